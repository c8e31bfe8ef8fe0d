"""loramux: one NF4 base model, many LoRA adapters, one server."""

__version__ = "0.1.0"
