"""Weights of base models that an operator has put into HUB_BASES_DIR, for merges that cannot do without them."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

from django.conf import settings
from django.db import transaction

from moerge.errors import MoergeError
from moerge.tensors import bases as tensor_bases
from moerge.tensors import checkpoints
from moerge.tensors.bases import BaseWeights
from moerge.tensors.checkpoints import Checkpoint
from registry.errors import Fault, NotReady, RequestInvalid
from registry.models import BaseModel, User
from registry.services import audit
from registry.services.bases import pattern_of


def add(
    *, user: User | None, base: BaseModel, folder: str | Path, progress: Callable[[float], None] | None = None
) -> BaseModel:
    """Make a checkpoint folder known as the weights of a base; every file is read once to be hashed.

    `folder` is absolute or relative to HUB_BASES_DIR, and must lie in it. `progress` hears the share of each file that
    is done. Raises RequestInvalid when the folder lies elsewhere, holds no checkpoint, or has other shapes than the
    base is known to have.
    """
    place = _place(folder)
    try:
        with checkpoints.open_checkpoint(place) as checkpoint:
            _check_shapes(base, checkpoint)
            sha256s = checkpoint.file_digests(progress)
    except (MoergeError, OSError) as error:
        detail = getattr(error, "detail", None) or str(error)
        raise _refused(f"{folder} cannot be taken: {detail}", met=str(folder), wanted="a checkpoint folder") from error
    weights = {
        "folder": str(place.relative_to(_root())),
        "digest": tensor_bases.digest_of(sha256s),
        "files": {name: {"size": (place / name).stat().st_size, "sha256": sha256} for name, sha256 in sha256s.items()},
    }
    _write(user, base, weights, action="base.weights.add")
    return base


def remove(*, user: User | None, base: BaseModel) -> None:
    """Forget the weights of a base; the files stay where they are."""
    _write(user, base, {}, action="base.weights.remove")


def open(base: BaseModel) -> BaseWeights:  # noqa: A001 - base_weights.open reads well
    """The weights of a base, with the digest that was computed when they were added.

    Raises NotReady, saying what to do, when there are none or their files are not as they were.
    """
    known = base.weights
    if not known:
        raise _not_ready(base, met="no weights", what=f"The hub has no weights of {base.name}.")
    place = _root() / known["folder"]
    for name, file in known["files"].items():
        path = place / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["size"]:
            met = "no file" if size is None else f"{size} bytes"
            raise _not_ready(
                base,
                met=f"{name}: {met}",
                wanted=f"{file['size']} bytes",
                what=f"The weights of {base.name} are not as they were when they were added.",
            )
    return BaseWeights(place, known["digest"])


def _root() -> Path:
    return Path(settings.HUB_BASES_DIR).resolve()


def _place(folder: str | Path) -> Path:
    """The folder itself, links followed. Raises RequestInvalid when it, or a file of it, lies outside HUB_BASES_DIR."""
    root = _root()
    place = (root / folder).resolve()
    outside = [path for path in (place, *place.glob("*.safetensors")) if not path.resolve().is_relative_to(root)]
    if outside or place == root or not place.is_dir():
        what = f"{outside[0]} lies outside HUB_BASES_DIR." if outside else f"{place} is no folder in HUB_BASES_DIR."
        raise _refused(what, met=str(folder), wanted=f"a folder below {root}")
    return place


def _check_shapes(base: BaseModel, checkpoint: Checkpoint) -> None:
    """Raise RequestInvalid where a weight has neither the known shape of its module nor that turned over.

    Embeddings, and layers that store their weight by inputs, lie the other way round than deltas.
    """
    found = dict(_shapes(checkpoint))
    matched = 0
    for pattern, known in base.shapes.items():
        wanted = (int(known[0]), int(known[1]))
        for module, met in found.items():
            if not _is_end(pattern, module) and not _is_end(module, pattern):
                continue
            matched += 1
            if wanted not in (met, met[::-1]):
                raise _refused(
                    f"{module} is {met[0]} x {met[1]} in this checkpoint; {base.name} has {wanted[0]} x {wanted[1]}.",
                    met=list(met),
                    wanted=list(wanted),
                )
    if base.shapes and not matched:
        raise _refused(
            f"The checkpoint has no module that {base.name} is known to have.",
            met=", ".join(sorted(found)[:5]),
            wanted=", ".join(sorted(base.shapes)[:5]),
        )


def _shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    """Module pattern -> rows and columns of every weight that is a matrix, or a kernel laid flat."""
    for name in checkpoint.names:
        shape = checkpoint.info(name).shape
        if name.endswith(".weight") and len(shape) > 1:
            yield pattern_of(name.removesuffix(".weight")), (shape[0], prod(shape[1:]))


def _is_end(short: str, long: str) -> bool:
    return long == short or long.endswith(f".{short}")


def _write(user: User | None, base: BaseModel, weights: Mapping[str, object], *, action: str) -> None:
    with transaction.atomic():
        base.weights = dict(weights)
        base.save(update_fields=["weights"])
        audit.record(user, action, base.name, digest=weights.get("digest"), folder=weights.get("folder"))


def _refused(detail: str, *, met: object, wanted: object) -> RequestInvalid:
    remedy = "Put the checkpoint that the base's own authors published into a folder of HUB_BASES_DIR."
    return RequestInvalid(detail, faults=[Fault("/folder", met, wanted, remedy)])


def _not_ready(base: BaseModel, *, what: str, met: str, wanted: str = "its checkpoint in HUB_BASES_DIR") -> NotReady:
    remedy = f"Ask the operator to run: bin/manage add_base_weights {base.name} FOLDER"
    return NotReady(what, faults=[Fault("/base_model", met, wanted, remedy)])
