"""LoRA and its variants: delta = scaling * B @ A (arXiv 2106.09685; rsLoRA's scaling arXiv 2312.03732).

`FIELDS` decides about every field of PEFT 0.21.2's LoraConfig, by name; a test walks PEFT's own list.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod, sqrt
from typing import Any

import numpy as np

from moerge.tensors.config import AdapterConfig
from moerge.tensors.files import Float32
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    GIVE_BASE,
    SAVE_AGAIN,
    AdapterFacts,
    Blocker,
    Dense,
    Kind,
    Layout,
    LowRank,
    ModuleFacts,
    Roles,
    Shapes,
    Site,
    Tensors,
    check_fit,
    invalid,
    replaced,
    shape_of,
)
from moerge.tensors.targets import Targets

_CONVERT = (
    "Convert it to a plain LoRA: keep the adapter as initialised and pass its folder as "
    "path_initial_model_for_weight_conversion to save_pretrained after training."
)
_MERGE_YOURSELF = "Train without this setting, or share it for routing and download only."

# "formed": understood here and part of what the adapter adds. "with base": so too where the weights of the base are at
# hand. "inert": does not change what a trained adapter computes. Any other text is why the delta cannot be formed when
# the field is set.
FIELDS: Mapping[str, str] = {
    "r": "formed",
    "lora_alpha": "formed",
    "use_rslora": "formed",
    "rank_pattern": "formed",
    "alpha_pattern": "formed",
    "target_modules": "formed",
    "exclude_modules": "formed",
    "layers_to_transform": "formed",
    "layers_pattern": "formed",
    "fan_in_fan_out": "formed",
    "lora_bias": "formed",
    "use_dora": "with base",
    "bias": "with base",
    "modules_to_save": "with base",
    "init_lora_weights": "formed",
    "base_model_name_or_path": "formed",
    "peft_type": "formed",
    "task_type": "inert",
    "auto_mapping": "inert",
    "peft_version": "inert",
    "revision": "inert",
    "inference_mode": "inert",
    "lora_dropout": "inert",
    "loftq_config": "inert",
    "eva_config": "inert",
    "corda_config": "inert",
    "lora_ga_config": "inert",
    "runtime_config": "inert",
    "megatron_core": "inert",
    "qalora_group_size": "inert",
    "ensure_weight_tying": "inert",
    # These two change training only: gradients of A, and noise on A that evaluation leaves out.
    "velora_config": "inert",
    "monteclora_config": "inert",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "parameters, not modules, are adapted, and their factors are stacked per expert",
    "layer_replication": "the base is rebuilt with repeated layers",
    "megatron_config": "the layers are Megatron's parallel layers",
    "alora_invocation_tokens": "the delta acts only after certain tokens (arXiv 2504.12397)",
    "use_qalora": "the input is pooled before A (arXiv 2309.14717)",
    "use_bdlora": "the factors are block-diagonal and stored in pieces",
    "arrow_config": "it mixes other adapters per token",
    "kasa_config": "the base loses its smallest singular values first (arXiv 2412.06071)",
}
_VARIANT_TENSORS = {
    "kasa_config": "lora_diag",
    "velora_config": "lora_velora_",
    "monteclora_config": "lora_monteclora_",
    "arrow_config": "lora_arrow",
}
# These initialisations subtract the first B @ A from the base (PiSSA arXiv 2404.02948, OLoRA 2406.01775, CorDA
# 2406.05223, LoRA-GA 2407.05000) or quantise it (LoftQ 2310.08659), so that the adapter is a delta to another base.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Every reason in config or file why B @ A alone is not what this adapter adds to the base."""
    found = [
        Blocker(f"/{name}", _shown(config.raw[name]), f"The delta cannot be formed from the file: {why}",
                _MERGE_YOURSELF)
        for name, why in FIELDS.items()
        if why not in ("formed", "with base", "inert") and _is_set(config.raw.get(name))
    ]  # fmt: skip
    if config.use_dora:
        found.append(Blocker("/use_dora", "True", "The delta cannot be formed from the file: DoRA rescales the rows of "
                             "base plus delta (arXiv 2402.09353)", GIVE_BASE, needs_base=True))  # fmt: skip
    found += replaced(config)
    start = config.raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        found.append(Blocker("/init_lora_weights", start, "The adapter is a delta to a changed base", _CONVERT))
    for name, info in header.tensors.items():
        if name.endswith("lora_B.weight") and len(info.shape) > 2:
            partner = header.tensors.get(name.removesuffix("lora_B.weight") + "lora_A.weight")
            if partner is not None and partner.shape[0] != info.shape[1]:
                found.append(Blocker(name, str(list(info.shape)), "The delta of a grouped convolution is not B @ A",
                                     _MERGE_YOURSELF))  # fmt: skip
                break
    return tuple(found)


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Rank, shape and scaling of all modules; raises AdapterInvalid where A, B and config disagree."""
    del header
    if config.raw.get("target_parameters") or config.raw.get("use_bdlora"):
        # Stacked per expert or cut into blocks: A has other shapes by design, and the blockers name these fields.
        return {}
    facts = {}
    for module, tensors in roles.items():
        _check_roles(config, module, tensors)
        a, b = tensors.get("A") or tensors["embedding_A"], tensors.get("B") or tensors["embedding_B"]
        rank = targets.rank(module)
        is_grouped = len(b.shape) > 2 and b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0
        if a.shape[0] != b.shape[1] and not is_grouped:
            raise invalid(
                "A and B of one module have different ranks",
                pointer=a.name,
                met=f"A {list(a.shape)}, B {list(b.shape)}",
                wanted="A (rank, in) and B (out, rank)",
                remedy=SAVE_AGAIN,
            )
        if a.shape[0] != rank:
            raise invalid("The rank in the config is not the rank of the weights", pointer=a.name, met=a.shape[0],
                          wanted=f"{rank}, from r or rank_pattern in adapter_config.json",
                          remedy=SAVE_AGAIN)  # fmt: skip
        alpha = targets.alpha(module)
        layout = Layout("embedding") if "embedding_A" in tensors else Layout()
        if len(a.shape) > 2:
            layout = Layout("conv", tuple(a.shape[1:]))
        facts[module] = ModuleFacts(
            rank=rank,
            shape=(b.shape[0], prod(a.shape[1:])),
            scaling=alpha / sqrt(rank) if config.use_rslora else alpha / rank,
            layout=layout,
        )
    return facts


def extras(config: AdapterConfig, name: str) -> bool:
    """Whether a tensor beside A and B belongs to a variant that the config names."""
    return any(
        f".{beginning}" in name and config.raw.get(field) is not None for field, beginning in _VARIANT_TENSORS.items()
    )


def with_base(config: AdapterConfig, facts: AdapterFacts, shapes: Shapes) -> dict[str, ModuleFacts]:
    """With DoRA every module needs a weight that fits, and its delta is not of low rank."""
    found = {name: facts.module(name) for name in facts.shapes}
    if config.use_dora:
        for name, fact in found.items():
            wanted = fact.layout.canonical_shape(shape_of(shapes, name), fan_in_fan_out=config.fan_in_fan_out)
            check_fit(name, fact.shape, wanted)
            found[name] = replace(fact, rank=min(fact.shape))
    return found


def delta(site: Site) -> LowRank | Dense:
    """The factors of one module as matrices; a convolution's are flattened to (rank, in * kernel) and (out, rank).

    With DoRA the delta itself: magnitude * (W + B A) / |W + B A| - W, the norm per output; without a base, for a caller
    who has accepted that blocker, B A alone.
    """
    facts = site.facts
    A, B = (site.read(role if role in site.tensors else f"embedding_{role}") for role in "AB")
    rank = A.shape[0]
    found = LowRank(A.reshape(rank, -1), B.reshape(-1, rank), facts.scaling, facts.layout)
    if not site.config.use_dora or site.base is None:
        return found
    weight, magnitude = site.base_weight(), site.read("magnitude").ravel()
    if len(magnitude) != facts.shape[0]:
        raise invalid("DoRA's magnitude has not one value per output, as PEFT has it since 0.10", wanted=facts.shape[0],
                      pointer=site.tensors["magnitude"].name, met=len(magnitude), remedy=SAVE_AGAIN)  # fmt: skip
    tuned = weight + found.delta()
    norms = np.sqrt(np.einsum("ij,ij->i", tuned, tuned, dtype=np.float64))
    if not norms.all():
        raise invalid("A row of base plus delta is zero, so DoRA has no direction there", pointer=site.module,
                      met=f"row {int(norms.argmin())} of zeros", wanted="rows of some length",
                      remedy="Leave this expert out.")  # fmt: skip
    tuned *= (magnitude / norms).astype(np.float32)[:, None]
    return Dense(tuned - weight, facts.layout)


def bias(site: Site) -> Float32:
    """What a trained bias on B adds to the output, (d_out,)."""
    return np.float32(site.facts.scaling) * site.read("bias")


def _check_roles(config: AdapterConfig, module: str, tensors: Tensors) -> None:
    pair = {"embedding_A", "embedding_B"} if "embedding_A" in tensors or "embedding_B" in tensors else {"A", "B"}
    if missing := sorted(pair - tensors.keys()):
        raise invalid("A module lacks one of its two factors", pointer=module, met=", ".join(sorted(tensors)),
                      wanted=f"also lora_{missing[0]}", remedy=SAVE_AGAIN)  # fmt: skip
    if extra := sorted(tensors.keys() & ({"A", "B", "embedding_A", "embedding_B"} - pair)):
        raise invalid("A module has the factors of a layer and of an embedding", pointer=module,
                      met=", ".join(extra), wanted="one pair", remedy=SAVE_AGAIN)  # fmt: skip
    first, second = (tensors[role] for role in sorted(pair))
    is_kernel = len(first.shape) > 2 and len(second.shape) == len(first.shape) and set(second.shape[2:]) == {1}
    if not is_kernel and not len(first.shape) == len(second.shape) == 2:
        raise invalid("A and B of one module do not fit together", pointer=first.name,
                      met=f"{list(first.shape)} and {list(second.shape)}", remedy=SAVE_AGAIN,
                      wanted="two matrices, or a convolution's kernel and a kernel of size 1")  # fmt: skip
    if config.use_dora != ("magnitude" in tensors):
        met = "a magnitude" if "magnitude" in tensors else "no magnitude"
        raise invalid("Config and weights disagree about DoRA", pointer=module, remedy=SAVE_AGAIN,
                      met=f"use_dora {config.use_dora} and {met}", wanted="both or neither")  # fmt: skip
    if "magnitude" in tensors and tensors["magnitude"].size not in (second.shape[0], prod(first.shape[1:])):
        info = tensors["magnitude"]
        raise invalid("DoRA's magnitude does not fit its module", pointer=info.name, met=list(info.shape),
                      wanted=f"{second.shape[0]} values", remedy=SAVE_AGAIN)  # fmt: skip
    if bool(config.raw.get("lora_bias")) != ("bias" in tensors):
        raise invalid("Config and weights disagree about lora_bias", pointer=second.name,
                      met=f"lora_bias {config.raw.get('lora_bias')} and {'a' if 'bias' in tensors else 'no'} bias on B",
                      wanted="both or neither", remedy=SAVE_AGAIN)  # fmt: skip
    if "bias" in tensors and tensors["bias"].shape != (second.shape[0],):
        raise invalid("The bias on B does not fit its module", pointer=tensors["bias"].name, remedy=SAVE_AGAIN,
                      met=list(tensors["bias"].shape), wanted=[second.shape[0]])  # fmt: skip


def _is_set(value: Any) -> bool:
    # An empty sub-config means its defaults, not that the variant is off.
    return bool(value) or isinstance(value, dict)


def _shown(value: Any) -> str:
    return str(value)[:200]


SPEC = Kind(
    name="lora",
    peft_type="LORA",
    endings={
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "embedding_A",
        "lora_embedding_B": "embedding_B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_B.bias": "bias",
    },
    blockers=blockers,
    check=check,
    with_base=with_base,
    delta=delta,
    bias=bias,
    extras=extras,
    zero_endings=(".lora_B.weight", ".lora_embedding_A"),
)
