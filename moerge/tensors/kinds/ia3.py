"""IA3: learned vectors l multiply what a module takes in, or puts out with its bias (arXiv 2205.05638).

Merges average l - 1. With the weights of the base it is a delta too: (l - 1) times their columns or rows.
"""

import numpy as np

from moerge.tensors.config import AdapterConfig
from moerge.tensors.files import Float32
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    SAVE_AGAIN,
    AdapterFacts,
    Blocker,
    Dense,
    Gain,
    Kind,
    Layout,
    ModuleFacts,
    Roles,
    Shapes,
    Site,
    check_fit,
    invalid,
    replaced,
    shape_of,
    without_weight,
)
from moerge.tensors.targets import Targets


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Vectors of convolutions, and whole modules beside the vectors."""
    found = [
        Blocker(name, str(list(info.shape)), "Vectors that multiply the channels of a convolution are not merged",
                "Route and download it as it is.")
        for name, info in header.tensors.items()
        if name.endswith(".ia3_l") and len(info.shape) != 2
    ][:1]  # fmt: skip
    return (*found, *replaced(config))


def check(config: AdapterConfig, roles: Roles, targets: Targets, header: Header) -> dict[str, ModuleFacts]:
    """Nothing is known of deltas without the base."""
    del config, roles, targets, header
    return {}


def feedforward(roles: Roles, targets: Targets) -> frozenset[str]:
    """Modules whose vector multiplies inputs; raises AdapterInvalid where config and shape of a vector disagree."""
    found = set()
    for module, tensors in roles.items():
        info = tensors["gain"]
        told = targets.is_feedforward(module)
        is_feedforward = info.shape[0] == 1 if told is None else told
        # A convolution's vectors have one shape for both.
        wanted = (1, info.size) if is_feedforward or len(info.shape) > 2 else (info.size, 1)
        if info.shape[:2] != wanted or len(info.shape) < 2:
            raise invalid("Config and weights disagree about the side that a vector multiplies", pointer=info.name,
                          met=list(info.shape), remedy=SAVE_AGAIN,
                          wanted=f"{list(wanted)}, from feedforward_modules in adapter_config.json")  # fmt: skip
        if is_feedforward:
            found.add(module)
    return frozenset(found)


def with_base(config: AdapterConfig, facts: AdapterFacts, shapes: Shapes) -> dict[str, ModuleFacts]:
    """Deltas are as large as the weights of the base."""
    found = {}
    for name, length in facts.gains.items():
        shape = Layout().canonical_shape(shape_of(shapes, name), fan_in_fan_out=config.fan_in_fan_out)
        if len(shape) != 2:
            raise without_weight(name)
        mine = (shape[0], length) if name in facts.feedforward else (length, shape[1])
        check_fit(name, mine, shape)
        found[name] = ModuleFacts(rank=min(mine), shape=mine, scaling=1.0)
    return found


def delta(site: Site) -> Dense:
    """(l - 1) times the columns of the base's weight where it multiplies inputs, else its rows."""
    found = gain(site)
    return Dense(site.base_weight() * (found.values if found.is_feedforward else found.values[:, None]))


def bias(site: Site) -> Float32:
    """(l - 1) times the base's bias, which is part of the output."""
    found = site.base.tensor(f"{site.module}.bias") if site.base else None
    if found is None or len(found) != site.tensors["gain"].size:
        raise without_weight(site.module)
    return found * gain(site).values


def gain(site: Site) -> Gain:
    """l - 1, flat."""
    return Gain(site.read("gain").ravel() - np.float32(1), site.module in site.whole.feedforward)


SPEC = Kind(
    name="ia3",
    peft_type="IA3",
    endings={"ia3_l": "gain"},
    blockers=blockers,
    check=check,
    feedforward=feedforward,
    with_base=with_base,
    delta=delta,
    bias=bias,
    gain=gain,
)
