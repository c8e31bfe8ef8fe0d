"""What a hostile client or an adapter's author can send, and what good clients feel meanwhile.

ATTACKS has each attack's name and what makes the function that sends it. Messages are made and serialized before the
clock starts, so that making them disturbs no timing. `Bystander` is a process of its own that asks GetModel all the
time and sends good requests: the longest wait and the requests that were lost are what an attack is judged by.

All load is bounded in count and time. Knows nothing of how the server defends itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from loramux.v1 import adapters_pb2
from loramux.v1 import generation_pb2 as pb

GENERATION = "/loramux.v1.GenerationService/"
ADAPTERS = "/loramux.v1.AdapterService/"
DEADLINE = 60.0  # seconds that one hostile RPC may take
PAUSE = 0.02  # seconds between two GetModel calls
GOOD_TOKENS = 8
GOOD_CLIENTS = 2
RESIDENT = "resident"  # an adapter that is loaded


@dataclass(frozen=True, slots=True)
class Victim:
    """A server on this machine that nobody needs: addresses "host:port", its adapter root, its process."""

    public: str
    admin: str
    metrics: str
    root: Path
    pid: int


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What the bystander felt: seconds of the longest GetModel and of the slowest good request, how many good requests
    ended, and those that did not end well."""

    longest: float
    slowest: float
    good: int
    lost: Counter[str]


Attack = Callable[[Victim], Counter[str]]  # returns how its requests ended


class Bystander:
    """A process of its own: the attacker's work must not slow down the clock of whoever measures."""

    def __init__(self, public: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_watch, args=(public, theirs), daemon=True)
        self._process.start()
        self._ours.recv()

    def begin(self) -> None:
        """Forget what was seen so far."""
        self._ours.send("begin")
        self._ours.recv()

    def end(self) -> Witnessed:
        """What was seen since `begin`."""
        self._ours.send("end")
        found: Witnessed = self._ours.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._ours.send("close")
        self._process.join(DEADLINE)


def _watch(public: str, pipe: Connection) -> None:
    longest, slowest, good, lost = 0.0, 0.0, 0, Counter[str]()
    lock, over = threading.Lock(), threading.Event()

    def probe() -> None:
        nonlocal longest
        ask = _call(public, GENERATION + "GetModel")
        while not over.is_set():
            started = time.monotonic()
            ask(b"", timeout=4 * DEADLINE)
            with lock:
                longest = max(longest, time.monotonic() - started)
            time.sleep(PAUSE)

    def use() -> None:
        nonlocal good, slowest
        sampling = pb.SamplingParams(max_new_tokens=GOOD_TOKENS, ignore_eos=True)
        content = pb.GenerateRequest(prompt="Once upon a time", sampling=sampling).SerializeToString()
        ask = _call(public, GENERATION + "Generate")
        while not over.is_set():
            started = time.monotonic()
            ended = _outcome(lambda: ask(content, timeout=4 * DEADLINE))
            with lock:
                good += 1
                slowest = max(slowest, time.monotonic() - started)
                lost.update([ended] if ended != "OK" else [])

    threads = [threading.Thread(target=work) for work in (probe, *[use] * GOOD_CLIENTS)]
    for thread in threads:
        thread.start()
    pipe.send("ready")
    while (word := pipe.recv()) != "close":
        with lock:
            answer = Witnessed(longest, slowest, good, Counter(lost)) if word == "end" else word
            longest, slowest, good = 0.0, 0.0, 0
            lost.clear()
        pipe.send(answer)
    over.set()
    for thread in threads:
        thread.join()


