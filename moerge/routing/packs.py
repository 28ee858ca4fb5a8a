"""Routing packs: what a client needs to route every token among experts of one base model, in one safetensors file.

arrow/<module>       (experts, d_in) float16   leading directions of the deltas, unit vectors
arrow_sigma/<module> (experts,) float32        their singular values, the scaling included
phatgoose/<module>   (experts, d_in) float32   gates as they were uploaded
mask/<kind>/<module> (experts,) uint8          1 where the expert has a row there; the other rows are zero
glider_global        (experts, d) float16      unit embeddings of instruction or description; mask/glider_global beside

All rows are in the order of `experts` in the metadata.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moerge.errors import PackInvalid
from moerge.routing import containers
from moerge.routing.containers import invalid
from moerge.routing.prototypes import Prototypes
from moerge.tensors import files
from moerge.tensors.files import Float32

Rows = Mapping[str, Float32]
Mask = npt.NDArray[np.bool_]
Number = TypeVar("Number", int, float)

FORMAT = "moerge-pack/1"
ARROW, PHATGOOSE, GLIDER = "arrow", "phatgoose", "glider_global"
KINDS = (ARROW, PHATGOOSE, GLIDER)
_SIGMA = "arrow_sigma"
# PHATGOOSE keeps two experts a token; GLIDER's scripts weigh the global half 3 on tasks that no expert was held to.
TOP_K, TEMPERATURE, ALPHA = 2, 1.0, 3.0
# Float16 keeps the norm of a unit vector to this.
_ROUNDED = 5e-3


@dataclass(frozen=True, kw_only=True)
class Member:
    """One expert of a pack: its adapter's SHA-256, rank, scaling (those of most modules) and target modules.

    `is_approximate`: its prototypes leave DoRA's magnitudes out.
    """

    expert: str
    revision: str
    sha256: str
    rank: int
    scale: float
    target_modules: tuple[str, ...]
    is_approximate: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """A routing pack in memory; arrays have one row for each member, in their order, and are float32.

    A row whose mask is false is zero. `masks` is by kind and module. `glider_mask` tells which rows of `glider_global`
    are there. `encoder` is the id of the text encoder that made those.
    """

    base_model: str
    members: tuple[Member, ...]
    kinds: tuple[str, ...]
    arrow: Rows = field(default_factory=dict)
    arrow_sigma: Rows = field(default_factory=dict)
    phatgoose: Rows = field(default_factory=dict)
    masks: Mapping[str, Mapping[str, Mask]] = field(default_factory=dict)
    glider_global: Float32 | None = None
    glider_mask: Mask | None = None
    base_revision: str = ""
    encoder: str = ""
    top_k: int = TOP_K
    temperature: float = TEMPERATURE
    alpha: float = ALPHA

    @property
    def differing(self) -> tuple[str, ...]:
        """Experts whose rank or target modules are not those of most; PEFT's own Arrow refuses such company."""
        if not self.members:
            return ()
        shapes = [(one.rank, one.target_modules) for one in self.members]
        most, _ = Counter(shapes).most_common(1)[0]
        return tuple(one.expert for one, shape in zip(self.members, shapes, strict=True) if shape != most)


def of_prototypes(found: Sequence[Prototypes]) -> tuple[Rows, Rows, dict[str, Mask]]:
    """Directions, singular values and masks by module, of experts in order. Raises PackInvalid where widths differ."""
    vectors, masks = stacked([{name: one.vector for name, one in each.modules.items()} for each in found])
    sigmas = {
        module: np.array([each.modules[module].sigma if module in each.modules else 0.0 for each in found], np.float32)
        for module in vectors
    }
    return vectors, sigmas, masks


def stacked(rows: Sequence[Rows]) -> tuple[dict[str, Float32], dict[str, Mask]]:
    """Vectors of experts in order as one matrix a module, zero where one has none, and masks that tell where.

    Raises PackInvalid where two experts have vectors of different widths for one module.
    """
    matrices: dict[str, Float32] = {}
    masks: dict[str, Mask] = {}
    for module in sorted({module for one in rows for module in one}):
        masks[module] = np.array([module in one for one in rows])
        widths = sorted({one[module].size for one in rows if module in one})
        if len(widths) > 1:
            raise invalid("Two experts have vectors of different widths for one module", pointer=module, met=widths,
                          wanted="one width", remedy="Take experts of one base model.")  # fmt: skip
        matrices[module] = np.zeros((len(rows), widths[0]), np.float32)
        for place, one in enumerate(rows):
            if module in one:
                matrices[module][place] = one[module]
    return matrices, masks


