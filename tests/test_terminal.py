"""Nothing from a file, a name or a peer reaches a terminal as markup or as a command."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from loramux import cli
from loramux.answers import Adapter
from loramux.config import Settings
from loramux.demo import Answer, Case, _table
from loramux.errors import InvalidRequest, LoramuxError, StartupError, Unauthenticated, WrongScope
from loramux.merge_report import LayerError, MergeReport
from loramux.rpc.server import Addresses
from loramux.tables import adapters_table, merge_table, startup_table
from loramux.terminal import Terminal, generated, sentence
from rich.console import Console
from rich.table import Table

# Closes what was not opened, sets a title, clears the screen, turns the direction, begins a line of its own.
HOSTILE = "[/bold]a[link=http://x]:smile:\x1b]0;pwned\x07\x1b[2J\u202e\x9b2J\x85b\nfake: all is well\r"
COMMANDS = ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\x9b", "\x85", "\r")


def shown_by(print_to: Any, console: Console | None = None) -> str:
    screen = StringIO()
    print_to(console or Terminal(file=screen, force_terminal=True, width=400))
    return screen.getvalue()


def check(text: str) -> None:
    assert not [command for command in COMMANDS if command in text]
    assert "[/bold]a[link=http://x]:smile:" in text.replace("\n", "")


def adapter(text: str) -> Adapter:
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Adapter):
        kind = str(field.type)
        fields[field.name] = (
            (text,) if "tuple" in kind else text if "str" in kind else datetime.now(UTC) if "datetime" in kind else 0
        )
    return Adapter(**fields)


def test_a_console_shows_what_it_is_given_as_it_is() -> None:
    check(shown_by(lambda console: console.print(HOSTILE, soft_wrap=True)))
    check(shown_by(lambda console: console.print(f"x {HOSTILE}", style="red", soft_wrap=True)))
    table = Table("a", title=HOSTILE)
    table.add_row(HOSTILE)
    check(shown_by(lambda console: console.print(table)))


@pytest.mark.parametrize("plain", [False, True])
def test_tables_of_names_from_files(plain: bool) -> None:
    def screen() -> tuple[StringIO, Console]:
        file = StringIO()
        kept = Console(file=file, width=400) if plain else Terminal(file=file, force_terminal=True, width=400)
        return file, kept

    model = SimpleNamespace(
        facts=SimpleNamespace(
            name=HOSTILE, architecture=HOSTILE, parameters=1, device="cpu", dtype="bf16", backend="x",
            quantized_parameters=1, bits_per_weight=4.1, nf4_bytes=1, dense_bytes=1, max_context=1,
        ),
        num_kv_blocks=1, block_size=1, kv_bytes_per_token=1,
    )  # fmt: skip
    application: Any = SimpleNamespace(
        settings=Settings(adapter_dir=(HOSTILE,)),  # type: ignore[arg-type]
        loaded=SimpleNamespace(model=model),
        adapters=SimpleNamespace(list=list),
    )
    report = MergeReport("m", (), "bf16", 1, (LayerError(HOSTILE, 0.1, 1.0, 2.0),), ())
    tables = (
        adapters_table([adapter(HOSTILE)]),
        startup_table(application, Addresses(HOSTILE, HOSTILE, HOSTILE)),
        merge_table(report),
        _table([Answer(Case(HOSTILE, "p"), f"x{HOSTILE}", 1, 0.1, 0.2)]),
    )
    for table in tables:
        file, console = screen()
        console.print(table)
        assert not [command for command in COMMANDS if command in file.getvalue()]
        assert "[/bold]" in file.getvalue()


@contextmanager
def client(answer: Any) -> Iterator[Any]:
    yield answer


class Out(io.TextIOWrapper):
    """Standard output, a terminal or not."""

    def __init__(self, tty: bool, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined,no-any-return]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loramux", *words])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_adapters_list_and_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor named [/bold]x made the list a traceback."""
    found = adapter(HOSTILE)
    answer = SimpleNamespace(list=lambda: SimpleNamespace(adapters=[found]), get=lambda name: found)
    monkeypatch.setattr("loramux.client.AdminClient", lambda *args, **options: client(answer))
    for words in (["list"], ["show", "x"], ["list", "--json"]):
        screen = StringIO()
        monkeypatch.setattr(cli, "console", Terminal(file=screen, width=400))
        monkeypatch.setattr(sys, "stdout", out := Out(tty=True))
        assert run(monkeypatch, "adapters", *words) == 0
        printed = screen.getvalue() + out.text()
        assert not [command for command in COMMANDS if command in printed]
        if words != ["list"]:
            assert json.loads(printed)["name"] == HOSTILE
        else:
            assert "[/bold]" in printed


