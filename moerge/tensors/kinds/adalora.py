"""AdaLoRA: delta = alpha / init_r * B @ diag(E) @ A, with ranks found in training (arXiv 2303.10512).

Whatever rank a module was left with, PEFT divides by the rank that all began with, plus 1e-5.
"""

from typing import Any

import numpy as np

from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header
from moerge.tensors.kind import SAVE_AGAIN, Kind, LowRank, ModuleFacts, Roles, Site, invalid, on_base
from moerge.tensors.kinds import lora
from moerge.tensors.targets import Targets

_FACTORS = ("A", "B", "E")
# What PEFT's AdaLoraConfig starts with where a config does not say.
_INIT_RANK = 12


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Rank, shape and scaling of all modules; raises AdapterInvalid where factors and config disagree."""
    del targets, header
    init, masks = config.raw.get("init_r"), config.raw.get("rank_pattern") or {}
    init = _INIT_RANK if init is None else init
    if type(init) is not int or init < 1:
        raise invalid("The rank at the start is not one", pointer="/init_r", met=str(init)[:100], remedy=SAVE_AGAIN,
                      wanted="a whole number above 0")  # fmt: skip
    if not isinstance(masks, dict):
        raise invalid("rank_pattern has the wrong type", pointer="/rank_pattern", met=type(masks).__name__,
                      wanted="an object of masks", remedy=SAVE_AGAIN)  # fmt: skip
    ranks = {_module(key): _rank(key, mask, init) for key, mask in masks.items()}
    facts = {}
    for module, tensors in roles.items():
        if missing := [role for role in _FACTORS if role not in tensors]:
            raise invalid("A module lacks one of its three factors", pointer=module, met=", ".join(sorted(tensors)),
                          wanted=f"also lora_{missing[0]}", remedy=SAVE_AGAIN)  # fmt: skip
        a, b, e = (tensors[role] for role in _FACTORS)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or e.shape != (a.shape[0], 1):
            raise invalid("The factors of one module do not fit together", pointer=a.name, remedy=SAVE_AGAIN,
                          met=f"A {list(a.shape)}, B {list(b.shape)}, E {list(e.shape)}",
                          wanted="(rank, in), (out, rank) and (rank, 1)")  # fmt: skip
        rank = ranks.get(module, init)
        if a.shape[0] != rank:
            raise invalid("The rank in the config is not the rank of the weights", pointer=a.name, met=a.shape[0],
                          wanted=f"{rank}, from init_r or rank_pattern in adapter_config.json",
                          remedy=SAVE_AGAIN)  # fmt: skip
        alpha = config.lora_alpha if config.lora_alpha > 0 else float(rank)
        facts[module] = ModuleFacts(rank=rank, shape=(b.shape[0], a.shape[1]), scaling=alpha / (init + 1e-5))
    return facts


def delta(site: Site) -> LowRank:
    """B as it is, and A with its rows multiplied by E."""
    A = np.ascontiguousarray(site.read("A") * site.read("E"))
    return LowRank(A, site.read("B"), site.facts.scaling, site.facts.layout)


def _module(key: str) -> str:
    """The module that a key such as `layer.0.query.lora_E` of rank_pattern is about."""
    return key.rpartition(".")[0]


def _rank(key: str, mask: Any, init: int) -> int:
    if not isinstance(mask, list) or len(mask) != init or not all(type(item) is bool for item in mask):
        raise invalid("A mask of rank_pattern is not one", pointer=f"/rank_pattern/{key[:200]}", met=str(mask)[:100],
                      wanted=f"{init} times true or false", remedy=SAVE_AGAIN)  # fmt: skip
    return sum(mask)


SPEC = Kind(
    name="adalora",
    peft_type="ADALORA",
    endings={f"lora_{role}": role for role in _FACTORS},
    blockers=lora.blockers,
    check=check,
    with_base=on_base,
    delta=delta,
    zero_endings=(".lora_E",),
)