def write(pack: Pack) -> bytes:
    """A pack as a file; the same pack gives the same bytes. Raises PackInvalid for what `read` would refuse."""
    tensors: dict[str, files.Tensor] = {}
    for module, rows in pack.arrow.items():
        tensors[f"{ARROW}/{module}"] = rows.astype(np.float16)
        tensors[f"{_SIGMA}/{module}"] = pack.arrow_sigma[module].astype(np.float32)
    tensors |= {f"{PHATGOOSE}/{module}": rows.astype(np.float32) for module, rows in pack.phatgoose.items()}
    for kind, masks in pack.masks.items():
        tensors |= {f"mask/{kind}/{module}": mask.astype(np.uint8) for module, mask in masks.items()}
    if pack.glider_global is not None and pack.glider_mask is not None:
        tensors[GLIDER] = pack.glider_global.astype(np.float16)
        tensors[f"mask/{GLIDER}"] = pack.glider_mask.astype(np.uint8)
    data = containers.dump(tensors, _metadata(pack))
    read(data)
    return data


def read(data: bytes) -> Pack:
    """The pack in a file, every shape, mask and vector checked. Raises PackInvalid."""
    metadata, tensors = containers.load(data, FORMAT)
    members = tuple(_member(row, place) for place, row in enumerate(_list(metadata, "experts")))
    kinds = tuple(_list(metadata, "kinds"))
    if not members:
        raise _wrong("experts", "none", "one expert or more")
    if not kinds or [kind for kind in KINDS if kind in kinds] != list(kinds):
        raise _wrong("kinds", str(list(kinds)), f"some of {list(KINDS)} in that order")
    taken: set[str] = set()
    found: dict[str, dict[str, Float32]] = {}
    masks: dict[str, dict[str, Mask]] = {}
    for kind in kinds:
        if kind == GLIDER:
            continue
        found[kind], masks[kind] = _matrices(kind, tensors, len(members), taken)
    sigmas = {}
    for module, mask in masks.get(ARROW, {}).items():
        name = f"{_SIGMA}/{module}"
        sigmas[module] = _take(tensors, name, (len(members),), taken).astype(np.float32)
        if ((sigmas[module] > 0) != mask).any():
            raise invalid("Singular values and mask disagree", pointer=name, met=sigmas[module].tolist(),
                          wanted="a value above 0 where there is a direction, else 0")  # fmt: skip
    _check_norms(ARROW, found.get(ARROW, {}), masks.get(ARROW, {}))
    glider: Float32 | None = None
    glider_mask: Mask | None = None
    if GLIDER in kinds:
        glider, glider_mask = _matrix(GLIDER, f"mask/{GLIDER}", tensors, len(members), taken)
        _check_norms(GLIDER, {"": glider}, {"": glider_mask})
    if strangers := sorted(tensors.keys() - taken):
        raise invalid("A tensor has no place in a pack", pointer=strangers[0], met=strangers[0],
                      wanted=f"tensors of the kinds {', '.join(kinds)}")  # fmt: skip
    return Pack(
        base_model=metadata.get("base_model", ""), base_revision=metadata.get("base_revision", ""),
        encoder=metadata.get("encoder", ""), members=members, kinds=kinds, arrow=found.get(ARROW, {}),
        arrow_sigma=sigmas, phatgoose=found.get(PHATGOOSE, {}), masks=masks, glider_global=glider,
        glider_mask=glider_mask, top_k=_positive(metadata, "top_k", int),
        temperature=_positive(metadata, "temperature", float),
        alpha=_positive(metadata, "alpha", float),
    )  # fmt: skip


