"""What the adapter cases share. ROOT is the server's --adapter-dir; ADMIN and TARGET are its addresses; LOG may name
the file that its log goes to: what is told there counts. Exit codes: 0 right, 1 the fault is there, 2 no server."""

import atexit
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from loramux.client import AdminClient, Client
from loramux.errors import LoramuxError
from safetensors.numpy import save_file

ROOT = Path(os.environ["ROOT"])
LOG = os.environ.get("LOG", os.devnull)
admin = AdminClient(os.environ.get("ADMIN", "127.0.0.1:50052"), timeout=60)
client = Client(os.environ.get("TARGET", "127.0.0.1:50051"), timeout=60)
SCAN = 7  # seconds; by then a server that looks every 5 (the default) has seen a change
SIZES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
KEY = "base_model.model.model.layers.{l}.self_attn.{p}"  # as PEFT writes it
faults: list[str] = []

try:
    client.model(), admin.list()
except LoramuxError as error:
    print(error.message, file=sys.stderr)
    sys.exit(2)


def factors(key=KEY, projections=("q_proj", "v_proj"), r=8, seed=0, std=0.05):
    random, out = np.random.default_rng(seed), {}
    for k, (i, o) in ((key.format(l=layer, p=p), SIZES[p]) for layer in range(30) for p in projections):
        out[k + ".lora_A.weight"] = random.standard_normal((r, i), np.float32) * np.float32(std)
        out[k + ".lora_B.weight"] = random.standard_normal((o, r), np.float32) * np.float32(std)
    return out


def write(name, tensors=None, **fields):
    """A new folder ROOT/name; `tensors` False leaves the weights away. Gone again at the end."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    atexit.register(shutil.rmtree, ROOT / Path(name).parts[0], ignore_errors=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]} | fields))
    if tensors is not False:
        save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def load(name, source=""):
    """The word loaded, or the error's text."""
    try:
        admin.load(name, source, replace=True)
        return "loaded"
    except LoramuxError as error:
        return f"{type(error).__name__} {error.reason}: {error.message}".replace(str(ROOT), "ROOT")


def ask(name, prompt="The capital of France is"):
    """(token, log probability, digest of the adapter) of the first greedy token, or the error's text."""
    try:
        r = client.generate(prompt, adapter=name, max_new_tokens=1, temperature=0, logprobs=True)
        token = r.completions[0].logprobs[0]
        return token.token_id, token.logprob, "".join(used.digest for used in r.adapters)
    except LoramuxError as error:
        return f"{type(error).__name__} {error.reason}: {error.message}"


def same(one, other):
    """Whether two answers come from the same weights and scale."""
    return type(one) is type(other) is tuple and one[0] == other[0] and abs(one[1] - other[1]) < 1e-3


def told(name, *words):
    """Whether what the admin port shows of an adapter, or a line of LOG about it, holds one of the words."""
    shown = dataclasses.asdict(admin.get(name)).items()
    text = [str(v) for k, v in shown if k not in ("name", "uid", "digest", "source")]
    text += [line.replace(name, "") for line in Path(LOG).read_text(errors="replace").splitlines() if name in line]
    return any(word.lower() in " ".join(text).replace(str(ROOT), "").lower() for word in words)


def expect(right, what):
    print("right:" if right else "FAULT:", what)
    faults.extend([] if right else [what])


def done():
    sys.exit(1 if faults else 0)
