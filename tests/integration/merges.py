"""Merges: as rows, with or without the content that a worker would have made, and as the worker makes them."""

import hashlib
from collections.abc import Sequence

from registry import storage
from registry.models import BaseModel, Expert, File, Merge, MergeParent, Recipe, Ref, Revision
from registry.services import blobs
from tests import tiny
from tests.integration import hf
from workers import runner

FIRST = tiny.lora(seed=1, rank=2, alpha=6, modules=(tiny.QUERY, tiny.VALUE))
SECOND = tiny.lora(seed=2, rank=5, alpha=2, modules=(tiny.VALUE,))


def merge_of(parents: Sequence[Expert], *, files: dict[str, bytes] | None = None, state: str = "") -> Merge:
    """A merge of the heads of experts; without `files` it is not computed."""
    state = state or (Merge.State.REGISTERED if files is None else Merge.State.READY)
    names = ",".join(parent.full_name for parent in parents)
    digest = hashlib.sha256(names.encode()).hexdigest()
    recipe = Recipe.objects.create(digest=digest, canonical="{}", method="linear")
    merge = Merge.objects.create(
        id=digest[:16],
        recipe=recipe,
        commit=hashlib.sha1(digest.encode()).hexdigest(),
        base_model=BaseModel.objects.get(pk=parents[0].base_model_id),
        state=state,
    )
    for position, parent in enumerate(parents):
        head = Ref.objects.get(expert=parent, name="main").revision
        MergeParent.objects.create(merge=merge, revision=head, weight=0.5, position=position)
    if files is not None:
        revision = Revision.objects.create(
            merge=merge, commit=merge.commit, manifest_digest=digest, state=Revision.State.READY
        )
        for path, data in files.items():
            blob = blobs.keep(blobs.stage_bytes(data))
            File.objects.create(revision=revision, path=path, blob=blob, is_large=path.endswith(".safetensors"))
    return merge


def ready(user, name: str, files: dict[str, bytes], *, private: bool = False) -> Expert:
    made = hf.expert(user, name, files, private=private)
    Revision.objects.filter(expert=made).update(state=Revision.State.READY)
    return made


def recipe(**changes) -> dict:
    body = {
        "base_model": tiny.BASE,
        "method": "linear",
        "parameters": {"normalize": False},
        "experts": [{"expert": "ann/first", "weight": 0.7}, {"expert": "ann/second", "weight": 0.3}],
    }
    return {**body, **changes}


def result(merge: Merge) -> dict[str, bytes]:
    kept = storage.current()
    rows = File.objects.filter(revision__merge=merge)
    found = {}
    for row in rows:
        with kept.open(row.blob_id) as file:
            found[row.path] = file.read()
    return found


def compute(merge: Merge) -> Merge:
    runner.run(merge.jobs.get().pk)
    merge.refresh_from_db()
    return merge
