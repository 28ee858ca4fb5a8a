"""Weights of bases that an operator adds: hashed once, checked against what is known, opened by digest."""

import hashlib
import json

import numpy as np
import pytest
from django.core.management import CommandError
from safetensors.numpy import save_file

from registry.errors import NotReady, RequestInvalid
from registry.models import AuditEvent, BaseModel
from registry.services import base_weights
from tests import tiny
from tests.integration import hf
from tests.integration.test_commands import call

pytestmark = pytest.mark.django_db

LAYER = "encoder.layer.0.attention.self"


@pytest.fixture
def base():
    made = hf.base()
    made.shapes = {"encoder.layer.*.attention.self.query": [4, 6], "embeddings.word_embeddings": [6, 9]}
    made.save()
    return made


@pytest.fixture
def folder(settings, tmp_path):
    """A checkpoint in two shards below HUB_BASES_DIR, written by the reference library."""
    settings.HUB_BASES_DIR = tmp_path / "bases"
    return shards(settings.HUB_BASES_DIR / "minilm")


def shards(place, **changes):
    arrays = {
        f"{LAYER}.query.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
        "embeddings.word_embeddings.weight": np.ones((9, 6), np.float32),
        f"{LAYER}.query.bias": np.ones(4, np.float32),
        **changes,
    }
    place.mkdir(parents=True, exist_ok=True)
    names = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(arrays))}
    for file in set(names.values()):
        save_file({name: array for name, array in arrays.items() if names[name] == file}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return place


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_is_hashed_once_and_then_known_by_one_digest(base, folder) -> None:
    said = call("add_base_weights", tiny.BASE.upper(), "minilm")
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()
    assert said.split() == [tiny.BASE, digest]
    base.refresh_from_db()
    assert base.weights == {
        "folder": "minilm",
        "digest": digest,
        "files": {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files},
    }
    event = AuditEvent.objects.get(action="base.weights.add")
    assert (event.subject, event.detail["digest"]) == (tiny.BASE, digest)
    with base_weights.open(base) as weights:
        assert weights.digest == digest
        np.testing.assert_array_equal(weights.weight(f"{LAYER}.query"), np.arange(24).reshape(4, 6))


def test_an_absolute_folder_is_taken_when_it_lies_in_the_folder_of_bases(base, folder) -> None:
    call("add_base_weights", tiny.BASE, str(folder))
    base.refresh_from_db()
    assert base.weights["folder"] == "minilm"


@pytest.mark.parametrize("place", ["../elsewhere", "{tmp}/elsewhere", "linked", "", ".", "nothing"])
def test_a_folder_that_lies_elsewhere_is_refused(place, base, folder, tmp_path) -> None:
    shards(tmp_path / "elsewhere")
    (folder.parent / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestInvalid, match="HUB_BASES_DIR"):
        base_weights.add(user=None, base=base, folder=place.format(tmp=tmp_path))
    base.refresh_from_db()
    assert base.weights == {}


def test_a_file_that_links_elsewhere_is_refused(base, folder, tmp_path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.replace(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(RequestInvalid, match=r"safetensors lies outside HUB_BASES_DIR"):
        base_weights.add(user=None, base=base, folder="minilm")


WRONG = {
    "a layer of another size": ({f"{LAYER}.query.weight": np.ones((4, 7), np.float32)}, "query is 4 x 7"),
    "another vocabulary": ({"embeddings.word_embeddings.weight": np.ones((8, 6), np.float32)}, "embeddings is 8 x 6"),
    "behind a wrapper": ({f"bert.{LAYER}.query.weight": np.ones((4, 7), np.float32)}, "query is 4 x 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_of_another_shape_is_refused_by_module(case, base, folder) -> None:
    changes, said = WRONG[case]
    shards(folder, **changes)
    with pytest.raises(RequestInvalid, match=said):
        base_weights.add(user=None, base=base, folder="minilm")


def test_a_checkpoint_without_any_known_module_is_refused(base, folder) -> None:
    base.shapes = {"model.layers.*.mlp.up_proj": [4, 6]}
    with pytest.raises(RequestInvalid, match="no module"):
        base_weights.add(user=None, base=base, folder="minilm")


def test_weights_stored_by_inputs_fit_as_they_lie(base, folder) -> None:
    shards(folder, **{f"{LAYER}.query.weight": np.ones((6, 4), np.float32)})
    base_weights.add(user=None, base=base, folder="minilm")
    assert base.weights


def test_what_is_no_checkpoint_is_refused(base, folder) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"PK\x03\x04 not weights")
    with pytest.raises(CommandError, match="minilm cannot be taken"):
        call("add_base_weights", tiny.BASE, "minilm")
    with pytest.raises(CommandError, match="not known"):
        call("add_base_weights", "nobody/knows", "minilm")
    with pytest.raises(CommandError, match="--remove"):
        call("add_base_weights", tiny.BASE)


def test_files_that_changed_since_are_refused_with_the_remedy(base, folder) -> None:
    with pytest.raises(NotReady, match="no weights") as none:
        base_weights.open(base)
    assert "add_base_weights" in none.value.faults[0].remedy
    base_weights.add(user=None, base=base, folder="minilm")
    shard = next(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole + b" ")
    with pytest.raises(NotReady) as changed:
        base_weights.open(base)
    fault = changed.value.faults[0]
    assert (fault.met, fault.wanted) == (f"{shard.name}: {len(whole) + 1} bytes", f"{len(whole)} bytes")
    assert f"bin/manage add_base_weights {tiny.BASE}" in fault.remedy
    shard.unlink()
    with pytest.raises(NotReady, match="not as they were"):
        base_weights.open(base)
    shard.write_bytes(whole)
    base_weights.open(base).close()


def test_weights_that_are_removed_leave_their_files(base, folder) -> None:
    base_weights.add(user=None, base=base, folder="minilm")
    call("add_base_weights", tiny.BASE, "--remove")
    assert BaseModel.objects.get(pk=base.pk).weights == {}
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert AuditEvent.objects.filter(action="base.weights.remove").count() == 1
