"""Proto messages to the engine's records and back.

Checks the shape of a request (which fields go together, roles, weights); values against limits are
checked by the engine's door. Knows nothing of what names and ids mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from loramux.engine.request import (
    AdapterUse,
    Delta,
    FinishReason,
    SamplingParams,
    SequenceFinished,
    Timings,
    TokenLogprob,
    Usage,
)
from loramux.errors import InvalidRequest
from loramux.lora.mixing import check_weight
from loramux.v1 import generation_pb2 as pb

ROLES = ("system", "user", "assistant")

_FINISH = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
_LOGPROBS_AT_ONCE = 2048  # made into messages without a break: some milliseconds
_SCALARS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "n",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
)


def sampling(message: pb.SamplingParams) -> SamplingParams:
    """The knobs that are present; the others keep their defaults. `top_logprobs` implies `logprobs`."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    if given.get("top_logprobs", 0) > 0:
        given["logprobs"] = True
    return SamplingParams(
        **given,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
    )


def adapter_names(message: pb.GenerateRequest) -> list[tuple[str, float]]:
    """(name, weight) of every adapter asked for; empty for the base. Raises InvalidRequest."""
    return weighted(message.adapter, message.mix, "adapter")


def weighted(single: str, mix: Sequence[pb.AdapterWeight], field: str) -> list[tuple[str, float]]:
    """(name, weight) of the `single` adapter, which stands in `field`, or of those in `mix`. Raises InvalidRequest."""
    if not mix:
        return [(single, 1.0)] if single else []
    if single:
        raise InvalidRequest("mix", f"give `{field}` or `mix`, not both")
    seen: set[str] = set()
    for i, part in enumerate(mix):
        if not part.adapter:
            raise InvalidRequest(f"mix[{i}].adapter", "is empty; the base is in every sum and needs no entry")
        if part.adapter in seen:
            raise InvalidRequest(f"mix[{i}].adapter", f"{part.adapter!r} is there twice; add its weights up")
        check_weight(part.weight, f"mix[{i}].weight")
        seen.add(part.adapter)
    return [(part.adapter, part.weight) for part in mix]


def input_field(message: pb.GenerateRequest | pb.CountTokensRequest) -> str:
    """Which input is given: "prompt", "token_ids" or "chat". Raises InvalidRequest for none or an empty one."""
    kind: str | None = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("input", "is missing; give one of prompt, token_ids and chat", reason="EMPTY_PROMPT")
    if kind == "prompt" and not message.prompt:
        raise InvalidRequest("prompt", "is empty; give at least one character", reason="EMPTY_PROMPT")
    if kind == "token_ids" and not message.token_ids.ids:
        raise InvalidRequest("token_ids", "is empty; give at least one id", reason="EMPTY_PROMPT")
    return kind


def parse_special(message: pb.GenerateRequest | pb.CountTokensRequest) -> bool:
    """Whether texts of special tokens in the prompt are those tokens; true unless it says otherwise."""
    return message.parse_special if message.HasField("parse_special") else True


def chat(message: pb.Chat) -> list[dict[str, str]]:
    """The turns as chat templates take them. Raises InvalidRequest."""
    if not message.messages:
        raise InvalidRequest("chat.messages", "is empty; give at least one turn", reason="EMPTY_PROMPT")
    for i, turn in enumerate(message.messages):
        if turn.role not in ROLES:
            got = turn.role if len(turn.role) <= 40 else turn.role[:40] + "…"
            hint = "; what a developer says goes as system" if turn.role == "developer" else ""
            raise InvalidRequest(f"chat.messages[{i}].role", f"must be one of {', '.join(ROLES)}, got {got!r}{hint}")
    return [{"role": turn.role, "content": turn.content} for turn in message.messages]


def resolved(adapters: Iterable[AdapterUse]) -> list[pb.ResolvedAdapter]:
    """What the names resolved to."""
    return [
        pb.ResolvedAdapter(name=a.handle.name, uid=a.handle.uid, digest=a.handle.digest, weight=a.weight)
        for a in adapters
    ]


