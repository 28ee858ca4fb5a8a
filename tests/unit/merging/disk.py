"""Adapters and base checkpoints on disk, written and read back by safetensors alone, and recipes of them carried out."""

import json
import zlib

import numpy as np
from safetensors.numpy import load_file, save_file

from moerge.merging import recipe, run
from moerge.tensors import adapters
from moerge.tensors.bases import BaseWeights

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def write(folder, modules, *, alpha=8, use_rslora=False, base="acme/base", tensors=None, **config):
    """An adapter as PEFT writes it; `modules` maps a name to (d_out, d_in, rank) or to (B, A)."""
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    folder.mkdir()
    found = {f"base_model.model.{name}": np.asarray(values, np.float32) for name, values in (tensors or {}).items()}
    for name, given in modules.items():
        factors = given
        if len(given) == 3:
            rows, columns, rank = given
            factors = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
        B, A = (np.ascontiguousarray(part, dtype=np.float32) for part in factors)
        found[f"base_model.model.{name}.lora_A.weight"] = A
        found[f"base_model.model.{name}.lora_B.weight"] = B
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {
        "peft_type": "LORA", "r": A.shape[0], "lora_alpha": alpha, "use_rslora": use_rslora,
        "base_model_name_or_path": base, "target_modules": sorted(modules), **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return load(folder)


def load(folder, *, base=None):
    config = adapters.parse_config((folder / "adapter_config.json").read_bytes())
    return adapters.load(config, folder / "adapter_model.safetensors", accept=run.ACCEPTED, base=base)


def parse(experts, weights, method="linear", *, parameters=None, output=None, base_model="acme/base", base=None):
    named = [
        {"expert": f"acme/{adapter.path.parent.name}", "revision": "1" * 40, "digest": adapter.digest, "weight": weight}
        for adapter, weight in zip(experts, weights, strict=True)
    ]
    return recipe.parse(
        {"base_model": base_model, "method": method, "parameters": parameters or {}, "experts": named,
         "output": output or {}} | ({} if base is None else {"base_weights": base.digest})
    )  # fmt: skip


def merge(
    folder, experts, weights, method="linear", *, parameters=None, output=None, base_model="acme/base", base=None,
    **options,
):  # fmt: skip
    parsed = parse(experts, weights, method, parameters=parameters, output=output, base_model=base_model, base=base)
    return run.merge(parsed, {adapter.digest: adapter for adapter in experts}, folder, base=base, **options)


def deltas(folder):
    """Deltas of a written adapter, read without our reader: scaling must be exactly 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, ending = "base_model.model.", ".lora_A.weight"
    found = {}
    for name, A in tensors.items():
        if name.endswith(ending):
            B = tensors[name.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            found[name[len(prefix) : -len(ending)]] = B.astype(np.float64) @ A.astype(np.float64)
    return found


def expected(adapter, scaling, module=Q):
    tensors = load_file(adapter.path)
    A = tensors[f"base_model.model.{module}.lora_A.weight"].astype(np.float64)
    return scaling * tensors[f"base_model.model.{module}.lora_B.weight"].astype(np.float64) @ A


def write_ia3(folder, gains, *, feedforward=(), base="acme/base", tensors=None, **config):
    """An IA3 adapter as PEFT writes it; `gains` maps a name to the vector l."""
    folder.mkdir()
    found = {f"base_model.model.{name}": np.asarray(values, np.float32) for name, values in (tensors or {}).items()}
    for name, values in gains.items():
        shape = (1, -1) if name in feedforward else (-1, 1)
        found[f"base_model.model.{name}.ia3_l"] = np.asarray(values, np.float32).reshape(shape)
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {
        "peft_type": "IA3", "base_model_name_or_path": base, "target_modules": sorted(gains),
        "feedforward_modules": sorted(feedforward), **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return load(folder)


def write_base(folder, tensors, *, shards=None, **config):
    """A checkpoint; `shards` maps a file name to the tensors in it, else all lie in one file."""
    folder.mkdir()
    shards = shards or {"model.safetensors": sorted(tensors)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        record = {"metadata": {"total_size": sum(part.nbytes for part in tensors.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return BaseWeights(folder)
