"""The command line: serve, demo, plan, generate, adapters, merge, quantize. Turns words into calls and errors into
sentences.

Every command exits with 0, or with 1 after a failure that it has named in one sentence, or with 2 for words that it
does not take; `serve` with 70, too, when its device is lost. Heavy imports (torch) happen inside the commands that need
them, so that `--help` is quick, and so that generate and adapters work where only the client is installed.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from loramux import config, logs, values
from loramux.errors import LoramuxError, StartupError, Unauthenticated, WrongScope
from loramux.escaping import escape
from loramux.importing import heavy_imports
from loramux.terminal import Terminal, generated, sentence

app = typer.Typer(
    name="loramux",
    help="One NF4-quantized language model, many LoRA adapters, one gRPC server.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
adapters_app = typer.Typer(
    name="adapters",
    help="Load, unload and look at adapters of a running server (through its admin port).",
    no_args_is_help=True,
)
app.add_typer(adapters_app)
console = Terminal()
errors = Terminal(stderr=True)

log = logging.getLogger(__name__)
# How a token is given, by the scope of the port that refuses it.
_TOKENS = {"public": " (--api-key or LORAMUX_API_KEY)", "admin": " (--admin-key or LORAMUX_ADMIN_KEY)"}
_LOG_LEVEL = config.ENV_PREFIX + "LOG_LEVEL"

Target = Annotated[str, typer.Option("--target", envvar="LORAMUX_TARGET", help="Public address of the server.")]
Admin = Annotated[str, typer.Option("--admin", envvar="LORAMUX_ADMIN", help="Admin address of the server.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="LORAMUX_API_KEY", help="Token, if the server has one.")
]
AdminKey = Annotated[
    str | None, typer.Option("--admin-key", envvar="LORAMUX_ADMIN_KEY", help="Admin token, if the server has one.")
]
Mix = Annotated[
    str | None, typer.Option(help="Several adapters with weights, e.g. sql=0.7,json=0.3.", metavar="NAME=WEIGHT,...")
]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]


def main() -> None:
    """Runs a command and prints its error, if any, as one sentence. See __main__ for what signals do meanwhile."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):  # bars of libraries, beside ours or in a log
        os.environ.setdefault(variable, "1")
    try:
        app()
    except StartupError as error:
        _fail(error.message)
    except LoramuxError as error:
        request_id = error.metadata.get("request_id", "")
        # By it an operator finds the rest in the server's log.
        shown = f", request {request_id}" if request_id and error.status == "INTERNAL" else ""
        # What goes into the header is given in another way here.
        of_token = isinstance(error, Unauthenticated | WrongScope)
        given_by = _TOKENS.get(error.metadata.get("scope", ""), "") if of_token else ""
        _fail(f"{error.message}{given_by} [{error.status} {error.reason}{shown}]")
    except Exception as error:
        if os.environ.get(_LOG_LEVEL) == "debug" and not logging.root.handlers:
            logs.configure("debug")
        log.debug("unexpected", exc_info=True)
        hint = "" if log.isEnabledFor(logging.DEBUG) else f"; {_LOG_LEVEL}=debug shows where"
        _fail(f"unexpected {type(error).__name__}: {error}{hint}")


def _require_server() -> None:
    """Raises StartupError if a package of the extra `server` is not installed, as with `pip install loramux` alone."""
    try:
        requirements = metadata.requires("loramux") or ()
    except metadata.PackageNotFoundError:
        return  # run from its sources, beside packages that somebody chose
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        package = re.split(r"[^\w.-]", wanted, maxsplit=1)[0]
        if re.search(r"""extra == ['"]server['"]""", marker) and not any(metadata.distributions(name=package)):
            raise StartupError(
                f"this command needs the server, and {package} is not installed: pip install 'loramux[server]'"
            )


def _fail(message: str) -> NoReturn:
    if logs.in_json() and not errors.is_terminal:
        log.error(sentence(message))
    else:
        errors.print(Text.assemble(("error: ", "bold red"), sentence(message)), soft_wrap=True)
    raise SystemExit(1)


def _say(text: str) -> None:
    """One line on standard output, whatever stands in it."""
    console.print(escape(text), soft_wrap=True)


