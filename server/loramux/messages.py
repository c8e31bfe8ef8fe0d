"""Clients' arguments to proto messages, and proto messages to `loramux.answers`: pure functions.

Knows nothing of channels; imports no torch and no gRPC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import TypeVar

from loramux.answers import (
    Adapter,
    AdapterList,
    ChatTurn,
    Completion,
    Delta,
    Finished,
    Generation,
    Merged,
    Merging,
    Model,
    Result,
    Started,
    StreamEvent,
    Timings,
    TokenLogprob,
    Usage,
    UsedAdapter,
)
from loramux.arguments import check_names
from loramux.errors import InvalidRequest
from loramux.v1 import adapters_pb2, generation_pb2

M = TypeVar("M")


def generate_request(prompt: str | None, given: Generation) -> generation_pb2.GenerateRequest:
    """The message; None is as good as not given.

    Raises TypeError for arguments that do not exist or do not go together, InvalidRequest for values that no
    message can hold (a negative n).
    """
    check_names(given, Generation.__annotations__)
    message = generation_pb2.GenerateRequest()
    _put_input(message, prompt, given.get("messages"), given.get("token_ids"))
    _put_mix(message, given.get("mix"))
    for name, value in given.items():
        if name in ("messages", "token_ids", "mix") or value is None:
            continue
        if name in ("adapter", "request_id", "cache_salt", "priority", "parse_special"):
            _put(message, name, name, value)
        else:
            one_stop = name == "stop" and isinstance(value, str)
            _put(message.sampling, name, f"sampling.{name}", [value] if one_stop else value)
    return message


def count_tokens_request(
    prompt: str | None, turns: Sequence[ChatTurn] | None, parse_special: bool | None
) -> generation_pb2.CountTokensRequest:
    """The message; raises what `generate_request` does."""
    message = generation_pb2.CountTokensRequest(parse_special=parse_special)
    _put_input(message, prompt, turns, None)
    return message


def load_request(
    name: str, source: str, replace: bool, pin: bool, validate_only: bool
) -> adapters_pb2.LoadAdapterRequest:
    """The message. Raises InvalidRequest for what cannot be sent."""
    return filled(
        adapters_pb2.LoadAdapterRequest(),
        name=name,
        source=source,
        replace=replace,
        pin=pin,
        validate_only=validate_only,
    )


def unload_request(
    name: str, drain_timeout: float | None, cancel_after_timeout: bool
) -> adapters_pb2.UnloadAdapterRequest:
    """The message; `drain_timeout` in seconds, None: no bound. Raises InvalidRequest for what cannot be sent."""
    message = filled(adapters_pb2.UnloadAdapterRequest(), name=name, cancel_after_timeout=cancel_after_timeout)
    if drain_timeout is not None:
        try:
            message.drain_timeout.FromNanoseconds(int(drain_timeout * 1e9))
        except (TypeError, ValueError, OverflowError):  # no number, NaN, more than ten thousand years
            text = f"must be a number of seconds, got {_short(drain_timeout)}; None is as long as it takes"
            raise InvalidRequest("drain_timeout", text) from None
    return message


def filled(message: M, **given: object) -> M:
    """The message with these fields. Raises InvalidRequest, by the field's name, for values that it cannot hold."""
    for name, value in given.items():
        _put(message, name, name, value)
    return message


def _put_input(
    message: generation_pb2.GenerateRequest | generation_pb2.CountTokensRequest,
    prompt: str | None,
    messages: Sequence[ChatTurn] | None,
    token_ids: Sequence[int] | None,
) -> None:
    """Set the one input that is given. Raises TypeError for none or several, InvalidRequest for what cannot be sent."""
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise TypeError("give exactly one of prompt, messages and token_ids")
    if prompt is not None:
        _put(message, "prompt", "prompt", prompt)
    elif messages is not None:
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise InvalidRequest("messages", f"must be a list of turns, got {_short(messages)}")
        message.chat.SetInParent()
        message.chat.messages.extend(_turn(turn, f"messages[{i}]") for i, turn in enumerate(messages))
    elif token_ids is not None:
        message.token_ids.SetInParent()
        _put(message.token_ids, "ids", "token_ids", token_ids)


def _put_mix(
    message: generation_pb2.GenerateRequest | adapters_pb2.MergeAdapterRequest, mix: Mapping[str, float] | None
) -> None:
    if not isinstance(mix, Mapping | None):
        raise InvalidRequest("mix", f"must be a mapping of adapters' names to weights, got {_short(mix)}")
    if mix is not None and not mix:  # in the message it would be as if none was asked for
        raise InvalidRequest("mix", "is empty; name the adapters and their weights, or leave it out")
    for i, (name, weight) in enumerate((mix or {}).items()):
        part = message.mix.add()
        _put(part, "adapter", f"mix[{i}].adapter", name)
        _put(part, "weight", f"mix[{i}].weight", weight)


def _turn(turn: object, where: str) -> generation_pb2.ChatMessage:
    """A turn as OpenAI's clients write it, as far as it is text. Raises InvalidRequest for the rest, by its name."""
    if not isinstance(turn, Mapping):
        raise InvalidRequest(where, f"must be a mapping with role and content, got {_short(turn)}")
    for key, value in turn.items():
        if key not in ("role", "content") and value not in (None, []):  # SDKs write down what is not there
            raise InvalidRequest(f"{where}.{key}", "is not supported; a turn has role and content, both of them text")
    message = generation_pb2.ChatMessage()
    for key in ("role", "content"):
        if turn.get(key) is None:
            raise InvalidRequest(f"{where}.{key}", "is missing; a turn has role and content, both of them text")
    if not isinstance(turn["role"], str):
        raise InvalidRequest(f"{where}.role", f"must be text, got {_short(turn['role'])}")
    _put(message, "role", f"{where}.role", turn["role"])
    _put(message, "content", f"{where}.content", _text(turn["content"], f"{where}.content"))
    return message


