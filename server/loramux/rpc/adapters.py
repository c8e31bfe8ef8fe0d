"""AdapterService: what operators do with adapters. Thin: the manager and its registry decide everything."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from loramux.engine.client import EngineClient
from loramux.errors import AdapterUnavailable, Cancelled, InvalidRequest, SlowReader
from loramux.escaping import encodable
from loramux.lora.entry import AdapterEntry, Residency, State
from loramux.lora.ingredient import Ingredient
from loramux.lora.manager import AdapterManager
from loramux.rpc import convert
from loramux.rpc.boundary import Context
from loramux.rpc.merged import MergedOnly
from loramux.rpc.ports import MergeDone, Merger, MergeStep
from loramux.rpc.sizes import MAX_MERGED
from loramux.rpc.watchers import Watchers
from loramux.v1 import adapters_pb2 as pb
from loramux.v1 import adapters_pb2_grpc as pb_grpc

MAX_PAGE = 1000

_STATES = {
    State.REGISTERED: pb.ADAPTER_STATE_REGISTERED,
    State.LOADING: pb.ADAPTER_STATE_LOADING,
    State.READY: pb.ADAPTER_STATE_READY,
    State.DRAINING: pb.ADAPTER_STATE_DRAINING,
    State.FAILED: pb.ADAPTER_STATE_FAILED,
    State.UNLOADED: pb.ADAPTER_STATE_UNLOADED,
}
_RESIDENCIES = {
    Residency.DISK: pb.RESIDENCY_DISK,
    Residency.HOST: pb.RESIDENCY_HOST,
    Residency.DEVICE: pb.RESIDENCY_DEVICE,
}


_DTYPES = {
    pb.MERGE_DTYPE_UNSPECIFIED: "bf16",
    pb.MERGE_DTYPE_BF16: "bf16",
    pb.MERGE_DTYPE_FP16: "fp16",
    pb.MERGE_DTYPE_FP32: "fp32",
}


def describe(entry: AdapterEntry, merged: str = "") -> pb.Adapter:
    """An entry as operators see it; `merged` is the adapter that is in the base's weights, if one is."""
    message = pb.Adapter(
        name=entry.name,
        uid=entry.uid,
        digest=entry.digest,
        source=encodable(entry.source),
        state=_STATES[entry.state],
        residency=_RESIDENCIES[entry.residency],
        pinned=entry.pinned,
        device_bytes=entry.nbytes,
        size_bytes=entry.size or 0,
        max_rank=entry.max_rank,
        target_modules=entry.target_modules,
        sites=entry.site_count,
        leases=len(entry.leases),
        error=encodable(entry.error.message) if entry.error is not None else "",
        merged=entry.name == merged,
        warnings=map(encodable, entry.warnings),
    )
    if entry.loaded_at:
        message.loaded_at.FromNanoseconds(int(entry.loaded_at * 1e9))
        message.load_time.FromNanoseconds(int(entry.load_seconds * 1e9))
    if entry.last_used_at:
        message.last_used_at.FromNanoseconds(int(entry.last_used_at * 1e9))
    return message


