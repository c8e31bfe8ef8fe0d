"""How much a request may hold: numbers of items and lengths of strings, looked at before anything is copied.

What the items are is checked later, by the door. Imports no torch.
"""

from __future__ import annotations

from loramux.engine.door import Limits
from loramux.errors import AdapterNotFound, InvalidRequest
from loramux.rpc.wire import Bound, Bounds
from loramux.v1 import generation_pb2 as pb

MAX_NAME_CHARS = 128  # no adapter has a longer name, see lora.roots
MAX_MERGED = 256  # adapters in one MergeAdapter
_V1 = "loramux.v1."


def bounds(limits: Limits) -> Bounds:
    """The bound of every repeated field of a request."""
    s = limits.settings
    return {
        _V1 + "TokenIds.ids": Bound("token_ids", limits.longest_prompt, "tokens", "PROMPT_TOO_LONG", fields=0),
        _V1 + "Chat.messages": Bound("chat.messages", limits.max_chat_turns, "turns", "TOO_MANY_TURNS", fields=3),
        _V1 + "GenerateRequest.mix": Bound("mix", s.max_mix, "adapters", fields=3),
        _V1 + "MergeAdapterRequest.mix": Bound("mix", MAX_MERGED, "adapters", fields=3),
        _V1 + "SamplingParams.logit_bias": Bound("sampling.logit_bias", s.max_logit_bias, "entries", fields=3),
        _V1 + "SamplingParams.stop": Bound("sampling.stop", s.max_stop_strings, "strings"),
        _V1 + "SamplingParams.stop_token_ids": Bound("sampling.stop_token_ids", s.max_stop_token_ids, "ids", fields=0),
    }


def check(message: pb.GenerateRequest, limits: Limits, bounds: Bounds) -> None:
    """Raise InvalidRequest for what there is too much of, AdapterNotFound for a name that no adapter can have.

    Takes no time, whatever the message holds.
    """
    check_input(message, bounds)
    bounds[_V1 + "GenerateRequest.mix"].check(len(message.mix))
    p = message.sampling
    bounds[_V1 + "SamplingParams.logit_bias"].check(len(p.logit_bias))
    bounds[_V1 + "SamplingParams.stop"].check(len(p.stop))
    bounds[_V1 + "SamplingParams.stop_token_ids"].check(len(p.stop_token_ids))
    s = limits.settings
    _check_length("request_id", message.request_id, s.max_request_id_chars)
    _check_length("cache_salt", message.cache_salt, s.max_cache_salt_chars)
    for name in (message.adapter, *(part.adapter for part in message.mix)):
        if len(name) > MAX_NAME_CHARS:  # there is none: no need to hash it, or to look for one like it
            raise AdapterNotFound(name)


def check_input(message: pb.GenerateRequest | pb.CountTokensRequest, bounds: Bounds) -> None:
    """The part of `check` that concerns the input."""
    bounds[_V1 + "TokenIds.ids"].check(len(message.token_ids.ids))
    bounds[_V1 + "Chat.messages"].check(len(message.chat.messages))


def _check_length(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise InvalidRequest(
            name,
            f"has {len(text)} characters; at most {most} are allowed",
            metadata={"limit": most, "given": len(text)},
        )
