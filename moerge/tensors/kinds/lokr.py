"""LoKr: delta = alpha / r * kron(w1, w2), each of both whole or a product of rank r (arXiv 2309.14859).

kron(U1 V1, U2 V2) = kron(U1, U2) kron(V1, V2), so LoKr is a LoRA whose rank is the product of the ranks of its parts,
never more than the smaller side of the delta. A kernel of a convolution is flattened to (out, in * kernel), which
leaves the Kronecker product what it is.
"""

from math import prod

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
    invalid,
    on_base,
    replaced,
)
from moerge.tensors.targets import Targets


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Kernels over one dimension, whose Kronecker product PEFT fails to form, and modules beside the factors."""
    found = [
        Blocker(name, str(list(info.shape)), "PEFT does not form the Kronecker product of a kernel over one dimension",
                "Train with use_effective_conv2d false and a smaller rank.")
        for name, info in header.tensors.items()
        if (name.endswith(".lokr_w2") and len(info.shape) == 3)
        or (name.endswith(".lokr_t2") and info.shape[-1:] == (1,))
    ][:1]  # fmt: skip
    return (*found, *replaced(config))


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Rank of the delta, shape and scaling; raises AdapterInvalid where tensors and config disagree."""
    del config, header
    facts = {}
    for module, tensors in roles.items():
        rank = targets.rank(module)
        rows, inner, first = _part(module, tensors, "w1", rank)
        more, inner2, second = _part(module, tensors, "w2", rank)
        layout = Layout("conv", (prod(inner) * inner2[0], *inner2[1:])) if len(inner2) > 1 else Layout()
        facts[module] = ModuleFacts(rank=first * second, shape=(rows * more, prod(inner) * prod(inner2)),
                                    scaling=targets.alpha(module) / rank, layout=layout)  # fmt: skip
    return facts


def delta(site: Site) -> LowRank:
    """kron of two pairs (U, V)."""
    B, A = products.kronecker(_pair(site, "w1"), _pair(site, "w2"))
    return LowRank(A, B, site.facts.scaling, site.facts.layout)


def _pair(site: Site, part: str) -> products.Pair:
    if part in site.tensors:
        whole = site.read(part)
        return products.split(whole.reshape(len(whole), -1))
    left, right = site.read(f"{part}_a"), site.read(f"{part}_b")
    if part == "w2" and "t2" in site.tensors:
        left, right = products.unrolled(site.read("t2"), left, right)
    return products.thin(left, right)


def _part(module: str, tensors: Tensors, part: str, rank: int) -> tuple[int, tuple[int, ...], int]:
    """Rows, columns (several of a kernel) and rank of w1 or w2."""
    roles = {part} if part in tensors else {f"{part}_a", f"{part}_b"}
    known = {part, f"{part}_a", f"{part}_b"} | ({"t2"} if part == "w2" else set())
    if tensors.keys() & known not in (roles, roles | {"t2"} if part not in tensors else roles):
        raise invalid(f"A module has neither a whole {part} nor its two factors", pointer=module, remedy=SAVE_AGAIN,
                      met=", ".join(sorted(tensors)),
                      wanted=f"lokr_{part}, or lokr_{part}_a and lokr_{part}_b")  # fmt: skip
    if part in tensors:
        rows, inner = tensors[part].shape[0], tensors[part].shape[1:]
        if len(inner) != 1 and (part == "w1" or len(inner) not in {2, 3}):
            raise invalid("A factor has not the dimensions it should", pointer=tensors[part].name, remedy=SAVE_AGAIN,
                          met=list(tensors[part].shape), wanted="a matrix, or a kernel in w2")  # fmt: skip
        return rows, inner, min(rows, prod(inner))
    first, second = tensors[f"{part}_a"], tensors[f"{part}_b"]
    is_core = part == "w2" and "t2" in tensors
    left = first.shape[::-1] if is_core else first.shape
    if len(left) != 2 or len(second.shape) != 2 or left[1] != second.shape[0]:
        raise invalid("The factors of one module do not fit together", pointer=first.name, remedy=SAVE_AGAIN,
                      met=f"{list(first.shape)} and {list(second.shape)}",
                      wanted="(rank, out) and (rank, in)" if is_core else "(out, rank) and (rank, in)")  # fmt: skip
    if left[1] != rank:
        raise invalid("The rank in the config is not the rank of the weights", pointer=first.name, met=left[1],
                      wanted=f"{rank}, from r or rank_pattern in adapter_config.json", remedy=SAVE_AGAIN)  # fmt: skip
    inner = core_layout(tensors["t2"], second).kernel if is_core else second.shape[1:]
    return left[0], inner, min(rank, left[0], prod(inner))


SPEC = Kind(
    name="lokr",
    peft_type="LOKR",
    endings={f"lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    blockers=blockers,
    check=check,
    with_base=on_base,
    delta=delta,
    zero_endings=(".lokr_w1", ".lokr_w1_a"),
)