class AdapterServicer(pb_grpc.AdapterServiceServicer):
    """See proto/loramux/v1/adapters.proto. `send_timeout`: seconds that one message may wait for its reader."""

    def __init__(
        self, manager: AdapterManager, engine: EngineClient, merger: Merger, merged: MergedOnly, *, send_timeout: float
    ) -> None:
        self._manager = manager
        self._merger = merger
        self._merged = merged
        self._engine = engine
        self._send_timeout = send_timeout
        self._watchers = Watchers()

    def _describe(self, entry: AdapterEntry) -> pb.Adapter:
        return describe(entry, self._merged.name)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        self._merged.check_change()
        entry, already = await self._manager.load(
            request.name,
            request.source,
            replace=request.replace,
            pin=request.pin,
            validate_only=request.validate_only,
        )
        return pb.LoadAdapterResponse(adapter=self._describe(entry), already_loaded=already)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        self._merged.check_change()
        timeout = None
        if request.HasField("drain_timeout"):
            timeout = request.drain_timeout.seconds + request.drain_timeout.nanos / 1e9
            if timeout < 0:
                raise InvalidRequest("drain_timeout", f"must not be negative, got {timeout:g} s")
        done = await self._manager.unload(
            request.name,
            drain_timeout=timeout,
            cancel_after_timeout=request.cancel_after_timeout,
            cancel=self._cancel,
        )
        return pb.UnloadAdapterResponse(freed_bytes=done.freed_bytes, cancelled_requests=done.cancelled)

    def _cancel(self, request_id: str) -> None:
        error = Cancelled("an operator unloaded this request's adapter", reason="ADAPTER_UNLOADED")
        self._engine.abort(request_id, error)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        return pb.GetAdapterResponse(adapter=self._describe(self._manager.get(request.name)))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        budget = self._manager.registry.budget
        after = _parse_page_token(request.page_token)
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        page = self._manager.registry.page(after, size + 1)
        more = len(page) > size
        page = page[:size]
        return pb.ListAdaptersResponse(
            adapters=[self._describe(entry) for entry in page],
            next_page_token="/".join(_place(page[-1])) if more else "",
            device_bytes=budget.used,
            device_budget_bytes=budget.limit or 0,
            host_bytes=self._manager.registry.tiers.host.used,
            host_budget_bytes=self._manager.registry.tiers.host.limit or 0,
        )

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:
        if not request.HasField("pinned"):
            raise InvalidRequest("pinned", "is missing; it is all that can be changed in a loaded adapter")
        entry = self._manager.pin(request.name, request.pinned)
        return pb.UpdateAdapterResponse(adapter=self._describe(entry))

    async def WatchAdapters(self, request: pb.WatchAdaptersRequest, context: Context) -> None:
        with self._watchers.one():
            async with aclosing(self._manager.watch()) as entries:
                async for entry in entries:
                    await self._send(context, pb.WatchAdaptersResponse(adapter=self._describe(entry)), "watch again")

    async def MergeAdapter(self, request: pb.MergeAdapterRequest, context: Context) -> None:
        if len(request.mix) > MAX_MERGED:
            raise InvalidRequest("mix", f"has {len(request.mix)} adapters; at most {MAX_MERGED} are allowed")
        wanted = convert.weighted(request.name, request.mix, "name")
        if not wanted:
            raise InvalidRequest("name", "is empty; name the adapter to merge, or give a mix")
        if request.dtype not in _DTYPES:
            raise InvalidRequest("dtype", f"{request.dtype} is none of MergeDtype")
        ingredients = [await self._ingredient(name, weight) for name, weight in wanted]
        async with aclosing(self._merger.merge(ingredients, request.output, _DTYPES[request.dtype])) as steps:
            async for step in steps:
                await self._send(context, _merging(step), "the merge was stopped")

    async def _ingredient(self, name: str, weight: float) -> Ingredient:
        """The files of a loaded or registered adapter.

        Raises AdapterNotFound, AdapterUnavailable for one that is not ready, and what AdapterManager.folder does.
        """
        entry = self._manager.get(name)
        if entry.error is not None:
            raise AdapterUnavailable(entry.error.message, metadata=entry.error.metadata)
        if entry.state is State.LOADING:
            raise AdapterUnavailable(
                f"adapter {name!r} is being loaded; merge it when it is ready", metadata={"adapter": name}
            )
        return Ingredient(name, await self._manager.folder(entry), weight, entry.digest)

    async def _send(self, context: Context, message: object, then: str) -> None:
        """Write one message; it waits here while the client's flow-control window is full."""
        try:
            async with asyncio.timeout(self._send_timeout):
                await context.write(message)
        except TimeoutError:
            raise SlowReader(f"the client did not read for {self._send_timeout:g} s; {then}") from None


def _merging(step: MergeStep | MergeDone) -> pb.MergeAdapterResponse:
    if isinstance(step, MergeStep):
        return pb.MergeAdapterResponse(tensors_done=step.done, tensors_total=step.total)
    report = pb.MergeReport(
        overall_error=step.overall_error,
        worst_error=step.worst_error,
        worst_layer=step.worst_layer,
        layers=step.layers,
        bytes=step.bytes,
    )
    return pb.MergeAdapterResponse(output=step.output, report=report)


def _place(entry: AdapterEntry) -> tuple[str, str]:
    """The order of lists. Names repeat while an earlier load drains, uids never do."""
    return entry.name, entry.uid


def _parse_page_token(token: str) -> tuple[str, str]:
    """The place after which a page begins; names hold no slash."""
    name, slash, uid = token.partition("/")
    if token and not (name and slash and uid):
        raise InvalidRequest("page_token", "is not a next_page_token of an earlier response")
    return name, uid