def _metadata(pack: Pack) -> dict[str, str]:
    return {
        "format": FORMAT,
        "base_model": pack.base_model,
        "base_revision": pack.base_revision,
        "encoder": pack.encoder,
        "experts": json.dumps(
            [{**asdict(one), "scale": float(one.scale)} for one in pack.members], sort_keys=True, separators=(",", ":")
        ),
        "kinds": json.dumps(pack.kinds),
        "differing": json.dumps(pack.differing),
        "top_k": str(pack.top_k),
        "temperature": repr(float(pack.temperature)),
        "alpha": repr(float(pack.alpha)),
    }


def _member(row: Any, place: int) -> Member:
    kinds = {"expert": str, "revision": str, "sha256": str, "rank": int, "scale": float, "target_modules": list,
             "is_approximate": bool}  # fmt: skip
    is_right = isinstance(row, dict) and row.keys() == kinds.keys()
    if not is_right or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
        raise _wrong(f"experts/{place}", str(row)[:200], f"an object of {', '.join(kinds)}")
    return Member(**{**row, "target_modules": tuple(map(str, row["target_modules"]))})


def _matrices(
    kind: str, tensors: Mapping[str, containers.Array], count: int, taken: set[str]
) -> tuple[dict[str, Float32], dict[str, Mask]]:
    """Matrices and masks of one kind by module."""
    start = f"{kind}/"
    modules = sorted(name.removeprefix(start) for name in tensors if name.startswith(start))
    both = {module: _matrix(start + module, f"mask/{kind}/{module}", tensors, count, taken) for module in modules}
    return {module: pair[0] for module, pair in both.items()}, {module: pair[1] for module, pair in both.items()}


def _matrix(
    name: str, mask_name: str, tensors: Mapping[str, containers.Array], count: int, taken: set[str]
) -> tuple[Float32, Mask]:
    """One matrix (experts, width) and its mask (experts,), which tells the rows that are not zero."""
    bits = _take(tensors, mask_name, (count,), taken)
    width = tensors[name].shape[-1] if name in tensors and tensors[name].ndim else 0
    rows = _take(tensors, name, (count, width), taken).astype(np.float32)
    if bits.dtype != np.uint8 or (bits > 1).any():
        raise invalid("A mask is not one", pointer=mask_name, met=str(bits.tolist())[:100], wanted="bytes of 0 and 1")
    if (rows.any(axis=1) != bits.astype(bool)).any():
        raise invalid("Mask and rows disagree", pointer=mask_name, met=str(bits.tolist())[:100],
                      wanted="1 for rows that are not zero, 0 for those that are")  # fmt: skip
    return rows, bits.astype(bool)


def _take(
    tensors: Mapping[str, containers.Array], name: str, shape: tuple[int, ...], taken: set[str]
) -> containers.Array:
    if name not in tensors:
        raise invalid("A tensor is missing", pointer=name, met="none", wanted=f"{name} {list(shape)}")
    if tensors[name].shape != shape:
        raise invalid(
            "A tensor has another shape", pointer=name, met=list(tensors[name].shape), wanted=f"{list(shape)}"
        )
    taken.add(name)
    return tensors[name]


def _check_norms(kind: str, rows: Rows, masks: Mapping[str, Mask]) -> None:
    for module, matrix in rows.items():
        norms = np.linalg.norm(matrix[masks[module]], axis=1)
        if (abs(norms - 1) > _ROUNDED).any():
            raise invalid("A vector has not the norm 1", pointer=f"{kind}/{module}".rstrip("/"),
                          met=f"{norms[np.argmax(abs(norms - 1))]:.4g}", wanted="1")  # fmt: skip


def _list(metadata: Mapping[str, str], name: str) -> list[Any]:
    text = metadata.get(name, "")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong(name, text[:80], "JSON") from None
    if not isinstance(value, list):
        raise _wrong(name, text[:80], "a list")
    return value


def _positive(metadata: Mapping[str, str], name: str, form: type[Number]) -> Number:
    text = metadata.get(name, "")
    try:
        value = form(text)
    except ValueError:
        raise _wrong(name, text[:80], "a number above 0") from None
    if not 0 < value < math.inf:
        raise _wrong(name, text[:80], "a number above 0")
    return value


def _wrong(name: str, met: str, wanted: str) -> PackInvalid:
    return invalid("The metadata of the pack is wrong", pointer=f"__metadata__/{name}", met=met, wanted=wanted)
