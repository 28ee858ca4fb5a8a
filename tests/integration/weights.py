"""Adapters that are the same and look different, and the jobs that find that out."""

import json

import numpy as np
from safetensors.numpy import load, save

from registry import jobs
from registry.models import Expert, Job, Revision
from tests import tiny
from tests.integration import hf
from workers import runner

MODULES = (tiny.QUERY, tiny.VALUE)
CONFIG, WEIGHTS, GATES = "adapter_config.json", "adapter_model.safetensors", "routing_gates.safetensors"
SIZE = 16


def lora(seed: int, **choices) -> dict[str, bytes]:
    """A LoRA on two small layers."""
    return tiny.lora(seed=seed, modules=MODULES, size=SIZE, **choices)


def ready(user, name: str, files: dict[str, bytes], *, private: bool = False) -> Expert:
    """An expert whose head is as if its pipeline had passed."""
    made = hf.expert(user, name, files, private=private)
    Revision.objects.filter(expert=made).update(state=Revision.State.READY)
    return made


def delta(files: dict[str, bytes], module: str) -> np.ndarray:
    """What a tree adds to one module, formed in float64 from the bytes."""
    config, tensors = json.loads(files[CONFIG]), load(files[WEIGHTS])
    a, b = (tensors[f"base_model.model.{module}.lora_{one}.weight"].astype(np.float64) for one in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def refactored(files: dict[str, bytes], *, rank: int, scale: float = 1.0) -> dict[str, bytes]:
    """The same deltas times `scale`, from factors of a higher rank: A -> R A, B -> B R^-1, zeros at the end."""
    config, tensors, noise = json.loads(files[CONFIG]), load(files[WEIGHTS]), np.random.default_rng(5)
    old = config["lora_alpha"] / config["r"]
    changed = {}
    for module in MODULES:
        a, b = (tensors[f"base_model.model.{module}.lora_{one}.weight"].astype(np.float64) for one in "AB")
        R = noise.normal(size=(len(a), len(a))) + 2 * np.eye(len(a))
        more = rank - len(a)
        wide = np.concatenate([R @ a, noise.normal(size=(more, a.shape[1]))])
        tall = np.concatenate([scale * old / 2 * b @ np.linalg.inv(R), np.zeros((len(b), more))], axis=1)
        changed[f"base_model.model.{module}.lora_A.weight"] = wide.astype(np.float32)
        changed[f"base_model.model.{module}.lora_B.weight"] = tall.astype(np.float32)
    config |= {"r": rank, "lora_alpha": 2 * rank}
    return {**files, CONFIG: json.dumps(config).encode(), WEIGHTS: save(changed, metadata={"format": "pt"})}


def gates(seed: int, **changes: np.ndarray) -> bytes:
    """A gate for each module."""
    noise = np.random.default_rng(seed)
    found = {module: noise.normal(size=SIZE).astype(np.float32) for module in MODULES}
    return save({**found, **changes}, metadata={"method": "phatgoose", "steps": "100"})


def measure(*experts: Expert) -> None:
    """Run the jobs that look at the weights of the heads, first all of one kind, then all of the other."""
    heads = [Revision.objects.get(expert=expert, refs__name="main") for expert in experts]
    for head in heads:
        jobs.enqueue_fingerprint(head)
    for kind in ("prototypes", "neighbours"):
        for head in heads:
            job = Job.objects.get(revision=head, kind=kind)
            runner.run(job.pk)
            job.refresh_from_db()
            assert job.state in Job.PASSED, job.error