def descriptors(pid: int) -> int:
    """Open file descriptors of a process on this machine."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _call(target: str, path: str) -> Any:
    """A unary method on a connection of its own; takes serialized requests."""
    return grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]).unary_unary(path)


def _outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _send(address: str, path: str, contents: Sequence[bytes], timeout: float = DEADLINE) -> Counter[str]:
    """All at once, each on a connection of its own; how they ended."""
    futures = [_call(address, path).future(content, timeout=timeout) for content in contents]
    return Counter(_outcome(future.result) for future in futures)


def _generate(message: pb.GenerateRequest, copies: int, timeout: float = DEADLINE) -> Attack:
    def attack(victim: Victim) -> Counter[str]:
        return _send(victim.public, GENERATION + "Generate", [content] * copies, timeout)

    content = message.SerializeToString()
    return attack


def _sampling(copies: int, **given: object) -> Attack:
    sampling = pb.SamplingParams(**({"max_new_tokens": 1} | given))  # type: ignore[arg-type]
    return _generate(pb.GenerateRequest(prompt="x", sampling=sampling), copies)


def _chat_flood(turns: int, copies: int) -> Attack:
    return _generate(pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * turns)), copies)


def _token_ids(count: int, copies: int) -> Attack:
    sampling = pb.SamplingParams(max_new_tokens=1)
    return _generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * count), sampling=sampling), copies)


def _prompt(words: int, copies: int, timeout: float = DEADLINE) -> Attack:
    return _generate(pb.GenerateRequest(prompt="a " * words), copies, timeout)


def _mix(names: int, weight: float, copies: int) -> Attack:
    parts = [pb.AdapterWeight(adapter=f"{RESIDENT}{i or ''}", weight=weight) for i in range(names)]
    return _generate(pb.GenerateRequest(prompt="x", mix=parts), copies)


def _count_tokens(prompt: str, copies: int) -> Attack:
    content = pb.CountTokensRequest(prompt=prompt).SerializeToString()
    return lambda victim: _send(victim.public, GENERATION + "CountTokens", [content] * copies)


def _unknown_names(count: int) -> Attack:
    contents = [pb.GenerateRequest(prompt="x", adapter=f"nobody-{i}").SerializeToString() for i in range(count)]

    def attack(victim: Victim) -> Counter[str]:
        ask = _call(victim.public, GENERATION + "Generate")
        return Counter(_outcome(lambda: ask(content, timeout=DEADLINE)) for content in contents)  # noqa: B023

    return attack


def _noise(count: int) -> Attack:
    contents = [os.urandom(64) for _ in range(count)]

    def attack(victim: Victim) -> Counter[str]:
        ask = _call(victim.public, GENERATION + "Generate")
        return Counter(_outcome(lambda: ask(content, timeout=DEADLINE)) for content in contents)  # noqa: B023

    return attack


def _leave_at_once(count: int) -> Attack:
    sampling = pb.SamplingParams(max_new_tokens=1000, ignore_eos=True)
    content = pb.GenerateStreamRequest(request=pb.GenerateRequest(prompt="x", sampling=sampling)).SerializeToString()

    def attack(victim: Victim) -> Counter[str]:
        with grpc.insecure_channel(victim.public) as channel:
            stream: Any = channel.unary_stream(GENERATION + "GenerateStream")
            for _ in range(count):
                stream(content, timeout=DEADLINE).cancel()
        return Counter(CANCELLED=count)

    return attack


def _never_read(count: int, seconds: float) -> Attack:
    sampling = pb.SamplingParams(max_new_tokens=1000, ignore_eos=True, logprobs=True, top_logprobs=20)
    content = pb.GenerateStreamRequest(request=pb.GenerateRequest(prompt="x", sampling=sampling)).SerializeToString()

    def attack(victim: Victim) -> Counter[str]:
        with ExitStack() as stack:
            for _ in range(count):
                channel = stack.enter_context(grpc.insecure_channel(victim.public))
                stream: Any = channel.unary_stream(GENERATION + "GenerateStream")
                stack.callback(stream(content, timeout=DEADLINE).cancel)
            time.sleep(seconds)
        return Counter(UNREAD=count)

    return attack


def _idle_connections(port_of: Callable[[Victim], str], count: int, seconds: float) -> Attack:
    """Connections that say half a line and then nothing."""

    def attack(victim: Victim) -> Counter[str]:
        host, _, port = port_of(victim).rpartition(":")
        with ExitStack() as stack:
            for _ in range(count):
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE))
                connection.sendall(b"GET /met")
            time.sleep(seconds)
        return Counter(IDLE=count)

    return attack


def _validate(weights: Callable[[], bytes], config: dict[str, object] | None = None) -> Attack:
    """An adapter folder that somebody put under a root, read on an operator's word."""
    content = weights()
    fields = _CONFIG | (config or {})

    def attack(victim: Victim) -> Counter[str]:
        folder = victim.root / "hostile"
        folder.mkdir()
        try:
            (folder / "adapter_config.json").write_text(json.dumps(fields))
            (folder / "adapter_model.safetensors").write_bytes(content)
            message = adapters_pb2.LoadAdapterRequest(name="hostile", source="hostile", validate_only=True)
            return _send(victim.admin, ADAPTERS + "LoadAdapter", [message.SerializeToString()])
        finally:
            shutil.rmtree(folder)

    return attack


