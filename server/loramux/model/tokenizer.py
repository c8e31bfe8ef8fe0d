"""The base model's tokenizer as the server uses it: text or chat to ids, and ids to text."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError

from loramux.errors import InvalidRequest
from loramux.model.control_tokens import ControlTokens, control_texts, encode
from loramux.model.renderer import TemplateRenderer

AtLeast = Callable[[int], None]  # told how many tokens a text has at least, as that becomes known; raises to stop

_PIECE = 32 << 10  # characters
_RENDER_SECONDS = 5.0  # of the thread's own time; a thousand turns take some hundredths
_LEAST_LONGEST = 16  # characters of the longest token, where a vocabulary is no measure: of bytes, say
_MOST_CONTROLS = 8  # copies of the tokenizer for templates with control tokens of their own
_COMPOSED = 4  # most characters that a normalizer makes one of: α and three marks
# What a template raises on turns that it was not written for, beside its own errors.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _go_on(tokens: int) -> None:
    pass


class Tokenizer:
    """Wraps a transformers fast tokenizer. Thread-safe for encoding; holds no per-request state."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self.renderer: TemplateRenderer | None = None  # of adapters' templates
        self.backend.no_truncation()
        self.backend.no_padding()
        self._controls: OrderedDict[str, ControlTokens] = OrderedDict()  # by templates of adapters
        self._lock = threading.Lock()
        self._control = ControlTokens(self.backend, self._template, hf_tokenizer.all_special_tokens)
        longest = max(map(len, self.backend.get_vocab()), default=1)
        composed = 1 if self.backend.normalizer is None else _COMPOSED
        self._longest = max(longest, _LEAST_LONGEST) * composed

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The Rust tokenizer underneath, for incremental decoding."""
        backend: tokenizers.Tokenizer = self._hf.backend_tokenizer
        return backend

    @property
    def chat_template(self) -> str | None:
        """The template that messages are rendered with; None without one."""
        template = self._hf.chat_template
        return template if isinstance(template, str) else None

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence id; the model's generation config may name more."""
        token_id: int | None = self._hf.eos_token_id
        return token_id

    @property
    def longest_token(self) -> int:
        """Most characters of a text that one token stands for."""
        return self._longest

    def encode(self, text: str, parse_special: bool = True, at_least: AtLeast = _go_on) -> list[int]:
        """Ids of `text`, with the special tokens that this tokenizer adds by its own configuration.

        With `parse_special`, the text of a special token is that token; without, it is text like any other. A long
        text is counted in pieces first, `at_least` being asked after each.
        """
        return self._ids(self._parsed if parse_special else self._control.encode, text, True, at_least)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], at_least: AtLeast = _go_on, template: str | None = None
    ) -> list[int]:
        """Ids of a conversation in the base's chat template (rendered by transformers in Jinja's sandbox), or in an
        adapter's `template` (by `renderer`), ending where the assistant's answer begins. The text of a control token
        in a turn's content is text like any other. Raises InvalidRequest if there is no template or it refuses the
        turns."""
        render, control = partial(self._render, at_least=at_least), self._control
        if template is not None:
            assert self.renderer is not None, "templates of adapters are used only with what renders them"
            render, control = partial(self.renderer.render, template), self._control_of(template)
        elif not self._hf.chat_template:
            raise InvalidRequest("chat", "this base model has no chat template; send `prompt` instead")
        contents = [turn["content"] for turn in messages]
        if not control.in_contents(contents):
            return self._ids(self._parsed, render(messages), False, at_least)
        return self._ids(control.encode, _marked(messages, contents, render, control), False, at_least)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; incomplete UTF-8 becomes U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def _template(self) -> str:
        template = self._hf.chat_template
        return template if isinstance(template, str) else "".join((template or {}).values())

    def _render(self, messages: Sequence[Mapping[str, str]], at_least: AtLeast) -> str:
        try:
            with _interrupted(at_least):
                text: str = self._hf.apply_chat_template(
                    [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
                )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest("chat.messages", f"the base's chat template refuses them: {error}") from error
        return text

    @property
    def special_tokens(self) -> dict[str, str]:
        """What templates may name: bos_token, eos_token and the like."""
        return {name: str(text) for name, text in self._hf.special_tokens_map.items() if isinstance(text, str)}

    def _control_of(self, template: str) -> ControlTokens:
        """The control tokens with an adapter's template; the base's own unless it writes others."""
        more = self._hf.all_special_tokens
        with self._lock:
            if (found := self._controls.get(template)) is None:
                same = control_texts(self.backend, template, more) == self._control.texts
                found = self._control if same else ControlTokens(self.backend, template, more)
                self._controls[template] = found
                if len(self._controls) > _MOST_CONTROLS:
                    self._controls.popitem(last=False)
            return found

    def _parsed(self, text: str, add_special_tokens: bool) -> list[int]:
        return encode(self.backend, text, add_special_tokens)

    def _ids(
        self, encode: Callable[[str, bool], list[int]], text: str, add_special_tokens: bool, at_least: AtLeast
    ) -> list[int]:
        """A long text is counted in pieces first. A cut may make more tokens of the one that it goes through, never
        more than that has characters."""
        tokens = 0
        for start in range(0, len(text) if len(text) > _PIECE else 0, _PIECE):
            tokens += len(encode(text[start : start + _PIECE], False)) - self._longest
            at_least(tokens)
        return encode(text, add_special_tokens)


def _marked(
    messages: Sequence[Mapping[str, str]],
    contents: list[str],
    render: Callable[[Sequence[Mapping[str, str]]], str],
    control: ControlTokens,
) -> str:
    """The rendered conversation for `ControlTokens.encode`: marks where the template wrote control tokens.

    The template gets the contents with one character of each control token's text disguised, which it hands on
    whatever it does with them. If that changes what it does, it looks for such texts in contents itself, as it may
    for "</think>": tokens that are not special are then left to it.
    """
    plain = render(messages)
    masks = control.masks(plain, *contents)
    unmask = str.maketrans({mask: first for first, mask in masks.items()})

    def disguised(but: frozenset[str]) -> str:
        masked = control.disguise(contents, masks, but)
        return render([{**m, "content": c} for m, c in zip(messages, masked, strict=True)])

    text = disguised(frozenset())
    if text.translate(unmask) != plain:
        found = frozenset(control.found(contents))
        looked_for = {t for t in found - control.special if disguised(found - {t}).translate(unmask) != plain}
        text = disguised(frozenset(looked_for))
    return control.mark(text).translate(unmask)


@contextmanager
def _interrupted(at_least: AtLeast) -> Iterator[None]:
    """Before each line of a template's code, ask `at_least`, and raise InvalidRequest if it has run for too long.

    The sandbox bounds a range, not loops within loops: a template could keep the thread for ever.
    """
    end = time.thread_time() + _RENDER_SECONDS

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        at_least(0)
        if time.thread_time() > end:
            raise InvalidRequest("chat.messages", f"the base's chat template takes more than {_RENDER_SECONDS:g} s")
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


class IdsOnly:
    """Stands in where a model comes without tokenizer: token ids are served, text is refused."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """Decodes every id to nothing."""
        return tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))

    @property
    def longest_token(self) -> int:
        """See Tokenizer; nothing is encoded here."""
        return 1 << 30

    def encode(self, text: str, parse_special: bool = True, at_least: AtLeast = _go_on) -> list[int]:
        """Raises InvalidRequest."""
        raise InvalidRequest("prompt", "this base model has no tokenizer; send `token_ids`")

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], at_least: AtLeast = _go_on, template: str | None = None
    ) -> list[int]:
        """Raises InvalidRequest."""
        raise InvalidRequest("chat", "this base model has no tokenizer; send `token_ids`")
