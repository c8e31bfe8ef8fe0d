"""Whatever a stranger's model makes transformers, torch or its own modeling code raise becomes one sentence."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from loramux.errors import LoramuxError, StartupError, UnsupportedModel
from loramux.ops.device import device_errors

log = logging.getLogger(__name__)
_LONGEST = 300  # characters of another library's message


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def summary(error: BaseException) -> str:
    """The error's type and text in one line, cut where it gets long."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs Python code of the folder's own (auto_map), which loramux never runs"
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def refusing(sentence: str, error_type: type[StartupError] = UnsupportedModel) -> Iterator[None]:
    """Raises `error_type` of `sentence` and a summary for every exception but those of loramux's own, which pass, and
    DeviceLost for what is no fault of the model's. The traceback goes to the log at debug level."""
    try:
        with device_errors():
            yield
    except LoramuxError:
        raise
    except Exception as error:
        log.debug("%s", sentence, exc_info=True)
        raise error_type(f"{sentence}: {summary(error)}") from error


def refuse_by_name(load: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates what loads a `source`, its first argument: every UnsupportedModel names the source, and an exception
    that nobody foresaw is one."""

    @functools.wraps(load)
    def loading(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        source: Any = arguments[0] if arguments else options["source"]
        name = source if isinstance(source, str) else source.name
        try:
            with refusing(f"{name}: this model cannot be loaded"):
                return load(*arguments, **options)
        except UnsupportedModel as error:
            if error.message.startswith(name):
                raise
            raise UnsupportedModel(f"{name}: {error.message}") from error

    return loading
