"""GenerationService: converts, admits, streams. Errors leave as LoramuxErrors; the boundary makes them statuses."""

from __future__ import annotations

import asyncio

from loramux import __version__
from loramux.engine.client import EngineClient
from loramux.errors import SlowReader
from loramux.rpc import convert
from loramux.rpc.boundary import Context
from loramux.rpc.flight import Admission
from loramux.rpc.ports import ModelInfo
from loramux.v1 import generation_pb2 as pb
from loramux.v1 import generation_pb2_grpc as pb_grpc


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """See proto/loramux/v1/generation.proto. `send_timeout`: seconds that one message may wait for its reader."""

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        model: ModelInfo,
        *,
        send_timeout: float,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._model = model
        self._send_timeout = send_timeout

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> bytes:
        """Returns the GenerateResponse serialized; the boundary hands it on as it is."""
        async with self._admission.admit(request, context.time_remaining()) as flight:
            await flight.start()
            answer = convert.Answer(flight.request.sampling.n)
            async for event in flight:
                async for piece in convert.in_pieces(event):
                    answer.add(piece)
            return answer.serialized(flight.request_id, flight.request.adapters)

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> None:
        async with self._admission.admit(request.request, context.time_remaining()) as flight:
            await flight.start()
            await flight.resolved()
            started = pb.StreamStarted(
                request_id=flight.request_id,
                prompt_tokens=len(flight.request.prompt_ids),
                adapters=convert.resolved(flight.request.adapters),
            )
            await self._send(context, pb.GenerateStreamResponse(started=started))
            async for event in flight:
                async for piece in convert.in_pieces(event):
                    await self._send(context, convert.stream_event(piece))

    async def _send(self, context: Context, message: pb.GenerateStreamResponse) -> None:
        """Write one message; it waits here while the client's flow-control window is full."""
        try:
            async with asyncio.timeout(self._send_timeout):
                await context.write(message)
        except TimeoutError:
            raise SlowReader(f"the client did not read for {self._send_timeout:g} s; its request was stopped") from None

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        ids = await self._admission.count(request)
        return pb.CountTokensResponse(tokens=len(ids), token_ids=ids)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        limits = self._engine.limits
        return pb.GetModelResponse(
            model=self._model.model,
            architecture=self._model.architecture,
            parameters=self._model.parameters,
            bits_per_weight=self._model.bits_per_weight,
            weight_bytes=self._model.weight_bytes,
            device=self._model.device,
            max_context=limits.max_context,
            vocab_size=limits.vocab_size,
            kv_capacity_tokens=self._model.kv_capacity_tokens,
            max_n=limits.settings.max_n,
            max_stop_strings=limits.settings.max_stop_strings,
            max_top_logprobs=limits.settings.max_top_logprobs,
            version=__version__,
            target_modules=self._model.target_modules,
            merged_adapter=self._model.merged_adapter,
            max_chat_turns=limits.max_chat_turns,
            max_mix=limits.settings.max_mix,
        )