def _text(content: object, where: str) -> str:
    """The text of a turn's content, whose parts follow each other directly. Raises InvalidRequest for other parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise InvalidRequest(where, f"must be text or a list of text parts, got {_short(content)}")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequest(where, f"must be a part with type and text, got {_short(part)}")
    if part.get("type") != "text":
        raise InvalidRequest(
            where, f"is a part of type {_short(part.get('type'))}; the models here read text only: type 'text'"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text", f"must be text, got {_short(text)}")
    for key, value in part.items():
        if key not in ("type", "text") and value is not None:
            raise InvalidRequest(f"{where}.{key}", "is not supported; a text part has type and text")
    return text


def _put(message: object, name: str, field: str, value: object) -> None:
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"{_short(value)} cannot be sent: {error}") from None
    except AttributeError:  # one value where several are asked for, or several for one
        raise InvalidRequest(field, f"{_short(value)} cannot be sent: it is of another type") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def result(message: generation_pb2.GenerateResponse) -> Result:
    """A unary answer."""
    return Result(
        request_id=message.request_id,
        adapters=_used(message.adapters),
        completions=tuple(
            Completion(
                index=c.index,
                text=c.text,
                token_ids=tuple(c.token_ids),
                logprobs=_logprobs(c.logprobs),
                finish_reason=_finish_reason(c.finish_reason),
                stop=c.stop,
            )
            for c in message.completions
        ),
        usage=_usage(message.usage),
        timings=_timings(message.timings),
    )


def stream_event(message: generation_pb2.GenerateStreamResponse) -> StreamEvent:
    """One message of a stream."""
    match message.WhichOneof("event"):
        case "started":
            started = message.started
            return Started(started.request_id, started.prompt_tokens, _used(started.adapters))
        case "delta":
            delta = message.delta
            return Delta(delta.index, delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs))
        case _:
            end = message.finished
            return Finished(
                end.index,
                _finish_reason(end.finish_reason),
                end.stop,
                _usage(end.usage),
                _timings(end.timings),
            )


def model(message: generation_pb2.GetModelResponse) -> Model:
    """The base model."""
    values = {field: getattr(message, field) for field in Model.__annotations__}
    return Model(**values | {"target_modules": tuple(message.target_modules)})


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    """An adapter."""
    state = adapters_pb2.AdapterState.Name(message.state).removeprefix("ADAPTER_STATE_")
    residency = adapters_pb2.Residency.Name(message.residency).removeprefix("RESIDENCY_")
    return Adapter(
        name=message.name,
        uid=message.uid,
        digest=message.digest,
        source=message.source,
        state=state.lower(),
        residency=residency.lower(),
        pinned=message.pinned,
        device_bytes=message.device_bytes,
        size_bytes=message.size_bytes,
        max_rank=message.max_rank,
        target_modules=tuple(message.target_modules),
        sites=message.sites,
        leases=message.leases,
        loaded_at=message.loaded_at.ToDatetime(UTC) if message.HasField("loaded_at") else None,
        last_used_at=message.last_used_at.ToDatetime(UTC) if message.HasField("last_used_at") else None,
        load_seconds=message.load_time.ToNanoseconds() / 1e9,
        error=message.error,
        merged=message.merged,
        warnings=tuple(message.warnings),
    )


def adapter_list(page: adapters_pb2.ListAdaptersResponse, adapters: Iterable[Adapter]) -> AdapterList:
    """All adapters, with the totals of the last page."""
    totals = page.device_bytes, page.device_budget_bytes, page.host_bytes, page.host_budget_bytes
    return AdapterList(tuple(adapters), *totals)


def merge_request(
    name: str, output: str, dtype: str, mix: Mapping[str, float] | None
) -> adapters_pb2.MergeAdapterRequest:
    """The message. Raises InvalidRequest for what no message can hold."""
    if dtype not in ("bf16", "fp16", "fp32"):
        raise InvalidRequest("dtype", f"{dtype!r} is none of bf16, fp16 and fp32")
    message = adapters_pb2.MergeAdapterRequest(dtype=f"MERGE_DTYPE_{dtype.upper()}")
    filled(message, name=name, output=output)
    _put_mix(message, mix)
    return message


def merging(message: adapters_pb2.MergeAdapterResponse) -> Merging | Merged:
    """One message of a merge."""
    if not message.HasField("report"):
        return Merging(message.tensors_done, message.tensors_total)
    r = message.report
    return Merged(message.output, r.bytes, r.layers, r.overall_error, r.worst_error, r.worst_layer)


def _used(adapters: Iterable[generation_pb2.ResolvedAdapter]) -> tuple[UsedAdapter, ...]:
    return tuple(UsedAdapter(a.name, a.uid, a.digest, a.weight) for a in adapters)


def _logprobs(items: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(i.token_id, i.text, i.logprob, _logprobs(i.top)) for i in items)


def _finish_reason(reason: generation_pb2.FinishReason) -> str:
    return generation_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _usage(u: generation_pb2.Usage) -> Usage:
    return Usage(u.prompt_tokens, u.completion_tokens, u.cached_prompt_tokens)


def _timings(t: generation_pb2.Timings) -> Timings:
    return Timings(t.queue, t.adapter_load, t.prefill, t.decode)
