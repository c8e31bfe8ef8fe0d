"""The whole server, nothing faked: a tiny random model with a tokenizer, adapters on disk, gRPC on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from loramux.assembly import Application, assemble, prepare_model
from loramux.client import AsyncAdminClient, AsyncClient
from loramux.config import Settings
from loramux.rpc.server import Addresses
from loramux.values import Memory
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.model.tiny import save_tiny
from tests.patience import PATIENCE

TARGETS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def save_model(folder: Path) -> Path:
    """A tiny llama with one token a byte; id 256 ends a sequence."""
    save_tiny("llama", folder, vocab_size=257, eos_token_id=256, bos_token_id=256, pad_token_id=256)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=CHAT)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 256}))
    return folder


def save_adapter(
    folder: Path, *, rank: int = 4, seed: int = 0, layers: int = 3, bias: bool = False, **config: Any
) -> Path:
    """A random adapter on all linear layers, strong enough to change every answer; DoRA or QA-LoRA as `config` says."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (k, n) in TARGETS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            columns = k // config["qalora_group_size"] if config.get("use_qalora") else k
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=g) / 8
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, rank, generator=g) / 4
            if bias:
                tensors[f"{key}.lora_B.bias"] = torch.randn(n, generator=g) / 4
            if config.get("use_dora"):
                tensors[f"{key}.lora_magnitude_vector"] = torch.randn(n, generator=g).abs() * 2
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@dataclass
class Stack:
    """A running server and clients of it."""

    application: Application
    addresses: Addresses
    client: AsyncClient
    admin: AsyncAdminClient
    channel: grpc.aio.Channel

    def counts(self) -> dict[str, int]:
        """Everything that must return to where it began."""
        stats = self.application.engine.stats()
        registry = self.application.adapters.registry
        return {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_blocks": stats.kv_blocks_used,
            "leases": sum(len(entry.leases) for entry in registry.entries()),
            "adapters": len(registry.entries()),
            "adapter_bytes": registry.budget.used + registry.budget.reserved,
        }

    async def settle(self, baseline: dict[str, int], seconds: float = PATIENCE) -> None:
        """Wait until all counts are at `baseline`; fails with the difference if they never are."""
        try:
            async with asyncio.timeout(seconds):
                while self.counts() != baseline:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.counts()} never returned to {baseline}") from None


@asynccontextmanager
async def serving(model: Path, adapters: Path, **settings: Any) -> AsyncIterator[Stack]:
    """Start the server with float32 activations on free ports; drained at the end."""
    given: dict[str, Any] = {
        "model": str(model),
        "dtype": "fp32",
        "port": 0,
        "admin_port": 0,
        "metrics_port": 0,
        "kv_memory": Memory(bytes=4 << 20),
        "max_batch_tokens": 64,
        "max_batch_rows": 32,
        "adapter_dir": (adapters,),
        "adapter_scan_interval": 0.0,  # tests write folders as they go and say themselves what is loaded
        "drain_timeout": 5.0,
    }
    configured = Settings(**given | settings)
    application = assemble(configured, prepare_model(configured))
    await application.engine.start()
    addresses = await application.server.start()
    try:
        async with (
            AsyncClient(addresses.public) as client,
            AsyncAdminClient(addresses.admin) as admin,
            grpc.aio.insecure_channel(addresses.public) as channel,
        ):
            yield Stack(application, addresses, client, admin, channel)
    finally:
        await application.server.drain()
        await application.engine.stop()
