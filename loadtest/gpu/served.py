"""Real servers over gRPC: whether a mixed batch answers as each request alone does, and tokens a second."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from loramux.client import AsyncClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from loadtest.adapters import write_adapters
from loadtest.bench import BenchSpec, bench
from loadtest.commands.options import connect
from loadtest.gpu.report import Job, Row
from loadtest.gpu.scale import Decoder
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes
from loadtest.workload import WorkloadSpec, plan

FLAG = "--batch-invariant"  # promises equal answers
QUESTIONS = 16
END = 256  # a token a byte; then the end; then fillers, so that the vocabulary has the size of a real one


def served(job: Job) -> None:
    """A random model of a small real shape, with the flag and without it."""
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-check-") as scratch:
        folder, root, decoder = Path(scratch), Path(scratch) / "adapters", job.scale.served
        job.report.at("writing a model and adapters")
        write_model(decoder, folder / "model", job.scale.device)
        shapes, ranks = linear_shapes(decoder.config()), job.scale.mixed_ranks
        names = [path.name for path in write_adapters(root, shapes, count=job.scale.served_adapters, ranks=ranks)]
        arguments = ["--model", str(folder / "model"), "--device", job.scale.device, "--adapter-dir", str(root)]
        arguments += ["--max-context", "1024", "--adapter-memory", "4GiB", "--log-level", "warning"]
        for flags in ([FLAG],) if job.scale.device == "cpu" else ([FLAG], []):
            with job.report.filling(served=" ".join([decoder.name, *flags])) as row:
                job.attempt("a server", partial(one_server, job, row, [*arguments, *flags], names, folder))


def one_server(job: Job, row: Row, arguments: Sequence[str], names: Sequence[str], folder: Path) -> None:
    """How many answers of a mixed batch were those of the same requests alone, and output tokens a second."""
    begin = time.monotonic()
    with serve(arguments, folder, start_timeout=max(10.0, job.left)) as address:
        row["start, s"] = round(time.monotonic() - begin, 1)
        equal = job.attempt(f"{row['served']}: answers", lambda: asyncio.run(equal_answers(job, address, names)))
        if equal is not None:
            row["answers as alone"] = f"{equal} of {QUESTIONS}"
            if FLAG in arguments and equal < QUESTIONS:
                job.report.problem(
                    f"{row['served']}: {QUESTIONS - equal} of {QUESTIONS} answers differ in a mixed batch"
                )
        for requests in job.scale.served_requests:
            for many in (0, len(names)) if requests > 1 else (0,):
                column = f"{requests} requests, {f'{many} adapters' if many else 'base'}"
                measure = partial(rate, job, address, requests, names[:many])
                row[column] = job.attempt(f"{row['served']}: {column}", lambda: asyncio.run(measure()))  # noqa: B023


async def equal_answers(job: Job, address: ServerAddress, names: Sequence[str]) -> int:
    """How many of QUESTIONS greedy requests, of the base and of adapters in turn, give the same ids alone as all at
    once. Each mode has a salt of its own: none finds the other's keys in the prefix cache."""
    async with AsyncClient(address.target, timeout=max(1.0, job.left)) as client:
        vocab = (await client.model()).vocab_size
        prompts = plan(WorkloadSpec(QUESTIONS, 60, 1, vocab, ("", *names), seed=5))

        async def ask(index: int, salt: str) -> tuple[int, ...]:
            request = prompts[index]
            result = await client.generate(
                token_ids=request.prompt_ids[: 5 + 3 * index],
                adapter=request.adapter,
                max_new_tokens=job.scale.served_tokens // 2,
                temperature=0.0,
                ignore_eos=True,
                cache_salt=salt,
            )
            return result.completions[0].token_ids

        together = await asyncio.gather(*(ask(i, "together") for i in range(QUESTIONS)))
        alone = [await ask(i, "alone") for i in range(QUESTIONS)]
    return sum(a == b for a, b in zip(together, alone, strict=True))


async def rate(job: Job, address: ServerAddress, requests: int, names: Sequence[str]) -> float:
    """Output tokens a second of twice as many requests as run at once. Raises ValueError if a request failed."""
    tokens, vocab = job.scale.served_tokens, job.scale.served.vocab
    spec = WorkloadSpec(2 * requests, tokens, tokens, vocab, tuple(names), seed=requests + len(names))
    async with connect(address.target, address.admin) as target:
        summary = await bench(target, BenchSpec(spec, requests, warmup=requests))
    if summary["failed"]:
        raise ValueError(f"{summary['failed']} requests failed: {summary['errors']}")
    return float(summary["output_throughput"])


def write_model(decoder: Decoder, folder: Path, device: str) -> None:
    """A random model that `loramux serve` takes like any other: dense bf16 safetensors and a tokenizer."""
    config = AutoConfig.for_model(**decoder.config())
    # Of unit size through every layer, so that attention has a say in the answers.
    config.initializer_range = decoder.hidden**-0.5
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {f"<{i}>": i for i in range(END, decoder.vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{END}>").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
