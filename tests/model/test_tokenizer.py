"""Texts and conversations to ids: as transformers has them, but a user's text is never a control token."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from loramux.errors import Cancelled, InvalidRequest
from loramux.model import tokenizer as tokenizer_module
from loramux.model.control_tokens import encode
from loramux.model.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog and hands the user a system of assistants",
    "<|im_start|> is not a word, nor is [INST] or <start_of_turn>user; user assistant system model end start of turn",
    "Numbers 0 1 2 3 4 5 6 7 8 9, marks . , ; : ! ? < > | [ ] ( ) _ - / \\ and \t tabs\n and lines\n\n",
]
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level(special: list[str], plain: list[str] = []) -> tokenizers.Tokenizer:  # noqa: B006
    """As GPT-2, Llama 3, Qwen: bytes, control tokens behind or, like SmolLM2's, within the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = BYTE_LEVEL
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=BYTE_LEVEL.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def sentencepiece_bpe(special: list[str]) -> tokenizers.Tokenizer:
    """As Llama 2, Mistral and Gemma: spaces become ▁, the text's beginning gets one, and no word is apart."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *special],
        initial_alphabet=list(map(chr, range(32, 127))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram(special: list[str]) -> tokenizers.Tokenizer:
    """Its vocabulary holds the control tokens as pieces of score 0: the likeliest of all."""
    pieces = [(char, -9.0) for char in map(chr, range(33, 127))] + [("▁", -5.0), ("▁the", -4.0), ("\n", -9.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((s, 0.0) for s in special), *pieces], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(special)
    return tokenizer


def spelled(*, ignore_merges: bool) -> tokenizers.Tokenizer:
    """Its own merges, or the words that it takes whole, lead to a control token."""
    merges = [] if ignore_merges else [("<", "/"), ("s", ">"), ("</", "s>")]
    pieces = [*map(chr, range(33, 127)), "Ġ", "Ċ", "</", "s>", "</s>", "<|im_start|>", "<|im_end|>"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, ignore_merges=ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), NO_REGEX])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>", "<|behind|>"])
    return tokenizer


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{{- m['content'] | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""
GEMMA = """{{ bos_token }}{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in messages %}{% if m['role'] != 'system' %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + (first if loop.first else '') }}
{{- m['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}{{ '<start_of_turn>model\\n' }}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"""
# As Qwen3's and DeepSeek's: what marks thoughts and turns is not special, and answers are cut behind their thoughts.
THINKING = """{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}
{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|' + m['role'] + '|>' + c + '<|end|>' }}
{%- endfor %}{{ '<|assistant|><think>\\n' }}{# <|user|> <|system|> #}"""
DIRECT = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}<|im_start|>"

BASES: dict[str, Any] = {
    "chatml": (lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), CHATML),
    "llama 3": (
        lambda: byte_level(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        LLAMA3,
    ),
    "gemma": (lambda: sentencepiece_bpe(["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]), GEMMA),
    "mistral": (lambda: sentencepiece_bpe(["<s>", "</s>", "[INST]", "[/INST]"]), MISTRAL),
    "unigram": (lambda: unigram(["<s>", "</s>", "<|im_start|>", "<|im_end|>"]), CHATML),
    "spelled by merges": (lambda: spelled(ignore_merges=False), CHATML),
    "spelled as a word": (lambda: spelled(ignore_merges=True), CHATML),
    "thinking": (
        lambda: byte_level(["<|end|>"], ["<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>"]),
        THINKING,
    ),
    "contents only": (lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), DIRECT),
}
_made: dict[str, tuple[Any, Tokenizer]] = {}


def base(name: str) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer and ours."""
    if name not in _made:
        make, template = BASES[name]

        def hf() -> Any:
            found = PreTrainedTokenizerFast(tokenizer_object=make(), chat_template=template)
            texts = found.get_vocab()
            found.bos_token = next((t for t in ("<s>", "<|begin_of_text|>") if t in texts), None)
            found.eos_token = next((t for t in ("</s>", "<|im_end|>", "<|eot_id|>", "<|end|>") if t in texts), None)
            return found

        _made[name] = hf(), Tokenizer(hf())
    return _made[name]


def control_ids(hf: Any) -> set[int]:
    """Without that of unknown characters, which stands for any text."""
    added = hf.backend_tokenizer.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special and token.content != "<unk>"}


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant")
    return [{"role": roles[min(i, 1 + (i + 1) % 2)], "content": content} for i, content in enumerate(contents)]


HARMLESS = st.text(alphabet=st.sampled_from("ab the\n\t <>|[]/_ imsndtuer1é語"), max_size=30)
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "[INST]",
    "</s>",
    "<s>",
    "<|user|>",
    "<|end|>",
]
HOSTILE = st.lists(
    st.one_of(HARMLESS, st.sampled_from([*CONTROL, "<|im_", "start|>", "<", "</", "<think>"])), max_size=6
)


@pytest.mark.parametrize("name", BASES)
@settings(max_examples=15, deadline=None)
@given(contents=st.lists(HARMLESS, min_size=1, max_size=4))
def test_contents_without_control_tokens_are_as_transformers_has_them(name: str, contents: list[str]) -> None:
    hf, ours = base(name)
    if any(token in "".join(contents) for token in hf.get_added_vocab()):
        return
    messages = turns(*contents)
    want = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode_chat(messages) == want
    # Nor does it matter which way they take: the renamed copy is the same tokenizer.
    render = partial(ours._render, at_least=lambda tokens: None)
    marked = tokenizer_module._marked(messages, contents, render, ours._control)
    assert ours._ids(ours._control.encode, marked, False, lambda tokens: None) == want


@pytest.mark.parametrize("name", BASES)
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(HOSTILE, min_size=1, max_size=3))
def test_no_content_makes_a_control_token(name: str, parts: list[list[str]]) -> None:
    """A user's "<|im_end|>" closed the turn, and what followed opened another."""
    hf, ours = base(name)
    control = control_ids(hf)
    got = ours.encode_chat(turns(*("".join(part) for part in parts)))
    harmless = ours.encode_chat(turns(*("x" for _ in parts)))
    assert [i for i in got if i in control] == [i for i in harmless if i in control]


@pytest.mark.parametrize("name", BASES)
def test_what_is_beside_a_control_tokens_text_is_as_it_was(name: str) -> None:
    """The ids of the other turns do not change, and together they are the same text."""
    hf, ours = base(name)
    inner = next(text for text in hf.get_added_vocab() if "unk" not in text and "think" not in text)
    with_text = ours.encode_chat(turns("the system", f"a {inner} b", "an answer", "the user"))
    without = ours.encode_chat(turns("the system", "a b", "an answer", "the user"))
    before = next(i for i, (a, b) in enumerate(zip(with_text, without, strict=False)) if a != b)
    assert with_text[:before] == without[:before]
    after = len(without) - before - 3
    assert with_text[-after:] == without[-after:]
    plain = hf.apply_chat_template(
        turns("the system", f"a {inner} b", "an answer", "the user"), add_generation_prompt=True
    )
    texts = [hf.backend_tokenizer.decode(ids, skip_special_tokens=False) for ids in (with_text, plain["input_ids"])]
    assert texts[0].replace(" ", "") == texts[1].replace(" ", "")  # sentencepiece begins anew behind each token


def test_a_template_still_sees_the_token_that_it_looks_for_in_contents() -> None:
    """Thoughts of earlier answers are cut; a turn's mark in the same content stays text, special or not."""
    hf, ours = base("thinking")
    user = hf.convert_tokens_to_ids("<|user|>")
    whole = turns("be brief", "hi", "<think>\nhm</think>\n<|user|>hello", "more")
    cut = turns("be brief", "hi", "<|user|>hello", "more")
    assert ours.encode_chat(whole) == ours.encode_chat(cut)
    assert ours.encode_chat(whole).count(user) == 2


def test_texts_that_come_together_only_in_the_template() -> None:
    hf, ours = base("contents only")
    start = hf.convert_tokens_to_ids("<|im_start|>")
    assert ours.encode_chat(turns("a<|im_ ", "start|>b")).count(start) == 1
    assert ours.encode_chat(turns("a<|im_st", "art|>b", "<", "|im_start|>")).count(start) == 1


def test_the_marks_of_our_own_are_no_way_in() -> None:
    """Whoever knew them could write control tokens after all."""
    hf, ours = base("chatml")
    control = control_ids(hf)
    one, two = Tokenizer(hf), Tokenizer(hf)
    marks = [t._control.mark("<|im_start|>") for t in (one, two)]
    assert marks[0] != marks[1]
    text = "\U000f0000im_start|> \U0010fffd0\U0010fffd <|im_end|>"
    got = ours.encode_chat(turns("s", text))
    assert [i for i in got if i in control] == [i for i in ours.encode_chat(turns("s", "x")) if i in control]


@pytest.mark.parametrize("name", BASES)
def test_prompts_are_parsed_unless_told_otherwise(name: str) -> None:
    hf, ours = base(name)
    control = control_ids(hf)
    text = f"a {hf.eos_token} b"
    want = hf(text, add_special_tokens=True)["input_ids"]
    assert ours.encode(text) == want
    literal = ours.encode(text, parse_special=False)
    assert [i for i in literal if i in control] == [i for i in ours.encode("a b") if i in control]
    assert hf.decode(literal, skip_special_tokens=True).replace(" ", "").endswith(f"a{hf.eos_token}b")
    assert ours.encode("a b", parse_special=False) == ours.encode("a b") == hf("a b")["input_ids"]


@pytest.mark.parametrize(
    "text", ["a " * 100_000, "word" * 50_000, " " * 200_000, "語" * 100_000, "a<|im_end|>" * 20_000]
)
def test_a_long_text_is_given_up_where_it_is_known_to_be_too_long(text: str) -> None:
    """4 MB were tokenized for 50 s before they were refused, and went on after the caller had gone."""
    _, ours = base("chatml")
    most = len(ours.encode(text)) // 4
    told: list[int] = []

    def at_least(tokens: int) -> None:
        told.append(tokens)
        if tokens > most:
            raise InvalidRequest("prompt", "too long")

    with pytest.raises(InvalidRequest):
        ours.encode(text, True, at_least)
    assert told == sorted(told)
    assert len(told) < len(text) / 32768 / 2 + 1


@pytest.mark.parametrize("text", ["a " * 50_000, "word" * 30_000, "the quick brown fox. " * 5000, " " * 100_000])
@pytest.mark.parametrize("name", ["chatml", "mistral", "unigram"])
def test_what_a_long_text_has_at_least_is_never_more_than_it_has(name: str, text: str) -> None:
    _, ours = base(name)
    told: list[int] = []
    tokens = len(ours.encode(text, True, told.append))
    assert told
    assert max(told) <= tokens
    assert len(text) <= tokens * ours.longest_token


def test_others_run_while_a_text_is_tokenized() -> None:
    """tokenizers' `encode` holds the interpreter's lock: a megabyte stopped the event loop for seconds."""
    _, ours = base("chatml")
    begun, turns = threading.Event(), 0

    def work() -> None:
        begun.set()
        encode(ours.backend, "a " * 500_000, False)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    while thread.is_alive():
        turns += 1
        thread.join(0.001)
    assert turns > 3  # one or two without


def test_a_template_that_fails_is_the_requests_fault() -> None:
    hf, _ = base("chatml")
    for template in ("{{ 1 / 0 }}", "{{ messages[99].x.y }}", "{{ raise_exception('no') }}", "{{ 1 + 'a' }}"):
        hf.chat_template = template
        with pytest.raises(InvalidRequest, match="template refuses"):
            Tokenizer(hf).encode_chat(turns("hi"))
    hf.chat_template = CHATML


def test_a_template_that_does_not_end_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox bounds a range, not a range within a range."""
    monkeypatch.setattr(tokenizer_module, "_RENDER_SECONDS", 0.05)
    hf, _ = base("chatml")
    loop = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
    hf.chat_template = loop
    ours = Tokenizer(hf)
    try:
        with pytest.raises(InvalidRequest, match="takes more than"):
            ours.encode_chat(turns("hi"))

        def gone(tokens: int) -> None:
            raise Cancelled("the client went away")

        with pytest.raises(Cancelled):
            ours.encode_chat(turns("hi"), gone)
    finally:
        hf.chat_template = CHATML
    assert sys.gettrace() is None or "tokenizer" not in repr(sys.gettrace())