def _with_settings(command: Callable[..., None], names: Collection[str] | None = None) -> Callable[..., None]:
    """Give a command one flag for each setting of `config`, or those of `names`, with the help that stands there."""
    known = {name: option for name, option in config.options().items() if names is None or name in names}

    def run(**given: Any) -> None:
        flags = {name: given.pop(name) for name in known}
        own = {name: value for name, value in given.items() if name != "config_file"}
        command(config.load(flags, file=given["config_file"]), **own)

    parameters = [
        inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option("--config", help="TOML file of settings; flags and LORAMUX_* go over it.")
            ],
        )
    ]
    for option in known.values():
        shown = "" if option.default in (None, ()) else f" [dim]Default: {_shown(option.default)}.[/]"
        switch = isinstance(option.default, bool)  # a flag without a value
        declared = typer.Option(
            option.flag, help=option.help.replace("[", r"\[") + shown, metavar=None if switch else option.metavar
        )
        kind: Any = list[str] | None if option.repeatable else bool | None if switch else str | None
        parameters.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared]
            )
        )
    signature = inspect.signature(command, eval_str=True)
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _shown(default: object) -> str:
    if isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        return f"{default >> 20}MiB"
    return str(default)


@app.command()
@_with_settings
def serve(
    settings: config.Settings,
    ports_file: Annotated[
        Path | None, typer.Option(help="Write the addresses and the process id to this file, as JSON, once serving.")
    ] = None,
) -> None:
    """Serve a base model and its adapters over gRPC until SIGTERM or Ctrl-C.

    Examples:

      loramux serve --adapter-dir adapters --adapter json --adapter sql

      loramux serve --model ./Llama-3-8B --device cuda --adapter-memory 4GiB --host 0.0.0.0

    Every flag can be given as LORAMUX_… in the environment (commas between several values) or in the --config file.
    """
    _require_server()
    from loramux.serve import run

    logs.configure(settings.log_level, settings.log_format)
    run(settings, errors, ports_file)


@app.command()
def demo(
    adapter_dir: Annotated[Path, typer.Option(help="Folder of adapters, each with an examples.json.")] = Path(
        "adapters"
    ),
    model: Annotated[str, typer.Option(help="Base model, as for `serve`.")] = "smollm2",
) -> None:
    """Start a real server on loopback, send it one mixed batch over gRPC, print what came back, stop it.

    The batch holds prompts for the base and for every adapter in the folder, all at the same time.
    """
    _require_server()
    from loramux.demo import run

    run(model, adapter_dir, console, errors)


_PLANNED = (
    "dtype",
    "max_context",
    "batch_invariant",
    "adapter_memory",
    "kv_memory",
    "max_batch_tokens",
    "max_batch_rows",
)


