"""Answers from the engine's events: the same however they come, and in pieces that hold nobody up."""

from __future__ import annotations

import asyncio

from loramux.engine.request import AdapterUse, Delta, FinishReason, SequenceFinished, Timings, TokenLogprob, Usage
from loramux.rpc import convert
from loramux.v1 import generation_pb2 as pb

from tests.engine.fakes import adapter

TOP = tuple(TokenLogprob(i, f"t{i}", -float(i)) for i in range(20))


def delta(index: int, tokens: int) -> Delta:
    logprobs = [TokenLogprob(i, f"t{i}", -0.5, TOP) for i in range(tokens)]
    return Delta(index, f"text {index} ", list(range(tokens)), logprobs)


def test_a_serialized_answer_is_the_message() -> None:
    """It is put together from pieces, lengths and all."""
    answer = convert.Answer(3)
    ends = {0: FinishReason.STOP, 1: FinishReason.LENGTH, 2: FinishReason.STOP}
    for tokens in (1, 40, 300):
        for index in ends:
            answer.add(delta(index, tokens) if index < 2 else Delta(index, "x" * tokens, [7] * tokens))
    for index, reason in ends.items():
        stop = "END" if index == 2 else ""
        answer.add(SequenceFinished(index, reason, stop, Usage(5, 9, 1), Timings(decode=2.0), last=index == 2))
    got = pb.GenerateResponse.FromString(answer.serialized("mine", [AdapterUse(adapter("a"), 0.5)]))
    assert (got.request_id, got.adapters[0].name, got.adapters[0].weight) == ("mine", "a", 0.5)
    assert (got.usage.completion_tokens, got.timings.decode) == (9, 2.0)
    assert [c.index for c in got.completions] == [0, 1, 2]
    for completion in got.completions[:2]:
        want = pb.Completion(
            index=completion.index,
            text=f"text {completion.index} " * 3,
            token_ids=[*range(1), *range(40), *range(300)],
            finish_reason=pb.FINISH_REASON_STOP if completion.index == 0 else pb.FINISH_REASON_LENGTH,
        )
        for tokens in (1, 40, 300):
            want.logprobs.extend(convert.token_logprobs(delta(0, tokens).logprobs))
        assert completion == want
    assert got.completions[2] == pb.Completion(
        index=2, text="x" * 341, token_ids=[7] * 341, finish_reason=pb.FINISH_REASON_STOP, stop="END"
    )


async def test_many_logprobs_leave_turns_to_others() -> None:
    """4,096 unread tokens with 20 alternatives each were made into messages in one go."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    whole, pieces = delta(1, 2000), []
    async for piece in convert.in_pieces(whole):
        assert isinstance(piece, Delta)
        assert sum(1 + len(item.top) for item in piece.logprobs) <= 2048
        pieces.append(piece)
    task.cancel()
    assert turns >= len(pieces) - 1 > 10
    added = pieces[0]
    for piece in pieces[1:]:
        added.merge(piece)
    assert added == whole


async def test_what_is_small_comes_in_one_piece() -> None:
    for event in (delta(0, 3), Delta(0, "x" * 9999, [1] * 9999), SequenceFinished(0, FinishReason.STOP)):
        assert [piece async for piece in convert.in_pieces(event)] == [event]