def token_logprobs(items: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    """One message a token, with its alternatives."""
    return [
        pb.TokenLogprob(token_id=item.token_id, text=item.text, logprob=item.logprob, top=token_logprobs(item.top))
        for item in items
    ]


def usage(record: Usage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        cached_prompt_tokens=record.cached_prompt_tokens,
    )


def timings(record: Timings) -> pb.Timings:
    """Seconds."""
    return pb.Timings(
        queue=record.queue, adapter_load=record.adapter_load, prefill=record.prefill, decode=record.decode
    )


def stream_event(event: Delta | SequenceFinished) -> pb.GenerateStreamResponse:
    """One message of a stream."""
    if isinstance(event, Delta):
        return pb.GenerateStreamResponse(
            delta=pb.StreamDelta(
                index=event.index,
                text=event.text,
                token_ids=event.token_ids,
                logprobs=token_logprobs(event.logprobs),
            )
        )
    return pb.GenerateStreamResponse(
        finished=pb.StreamFinished(
            index=event.index,
            finish_reason=_FINISH[event.reason],
            stop=event.stop,
            usage=usage(event.usage),
            timings=timings(event.timings),
        )
    )


async def in_pieces(event: Delta | SequenceFinished) -> AsyncGenerator[Delta | SequenceFinished, None]:
    """The event; a delta with many log probabilities as several, between which the event loop serves others."""
    if isinstance(event, SequenceFinished) or not event.logprobs:
        yield event
        return
    step = max(1, _LOGPROBS_AT_ONCE // (1 + len(event.logprobs[0].top)))
    for start in range(0, len(event.token_ids), step):
        if start > 0:
            await asyncio.sleep(0)
        stop = start + step
        text = "" if start > 0 else event.text
        yield Delta(event.index, text, event.token_ids[start:stop], event.logprobs[start:stop])


class Answer:
    """Adds the events of one request up to the unary answer.

    Log probabilities are serialized as they come: those of 16 sequences with 20 alternatives a token are a million
    messages, which would hold the event loop for seconds if they were built and serialized at the end.
    """

    def __init__(self, n: int) -> None:
        self._parts = [Delta(index=index) for index in range(n)]
        self._logprobs: list[list[bytes]] = [[] for _ in range(n)]
        self._ends: dict[int, SequenceFinished] = {}
        self._last = SequenceFinished(index=0, reason=FinishReason.STOP)

    def add(self, event: Delta | SequenceFinished) -> None:
        """Take the next event."""
        if isinstance(event, SequenceFinished):
            self._ends[event.index] = event
            self._last = event
            return
        if event.logprobs:
            part = pb.Completion(logprobs=token_logprobs(event.logprobs))
            self._logprobs[event.index].append(part.SerializeToString())
        self._parts[event.index].merge(replace(event, logprobs=[]))

    def serialized(self, request_id: str, adapters: Iterable[AdapterUse]) -> bytes:
        """The GenerateResponse, after the last event. In protobuf, messages that follow each other are one message."""
        answer = pb.GenerateResponse(
            request_id=request_id,
            adapters=resolved(adapters),
            usage=usage(self._last.usage),
            timings=timings(self._last.timings),
        )
        pieces = [answer.SerializeToString()]
        for part, logprobs in zip(self._parts, self._logprobs, strict=True):
            end = self._ends[part.index]
            completion = pb.Completion(
                index=part.index,
                text=part.text,
                token_ids=part.token_ids,
                finish_reason=_FINISH[end.reason],
                stop=end.stop,
            )
            content = [completion.SerializeToString(), *logprobs]
            pieces += [_COMPLETION, _varint(sum(map(len, content))), *content]
        return b"".join(pieces)


# What stands before a completion: its field's number, and that a length follows.
_COMPLETION = bytes([pb.GenerateResponse.DESCRIPTOR.fields_by_name["completions"].number << 3 | 2])


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])