@app.command()
@partial(_with_settings, names=_PLANNED)
def plan(
    settings: config.Settings,
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A model's folder or config.json, or smollm2.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of the GPU, e.g. 24GiB.", metavar="SIZE")],
    rank: Annotated[str, typer.Option(help="Rank of the adapters to count, on all linear layers.")] = "16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what fits on a GPU, before there is one: weights, KV cache, adapters. Needs no GPU and reads no weights.

    The server plans its memory by the same code, once it has loaded. Exits with 1 if the model does not fit.

    Example: loramux plan ./Llama-3-8B/config.json --gpu-memory 24GiB --max-context 8192
    """
    size = _parsed(values.MEMORY_SIZE, "--gpu-memory", gpu_memory)
    of_rank = _parsed(values.integer("RANK", 1, 4096), "--rank", rank)
    _require_server()
    from loramux.plan import plan
    from loramux.tables import plan_table

    planned = plan(source, settings, size, of_rank)
    if as_json:
        print(json.dumps(asdict(planned)))
    else:
        console.print(plan_table(planned))
    if planned.problem is not None:
        raise StartupError(planned.problem)


def _parsed(kind: values.Kind, flag: str, given: str) -> Any:
    try:
        return kind.parse(given)
    except ValueError as allowed:
        raise StartupError(f"{flag}: {given!r} is not allowed; give {allowed}") from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to send; - reads it from standard input.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Adapter's name; empty is the base model.")] = "",
    mix: Mix = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    stats: Annotated[bool, typer.Option(help="Print tokens and timings to standard error.")] = False,
    target: Target = "127.0.0.1:50051",
    api_key: ApiKey = None,
) -> None:
    """Generate text from a running server; it appears as it is made.

    Examples:

      loramux generate "What is the capital of France?"

      loramux generate --adapter date "Write this date in ISO 8601: the 3rd of March, 2021"
    """
    from loramux.answers import Finished
    from loramux.client import Client

    text = sys.stdin.read() if prompt == "-" else prompt
    given: dict[str, Any] = {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}
    given |= {"mix": _mix(mix)} if mix is not None else {}
    given |= {"seed": seed} if seed is not None else {}
    started = time.monotonic()
    with Client(target, api_key=api_key) as client:
        stream = client.stream(
            **given,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop or (),
        )
        last = None
        for event in stream:
            sys.stdout.write(generated(event.text))
            sys.stdout.flush()
            last = event
    sys.stdout.write("\n")
    if stats and isinstance(last, Finished):
        usage, timings = last.usage, last.timings
        errors.print(
            f"{usage.prompt_tokens} prompt + {usage.completion_tokens} output tokens in "
            f"{time.monotonic() - started:.2f} s; queue {timings.queue:.3f}, prefill {timings.prefill:.3f}, "
            f"decode {timings.decode:.3f} s",
            style="dim",
            soft_wrap=True,
        )


def _mix(text: str) -> dict[str, float]:
    """The weights by name. Raises typer.BadParameter, also for an empty text: nothing is ever meant by it."""
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, weight = item.partition("=")
        name = name.strip()
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise typer.BadParameter(f"{item!r}: write NAME=WEIGHT, e.g. sql=0.7,json=0.3", param_hint="--mix")
        if name in weights:
            raise typer.BadParameter(f"{name!r} appears twice; give it one weight", param_hint="--mix")
        weights[name] = number
    return weights


@app.command()
def merge(
    out: Annotated[Path, typer.Option(help="New folder for the dense model.")],
    name: Annotated[str, typer.Argument(help="The adapter's name: its folder under a root.")] = "",
    mix: Mix = None,
    dtype: Annotated[str, typer.Option(help="Type of the merged weights.", metavar="bf16|fp16|fp32")] = "bf16",
    model: Annotated[str, typer.Option(help="Base model, as for `serve`.")] = "smollm2",
    adapter_dir: Annotated[
        list[Path] | None, typer.Option(help="Root under which adapters lie; repeatable. Default: adapters.")
    ] = None,
) -> None:
    """Write base + adapter (or a mix) as a dense Hugging Face model; needs no server. See docs/merge.md.

    LoRA, QA-LoRA and DoRA; a DoRA adapter by itself, not in a mix.

    Examples:

      loramux merge sql --out ./smollm2-sql

      loramux merge --mix sql=0.7,json=0.3 --out ./smollm2-mix --dtype fp16
    """
    _require_server()
    from loramux.lora.ingredient import Ingredient
    from loramux.lora.roots import AdapterRoots
    from loramux.progress import bar
    from loramux.tables import merge_table

    if bool(name) == (mix is not None):
        raise typer.BadParameter("give an adapter's name or --mix, one of the two", param_hint="NAME")
    if dtype not in ("bf16", "fp16", "fp32"):
        raise typer.BadParameter(f"{dtype!r} is none of bf16, fp16 and fp32", param_hint="--dtype")
    weights = {name: 1.0} if mix is None else _mix(mix)
    roots = AdapterRoots(adapter_dir or [Path("adapters")])
    ingredients = [Ingredient(n, roots.resolve(n), weight) for n, weight in weights.items()]
    with heavy_imports():
        from loramux.merge import merge as write
    with bar(errors, f"Merging {', '.join(weights)} into {model}") as progress:
        report = write(model, ingredients, out, dtype=dtype, progress=progress)
    console.print(merge_table(report))
    _say(f"Wrote {out}: {report.bytes / 2**20:.1f} MiB. Serve it with: loramux serve --model {out}")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Hugging Face folder or hub id, .gguf file, or smollm2.")],
    out: Annotated[Path, typer.Argument(help="New folder for the NF4 checkpoint.")],
) -> None:
    """Write a model as an NF4 checkpoint (double quantization) that loramux and transformers + bitsandbytes load.

    Example: loramux quantize ./Llama-3-8B ./Llama-3-8B-nf4
    """
    _require_server()
    from loramux.progress import bar

    with heavy_imports():
        from loramux.quantize import quantize_to
    with bar(errors, f"Quantizing {source}") as progress:
        size = quantize_to(source, out, progress)
    _say(f"Wrote {out}: {size / 2**20:.1f} MiB. Serve it with: loramux serve --model {out}")


@adapters_app.command("list")
def adapters_list(
    admin: Admin = "127.0.0.1:50052",
    admin_key: AdminKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """All adapters with state, size, rank, targets and requests that hold them now."""
    from loramux.client import AdminClient
    from loramux.tables import adapters_table, as_dict

    with AdminClient(admin, api_key=admin_key) as client:
        found = client.list().adapters
    if as_json:
        for adapter in found:
            print(json.dumps(as_dict(adapter)))
    else:
        console.print(adapters_table(found))


@adapters_app.command("show")
def adapters_show(name: Name, admin: Admin = "127.0.0.1:50052", admin_key: AdminKey = None) -> None:
    """One adapter, everything known of it, as JSON."""
    from loramux.client import AdminClient
    from loramux.tables import as_dict

    with AdminClient(admin, api_key=admin_key) as client:
        # In ASCII, since what a terminal must not get is then written as JSON writes it.
        console.print_json(data=as_dict(client.get(name)), ensure_ascii=True)


@adapters_app.command("load")
def adapters_load(
    name: Name,
    source: Annotated[str, typer.Argument(help="Folder under the server's adapter roots; empty: named like it.")] = "",
    replace: Annotated[bool, typer.Option(help="Take the name over from other content.")] = False,
    pin: Annotated[bool, typer.Option(help="Never evict it.")] = False,
    validate_only: Annotated[bool, typer.Option(help="Only read and check the files.")] = False,
    admin: Admin = "127.0.0.1:50052",
    admin_key: AdminKey = None,
) -> None:
    """Load an adapter. Running requests never notice; with --replace they finish on the weights they began with."""
    from loramux.client import AdminClient

    with AdminClient(admin, api_key=admin_key) as client:
        adapter = client.load(name, source, replace=replace, pin=pin, validate_only=validate_only)
    verb = "is fit to load:" if validate_only else "is loaded as"
    _say(
        f"{name} {verb} {adapter.uid or adapter.digest}: {adapter.sites} layers, rank ≤ {adapter.max_rank}, "
        f"{adapter.device_bytes / 2**20:.2f} MiB, read in {adapter.load_seconds * 1e3:.0f} ms"
    )
    for warning in adapter.warnings:
        _say(f"warning: {warning}")


@adapters_app.command("unload")
def adapters_unload(
    name: Name,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds that running requests may take.")] = None,
    cancel: Annotated[bool, typer.Option(help="After the timeout, cancel what still runs.")] = False,
    admin: Admin = "127.0.0.1:50052",
    admin_key: AdminKey = None,
) -> None:
    """Unload an adapter: no new requests from now on, running ones finish, then its memory is freed."""
    from loramux.client import AdminClient

    with AdminClient(admin, api_key=admin_key) as client:
        unloaded = client.unload(name, drain_timeout=drain_timeout, cancel_after_timeout=cancel)
    _say(
        f"{name} unloaded: {unloaded.freed_bytes / 2**20:.2f} MiB freed, "
        f"{unloaded.cancelled_requests} requests cancelled"
    )


@adapters_app.command("merge")
def adapters_merge(
    output: Annotated[str, typer.Option(help="New folder under the server's --merge-dir.")],
    name: Annotated[str, typer.Argument(help="The adapter's name.")] = "",
    mix: Mix = None,
    dtype: Annotated[str, typer.Option(help="Type of the merged weights.", metavar="bf16|fp16|fp32")] = "bf16",
    admin: Admin = "127.0.0.1:50052",
    admin_key: AdminKey = None,
) -> None:
    """Write base + a loaded adapter (or a mix) as a dense model, on the server's disk, while it serves."""
    from loramux.answers import Merged
    from loramux.client import AdminClient
    from loramux.progress import bar

    with AdminClient(admin, api_key=admin_key) as client, bar(errors, f"Merging {name or mix}") as progress:
        for step in client.merge(name, output=output, dtype=dtype, mix=None if mix is None else _mix(mix)):
            if not isinstance(step, Merged):
                progress(step.done, step.total)
                continue
            _say(
                f"Wrote {step.output} on the server: {step.bytes / 2**20:.1f} MiB. Over {step.layers} layers, the "
                f"rounding to {dtype} is {step.overall_error:.2%} of the adapter's change, at most "
                f"{step.worst_error:.2%} ({step.worst_layer})"
            )


@adapters_app.command("pin")
def adapters_pin(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Unpin instead.")] = False,
    admin: Admin = "127.0.0.1:50052",
    admin_key: AdminKey = None,
) -> None:
    """Pin an adapter, so that it is never evicted."""
    from loramux.client import AdminClient

    with AdminClient(admin, api_key=admin_key) as client:
        client.pin(name, not off)
    _say(f"{name} {'unpinned' if off else 'pinned'}")
