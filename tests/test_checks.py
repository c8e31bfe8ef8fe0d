"""What is wrong with the settings is said before a model is read, with the flag and the way out."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loramux.checks import check, reserved_ports
from loramux.config import Settings
from loramux.errors import StartupError
from loramux.values import StartAdapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root [bold]\x1b"
    (folder / "sql").mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "sql" / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    b = {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]}
    header = json.dumps({f"{key}A.weight": a, f"{key}B.weight": b}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(64)
    (folder / "sql" / "adapter_model.safetensors").write_bytes(content)
    return folder


def refused(sentence: str, ports_file: Path | None = None, **settings: Any) -> None:
    with pytest.raises(StartupError) as caught:
        check(Settings(**settings), ports_file)
    assert sentence in caught.value.message


def test_what_is_right_passes(root: Path, tmp_path: Path) -> None:
    check(Settings())
    (tmp_path / "a.yaml").write_text("adapters: []")
    check(
        Settings(
            adapter_dir=(root,),
            adapter=(StartAdapter("sql"), StartAdapter("other", "sql"), StartAdapter("absolute", str(root / "sql"))),
            adapters_file=tmp_path / "a.yaml",
            merge_dir=tmp_path,
            model="org/name",
        ),
        tmp_path / "ports.json",
    )
    check(Settings(adapter=(StartAdapter("a", "hub:org/name@" + "0" * 40),), adapter_hub=("org/*",)))


def test_folders_and_files(root: Path, tmp_path: Path) -> None:
    none, file = tmp_path / "none", tmp_path / "file"
    file.write_text("")
    broken = tmp_path / "broken.yaml"
    broken.write_text("adapters: &a []\nmore: *a\n")
    refused(f"--adapter-dir {none}: No such file", adapter_dir=(root, none))
    refused(f"--adapter-dir {file}: Not a directory", adapter_dir=(file,))
    refused("--adapter-dir", adapter_dir=(Path("x" * 5000),))
    refused("--adapter-dir: ", adapter_dir=(Path("x\0"),))
    refused(f"--merge-dir: cannot use the folder {none}: No such file", merge_dir=none)
    refused(f"--merge-dir: {file} is no folder", merge_dir=file)
    refused(f"--adapters-file: {none}: cannot be read: No such file", adapters_file=none)
    refused(f"--adapters-file: {broken}: is not YAML that is read here: line 2: ", adapters_file=broken)
    refused("--ports-file: cannot use the folder", tmp_path / "none" / "ports.json")
    refused("is a folder; name a file", tmp_path)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(f"--merge-dir: the folder {tmp_path} may not be written to", merge_dir=tmp_path)


def test_adapters(root: Path) -> None:
    for adapter, sentence in (
        (StartAdapter("sqk"), "--adapter sqk: source: there is no folder 'sqk'"),
        (StartAdapter("sql", "/etc"), "--adapter sql: '/etc' leads outside"),
        (StartAdapter("sql", "../x"), "leads outside"),
        (StartAdapter("sql", "hub:org/name@" + "0" * 40), "takes no adapters from a hub"),
    ):
        refused(sentence, adapter_dir=(root,), adapter=(adapter,))
    for source, sentence in (
        ("hub:org/name@main", "is not of the form hub:ORG/NAME@REVISION"),
        ("hub:other/name@" + "0" * 40, "is not among the hub repositories"),
    ):
        refused(sentence, adapter=(StartAdapter("sql", source),), adapter_hub=("org/*",))
    refused("--merged sqk: ", adapter_dir=(root,), merged=StartAdapter("sqk"))
    refused(
        "--adapter: sql is given twice", adapter_dir=(root,), adapter=(StartAdapter("sql"), StartAdapter("sql", "sql"))
    )
    refused("without --adapter-dir", adapter=(StartAdapter("sql"),))


def test_an_adapter_that_cannot_be_read_is_found_before_the_model_is(root: Path) -> None:
    weights, config = root / "sql" / "adapter_model.safetensors", root / "sql" / "adapter_config.json"
    content = weights.read_bytes()
    for damaged in (b"", content[:9], content[:-1], b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(damaged)
        refused("--adapter sql: adapter_model.safetensors", adapter_dir=(root,), adapter=(StartAdapter("sql"),))
    weights.unlink()
    refused("--adapter sql: ", adapter_dir=(root,), adapter=(StartAdapter("sql"),))
    weights.write_bytes(content)
    config.write_text("{")
    refused("--adapter sql: adapter_config.json", adapter_dir=(root,), adapter=(StartAdapter("sql"),))


def test_models(tmp_path: Path) -> None:
    refused("no such folder or file", model="smollm3")
    refused("no such folder or file", model=str(tmp_path / "none"))
    refused("there is no config.json", model=str(tmp_path))
    (tmp_path / "model.bin").write_text("")
    refused("a model is a Hugging Face folder or id", model=str(tmp_path / "model.bin"))
    refused("cannot look at", model="x" * 5000)
    refused("no such folder or file", model="x\0y")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_certificates(tmp_path: Path) -> None:
    def make(name: str) -> tuple[Path, Path]:
        cert, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=x"
        subprocess.run([*shlex.split(command), "-out", str(cert), "-keyout", str(key)], check=True, capture_output=True)
        return cert, key

    cert, key = make("one")
    _, other = make("two")
    secret = tmp_path / "secret.key"
    command = ["openssl", "pkey", "-in", str(key), "-out", str(secret), "-aes256", "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(cert.read_text()[:200])
    check(Settings(tls_cert=cert, tls_key=key))
    refused("is not the key of the certificate", tls_cert=cert, tls_key=other)
    refused("--tls-key: cannot read", tls_cert=cert, tls_key=tmp_path / "none")
    refused("--tls-cert: cannot read", tls_cert=tmp_path, tls_key=key)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(f"--tls-cert: cannot read {pipe}: it is not a regular file", tls_cert=pipe, tls_key=key)
    refused(f"--tls-key: cannot read {pipe}: it is not a regular file", tls_cert=cert, tls_key=pipe)
    refused("holds no private key in PEM form", tls_cert=cert, tls_key=cert)
    refused("holds no certificate in PEM form", tls_cert=key, tls_key=key)
    refused("is encrypted; give a key without a password", tls_cert=cert, tls_key=secret)
    refused("are no usable pair", tls_cert=damaged, tls_key=key)


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as server:
        yield server.getsockname()[1]


def free(**settings: Any) -> Settings:
    return Settings(**({"port": 0, "admin_port": 0, "metrics_port": 0} | settings))


@pytest.mark.parametrize("flag", ["port", "admin_port", "metrics_port"])
def test_a_port_that_is_taken(flag: str) -> None:
    """It was found out after the model had been loaded."""
    with listening() as port, pytest.raises(StartupError) as caught, reserved_ports(free(**{flag: port})):
        pass
    assert f"--{flag.replace('_', '-')}: cannot listen on 127.0.0.1:{port}: it is taken" in caught.value.message


def test_reserved_ports_are_nobody_elses_and_refuse_clients_until_they_are_served() -> None:
    with listening() as port:
        pass
    with reserved_ports(free(port=port)):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        with pytest.raises(StartupError, match="it is taken"), reserved_ports(free(admin_port=port)):
            pass
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_on_which_old_connections_time_out_is_free() -> None:
    with listening() as port, socket.create_connection(("127.0.0.1", port)):
        pass
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()  # who closes first waits
    client.close()
    server.close()
    with reserved_ports(free(port=port)):
        pass


def test_hosts_and_sockets(tmp_path: Path) -> None:
    with listening() as port:  # free from here on, whatever else runs on the machine
        pass
    for settings, sentence in (
        ({"host": "no-such-host.invalid"}, "--host: no-such-host.invalid is no address"),
        ({"host": "192.0.2.1"}, "--host: 192.0.2.1 is not an address of this machine"),
        ({"metrics_host": "192.0.2.1", "metrics_port": 1}, "--metrics-host: 192.0.2.1 is not an address"),
        ({"host": f"unix:{tmp_path}/none/x.sock"}, "--host: cannot use the folder"),
        ({"host": f"unix:{tmp_path}/{'x' * 200}"}, "is longer than a socket's may be"),
        ({"host": f"unix:{tmp_path}"}, "is no socket"),
        ({"host": f"unix:{tmp_path}/x", "admin_host": f"unix:{tmp_path}/x"}, "--admin-port: --port is at"),
        ({"port": port, "metrics_port": port}, f"--metrics-port: --port is at {port}, too"),
    ):
        with pytest.raises(StartupError) as caught, reserved_ports(free(**settings)):
            pass
        assert sentence in caught.value.message
    for host in ("127.0.0.1", "localhost", "0.0.0.0", f"unix:{tmp_path}/x.sock"):
        with reserved_ports(free(host=host)):
            pass


def test_a_socket_at_which_a_server_listens(tmp_path: Path) -> None:
    """gRPC takes its place away."""
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(StartupError, match=r"listens on .* already"), reserved_ports(free(host=f"unix:{path}")):
            pass
    with reserved_ports(free(host=f"unix:{path}")):  # left over
        pass
