"""Snapshots: a routing index as a folder of files, which many processes map into memory and share.

    meta.json         format, encoder, dimension, seq, what each base holds, and size and SHA-256 of every other file
    <n>.columns       the columns of the n-th base one after the other, each at a multiple of 64 bytes
    <n>.vectors       what finds the near ones among its rows

`meta.json` names every other file by its digest, so whoever knows the digest of meta.json knows the whole folder.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid
from moerge.routing.index import VectorIndex
from moerge.routing.segment import Columns, Segment

FORMAT = "moerge-routing-index/1"
META = "meta.json"
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A whole index as of change number `seq`: base model -> segment, all vectors from one encoder."""

    seq: int
    encoder_id: str
    dimension: int
    segments: Mapping[str, Segment]


def write(folder: Path, segments: Mapping[str, Segment], *, seq: int, encoder_id: str, dimension: int) -> str:
    """Write a snapshot as `folder` and return the SHA-256 of its meta.json; equal content gives equal files.

    It is written beside its place and renamed when it is whole and on the disk, so a reader never meets half of one;
    what a writer that was killed left behind is replaced. Raises IndexInvalid for rows of another width.
    """
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    bases = []
    for number, (name, segment) in enumerate(sorted(segments.items())):
        if segment.vectors.dimension != dimension:
            raise _invalid(f"{name} has vectors of another width", name, segment.vectors.dimension, dimension)
        columns = _write_columns(unfinished / f"{number}.columns", segment.columns)
        segment.vectors.save(unfinished / f"{number}.vectors")
        counts = {"experts": len(segment), "vectors": len(segment.vectors)}
        bases.append({"base_model": name, "counts": counts, "columns": columns})
    files = {path.name: _described(path) for path in sorted(unfinished.iterdir())}
    meta = {
        "format": FORMAT,
        "encoder": encoder_id,
        "dimension": dimension,
        "seq": seq,
        "bases": bases,
        "files": files,
    }
    data = json.dumps(meta, sort_keys=True, indent=1).encode()
    (unfinished / META).write_bytes(data)
    for path in [*unfinished.iterdir(), unfinished]:
        _sync(path)
    _replace(unfinished, folder)
    return hashlib.sha256(data).hexdigest()


def open(folder: Path, sha256: str, *, encoder_id: str) -> Snapshot:  # noqa: A001  # Called as snapshots.open.
    """Check every byte of a snapshot and map it into memory.

    Raises IndexInvalid, naming the file, when meta.json does not have this SHA-256, a file is missing, too many or
    not what was written, or when another encoder or another version of the format made the snapshot.
    """
    meta = _meta(folder, sha256)
    if meta["encoder"] != encoder_id:
        raise _invalid("the snapshot is of another encoder", META, meta["encoder"], encoder_id)
    _check_files(folder, meta["files"])
    segments = {}
    for number, base in enumerate(meta["bases"]):
        columns = _mapped(folder / f"{number}.columns", base["columns"])
        vectors = VectorIndex.open(folder / f"{number}.vectors", columns["rows"])
        segments[base["base_model"]] = Segment(columns, vectors)
    return Snapshot(seq=meta["seq"], encoder_id=encoder_id, dimension=meta["dimension"], segments=segments)


def _meta(folder: Path, sha256: str) -> dict[str, Any]:
    try:
        data = (folder / META).read_bytes()
    except OSError as error:
        raise _invalid("the snapshot has no meta.json that can be read", META, str(error), "a file") from error
    met = hashlib.sha256(data).hexdigest()
    if met != sha256:
        raise _invalid("meta.json is not what was written", META, met, sha256)
    meta: dict[str, Any] = json.loads(data)
    if meta["format"] != FORMAT:
        raise _invalid("the snapshot has another format", META, meta["format"], FORMAT)
    return meta


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    present = {path.name for path in folder.iterdir()} - {META}
    for name in sorted(present ^ files.keys()):
        where = "there but not in meta.json" if name in present else "missing"
        raise _invalid(f"{name} is {where}", name, sorted(present), sorted(files))
    for name, wanted in files.items():
        size = (folder / name).stat().st_size
        if size != wanted["bytes"]:
            raise _invalid(f"{name} has another size", name, size, wanted["bytes"])
        met = _described(folder / name)
        if met != wanted:
            raise _invalid(f"{name} is not what was written", name, met["sha256"], wanted["sha256"])


def _write_columns(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Write the columns by name and return where each of them lies."""
    places = []
    with path.open("wb") as file:
        for name, values in sorted(columns.items()):
            file.write(bytes(-file.tell() % _ALIGNMENT))
            little = values.dtype.newbyteorder("<")
            places.append({"name": name, "dtype": little.str, "shape": list(values.shape), "offset": file.tell()})
            np.ascontiguousarray(values, dtype=little).tofile(file)
    return places


def _mapped(path: Path, places: Iterable[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        place["name"]: np.frombuffer(
            data, dtype=place["dtype"], count=int(np.prod(place["shape"])), offset=place["offset"]
        ).reshape(place["shape"])
        for place in places
    }


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(new: Path, place: Path) -> None:
    """Put a folder in a place, where an older one of the same name may stand that others have mapped."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _invalid(detail: str, pointer: str, met: object, wanted: object) -> IndexInvalid:
    return IndexInvalid(detail, pointer=pointer, met=met, wanted=wanted, remedy="build the snapshot again")
