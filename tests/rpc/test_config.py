"""Settings: which source wins, what is refused, and with which sentence."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from loramux.config import Settings, load, options
from loramux.errors import StartupError
from loramux.values import Memory, StartAdapter


def test_defaults_need_nothing() -> None:
    assert load(environ={}) == Settings()


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text('max_n = 1\nmax-queue = 10\nport = 1000\nmodel = "from file"\n')
    environ = {"LORAMUX_MAX_QUEUE": "20", "LORAMUX_PORT": "2000", "LORAMUX_CONFIG": str(file)}
    settings = load({"port": 3000, "model": None}, environ=environ)
    assert (settings.max_n, settings.max_queue, settings.port, settings.model) == (1, 20, 3000, "from file")
    other = tmp_path / "other.toml"
    other.write_text("max_n = 2")
    assert load(environ=environ, file=other).max_n == 2


def test_every_kind_of_value() -> None:
    settings = load(
        {
            "adapter_dir": ["/a", "/b"],
            "adapter": ["one", "two=/b/two"],
            "adapter_memory": "512MiB",
            "kv_memory": "40%",
            "drain_timeout": "1.5",
        },
        environ={"LORAMUX_MAX_MESSAGE_BYTES": "1.5 MB", "LORAMUX_API_KEY": "sesame-sesame"},
    )
    assert settings.adapter_dir == (Path("/a"), Path("/b"))
    assert settings.adapter == (StartAdapter("one"), StartAdapter("two", "/b/two"))
    assert settings.adapter_memory == 512 * 1024**2
    assert settings.kv_memory == Memory(fraction=0.4)
    assert Memory(fraction=0.4).resolve(1000) == 400
    assert Memory(bytes=7).resolve(1000) == 7
    assert settings.drain_timeout == 1.5
    assert settings.max_message_bytes == 1_500_000
    small = load({"adapter_host_memory": "0", "adapter_memory": "900KB", "max_message_bytes": "65536"}, environ={})
    assert (small.adapter_host_memory, small.adapter_memory, small.max_message_bytes) == (0, 900_000, 65536)
    assert load({"kv_memory": "1048576"}, environ={}).kv_memory == Memory(bytes=1 << 20)
    assert load({"batch_invariant": True}, environ={}).batch_invariant
    assert load(environ={"LORAMUX_BATCH_INVARIANT": "on"}).batch_invariant
    assert not load({"batch_invariant": "no"}, environ={"LORAMUX_BATCH_INVARIANT": "1"}).batch_invariant
    assert load(environ={"LORAMUX_ADAPTER": "a, b=/x,"}).adapter == (StartAdapter("a"), StartAdapter("b", "/x"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": 70000}, "--port: 70000 is not allowed; give a whole number from 0 to 65535"),
        ({"port": "http"}, "--port: 'http' is not allowed; give a whole number from 0 to 65535"),
        ({"port": True}, "--port: True is not allowed"),
        ({"device": "tpu"}, "--device: 'tpu' is not allowed; give one of auto, cpu, cuda"),
        ({"batch_invariant": "perhaps"}, "--batch-invariant: 'perhaps' is not allowed; give on or off"),
        ({"adapter_memory": "lots"}, "--adapter-memory: 'lots' is not allowed; give a size such as 512MiB"),
        ({"adapter_memory": "0"}, "--adapter-memory: '0' is not allowed"),
        ({"kv_memory": "200%"}, "--kv-memory: '200%' is not allowed; give a share of the free memory from 1%"),
        (
            {"kv_memory": "lots"},
            "give a size such as 512MiB, 1.5GB or a number of bytes, at least 1; or a share of",
        ),
        ({"kv_memory": 24}, "--kv-memory: 24 is not allowed; give it a unit, such as 24GiB: 24 alone is a number of"),
        ({"adapter_memory": "4"}, "--adapter-memory: '4' is not allowed; give it a unit, such as 4GiB"),
        ({"adapter_host_memory": "1000000"}, "--adapter-host-memory: '1000000' is not allowed; give it a unit"),
        ({"step_target": -0.1}, "--step-target: -0.1 is not allowed; give a number of seconds from 0 to 60"),
        ({"send_timeout": "nan"}, "--send-timeout: 'nan' is not allowed; give a number of seconds"),
        ({"adapter": ["../x"]}, "--adapter: ['../x'] is not allowed; give NAME or NAME=FOLDER"),
        ({"model": " "}, "--model: ' ' is not allowed; give a text that is not empty"),
        ({"tls_cert": "/x.pem"}, "--tls-cert and --tls-key go together"),
        ({"port": 5, "admin_port": 5}, "--port and --admin-port are both 5"),
        ({"max_batch_tokens": 8, "max_batch_rows": 9}, "--max-batch-tokens (8) must not be below --max-batch-rows (9)"),
    ],
)
def test_a_bad_flag_is_named_with_what_is_allowed(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(StartupError) as caught:
        load(flags, environ={})
    assert sentence in caught.value.message


def test_a_bad_value_is_named_after_its_source(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="LORAMUX_PORT: 'x' is not allowed"):
        load(environ={"LORAMUX_PORT": "x"})
    file = tmp_path / "l.toml"
    file.write_text('port = "x"')
    with pytest.raises(StartupError, match=r"port in .*l\.toml: 'x' is not allowed"):
        load(environ={}, file=file)
    file.write_text("prot = 1")
    with pytest.raises(StartupError, match="sets prot, which is no setting; did you mean port"):
        load(environ={}, file=file)
    file.write_text("port = ")
    with pytest.raises(StartupError, match="is not TOML"):
        load(environ={}, file=file)
    with pytest.raises(StartupError, match=r"cannot read .*: No such file"):
        load(environ={}, file=tmp_path / "none.toml")


def test_keys_come_from_files_and_never_show(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("from-the-file\n")
    settings = load({"api_key_file": str(key)}, environ={"LORAMUX_API_KEY": "from-the-environment"})
    assert settings.api_key == "from-the-file"
    assert "from-the-file" not in repr(settings)
    settings = load({"api_key": "from-a-flag"}, environ={"LORAMUX_API_KEY_FILE": str(key)})
    assert (settings.api_key, settings.api_key_file) == ("from-a-flag", None)
    with pytest.raises(StartupError, match="are both given"):
        load({"api_key": "from-a-flag", "api_key_file": str(key)}, environ={})
    for secret in ("short", "with space inside", "ümlaut-key"):
        with pytest.raises(StartupError) as caught:
            load({"api_key": secret}, environ={})
        assert secret not in caught.value.message
    key.write_text("")
    with pytest.raises(StartupError, match="the content of"):
        load({"api_key_file": str(key)}, environ={})


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    """A pipe in the place of a file held the start up for ever."""
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.touch()
    os.truncate(large, (1 << 20) + 1)
    read, write = os.pipe()  # as of `--api-key-file <(…)`: its writer lives
    try:
        for path, why in (
            (pipe, "it is not a regular file; pipes and devices are not read"),
            (Path(f"/dev/fd/{read}"), "it is not a regular file"),
            (Path("/dev/zero"), "it is not a regular file"),
            (large, "it has more than 1048576 bytes"),
            (tmp_path, "Is a directory"),
            (Path("nul\0"), "embedded null"),
        ):
            for flag in ("api_key_file", "admin_key_file"):
                with pytest.raises(StartupError) as caught:
                    load({flag: str(path)}, environ={})
                assert caught.value.message.startswith(f"--{flag.replace('_', '-')}: cannot read {path}: {why}")
            with pytest.raises(StartupError) as caught:
                load(environ={}, file=path)
            assert caught.value.message.startswith(f"--config: cannot read {path}: {why}")
    finally:
        os.close(read)
        os.close(write)


def test_a_file_behind_a_link_or_a_descriptor_is_one(tmp_path: Path) -> None:
    """So Kubernetes mounts secrets, and so a shell redirects standard input."""
    key, link = tmp_path / "key", tmp_path / "link"
    key.write_text("from-the-file\n")
    link.symlink_to(key)
    with key.open() as opened:
        for path in (link, Path(f"/dev/fd/{opened.fileno()}")):
            assert load({"api_key_file": str(path)}, environ={}).api_key == "from-the-file"


@pytest.mark.parametrize("service", ["LORAMUX", "LORAMUX_ADMIN", "LORAMUX_METRICS", "LORAMUX_BLUE_2"])
def test_kubernetes_service_variables_are_not_ours(service: str) -> None:
    """A service named "loramux" puts LORAMUX_PORT=tcp://… into every pod beside it; the server then did not start."""
    environ = {
        f"{service}_SERVICE_HOST": "10.0.0.7",
        f"{service}_SERVICE_PORT": "50051",
        f"{service}_SERVICE_PORT_GRPC": "50051",
        f"{service}_PORT": "tcp://10.0.0.7:50051",
    }
    for protocol in ("tcp", "udp", "sctp"):
        port = f"{service}_PORT_50051_{protocol.upper()}"
        environ |= {port: f"{protocol}://10.0.0.7:50051", f"{port}_PROTO": protocol}
        environ |= {f"{port}_PORT": "50051", f"{port}_ADDR": "10.0.0.7"}
    assert load(environ=environ) == Settings()


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("LORAMUX_PROT", "LORAMUX_PROT is set, which is no setting; did you mean LORAMUX_PORT?"),
        ("LORAMUX_ADAPTER_DIRS", "did you mean LORAMUX_ADAPTER_DIR?"),
        ("LORAMUX_CACHE_DIR", "did you mean LORAMUX_CACHE?"),
        ("LORAMUX_XYZZY", "lists the settings"),
        ("LORAMUX_SERVICE_HOSTS", "is no setting"),
    ],
)
def test_a_variable_that_nothing_reads_is_an_error(variable: str, sentence: str) -> None:
    with pytest.raises(StartupError) as caught:
        load(environ={variable: "1"})
    assert sentence in caught.value.message


def test_variables_of_other_parts_and_programs_are_left_alone() -> None:
    others = ("CACHE", "ISA", "TARGET", "ADMIN", "TEST_LEAK")
    environ = {f"LORAMUX_{name}": "x" for name in others} | {"PATH": "/bin", "MY_LORAMUX_X": "1", "loramux_port": "x"}
    assert load(environ=environ | {"LORAMUX_MAX_N": "", "LORAMUX_UNSET": ""}) == Settings()


def test_settings_are_frozen_and_every_one_is_documented() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]
    for option in options().values():
        assert option.help.endswith("."), option
        assert option.metavar
        assert option.flag == "--" + option.name.replace("_", "-")
    assert options()["adapter_dir"].repeatable
    assert options()["port"].variable == "LORAMUX_PORT"
