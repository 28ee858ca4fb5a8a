"""LoHa: delta = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), element by element (arXiv 2108.06098).

The product of two matrices of rank r, element by element, has rank at most r * r, with factors that are row-wise and
column-wise products of the given ones; so LoHa is a LoRA of rank r * r, exactly.
"""

import numpy as np

from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header
from moerge.tensors.kind import Blocker, Kind, LowRank, ModuleFacts, Roles, Site, invalid
from moerge.tensors.targets import Targets

_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
_SAVE_AGAIN = "Save config and weights together with PeftModel.save_pretrained and upload both."


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Convolutions decomposed with a core tensor, and whole modules beside the factors."""
    found = [
        Blocker(name, "a core tensor", "The delta of a convolution with a core tensor is not formed here",
                "Train with use_effective_conv2d false.")
        for name in header.tensors
        if name.endswith((".hada_t1", ".hada_t2"))
    ][:1]  # fmt: skip
    if config.modules_to_save:
        found.append(Blocker("/modules_to_save", ", ".join(config.modules_to_save)[:200],
                             "The delta cannot be formed from the file: whole modules of the base are replaced",
                             "Train without this setting, or share it for routing and download only."))  # fmt: skip
    return tuple(found)


def check(config: AdapterConfig, roles: Roles, targets: Targets) -> dict[str, ModuleFacts]:
    """Rank (of the delta, so r * r), shape and scaling; raises AdapterInvalid where tensors and config disagree."""
    del config
    facts = {}
    for module, tensors in roles.items():
        if missing := [role for role in _FACTORS if role not in tensors]:
            raise invalid("A module lacks one of its four factors", pointer=module, met=", ".join(sorted(tensors)),
                          wanted=f"also hada_{missing[0]}", remedy=_SAVE_AGAIN)  # fmt: skip
        rank = targets.rank(module)
        scaling = targets.alpha(module) / rank
        left, right, left2, right2 = (tensors[role].shape for role in _FACTORS)
        if "t1" in tensors or "t2" in tensors:
            continue
        if left != left2 or right != right2 or len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise invalid("The factors of one module do not fit together", pointer=module, remedy=_SAVE_AGAIN,
                          met=f"{list(left)}, {list(right)}, {list(left2)}, {list(right2)}",
                          wanted="(out, rank), (rank, in), twice")  # fmt: skip
        if left[1] != rank:
            raise invalid("The rank in the config is not the rank of the weights", pointer=tensors["w1_a"].name,
                          met=left[1], wanted=f"{rank}, from r or rank_pattern in adapter_config.json",
                          remedy=_SAVE_AGAIN)  # fmt: skip
        facts[module] = ModuleFacts(rank=rank * rank, shape=(left[0], right[1]), scaling=scaling)
    return facts


def delta(site: Site) -> LowRank:
    """((out, r), (r, in)) twice -> (r * r, in) and (out, r * r)."""
    facts = site.facts
    w1_a, w1_b, w2_a, w2_b = (site.read(role) for role in _FACTORS)
    B = np.einsum("oi,oj->oij", w1_a, w2_a).reshape(facts.shape[0], facts.rank)
    A = np.einsum("ik,jk->ijk", w1_b, w2_b).reshape(facts.rank, facts.shape[1])
    return LowRank(A, B, facts.scaling, facts.layout)


SPEC = Kind(
    name="loha",
    peft_type="LOHA",
    endings={f"hada_{role}": role for role in (*_FACTORS, "t1", "t2")},
    blockers=blockers,
    check=check,
    delta=delta,
    zero_endings=(".hada_w2_b",),
)
