"""Checkpoints with vision or audio towers beside their language model: the language model alone is served."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from loramux.errors import UnsupportedModel

# Segments of a tensor's path that lead into the language model of a checkpoint with other towers.
LANGUAGE_TOWERS = frozenset({"language_model", "text_model", "llm"})
# Their language models see the whole prompt, what comes later included, even without an image.
_PREFIX_MODELS = frozenset({"paligemma"})


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in one that also describes other towers; another is returned as it is.

    What stands outside and is the language model's takes its place within: whether the head is tied, the ids that
    end a text. Raises UnsupportedModel if that language model is not one that transformers runs alone.
    """
    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig) or config.is_encoder_decoder:
        return config
    if config.model_type in _PREFIX_MODELS:
        raise UnsupportedModel(
            f"{config.model_type}: its language model attends to the whole prompt at once; loramux drives causal "
            "models only"
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{config.model_type}: loramux serves the language model of a checkpoint with other towers, and "
            f"transformers has no causal language model for this one ({text.model_type}); take a text-only checkpoint"
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    ends = getattr(config, "eos_token_id", None)
    if ends is not None:
        text.eos_token_id = ends
    return text


def without_tower(key: str) -> str:
    """A tensor's name without the segment that leads into the language model, if there is one."""
    segments = key.split(".")
    at = next((i for i, segment in enumerate(segments) if segment in LANGUAGE_TOWERS), None)
    return key if at is None else ".".join(segments[:at] + segments[at + 1 :])