@pytest.mark.parametrize(
    "error",
    [StartupError(HOSTILE), InvalidRequest("x", HOSTILE), RuntimeError(HOSTILE), KeyError("[/x]"), OSError(2, HOSTILE)],
)
def test_errors_are_one_line_and_never_a_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> Any:
        raise error

    screen = StringIO()
    monkeypatch.setattr(cli, "errors", Terminal(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr("loramux.client.AdminClient", fails)
    assert run(monkeypatch, "adapters", "list") == 1
    printed = screen.getvalue()
    assert printed.count("\n") == 1
    assert "error: " in printed
    assert "Traceback" not in printed
    assert not [command for command in COMMANDS if command in printed]


@pytest.mark.parametrize("error", [Unauthenticated, WrongScope])
@pytest.mark.parametrize(
    ("scope", "options"), [("public", "--api-key or LORAMUX_API_KEY"), ("admin", "--admin-key or LORAMUX_ADMIN_KEY")]
)
def test_a_refused_token_names_the_options_that_give_it(
    error: type[LoramuxError], scope: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> Any:
        raise error("the port asks for a token", metadata={"scope": scope})

    monkeypatch.setattr(sys, "stderr", err := Out(tty=False))
    monkeypatch.setattr("loramux.client.AdminClient", fails)
    assert run(monkeypatch, "adapters", "list") == 1
    assert f"the port asks for a token ({options}) [{error.status}" in err.text()


@pytest.mark.parametrize(
    "words",
    [
        ["adapters", "list", HOSTILE],
        ["generate", "x", "--mix", HOSTILE],
        ["generate", "x", "--mix", ""],  # the base answered
        ["adapters", "merge", "a", "--output", "b", "--mix", ""],
        [HOSTILE],
    ],
)
def test_words_that_are_not_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    err = Out(tty=False)
    monkeypatch.setattr(sys, "stderr", err)
    assert run(monkeypatch, *words) == 2
    assert "Traceback" not in err.text()
    assert "\x1b" not in err.text()


@pytest.mark.parametrize("tty", [True, False])
def test_a_models_text_is_obeyed_by_no_terminal_and_whole_in_a_pipe(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n\tb\x1b[31m\u202e\x07 👩\u200d💻\u00a0ü"
    monkeypatch.setattr(sys, "stdout", out := Out(tty))
    answer = SimpleNamespace(stream=lambda **options: [SimpleNamespace(text=part) for part in text])
    monkeypatch.setattr("loramux.client.Client", lambda *args, **options: client(answer))
    assert run(monkeypatch, "generate", "x") == 0
    assert out.text() == ("a\n\tb\\x1b[31m\\u202e\\x07 👩\u200d💻\u00a0ü\n" if tty else text + "\n")


def test_a_terminal_that_lacks_a_letter_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Out(tty=True, encoding="ascii"))
    answer = SimpleNamespace(stream=lambda **options: [SimpleNamespace(text="ü")])
    monkeypatch.setattr("loramux.client.Client", lambda *args, **options: client(answer))
    assert run(monkeypatch, "generate", "x") == 0
    assert out.text() == "\\xfc\n"


def test_sentences_and_generated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sentence(" a\n  b\x1b ") == "a b\\x1b"
    monkeypatch.setattr(sys, "stdout", Out(tty=False))
    assert generated("\x1b") == "\x1b"
