"""Frozen settings of the server: flags over environment over file over defaults.

`Settings` declares every setting once, with its default, its kind and its help sentence; the command line
builds its flags and help texts from `options()`. A setting `max_queue` is the flag `--max-queue`, the
variable `LORAMUX_MAX_QUEUE` and the key `max_queue` of the TOML file. This module knows nothing of models,
gRPC or threads: it turns what was given into checked values, and a bad one into a StartupError that names the
setting, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from loramux import values
from loramux.errors import StartupError
from loramux.files import read_file
from loramux.values import Memory, StartAdapter, choice, integer, many, seconds, text

ENV_PREFIX = "LORAMUX_"
# Read elsewhere: by this module, by the caches, by the native operations, by commands that are clients, by tests.
OTHER_VARIABLES = tuple(
    ENV_PREFIX + name for name in ("CONFIG", "CACHE", "ISA", "THREADS", "TARGET", "ADMIN", "TEST_LEAK")
)
_SERVICE_VARIABLE = re.compile(
    r"LORAMUX_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def _is(kind: values.Kind, help: str) -> dict[str, Any]:
    return {"kind": kind, "help": help}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything `loramux serve` can be told. Construct directly (checked across fields) or with `load`."""

    # the base model
    model: str = field(
        default="smollm2",
        metadata=_is(text("MODEL"), "Base: a Hugging Face folder or hub id, a .gguf file, or the embedded smollm2."),
    )
    device: str = field(
        default="auto",
        metadata=_is(choice("auto", "cpu", "cuda"), "Where to compute; auto takes CUDA if present."),
    )
    dtype: str = field(
        default="auto",
        metadata=_is(
            choice("auto", "bf16", "fp16", "fp32"),
            "Type of activations and adapters; auto is bf16 where that is native.",
        ),
    )
    max_context: int = field(
        default=4096,
        metadata=_is(
            integer("TOKENS", 16, 1 << 20),
            "Most tokens of prompt and output together; never more than the model was made for.",
        ),
    )

    # ports
    host: str = field(
        default="127.0.0.1",
        metadata=_is(text("HOST"), "Address of the public port; 0.0.0.0 is every interface, unix:PATH a socket."),
    )
    port: int = field(default=50051, metadata=_is(integer("PORT", 0, 65535), "Public gRPC port; 0 takes a free one."))
    admin_host: str = field(
        default="127.0.0.1",
        metadata=_is(text("HOST"), "Address of the admin port; beyond this machine only with an admin key."),
    )
    admin_port: int = field(
        default=50052, metadata=_is(integer("PORT", 0, 65535), "Admin gRPC port; 0 takes a free one.")
    )
    metrics_host: str = field(
        default="127.0.0.1",
        metadata=_is(text("HOST"), "Address of /metrics and of the probes /healthz, /readyz, /livez."),
    )
    metrics_port: int = field(
        default=9400,
        metadata=_is(integer("PORT", 0, 65535), "Port of /metrics and of the probes; 0 serves neither."),
    )
    tls_cert: Path | None = field(
        default=None, metadata=_is(values.FILE, "PEM certificate chain; both gRPC ports then speak TLS.")
    )
    tls_key: Path | None = field(default=None, metadata=_is(values.FILE, "PEM private key of the certificate."))

    # keys
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata=_is(
            values.SECRET,
            "Bearer token of the public port. Flags show in `ps`: prefer the variable or a file.",
        ),
    )
    api_key_file: Path | None = field(default=None, metadata=_is(values.FILE, "File that holds the public token."))
    admin_key: str | None = field(
        default=None,
        repr=False,
        metadata=_is(
            values.SECRET,
            "Bearer token of the admin port. Flags show in `ps`: prefer the variable or a file.",
        ),
    )
    admin_key_file: Path | None = field(default=None, metadata=_is(values.FILE, "File that holds the admin token."))

    # adapters
    adapter_dir: tuple[Path, ...] = field(
        default=(),
        metadata=_is(many(values.FOLDER), "Root under which adapters lie; repeatable. None is read from elsewhere."),
    )
    adapter: tuple[StartAdapter, ...] = field(
        default=(), metadata=_is(many(values.START_ADAPTER), "Adapter to load at start; repeatable.")
    )
    adapter_hub: tuple[str, ...] = field(
        default=(),
        metadata=_is(
            many(text("ORG/NAME")),
            "Hub repository that operators may load adapters from, as hub:ORG/NAME@COMMIT; 'acme/*' is understood; "
            "repeatable. None is loaded from a hub otherwise.",
        ),
    )
    adapters_file: Path | None = field(
        default=None,
        metadata=_is(
            values.FILE,
            "YAML of adapters to have: name, source, digest, pin. Applied at start, on SIGHUP and when it changes.",
        ),
    )
    merged: StartAdapter | None = field(
        default=None,
        metadata=_is(
            values.START_ADAPTER,
            "Adapter to merge into the weights and serve alone, with no branch (docs/merge.md).",
        ),
    )
    merge_dir: Path | None = field(
        default=None,
        metadata=_is(values.FOLDER, "Root under which MergeAdapter may write new folders; without it, it may not."),
    )
    adapter_chat_templates: bool = field(
        default=False,
        metadata=_is(
            values.SWITCH,
            "Render messages for an adapter with the chat template in its folder, if it has one. Off: with the base's.",
        ),
    )
    adapter_memory: int = field(
        default=1 << 30, metadata=_is(values.MEMORY_SIZE, "Most memory of adapters on the device, e.g. 512MiB.")
    )
    adapter_host_memory: int = field(
        default=1 << 30,
        metadata=_is(
            values.MEMORY_SIZE_OR_NONE,
            "Most host memory of adapters that were put out of the device's; 0 keeps none. On a GPU copies of those "
            "that are on the device come on top.",
        ),
    )
    adapter_scan_interval: float = field(
        default=5.0,
        metadata=_is(
            seconds(0.0, 86400), "Seconds between looks for new, changed and removed adapters; 0 looks once, at start."
        ),
    )
    load_timeout: float = field(
        default=120.0, metadata=_is(seconds(0.1, 86400), "Most seconds that loading one adapter may take.")
    )

    # the engine
    kv_memory: Memory | None = field(
        default=None,
        metadata=_is(
            values.MEMORY,
            "Memory of the KV cache: a size, or a share of what is free, e.g. 40%. Unset: 10% on a CPU, 85% on a GPU "
            "of what adapters and the largest step leave.",
        ),
    )
    batch_invariant: bool = field(
        default=False,
        metadata=_is(
            values.SWITCH,
            "On a GPU, keep every answer the same to the last bit whatever else is in the batch, at some cost in "
            "speed. On a CPU in bf16 that is always so.",
        ),
    )
    max_batch_tokens: int = field(
        default=512,
        metadata=_is(integer("TOKENS", 1, 1 << 20), "Most tokens, prefill and decode together, in one step."),
    )
    max_batch_rows: int = field(
        default=64, metadata=_is(integer("SEQUENCES", 1, 4096), "Most sequences that run at the same time.")
    )
    step_target: float = field(
        default=0.1,
        metadata=_is(
            seconds(0.0, 60.0),
            "Seconds that a step should take while others decode: longer prompts are computed in smaller chunks, so "
            "that streams do not halt. 0 sets no bound.",
        ),
    )
    max_queue: int = field(
        default=1024,
        metadata=_is(integer("REQUESTS", 1, 1 << 20), "Most requests that wait; beyond, RESOURCE_EXHAUSTED."),
    )

    # limits of one request
    max_n: int = field(default=16, metadata=_is(integer("N", 1, 1024), "Most sequences (n) in one request."))
    max_stop_strings: int = field(default=16, metadata=_is(integer("N", 0, 1024), "Most stop strings in one request."))
    max_top_logprobs: int = field(default=20, metadata=_is(integer("N", 0, 1024), "Most top_logprobs in one request."))
    max_mix: int = field(default=8, metadata=_is(integer("N", 1, 256), "Most adapters in one request's mix."))
    max_chat_turns: int = field(
        default=1024, metadata=_is(integer("TURNS", 1, 1 << 16), "Most turns in one request's conversation.")
    )
    max_message_bytes: int = field(
        default=4 << 20,
        metadata=_is(
            values.SIZE,
            "Largest request message. Up to twice this is refused with a reason, beyond by gRPC itself.",
        ),
    )

    # time
    drain_timeout: float = field(
        default=30.0,
        metadata=_is(seconds(0, 86400), "Most seconds that running requests get when the server stops."),
    )
    send_timeout: float = field(
        default=30.0,
        metadata=_is(seconds(0.01, 86400), "Seconds after which a client that stops reading loses its stream."),
    )

    log_level: str = field(
        default="info",
        metadata=_is(choice("debug", "info", "warning", "error"), "How much is logged. Prompts never are."),
    )
    log_format: str = field(
        default="text",
        metadata=_is(choice("text", "json"), "Log lines as text, or as one JSON object each."),
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert and --tls-key go together: give both, or neither for plain text")
        if not is_local(self.admin_host) and self.admin_key is None:
            raise StartupError(
                f"--admin-host {self.admin_host} would let anyone on the network load and unload adapters: "
                "set an admin key (LORAMUX_ADMIN_KEY or --admin-key-file), or stay on 127.0.0.1"
            )
        if self.max_batch_tokens < self.max_batch_rows:
            raise StartupError(
                f"--max-batch-tokens ({self.max_batch_tokens}) must not be below --max-batch-rows "
                f"({self.max_batch_rows}): every running sequence takes a token of each step"
            )
        if self.merged is not None and self.adapter:
            raise StartupError("--merged serves one adapter and no other: leave --adapter away, or --merged")
        if self.port == self.admin_port != 0 and self.host == self.admin_host:
            raise StartupError(f"--port and --admin-port are both {self.port}: give them different numbers")

    @property
    def start_adapters(self) -> tuple[StartAdapter, ...]:
        """What to load at start."""
        return self.adapter if self.merged is None else (self.merged,)


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address: loopback, or a Unix socket."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as the command line shows it. `parse` is called by `load`; it raises ValueError."""

    name: str
    default: Any
    help: str
    metavar: str
    parse: Callable[[object], Any] = field(repr=False)

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def repeatable(self) -> bool:
        return isinstance(self.default, tuple)


def _option(setting: Field[Any]) -> Option:
    kind: values.Kind = setting.metadata["kind"]
    return Option(setting.name, setting.default, setting.metadata["help"], kind.metavar, kind.parse)


def options() -> dict[str, Option]:
    """Every setting by name, in the order of `Settings`."""
    return {setting.name: _option(setting) for setting in fields(Settings)}


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Settings:
    """Settings from flags (by name; None and empty lists are not given), environment and a TOML file.

    Without `file`, the variable LORAMUX_CONFIG may name one. Raises StartupError.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(ENV_PREFIX + "CONFIG"):
        file = Path(environ[ENV_PREFIX + "CONFIG"])
    settings: dict[str, Any] = {}
    if file is not None:
        _overlay(settings, _from_file(file), lambda option: f"{option.name} in {file}")
    _overlay(settings, _from_environment(environ), lambda option: option.variable)
    given = {name: value for name, value in (flags or {}).items() if value is not None and value not in ((), [])}
    _overlay(settings, given, lambda option: option.flag)
    return Settings(**settings)


def _overlay(settings: dict[str, Any], source: Mapping[str, object], where: Callable[[Option], str]) -> None:
    """Parse one source and put its values over those of the sources below it."""
    known = options()
    parsed: dict[str, Any] = {}
    for name, given in source.items():
        option = known[name]
        try:
            parsed[name] = option.parse(given)
        except ValueError as allowed:
            shown = "this token" if name in ("api_key", "admin_key") else repr(given)
            raise StartupError(f"{where(option)}: {shown} is not allowed; give {allowed}") from None
    for key in ("api_key", "admin_key"):
        file = key + "_file"
        if key in parsed and file in parsed:
            raise StartupError(f"{where(known[file])} and {where(known[key])} are both given: give one of the two")
        if file in parsed:
            parsed[key] = _read_secret(parsed[file], where(known[file]))
        elif key in parsed:
            settings.pop(file, None)  # a file named by a lower source is not where this key came from
    settings.update(parsed)


def _read_secret(file: Path, where: str) -> str:
    try:
        secret: str = values.SECRET.parse(read_file(file).decode("ascii", "replace"))
    except OSError as error:
        raise StartupError(f"{where}: cannot read {file}: {error.strerror}") from None
    except ValueError as allowed:
        raise StartupError(f"{where}: the content of {file} is not allowed; give {allowed}") from None
    return secret


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What is set, by setting. Raises StartupError for a variable of our prefix that nothing reads."""
    by_variable = {option.variable: name for name, option in options().items()}
    found = {}
    for variable, given in environ.items():
        if not given or not variable.startswith(ENV_PREFIX) or _from_kubernetes(variable, given):
            continue
        if variable in by_variable:
            found[by_variable[variable]] = given
        elif variable not in OTHER_VARIABLES:
            known = [name.removeprefix(ENV_PREFIX) for name in (*by_variable, *OTHER_VARIABLES)]
            close = difflib.get_close_matches(variable.removeprefix(ENV_PREFIX), known, n=1)
            hint = f"did you mean {ENV_PREFIX}{close[0]}?" if close else "`loramux serve --help` lists the settings"
            raise StartupError(f"{variable} is set, which is no setting; {hint}")
    return found


def _from_kubernetes(variable: str, given: str) -> bool:
    """Whether it is one of those that every pod has for a service named loramux or loramux-…: such as
    LORAMUX_PORT=tcp://10.0.0.7:50051, LORAMUX_SERVICE_HOST, LORAMUX_ADMIN_PORT_50052_TCP_ADDR."""
    return bool(_SERVICE_VARIABLE.fullmatch(variable)) or given.startswith(("tcp://", "udp://", "sctp://"))


def _from_file(file: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(read_file(file).decode("utf-8"))
    except OSError as error:
        raise StartupError(f"--config: cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"--config: {file} is not TOML: {error}") from None
    known = options()
    found = {key.replace("-", "_"): value for key, value in content.items()}
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise StartupError(f"--config: {file} sets {key}, which is no setting{hint}")
    return found
