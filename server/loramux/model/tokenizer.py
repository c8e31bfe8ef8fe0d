"""The base model's tokenizer as the server uses it: text or chat to ids, and ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError

from loramux.errors import InvalidRequest


class Tokenizer:
    """Wraps a transformers fast tokenizer. Thread-safe for encoding; holds no per-request state."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer

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

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that this tokenizer adds by its own configuration."""
        ids: list[int] = self._hf(text, add_special_tokens=True, verbose=False)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the base's chat template (rendered by transformers in Jinja's sandbox), ending
        where the assistant's answer begins. Raises InvalidRequest if there is no template or it refuses the turns."""
        if not self._hf.chat_template:
            raise InvalidRequest("chat", "this base model has no chat template; send `prompt` instead")
        try:
            ids: list[int] = self._hf.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise InvalidRequest("chat.messages", f"the base's chat template refuses them: {error}") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; incomplete UTF-8 becomes U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text


class IdsOnly:
    """Stands in where a model comes without tokenizer: token ids are served, text is refused."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """Decodes every id to nothing."""
        return tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))

    def encode(self, text: str) -> list[int]:
        """Raises InvalidRequest."""
        raise InvalidRequest("prompt", "this base model has no tokenizer; send `token_ids`")

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises InvalidRequest."""
        raise InvalidRequest("chat", "this base model has no tokenizer; send `token_ids`")
