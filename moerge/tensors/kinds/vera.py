"""VeRA: delta = diag(b) B diag(d) A, with random A and B that all modules share (arXiv 2310.11454).

A and B are as large as the largest module needs; each module takes the first rows of B and columns of A.
"""

import numpy as np

from moerge.tensors import products
from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    GIVE_BASE,
    SAVE_AGAIN,
    AdapterFacts,
    Blocker,
    Kind,
    Layout,
    LowRank,
    ModuleFacts,
    Roles,
    Shapes,
    Site,
    check_fit,
    invalid,
    replaced,
    shape_of,
)
from moerge.tensors.targets import Targets

_A, _B = "base_model.vera_A", "base_model.vera_B"


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Projections that are not in the file, and inputs whose width only the base tells."""
    found = replaced(config)
    if not _is_saved(config):
        found.append(Blocker("/save_projection", "False", "The random projections are not in the file, and their seed "
                             "gives others on other machines", "Save again with save_projection true."))  # fmt: skip
    elif _A in header.tensors:
        width = header.tensors[_A].shape[-1]
        for name, info in header.tensors.items():
            if name.endswith(".vera_lambda_b") and info.shape != (width,):
                found.append(Blocker(name, f"{info.size} outputs, where the widest input has {width}",
                                     "The file does not tell how wide the inputs of its modules are", GIVE_BASE,
                                     needs_base=True))  # fmt: skip
                break
    return tuple(found)


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Rank and shape of all modules; inputs are taken to be as wide as A, which is so where all modules are square."""
    del targets
    if not _is_saved(config):
        return {}
    if missing := [name for name in (_A, _B) if name not in header.tensors]:
        raise invalid("Config and weights disagree about the projections", pointer="/save_projection", met="true",
                      wanted=f"{missing[0]} in the weights", remedy=SAVE_AGAIN)  # fmt: skip
    a, b = header.tensors[_A], header.tensors[_B]
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == config.r:
        raise invalid("The projections do not fit together and to the config", pointer=a.name, remedy=SAVE_AGAIN,
                      met=f"A {list(a.shape)}, B {list(b.shape)}", wanted=f"(r, in) and (out, r), r {config.r}"
                      " from adapter_config.json")  # fmt: skip
    facts = {}
    for module, tensors in roles.items():
        if missing := [role for role in ("b", "d") if role not in tensors]:
            raise invalid("A module lacks one of its two vectors", pointer=module, met=", ".join(sorted(tensors)),
                          wanted=f"also vera_lambda_{missing[0]}", remedy=SAVE_AGAIN)  # fmt: skip
        outer, inner = tensors["b"], tensors["d"]
        if len(outer.shape) != 1 or outer.size > b.shape[0] or inner.shape != (config.r,):
            raise invalid("The vectors of a module do not fit the projections", pointer=outer.name, remedy=SAVE_AGAIN,
                          met=f"{list(outer.shape)} and {list(inner.shape)}",
                          wanted=f"at most {b.shape[0]} values, and {config.r}")  # fmt: skip
        facts[module] = _facts(config.r, (outer.size, a.shape[1]))
    return facts


def with_base(config: AdapterConfig, facts: AdapterFacts, shapes: Shapes) -> dict[str, ModuleFacts]:
    """Modules as wide as the base has them."""
    found = {}
    for name, widest in facts.shapes.items():
        shape = Layout().canonical_shape(shape_of(shapes, name), fan_in_fan_out=config.fan_in_fan_out)
        check_fit(name, (widest[0], min(widest[1], shape[-1])), shape)
        found[name] = _facts(config.r, (shape[0], shape[1]))
    return found


def delta(site: Site) -> LowRank:
    """The first columns of A times d, and the first rows of B times b."""
    rows, columns = site.facts.shape
    A = site.file.float32(_A)[:, :columns] * site.read("d")[:, None]
    B = site.file.float32(_B)[:rows] * site.read("b")[:, None]
    B, A = products.thin(B, np.ascontiguousarray(A))
    return LowRank(A, B, 1.0)


def extras(config: AdapterConfig, name: str) -> bool:
    """Whether a tensor is one of the projections."""
    del config
    return name in {_A, _B}


def _facts(rank: int, shape: tuple[int, int]) -> ModuleFacts:
    return ModuleFacts(rank=min(rank, *shape), shape=shape, scaling=1.0)


def _is_saved(config: AdapterConfig) -> bool:
    return config.raw.get("save_projection") is not False


SPEC = Kind(
    name="vera",
    peft_type="VERA",
    endings={"vera_lambda_b": "b", "vera_lambda_d": "d"},
    blockers=blockers,
    check=check,
    with_base=with_base,
    delta=delta,
    extras=extras,
    zero_endings=(".vera_lambda_b",),
)
