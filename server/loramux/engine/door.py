"""The engine's door: every limit that a request must keep, whichever face it came through. Imports no torch.

Knows nothing of adapters' names or of proto messages; it only names their fields in errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loramux.engine.request import AdapterUse, SamplingParams
from loramux.engine.settings import EngineSettings
from loramux.errors import InvalidRequest
from loramux.lora import mixing

MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 3.4e38  # float32, in which logits are divided by it, ends a little later
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 2.0**-20  # a logit divided by much less may be no float32 any more
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Token ids are below `vocab_size`; prompt and output together have at most `max_context` tokens.

    `max_context` is the smaller of the model's context and the KV cache: what can never fit is refused.
    """

    vocab_size: int
    max_context: int
    settings: EngineSettings = field(default_factory=EngineSettings)

    @property
    def longest_prompt(self) -> int:
        """Tokens; one place is left for the first generated token."""
        return self.max_context - 1

    @property
    def max_chat_turns(self) -> int:
        """Of one conversation; each takes a token at least."""
        return min(self.settings.max_chat_turns, self.max_context)


def check_request(
    sampling: SamplingParams,
    prompt_ids: Sequence[int],
    limits: Limits,
    *,
    request_id: str = "",
    cache_salt: str = "",
    priority: int = 0,
    adapters: Sequence[AdapterUse] = (),
    prompt_field: str = "prompt",
) -> None:
    """Return if the request keeps every limit; raise InvalidRequest for the first that it does not.

    `adapters` may be loading still: see `check_mix`. `prompt_field` is the proto field that the ids came from. The
    error's `field` is a path in GenerateRequest, its text and metadata (`limit`, `given`) say what is allowed and what
    was given.
    """
    s = limits.settings
    check_prompt(prompt_ids, limits, prompt_field)
    _at_most("request_id", len(request_id), s.max_request_id_chars, "characters")
    _at_most("cache_salt", len(cache_salt), s.max_cache_salt_chars, "characters")
    _at_most("mix", len(adapters), s.max_mix, "adapters")
    check_mix(adapters)
    _within("priority", priority, -s.max_priority, s.max_priority)
    check_sampling(sampling, limits)


def check_mix(adapters: Sequence[AdapterUse]) -> None:
    """Raise InvalidRequest for a weight out of range, or an adapter that is mixed and cannot be, as far as it is
    known: of those that load it is not.

    So it is asked again once they have loaded.
    """
    mixing.check_mix([mixing.Part(use.handle.name, use.handle.mixable, use.weight) for use in adapters])


def check_sampling(p: SamplingParams, limits: Limits) -> None:
    """The part of `check_request` that needs no prompt. Raises InvalidRequest."""
    s = limits.settings
    _within("sampling.n", p.n, 1, s.max_n)
    if p.max_new_tokens < 1:
        raise _invalid("sampling.max_new_tokens", "must be at least 1", 1, p.max_new_tokens)
    _within("sampling.min_new_tokens", p.min_new_tokens, 0, p.max_new_tokens)
    _within("sampling.temperature", p.temperature, 0.0, MAX_TEMPERATURE)
    if p.top_k < 0:
        raise _invalid("sampling.top_k", "must not be negative; 0 keeps all tokens", 0, p.top_k)
    if not 0.0 < p.top_p <= 1.0:
        raise _invalid("sampling.top_p", "must be in (0, 1]", "(0, 1]", p.top_p)
    _within("sampling.min_p", p.min_p, 0.0, 1.0)
    if p.seed is not None:
        _within("sampling.seed", p.seed, 0, MAX_SEED)
    _within("sampling.repetition_penalty", p.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    _within("sampling.frequency_penalty", p.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("sampling.presence_penalty", p.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("sampling.top_logprobs", p.top_logprobs, 0, s.max_top_logprobs)
    _check_bias(p, limits)
    _check_stops(p, limits)


def check_prompt(prompt_ids: Sequence[int], limits: Limits, name: str) -> None:
    """The part of `check_request` that concerns the prompt. Raises InvalidRequest for the field `name`."""
    if not prompt_ids:
        raise _invalid(name, "is empty; give at least one token", 1, 0, reason="EMPTY_PROMPT")
    if len(prompt_ids) > limits.longest_prompt:
        raise prompt_too_long(name, len(prompt_ids), limits.max_context)
    _check_ids(name, prompt_ids, limits.vocab_size)


def prompt_too_long(name: str, tokens: int, max_context: int, *, or_more: bool = False) -> InvalidRequest:
    """The error for a prompt of so many tokens, or of at least so many."""
    return InvalidRequest(
        name,
        f"has {tokens} tokens{' or more' if or_more else ''}; this server's context of {max_context} tokens takes "
        f"prompts of at most {max_context - 1}",
        reason="PROMPT_TOO_LONG",
        metadata={"limit": max_context - 1, "given": tokens},
    )


def _check_bias(p: SamplingParams, limits: Limits) -> None:
    _at_most("sampling.logit_bias", len(p.logit_bias), limits.settings.max_logit_bias, "entries")
    _check_ids("sampling.logit_bias", tuple(p.logit_bias), limits.vocab_size)
    for token_id, bias in p.logit_bias.items():
        _within(f"sampling.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_stops(p: SamplingParams, limits: Limits) -> None:
    s = limits.settings
    _at_most("sampling.stop", len(p.stop), s.max_stop_strings, "strings")
    for i, text in enumerate(p.stop):
        if not text:
            raise _invalid(f"sampling.stop[{i}]", "is empty", 1, 0)
        _at_most(f"sampling.stop[{i}]", len(text), s.max_stop_chars, "characters")
    _at_most("sampling.stop_token_ids", len(p.stop_token_ids), s.max_stop_token_ids, "ids")
    _check_ids("sampling.stop_token_ids", tuple(p.stop_token_ids), limits.vocab_size)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        return
    for worst in (max(ids), min(ids)):
        if not 0 <= worst < vocab_size:
            raise _invalid(
                name,
                f"token id {worst} is not in the vocabulary, whose ids are 0 … {vocab_size - 1}",
                vocab_size - 1,
                worst,
                reason="TOKEN_ID_OUT_OF_RANGE",
            )


def _at_most(name: str, given: int, limit: int, what: str) -> None:
    if given > limit:
        raise _invalid(name, f"has {given} {what}; at most {limit} are allowed", limit, given)


def _within(name: str, given: float, low: float, high: float) -> None:
    if not low <= given <= high:  # also true of NaN
        raise _invalid(name, f"must be in [{low:g}, {high:g}], got {given!r}", f"[{low:g}, {high:g}]", given)


def _invalid(name: str, text: str, limit: object, given: object, *, reason: str | None = None) -> InvalidRequest:
    if str(given) not in text:
        text = f"{text}, got {given}"
    return InvalidRequest(name, text, reason=reason, metadata={"limit": limit, "given": given})
