"""Renders the chat templates of adapters, in a child process that is bounded in time and memory.

A template is a program. Jinja's sandbox keeps it from the system, not from loops without an end or strings of
gigabytes, so it runs where neither takes anything from others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from loramux.errors import InvalidAdapter, InvalidRequest

_COMMAND = (sys.executable, "-m", "loramux.model.template_child")
_SECONDS = 60.0  # that an answer may take on a machine that is busy; the child counts its own time
_MAX_TEXT = 16 << 20  # bytes of an answer


class TemplateRenderer:
    """One child, started when it is first needed and again when a template ended it. Thread-safe; conversations wait in
    line."""

    def __init__(self, special_tokens: Mapping[str, str], command: Sequence[str] = _COMMAND) -> None:
        """special_tokens: names and texts that templates may use, e.g. bos_token."""
        self._special_tokens = dict(special_tokens)
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, template: str) -> None:
        """Raises InvalidAdapter if it is no template, or takes too long for one short turn."""
        answer = self._ask(template, None)
        if "error" in answer:
            raise InvalidAdapter("chat_template", _sentence(answer["error"]), reason="INVALID_CHAT_TEMPLATE")

    def render(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the assistant's answer begins. Raises InvalidRequest if the template refuses it
        or takes too long."""
        answer = self._ask(template, messages)
        if "error" in answer:
            raise InvalidRequest("chat.messages", f"the adapter's chat template refuses them: {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, template: str, messages: Sequence[Mapping[str, str]] | None) -> dict[str, str]:
        request = {"template": template, "messages": messages, "special_tokens": self._special_tokens}
        with self._lock:
            try:
                child = self._started()
                content = json.dumps(request).encode()
                assert child.stdin is not None
                child.stdin.write(len(content).to_bytes(4, "little") + content)
                child.stdin.flush()
                return _answer(child)
            except (OSError, EOFError):
                self._end()
                return {"error": "takes too long, or too much memory"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(  # noqa: S603
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            weakref.finalize(self, _stop, self._child)
            _answer(self._child)  # it is ready
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            _stop(self._child)
            self._child = None


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    child.wait()


def _answer(child: subprocess.Popen[bytes]) -> dict[str, str]:
    """The child's next frame. Raises EOFError if it ended, TimeoutError if it does not answer."""
    assert child.stdout is not None
    end = time.monotonic() + _SECONDS
    length = int.from_bytes(_read(child.stdout.fileno(), 4, end), "little")
    if length > _MAX_TEXT:
        raise EOFError
    answer: dict[str, str] = json.loads(_read(child.stdout.fileno(), length, end))
    return answer


def _read(descriptor: int, count: int, end: float) -> bytes:
    read = bytearray()
    while len(read) < count:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(descriptor, count - len(read))
        if not piece:
            raise EOFError
        read += piece
    return bytes(read)


def _sentence(error: str) -> str:
    return (
        f"of the adapter's folder {error}; mend it, take it out of the folder, or serve without "
        "--adapter-chat-templates"
    )
