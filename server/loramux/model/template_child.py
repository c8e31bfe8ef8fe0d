"""Renders chat templates that come with adapters: a process of its own, for what they may do. See model.renderer.

Reads frames from stdin and answers each on stdout. A frame is its length in 4 bytes, little endian, then JSON.
A template that takes too much time ends the process; so does the end of stdin.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

CPU_SECONDS = 2.0  # for one conversation; usual ones take milliseconds
_MEMORY_BYTES = 1 << 30  # of address space; without a template it is 200 MB
_TRIAL = [{"role": "user", "content": "Hello"}]


def main() -> None:
    """Serve until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    write_frame(sys.stdout.buffer, {})
    while (request := read_frame(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sys.stdout.buffer, answer)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    trial = request["messages"] is None
    try:
        rendered: Any = render_jinja_template(  # the texts, and what else it is declared not to return
            conversations=[_TRIAL if trial else request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["special_tokens"],
        )
        return {"text": "" if trial else rendered[0][0]}
    except TemplateSyntaxError as error:
        return {"error": f"is no template: {error.message} in line {error.lineno}"}
    except MemoryError:
        return {"error": "takes too much memory"}
    except Exception as error:  # a template may raise anything, and its own trial is no conversation it was made for
        return {"text": ""} if trial else {"error": str(error)[:1000] or type(error).__name__}


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None at the end."""
    length = stream.read(4)
    if len(length) < 4:
        return None
    frame: dict[str, Any] = json.loads(stream.read(int.from_bytes(length, "little")))
    return frame


def write_frame(stream: BinaryIO, frame: dict[str, Any]) -> None:
    """Write and flush."""
    content = json.dumps(frame).encode()
    stream.write(len(content).to_bytes(4, "little") + content)
    stream.flush()


if __name__ == "__main__":
    main()
