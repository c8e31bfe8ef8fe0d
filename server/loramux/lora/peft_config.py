"""Our own strict schema of PEFT's adapter_config.json (the reference is LoraConfig of PEFT 0.21).

Knows which fields change what is computed, which do not, and which this server refuses. It never imports what a
config names (`megatron_core`, `auto_mapping` and the like are text to it) and does not look at tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from loramux.errors import InvalidAdapter
from loramux.lora.file_type import SIGNATURE_BYTES, describe
from loramux.lora.patterns import PatternTable
from loramux.lora.roots import CONFIG_FILE
from loramux.lora.selection import Selection, selection

_MAX_WHOLE = 1 << 24  # of a rank or a group size: far above what a layer can have
_MAX_NUMBER = 2.0**127  # of an alpha: what is above does not fit into float32, or overflows in the next operation
_MAX_PATTERNS = 4096
_MAX_NAMED = 32  # unknown fields in one message
Names = Annotated[list[str], Field(fail_fast=True)]  # an error for each of 200,000 entries would take seconds to write
Numbers = Annotated[list[int], Field(fail_fast=True)]
# The types of fields, each with what it is in the words of messages.
Rank = Annotated[int, Field(ge=1, le=_MAX_WHOLE, description=f"a whole number from 1 to {_MAX_WHOLE}")]
Alpha = Annotated[
    float,
    Field(
        allow_inf_nan=False,
        ge=-_MAX_NUMBER,
        le=_MAX_NUMBER,
        description="a number that fits into float32, at most 2**127",
    ),
]
Switch = Annotated[bool | None, Field(description="true or false")]
Text = Annotated[str | None, Field(description="text")]
Modules = Annotated[Names | str | None, Field(description="a list of names, or one pattern")]
ListedModules = Annotated[Names | None, Field(description="a list of names")]
Layers = Annotated[Numbers | int | None, Field(description="a whole number, or a list of them")]
Init = Annotated[bool | str | None, Field(description="true, false or the name of an initialization")]
Biases = Annotated[Literal["none", "all", "lora_only"], Field(description="'none', 'all' or 'lora_only'")]

# How an adapter that moved part of the base into its factors becomes a plain one. PEFT's own name for the way.
_SAVE_PLAIN = (
    "it was trained on a changed base (W - s*B*A), which this server does not have; load it in peft and save it as "
    "plain LoRA with `model.save_pretrained(out, path_initial_model_for_weight_conversion=initial)`, where `initial` "
    "is the folder of the adapter as it was saved before training"
)
_REFUSED_INITS: Mapping[str, str] = {
    "pissa": _SAVE_PLAIN,
    "olora": _SAVE_PLAIN,
    "corda": _SAVE_PLAIN,
    "lora_ga": _SAVE_PLAIN,
    "loftq": "it was trained on a base that LoftQ changed, which this server does not have; train with "
    "init_lora_weights=true, or start with peft's `replace_lora_weights_loftq`, which leaves the base as it is",
}
_HONOURED_INITS = ("gaussian", "eva", "orthogonal", "mica")  # they leave the base as it is

# Fields that change what the adapter computes in a way this server does not serve: field → the way out.
_REFUSED_FIELDS: Mapping[str, str] = {
    "layer_replication": "it changes the layers of the base; train on the base as it is served",
    "alora_invocation_tokens": "activated LoRA changes only what follows its tokens in a sequence; train with it unset",
    "kasa_config": "it was trained on a base without its smallest singular values, which this server does not have; "
    "train with it unset",
    "arrow_config": "Arrow chooses adapters for each token; load those adapters one by one, or ask for a `mix` of them",
    "use_bdlora": "its factors are block-diagonal; write them out as full lora_A and lora_B, with zeros between the "
    "blocks, and set it to null",
}
# Of those, the one for which an empty container means "not used" to PEFT. For the others {} turns the method on.
_EMPTY_IS_UNUSED = frozenset({"layer_replication"})
# Fields that do nothing without tensors of their own; such tensors are refused by their keys (lora.matching).
_NEED_TENSORS = (
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "velora_config",
    "monteclora_config",
)
# What trainers write beside PEFT's fields and read themselves, or older PEFT did: nothing of it is used in inference.
_TRAINERS_FIELDS = frozenset(
    {
        *("lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"),
        *("learning_rate", "lr", "lr_scheduler_type", "optimizer", "weight_decay", "warmup_ratio", "warmup_steps"),
        *("num_train_epochs", "num_epochs", "max_steps", "batch_size", "max_seq_length", "max_length", "packing"),
        *("gradient_checkpointing", "gradient_accumulation_steps", "seed", "random_state", "neftune_noise_alpha"),
        *("merge_weights", "lora_dtype", "unsloth_version", "unsloth_fixed", "swift_version", "transformers_version"),
        *("library_name", "license", "tags", "datasets", "dataset", "language", "created_at", "date", "description"),
        *("base_model_class", "parent_library", "tokenizer_name_or_path", "model_max_length", "torch_dtype", "dtype"),
    }
)


class PeftConfig(BaseModel):
    """A checked adapter_config.json. Frozen; values are of the JSON types named here, never coerced."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", arbitrary_types_allowed=True)

    # Honoured: these decide the scale and the shapes.
    peft_type: Text = None
    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: Switch = False
    rank_pattern: PatternTable[int] = PatternTable()
    alpha_pattern: PatternTable[float] = PatternTable()
    lora_bias: Switch = False
    use_dora: Switch = None
    use_qalora: Switch = None
    qalora_group_size: Any = None  # without use_qalora it has no effect
    init_lora_weights: Init = True

    # Honoured: what these leave out must not be in the file (lora.selection).
    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: Layers = None
    layers_pattern: Modules = None

    # No effect on what is computed: A and B have the same shapes for Conv1D, dropout ends with training, and the
    # configs of an initialization stay in the file when the adapter was converted to plain LoRA.
    fan_in_fan_out: Any = False
    lora_dropout: Any = 0.0
    ensure_weight_tying: Any = False
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    megatron_config: Any = None
    megatron_core: Any = None
    task_type: Any = None
    auto_mapping: Any = None
    peft_version: Any = None
    base_model_name_or_path: Any = None
    revision: Any = None
    inference_mode: Any = None
    runtime_config: Any = None

    # No effect without tensors of their own, which are refused where they are.
    bias: Biases = "none"
    modules_to_save: ListedModules = None
    trainable_token_indices: Any = None
    target_parameters: ListedModules = None
    velora_config: Any = None
    monteclora_config: Any = None

    # Refused unless unused.
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    kasa_config: Any = None
    arrow_config: Any = None
    use_bdlora: Any = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _compile(cls, value: object, info: ValidationInfo) -> PatternTable[Any]:
        field = str(info.field_name)
        if not isinstance(value, dict | None):
            _refuse(field, f"is an object of patterns, not {shown(value)}")
        if len(value or {}) > _MAX_PATTERNS:
            _refuse(field, f"has {len(value or {})} patterns; the limit is {_MAX_PATTERNS}")
        for key, number in (value or {}).items():
            _check_number(field, key, number)
        return PatternTable.compile(field, value or {})

    def rank_of(self, *paths: str) -> int:
        """The rank that the config gives the module that is known by `paths`; see PatternTable.find."""
        return self.rank_pattern.find(paths, self.r)

    def selection(self) -> Selection:
        """Which modules it selects. Raises InvalidAdapter for what is no regular expression."""
        return selection(
            self.target_modules,
            self.exclude_modules,
            self.modules_to_save or (),
            self.layers_to_transform,
            self.layers_pattern,
        )

    @property
    def switched_on(self) -> tuple[str, ...]:
        """The fields that are in use, as far as the config says, but do nothing without tensors of their own."""
        return tuple(f for f in _NEED_TENSORS if getattr(self, f) not in (None, False, "none", [], {}))

    @property
    def pooling(self) -> int:
        """How many inputs share a column of A."""
        return int(self.qalora_group_size) if self.use_qalora else 1

    def scale_of(self, rank: int, *paths: str) -> float:
        """The factor of B·A·x (and of B's bias) at the module that is known by `paths`, whose tensors have `rank`."""
        alpha = self.alpha_pattern.find(paths, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(data: bytes) -> PeftConfig:
    """The checked config in `data`; raises InvalidAdapter that names the field and the way out."""
    fields = _load_json(data)
    _check_origin(fields)
    try:
        config = PeftConfig.model_validate(fields)
    except ValidationError as error:
        raise InvalidAdapter(CONFIG_FILE, "; ".join(_problems(error)), reason="INVALID_CONFIG") from None
    refusals: list[InvalidAdapter] = []
    checks: tuple[Callable[[PeftConfig], None], ...] = (_check_peft_type, *_FIELD_CHECKS, *_OTHER_CHECKS)
    for check in checks:
        try:
            check(config)
        except InvalidAdapter as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:  # at once: nobody mends a file one error a try
        raise InvalidAdapter(CONFIG_FILE, "; ".join(r.message for r in refusals), reason="UNSUPPORTED_ADAPTER")
    return config


def _problems(error: ValidationError) -> list[str]:
    """For each field that pydantic found wrong, in our words: what it is, and what stands there."""
    found: dict[str, str] = {}
    for wrong in error.errors(include_url=False, include_context=False):
        field, *within = wrong["loc"]
        in_list = any(isinstance(part, int) for part in within)
        if field not in found or in_list:  # of several types that may stand there, the one that is meant
            what = f"a list with {shown(wrong['input'])}" if in_list else shown(wrong["input"])
            found[str(field)] = f"{field}: is {PeftConfig.model_fields[str(field)].description}, not {what}"
    return list(found.values())


def _load_json(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} appears twice")
            found[key] = value
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(CONFIG_FILE, _not_json(data, error), reason="INVALID_CONFIG") from None
    if not isinstance(fields, dict):
        raise InvalidAdapter(
            CONFIG_FILE, f"holds a JSON {type(fields).__name__}, not an object", reason="INVALID_CONFIG"
        )
    return fields


def _not_json(data: bytes, error: Exception) -> str:
    if data[8:9] == b"{" and b"data_offsets" in data[:65536]:
        return "is a safetensors file, not JSON; were the two files exchanged?"
    json_text = data.lstrip()[:1] in (b"{", b"[") and data[1:2] != b"\0"
    what = None if json_text else describe(data[:SIGNATURE_BYTES], CONFIG_FILE)
    return what or f"is not valid JSON: {error}"


def _check_origin(fields: Mapping[str, Any]) -> None:
    """Raises InvalidAdapter for a config that is none of PEFT's LoRA."""
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        raise InvalidAdapter(
            CONFIG_FILE,
            "is MLX's, not PEFT's. Convert it: in the weights lora_a becomes lora_A.weight and lora_b lora_B.weight, "
            "both transposed; write peft_type LORA, r (MLX's rank), lora_alpha (rank * scale) and target_modules here",
            reason="INVALID_CONFIG",
        )
    if "r" not in fields and not fields.keys().isdisjoint(("error", "weight_map")):
        raise InvalidAdapter(
            CONFIG_FILE,
            "is a server's answer to a download, or an index of weights; the adapter's own is what PEFT's "
            "save_pretrained writes: fetch it again",
            reason="INVALID_CONFIG",
        )
    if "r" not in fields and not fields.keys().isdisjoint(("architectures", "model_type", "tokenizer_class")):
        raise InvalidAdapter(
            CONFIG_FILE,
            "is the config of a whole model or a tokenizer; the adapter's own is what PEFT's save_pretrained writes",
            reason="INVALID_CONFIG",
        )
    if fields.get("peft_type") is None and not {"r", "lora_alpha"} <= fields.keys():
        _refuse(
            "peft_type",
            'is missing, and without r and lora_alpha it does not look like LoRA; if it is, add "peft_type": "LORA" '
            "and the r and lora_alpha that it was trained with",
        )


def _check_peft_type(config: PeftConfig) -> None:
    if config.peft_type is not None and config.peft_type != "LORA" and config.peft_type.strip().upper() == "LORA":
        _refuse("peft_type", f"{config.peft_type!r} is no method that PEFT knows; write it as 'LORA'")
    if config.peft_type not in ("LORA", None):
        _refuse(
            "peft_type",
            f"{config.peft_type!r} is not served, only 'LORA' is; where the method adds to weights of linear layers, "
            "peft's `save_as_lora(out, model, rank=...)` writes a LoRA that comes near it",
        )


def _check_field(field: str, way_out: str, config: PeftConfig) -> None:
    value = getattr(config, field)
    unused = value is None or value is False or (field in _EMPTY_IS_UNUSED and value in ([], {}))
    if not unused:
        _refuse(field, f"{shown(value)} is not served: {way_out}")


_FIELD_CHECKS = tuple(partial(_check_field, field, way_out) for field, way_out in _REFUSED_FIELDS.items())


def _check_variant(config: PeftConfig) -> None:
    """DoRA and QA-LoRA, as far as PEFT defines them."""
    if config.use_dora and config.lora_bias:
        _refuse("lora_bias", "has no meaning with use_dora=true, and PEFT refuses it; train with lora_bias=false")
    if not config.use_qalora:
        return
    if config.use_dora:
        _refuse("use_qalora", "is not defined together with use_dora, and PEFT refuses it; train with one of the two")
    if config.lora_bias:
        _refuse(
            "lora_bias",
            "is left out by PEFT when it computes QA-LoRA; set it to false and drop the lora_B.bias tensors, which "
            "changes no answer",
        )
    size = config.qalora_group_size
    if type(size) is not int or not 2 <= size <= _MAX_WHOLE:
        _refuse(
            "qalora_group_size",
            f"is the number of inputs that were pooled in training, a whole number of at least 2, not {shown(size)}; "
            "write the number that the adapter was trained with (PEFT's default is 16)",
        )


def _check_init(config: PeftConfig) -> None:
    value = config.init_lora_weights
    if not isinstance(value, str):
        return
    # PEFT compares some names with `startswith` and some in any case, so all are refused in the widest sense.
    name = value.strip().lower().replace("-", "_")
    for prefix, way_out in _REFUSED_INITS.items():
        if name.startswith(prefix) or name.replace("_", "").startswith(prefix.replace("_", "")):
            _refuse("init_lora_weights", f"{value!r}: {way_out}")
    if name not in _HONOURED_INITS:
        _refuse(
            "init_lora_weights",
            f"{value!r} is unknown to this server, so it cannot tell whether the base was changed; set it to true "
            "if it was not",
        )


def _check_unknown(config: PeftConfig) -> None:
    """Raises InvalidAdapter that names all unknown fields with a value."""
    unknown = {
        field: value
        for field, value in (config.model_extra or {}).items()
        if field not in _TRAINERS_FIELDS
        and (field, value) != ("swift_type", "LORA")
        and not (value is None or value is False or value in ("", [], {}))
    }
    if unknown:
        named = [f"{field[:80]} ({shown(value)})" for field, value in list(unknown.items())[:_MAX_NAMED]]
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        _refuse(
            CONFIG_FILE,
            f"has fields that are unknown to this server and may change what the adapter computes: "
            f"{', '.join(named)}{more}; remove those that do not, or update the server",
        )


_OTHER_CHECKS = (_check_variant, _check_init, _check_unknown)


def _check_number(field: str, key: str, number: object) -> None:
    place = f"{field}[{key[:80]!r}]"
    if field == "rank_pattern" and (type(number) is not int or not 1 <= number <= _MAX_WHOLE):
        _refuse(place, f"a rank is a whole number from 1 to {_MAX_WHOLE}, not {shown(number)}")
    if type(number) not in (int, float) or not abs(cast(float, number)) <= _MAX_NUMBER:
        _refuse(place, f"an alpha is a number that fits into float32, at most 2**127, not {shown(number)}")


def _refuse(field: str, message: str) -> NoReturn:
    raise InvalidAdapter(field, message, reason="UNSUPPORTED_ADAPTER")


def shown(value: object) -> str:
    """The value in a message, cut to a bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