def _file(header: Mapping[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


def _many_dimensions() -> bytes:
    return _file({_KEY.format(0): {"dtype": "F32", "shape": [2**47] * 40_000, "data_offsets": [0, 0]}})


def _many_tensors() -> bytes:
    return _file({_KEY.format(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})


def _one_pair() -> bytes:
    entries = {
        _KEY.format(0): {"dtype": "F32", "shape": [2, 576], "data_offsets": [0, 4608]},
        _KEY.format(0).replace("lora_A", "lora_B"): {"dtype": "F32", "shape": [576, 2], "data_offsets": [4608, 9216]},
    }
    return _file(entries, bytes(9216))


# Every attack, and what makes it: that is called when it is wanted, for together their messages would fill the memory.
ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "nothing": lambda: lambda _: Counter[str](),
    "chat of 500,000 empty turns": lambda: _chat_flood(500_000, 1),
    "4 × 4.2 million token ids": lambda: _token_ids(4_194_000, 4),
    "4 × a million stop token ids": lambda: _sampling(4, stop_token_ids=range(1_000_000)),
    "4 × a million stop strings": lambda: _sampling(4, stop=["x"] * 1_000_000),
    "4 × 300,000 logit biases": lambda: _sampling(4, logit_bias=dict.fromkeys(range(300_000), 1.0)),
    "4 × 200,000 names in a mix": lambda: _mix(200_000, 1.0, 4),
    "20 × a mix weight of 1e39": lambda: _mix(1, 1e39, 20),
    "3 × a prompt of 0.8 MB, callers gone after 0.5 s": lambda: _prompt(400_000, 3, timeout=0.5),
    "4 × a prompt of 4 MB": lambda: _prompt(2_000_000, 4),
    "8 × CountTokens of 4 MB": lambda: _count_tokens("é" * 2_000_000, 8),
    "4 × n=16 with top_logprobs=20, 64 tokens each": lambda: _sampling(
        4, n=16, top_logprobs=20, max_new_tokens=64, ignore_eos=True, temperature=1.0
    ),
    "500 unknown adapter names": lambda: _unknown_names(500),
    "500 messages of noise": lambda: _noise(500),
    "500 streams left at once": lambda: _leave_at_once(500),
    "8 streams that nobody reads": lambda: _never_read(8, 3.0),
    "200 idle connections to the public port": lambda: _idle_connections(lambda v: v.public, 200, 3.0),
    "200 idle connections to the metrics port": lambda: _idle_connections(lambda v: v.metrics, 200, 3.0),
    "an adapter with a tensor of 40,000 dimensions": lambda: _validate(_many_dimensions),
    "an adapter with 100,000 tensors in its header": lambda: _validate(_many_tensors),
    "an adapter with a pattern that backtracks": lambda: _validate(_one_pair, {"rank_pattern": {"(.*.*.*)*x": 2}}),
}


def write_resident(root: Path) -> None:
    """The adapter whose name attacks may use."""
    folder = root / RESIDENT
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(_CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(_one_pair())


@contextmanager
def bystander(public: str) -> Iterator[Bystander]:
    """A bystander that is gone at the end."""
    watching = Bystander(public)
    try:
        yield watching
    finally:
        watching.close()
