"""LoHa: delta = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), element by element (arXiv 2108.06098).

The product of two matrices of rank r, element by element, has rank at most r * r, with factors that are row-wise and
column-wise products of the given ones; so LoHa is a LoRA of rank r * r, exactly. A core tensor makes each of the two a
convolution's kernel in Tucker form, which is a matrix of rank r too.
"""

from moerge.tensors import products
from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    SAVE_AGAIN,
    Blocker,
    Kind,
    Layout,
    LowRank,
    ModuleFacts,
    Roles,
    Site,
    Tensors,
    core_layout,
    flat_kernels,
    invalid,
    on_base,
    replaced,
)
from moerge.tensors.targets import Targets

_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Cores whose convolution only the base tells, and whole modules beside the factors."""
    return (*flat_kernels(header, (".hada_t1",)), *replaced(config))


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Rank (of the delta, so r * r), shape and scaling; raises AdapterInvalid where tensors and config disagree."""
    del config, header
    facts = {}
    for module, tensors in roles.items():
        if missing := [role for role in _FACTORS if role not in tensors]:
            raise invalid("A module lacks one of its four factors", pointer=module, met=", ".join(sorted(tensors)),
                          wanted=f"also hada_{missing[0]}", remedy=SAVE_AGAIN)  # fmt: skip
        rank, layout = targets.rank(module), Layout()
        left, right, left2, right2 = (tensors[role].shape for role in _FACTORS)
        wanted = "(out, rank), (rank, in), twice"
        if "t1" in tensors or "t2" in tensors:
            layout, wanted = _core(module, tensors), "(rank, out), (rank, in), twice"
            left, left2 = left[::-1], left2[::-1]
        if left != left2 or right != right2 or len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise invalid("The factors of one module do not fit together", pointer=module, remedy=SAVE_AGAIN,
                          met=", ".join(str(list(tensors[role].shape)) for role in _FACTORS),
                          wanted=wanted)  # fmt: skip
        if left[1] != rank:
            raise invalid("The rank in the config is not the rank of the weights", pointer=tensors["w1_a"].name,
                          met=left[1], wanted=f"{rank}, from r or rank_pattern in adapter_config.json",
                          remedy=SAVE_AGAIN)  # fmt: skip
        shape = layout.canonical_shape((left[0], *layout.kernel)) if layout.kernel else (left[0], right[1])
        facts[module] = ModuleFacts(rank=min(rank * rank, *shape), shape=(shape[0], shape[1]),
                                    scaling=targets.alpha(module) / rank, layout=layout)  # fmt: skip
    return facts


def delta(site: Site) -> LowRank:
    """((out, r), (r, in)) twice, or Tucker forms -> (r * r, in) and (out, r * r)."""
    pairs = [
        products.unrolled(site.read(f"t{part}"), site.read(f"w{part}_a"), site.read(f"w{part}_b"))
        if f"t{part}" in site.tensors
        else (site.read(f"w{part}_a"), site.read(f"w{part}_b"))
        for part in "12"
    ]
    B, A = products.thin(*products.hadamard(*pairs))
    return LowRank(A, B, site.facts.scaling, site.facts.layout)


def _core(module: str, tensors: Tensors) -> Layout:
    if "t1" not in tensors or "t2" not in tensors:
        raise invalid("A module has one of its two cores", pointer=module, met=", ".join(sorted(tensors)),
                      wanted="hada_t1 and hada_t2", remedy=SAVE_AGAIN)  # fmt: skip
    layouts = [core_layout(tensors[f"t{part}"], tensors[f"w{part}_b"]) for part in "12"]
    if layouts[0] != layouts[1]:
        raise invalid("The cores of one module do not fit together", pointer=module, met=str(layouts[0].kernel),
                      wanted=str(layouts[1].kernel), remedy=SAVE_AGAIN)  # fmt: skip
    return layouts[0]


SPEC = Kind(
    name="loha",
    peft_type="LOHA",
    endings={f"hada_{role}": role for role in (*_FACTORS, "t1", "t2")},
    blockers=blockers,
    check=check,
    with_base=on_base,
    delta=delta,
    zero_endings=(".hada_w2_b",),
)
