"""Puts the rooms together: settings in, a server that is ready to start out. The only module that knows them all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from loramux.checks import adapter_roots
from loramux.config import Settings
from loramux.engine.loop import DEVICE_LOST_TEXT, AsyncEngine
from loramux.engine.request import Request
from loramux.engine.settings import EngineSettings
from loramux.errors import DeviceLost, EngineFault, LoramuxError, StartupError
from loramux.lora.adapter import Adapter
from loramux.lora.base import Base
from loramux.lora.delta import Delta
from loramux.lora.entry import LoadedAdapter
from loramux.lora.folder import AdapterFolder
from loramux.lora.in_base import AdapterInBase
from loramux.lora.limits import ReadLimits
from loramux.lora.manager import AdapterManager
from loramux.lora.peft_files import read_adapter
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import AdapterRoots
from loramux.lora.snapshot import measure
from loramux.merge_process import MergeProcess
from loramux.model.embedded import EMBEDDED
from loramux.model.kv_capacity import free_bytes, kv_blocks
from loramux.model.loading import LoadedModel, load_model, pick_device
from loramux.model.renderer import TemplateRenderer
from loramux.model.tokenizer import IdsOnly, Tokenizer
from loramux.model.warm_up import warm_up
from loramux.ops.cpu.build import wanted_isa, wanted_threads
from loramux.ops.device import device_errors, out_of_memory
from loramux.ops.site import Site
from loramux.progress import Phases
from loramux.rpc.ports import ModelInfo
from loramux.rpc.server import Parts, Server
from loramux.values import StartAdapter

LEAK_VARIABLE = "LORAMUX_TEST_LEAK"


@dataclass(frozen=True, slots=True)
class Application:
    """A server and what it serves. `start` the engine, then the server; `drain` the server, then `stop` the engine."""

    settings: Settings
    loaded: LoadedModel
    engine: AsyncEngine
    adapters: AdapterManager
    server: Server


@device_errors()
def prepare_model(settings: Settings, phases: Phases | None = None) -> LoadedModel:
    """Load the base model and give it its KV cache. Takes seconds to minutes; raises StartupError,
    and DeviceLost.

    The device, LORAMUX_ISA and LORAMUX_THREADS are looked at first. `phases` is told what is done.
    """
    phases = phases or Phases(None)
    if pick_device(settings.device).type == "cpu":
        wanted_isa()
        wanted_threads()
    weights = phases.counting("Loading weights")

    def progress(done: int, total: int) -> None:
        weights(done, total)
        if done == total:
            phases.begin("Testing the model")

    phases.begin(f"Opening {settings.model}")
    merged = settings.merged
    merging: Callable[[Sequence[Site], Mapping[str, torch.Tensor]], Delta] | None = None
    if merged is not None:
        merging = partial(_delta, merged, adapter_roots(settings)[0])
    try:
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            max_context=settings.max_context,
            batch_invariant=settings.batch_invariant,
            progress=progress,
            compiling=phases.counting("Compiling native operations"),
            merging=merging,
        )
    except LoramuxError as error:
        if merged is None or isinstance(error, StartupError):
            raise
        raise StartupError(f"--merged {merged.name}: {error.message}") from error
    phases.begin("Making the KV cache")
    model = loaded.model
    if model.shortcut is not None and model.device.type == "cpu":
        # All that is worth several threads has those of the native operations. Torch's own may spin for
        # milliseconds after each use, on the cores where these are to run.
        torch.set_num_threads(1)
    block_size = EngineSettings().block_size
    blocks = kv_blocks(model, settings, block_size, free_bytes(model.device))
    try:
        model.allocate_kv(blocks, block_size)
    except torch.OutOfMemoryError as error:
        raise StartupError(f"--kv-memory: {blocks} blocks of {block_size} tokens do not fit: {error}") from error
    try:
        warm_up(
            model,
            settings.max_batch_rows,
            settings.max_batch_tokens,
            compiling=phases.counting("Compiling GPU kernels"),
            progress=phases.counting("Running each kind of step once"),
        )
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise StartupError(f"--max-batch-tokens: a step of so many tokens does not fit: {error}") from error
    if model.can_capture:
        model.capture_decode_steps(
            settings.max_batch_rows, max_mix=settings.max_mix, progress=phases.counting("Capturing decode steps")
        )
    return loaded


def _delta(
    adapter: StartAdapter, roots: AdapterRoots, sites: Sequence[Site], dense: Mapping[str, torch.Tensor]
) -> Delta:
    """What `--merged` names."""
    folder = roots.resolve(adapter.source or adapter.name)
    return Delta([(read_adapter(folder, sites, limits=ReadLimits(), base=Base(dense=dense)), 1.0)])


def assemble(settings: Settings, loaded: LoadedModel) -> Application:
    """Wire engine, adapters and faces around a prepared model. Call it on the event loop that will run them."""
    model = loaded.model
    tokenizer = loaded.tokenizer or IdsOnly()
    registry = AdapterRegistry(device_budget=settings.adapter_memory, host_budget=settings.adapter_host_memory)

    def give_back(request: Request) -> None:
        for use in request.adapters:
            registry.release(use.handle.uid, request.request_id)

    engine = AsyncEngine(
        model,
        tokenizer.backend,
        EngineSettings(
            max_batch_rows=settings.max_batch_rows,
            max_batch_tokens=max(settings.max_batch_tokens, settings.max_batch_rows),
            step_target=settings.step_target,
            max_queue=settings.max_queue,
            max_n=settings.max_n,
            max_stop_strings=settings.max_stop_strings,
            max_top_logprobs=settings.max_top_logprobs,
            max_mix=settings.max_mix,
            max_chat_turns=settings.max_chat_turns,
        ),
        on_finish=give_back,
    )
    limits = ReadLimits()
    embedded = EMBEDDED.get(settings.model)
    base = Base(
        settings.model if embedded is None else embedded.hub_id,
        None if loaded.tokenizer is None else loaded.tokenizer.chat_template,
        _check_template(settings, loaded.tokenizer),
        model.dense_weights(),
    )
    read = _leaking if os.environ.get(LEAK_VARIABLE) == "adapters" else _plain

    # Where the device has its own memory, what is put out of it comes back from a copy that was never given up.
    keep = model.device.type != "cpu" and settings.adapter_host_memory > 0

    def read_and_place(folder: AdapterFolder) -> LoadedAdapter:
        if isinstance(loaded.merged, Delta):
            ((merged, _),) = loaded.merged.terms
            return AdapterInBase.of(merged, len(model.sites), model.dtype)
        files = read_adapter(folder, model.sites, limits=limits, base=base)
        with _losses_told(engine):
            return read(
                lambda: Adapter.build(files, model.sites, model.device, model.dtype, model.dequantize, keep=keep)
            )

    def place(adapter: Adapter) -> Adapter:
        with _losses_told(engine):
            return adapter.place(model.device, keep=keep)

    adapters = AdapterManager(
        registry,
        adapter_roots(settings)[0],
        read_and_place,
        measure=lambda folder: 0 if loaded.merged is not None else measure(folder, model.dtype.itemsize, limits),
        limits=limits,
        load_timeout=settings.load_timeout,
        # With a merged adapter there is nothing else to ask for.
        scan_interval=None if loaded.merged is not None else settings.adapter_scan_interval,
        declared_in=None if loaded.merged is not None else settings.adapters_file,
        place=place if keep and loaded.merged is None else None,
    )
    info = ModelInfo(
        model=settings.model,
        architecture=model.facts.architecture,
        parameters=model.facts.parameters,
        bits_per_weight=model.facts.bits_per_weight,
        weight_bytes=model.facts.nf4_bytes + model.facts.dense_bytes,
        device=model.facts.device,
        kv_capacity_tokens=model.num_kv_blocks * model.block_size,
        target_modules=tuple(sorted({site.name.rpartition(".")[2] for site in model.sites})),
        merged_adapter="" if settings.merged is None else settings.merged.name,
    )
    merger = MergeProcess(loaded.place, settings.merge_dir)
    server = Server(settings, Parts(engine, adapters, tokenizer, info, merger))
    return Application(settings, loaded, engine, adapters, server)


@contextmanager
def _losses_told(engine: AsyncEngine) -> Iterator[None]:
    """Around what other threads than the engine's do on the device: where nothing runs that needs no loading, no step
    would meet the loss."""
    try:
        with device_errors():
            yield
    except DeviceLost as error:
        engine.lose_device(error)
        raise EngineFault(DEVICE_LOST_TEXT, reason="DEVICE_LOST") from error


_leaked: list[Adapter] = []


def _check_template(settings: Settings, tokenizer: Tokenizer | None) -> Callable[[str], None] | None:
    """What checks templates of adapters, if they are used; the tokenizer renders them from now on."""
    if tokenizer is None or not settings.adapter_chat_templates:
        return None
    tokenizer.renderer = TemplateRenderer(tokenizer.special_tokens)
    return tokenizer.renderer.check


def _plain(build: Callable[[], Adapter]) -> Adapter:
    return build()


def _leaking(build: Callable[[], Adapter]) -> Adapter:
    """Keeps every adapter for good: the soak test must notice (`loadtest soak --seed-leak`)."""
    _leaked.append(build())
    return _leaked[-1]
