"""What can be told of the settings before anything is loaded: seconds after the start, not when a model is in memory.

Of files nothing is read but what is small: configs, headers, certificates. Imports no torch.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loramux.cache import cache_root
from loramux.config import Settings
from loramux.errors import LoramuxError, StartupError
from loramux.files import read_file
from loramux.lora.hub import PREFIX as HUB
from loramux.lora.hub import Hub
from loramux.lora.limits import ReadLimits
from loramux.lora.manifest import read_manifest
from loramux.lora.roots import AdapterRoots
from loramux.lora.snapshot import measure
from loramux.model.place import local_place

_LONGEST_SOCKET_PATH = 107


def check(settings: Settings, ports_file: Path | None = None) -> None:
    """Raises StartupError, naming the flag, for what would fail later: files, folders, adapters, certificates."""
    local_place(settings.model)
    if settings.merge_dir is not None:
        _check_folder(settings.merge_dir, "--merge-dir")
    if ports_file is not None:
        if ports_file.is_dir():
            raise StartupError(f"--ports-file: {ports_file} is a folder; name a file")
        _check_folder(ports_file.parent, "--ports-file")
    if settings.tls_cert is not None and settings.tls_key is not None:
        _check_certificate(settings.tls_cert, settings.tls_key)
    _check_adapters(settings)


def _check_folder(folder: Path, flag: str) -> None:
    """It is there, and may be written to."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise StartupError(f"{flag}: {folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StartupError(f"{flag}: the folder {folder} may not be written to by this user")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartupError(
            f"{flag}: cannot use the folder {folder}: {reason}; make it first, or name another"
        ) from None


def _check_adapters(settings: Settings) -> None:
    flag = "--adapter" if settings.merged is None else "--merged"
    names: set[str] = set()
    try:
        roots, hub = adapter_roots(settings)
        roots.check()
    except ValueError as error:
        raise StartupError(f"--adapter-dir: {error}") from None
    for adapter in settings.start_adapters:
        if adapter.name in names:
            raise StartupError(f"{flag}: {adapter.name} is given twice; give it once")
        names.add(adapter.name)
        source = adapter.source or adapter.name
        try:
            if hub is not None and source.startswith(HUB):
                hub.place(source)
            else:
                measure(roots.resolve(source), 2, ReadLimits())
        except LoramuxError as error:
            raise StartupError(f"{flag} {adapter.name}: {error.message}") from error
    if settings.adapters_file is not None and settings.merged is None:
        try:
            read_manifest(settings.adapters_file)
        except LoramuxError as error:
            raise StartupError(error.message) from error


def adapter_roots(settings: Settings) -> tuple[AdapterRoots, Hub | None]:
    """Where adapters may come from, and the hub among it, if there is one."""
    hub = Hub(settings.adapter_hub, cache_root() / "hub", ReadLimits()) if settings.adapter_hub else None
    return AdapterRoots(settings.adapter_dir, hub), hub


def _check_certificate(certificate: Path, key: Path) -> None:
    """Both can be read, are PEM, and belong together; the key needs no password, since gRPC has none to give."""
    for file, flag, holds in (
        (certificate, "--tls-cert", b" CERTIFICATE-----"),
        (key, "--tls-key", b"PRIVATE KEY-----"),
    ):
        try:
            content = read_file(file)
        except OSError as error:
            raise StartupError(f"{flag}: cannot read {file}: {error.strerror}") from None
        if holds not in content:
            what = "certificate" if flag == "--tls-cert" else "private key"
            raise StartupError(f"{flag}: {file} holds no {what} in PEM form (-----BEGIN …)")
    asked: list[bool] = []

    def ask() -> bytes:
        asked.append(True)
        return b""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=ask)
    except (ssl.SSLError, OSError, ValueError) as error:
        if asked:
            raise StartupError(
                f"--tls-key: {key} is encrypted; give a key without a password (openssl pkey -in … -out …)"
            ) from None
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise StartupError(f"--tls-key: {key} is not the key of the certificate in {certificate}") from None
        raise StartupError(f"--tls-cert: {certificate} and {key} are no usable pair: {error}") from None


@contextmanager
def reserved_ports(settings: Settings) -> Iterator[None]:
    """Holds the ports that will be served, so that nothing else takes them while a model is loaded.

    They are bound and do not listen: who connects is refused at once, as if nothing ran. Released at the end, just
    before they are served. Raises StartupError, naming the flag, for one that cannot be had.
    """
    wanted = [
        ("--host", settings.host, "--port", settings.port),
        ("--admin-host", settings.admin_host, "--admin-port", settings.admin_port),
    ]
    if settings.metrics_port:
        wanted.append(("--metrics-host", settings.metrics_host, "--metrics-port", settings.metrics_port))
    with ExitStack() as held:
        taken: dict[object, str] = {}
        for host_flag, host, flag, port in wanted:
            place = host if host.startswith("unix:") else port
            if place != 0 and place in taken and (host == settings.host or place == host):
                raise StartupError(f"{flag}: {taken[place]} is at {place}, too; give them different places")
            taken.setdefault(place, flag)
            if host.startswith("unix:"):
                _check_socket(Path(host.removeprefix("unix:")), host_flag)
            else:
                for bound in _bound(host, port, host_flag, flag):
                    held.enter_context(bound)
        yield


def _bound(host: str, port: int, host_flag: str, flag: str) -> list[socket.socket]:
    """Sockets bound to every address that `host` stands for. Raises StartupError."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartupError(f"{host_flag}: {host} is no address and no name of one: {error}") from None
    bound: list[socket.socket] = []
    failed: OSError | None = None
    with ExitStack() as undo:
        for family, kind, protocol, _, address in addresses:
            try:
                bound.append(undo.enter_context(_bind(family, kind, protocol, address)))
            except OSError as error:
                failed = error
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    break
        if failed is not None and (not bound or failed.errno in (errno.EADDRINUSE, errno.EACCES)):
            if failed.errno == errno.EADDRNOTAVAIL:
                raise StartupError(f"{host_flag}: {host} is not an address of this machine")
            reason = "it is taken" if failed.errno == errno.EADDRINUSE else str(failed.strerror)
            shown = f"[{host.strip('[]')}]" if ":" in host else host
            free = "0 to serve none" if flag == "--metrics-port" else "0 for a free one"
            raise StartupError(f"{flag}: cannot listen on {shown}:{port}: {reason}; choose another port, or {free}")
        undo.pop_all()
    return bound


def _bind(family: int, kind: int, protocol: int, address: object) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        try:
            made.bind(address)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Only connections of an earlier server that time out there? Then gRPC gets it, too.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)  # type: ignore[arg-type]
    except BaseException:
        made.close()
        raise
    return made


def _check_socket(path: Path, flag: str) -> None:
    """gRPC would take a socket's place from a server that listens there."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise StartupError(f"{flag}: the path {path} is longer than a socket's may be ({_LONGEST_SOCKET_PATH} bytes)")
    _check_folder(path.parent, flag)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise StartupError(f"{flag}: {path} is there and is no socket; remove it, or name another")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left over from a server that is gone
        except OSError as error:
            raise StartupError(f"{flag}: cannot use the socket {path}: {error.strerror or error}") from None
    raise StartupError(f"{flag}: a server listens on {path} already; stop it, or name another")
