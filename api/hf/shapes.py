"""Answers in the shapes that stock Hub clients parse."""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from api.hf.snapshots import Snapshot
from registry.models import Expert, File, Merge, Revision
from registry.services import merges

POINTER_BYTES = 134  # of the git-lfs pointer file that a git checkout would hold in place of a large file


def moment(at: datetime) -> str:
    """A time ending in Z: clients refuse +00:00."""
    text = at.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"


def model(
    expert: Expert, head: Revision | None, *, commit: str, files: Sequence[File] | None = None, blobs: bool = False
) -> dict[str, Any]:
    """ModelInfo of an expert; `files` adds the siblings, `blobs` their sizes and digests."""
    base = (head.base_model if head else None) or expert.base_model
    record = _model(
        full_name=expert.full_name,
        commit=commit,
        created_at=expert.created_at,
        changed_at=head.created_at if head else expert.created_at,
        base_name=base.name if base else "",
        licence=expert.licence,
        tags=expert.tags,
    )
    if head is not None and head.facts.get("card_data"):
        record["cardData"] = {**record["cardData"], **head.facts["card_data"]}
    record |= {
        "_id": f"{expert.pk:024x}",
        "author": expert.namespace.name,
        "private": expert.visibility == Expert.Visibility.PRIVATE,
        "downloads": expert.downloads,
    }
    if files is not None:
        record["siblings"] = [sibling(file, blobs=blobs) for file in files]
        record["usedStorage"] = sum(file.blob.size_bytes for file in files)
    return record


def merge(merge: Merge, snapshot: Snapshot, *, files: Sequence[File], blobs: bool) -> dict[str, Any]:
    """ModelInfo of a merge; one that is not computed yet lists the names that it will have."""
    record = _model(
        full_name=merge.full_name,
        commit=merge.commit,
        created_at=merge.created_at,
        changed_at=merge.finished_at or merge.created_at,
        base_name=merge.base_model.name,
        licence="",
        tags=["merge", merge.recipe.method],
    )
    is_computed = snapshot.revision is not None
    names = merges.names(merge) or merges.TEXTS
    siblings = (
        [sibling(file, blobs=blobs) for file in files] if is_computed else [{"rfilename": name} for name in names]
    )
    return record | {
        "_id": merge.pk[:24],
        "author": "merges",
        "private": snapshot.is_private,
        "downloads": 0,
        "siblings": siblings,
        "usedStorage": sum(file.blob.size_bytes for file in files),
    }


def _model(
    *,
    full_name: str,
    commit: str,
    created_at: datetime,
    changed_at: datetime,
    base_name: str,
    licence: str,
    tags: Iterable[str],
) -> dict[str, Any]:
    card: dict[str, Any] = {"library_name": "peft", "tags": list(tags)}
    every = ["peft", "safetensors", *tags]
    if base_name:
        card["base_model"] = base_name
        every += [f"base_model:{base_name}", f"base_model:adapter:{base_name}"]
    if licence:
        card["license"] = licence
        every.append(f"license:{licence}")
    return {
        "id": full_name,
        "modelId": full_name,
        "sha": commit,
        "lastModified": moment(changed_at),
        "createdAt": moment(created_at),
        "gated": False,
        "disabled": False,
        "likes": 0,
        "tags": list(dict.fromkeys(every)),
        "library_name": "peft",
        "pipeline_tag": None,
        "cardData": card,
        "config": {"peft": {"base_model_name_or_path": base_name}} if base_name else {},
        "usedStorage": 0,
    }


def sibling(file: File, *, blobs: bool) -> dict[str, Any]:
    """A file as model_info lists it."""
    record: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        record |= {"size": file.blob.size_bytes, "blobId": file.blob.git_sha1}
        if file.is_large:
            size = file.blob.size_bytes
            record["lfs"] = {"sha256": file.blob_id, "size": size, "pointerSize": POINTER_BYTES}
    return record


def node(file: File, last_commit: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file as a tree lists it."""
    size = file.blob.size_bytes
    record: dict[str, Any] = {"type": "file", "path": file.path, "size": size, "oid": file.blob.git_sha1}
    if file.is_large:
        record["lfs"] = {"oid": file.blob_id, "size": size, "pointerSize": POINTER_BYTES}
    return record | ({"lastCommit": last_commit} if last_commit else {})


def folder(path: str, files: Iterable[File], last_commit: dict[str, Any] | None = None) -> dict[str, Any]:
    """A folder as a tree lists it; its id is a digest over what lies in it."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in files:
        digest.update(f"{file.path}\0{file.blob_id}\n".encode())
    record: dict[str, Any] = {"type": "directory", "path": path, "oid": digest.hexdigest(), "size": 0}
    return record | ({"lastCommit": last_commit} if last_commit else {})


def title(message: str) -> str:
    return message.partition("\n")[0]


def last_commit(revision: Revision) -> dict[str, Any]:
    return {"id": revision.commit, "title": title(revision.message), "date": moment(revision.created_at)}


def commit(revision: Revision) -> dict[str, Any]:
    """A commit as the history lists it."""
    author = revision.author.username if revision.author else "moerge"
    return {
        "id": revision.commit,
        "title": title(revision.message),
        "message": revision.message.partition("\n")[2].strip("\n"),
        "date": moment(revision.created_at),
        "authors": [{"user": author}],
    }
