"""Every kind of adapter and every setting of LoRA that PEFT knows, made by stock PEFT, at the door of merges.

Each is accepted, or refused by its name before anything is made. What is accepted does what it did before, which
tests/unit/tensors/test_identity.py shows case by case; the lists are those of that file.
"""

import json

import numpy as np
import pytest
from peft import PeftType
from safetensors.numpy import save

from moerge.merging.experts import ACCEPTED
from registry.errors import HubError
from registry.models import BaseAlias, BaseModel, Job, Merge, Revision
from registry.services import merges
from tests import tiny, tiny_peft
from tests.integration import hf
from tests.unit.tensors import test_identity as walk

pytestmark = [pytest.mark.django_db, pytest.mark.filterwarnings("ignore")]

CHECK = "/api/v1/merges/check"
REST = sorted(
    {kind.value for kind in PeftType} - {kept.kind for kept in walk.KEEPS.values()} - {"SHIRA"} - {*walk.REFUSED_KINDS}
)


# One case of each kind, setting and reason to need the base; that each of the others is kept is shown there.
KEPT = {(kept.kind, kept.field, kept.blocker): name for name, kept in walk.KEEPS.items() if not kept.with_base}


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def base():
    row = BaseModel.objects.create(name="tiny/base")
    BaseAlias.objects.create(key="tiny/base", base=row)
    return row


def uploaded(user, files: dict[str, bytes]) -> None:
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "tiny/base"}
    tree = {
        "README.md": tiny.card(base_model="tiny/base"),
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": files["adapter_model.safetensors"],
    }
    made = hf.expert(user, "one", tree)
    Revision.objects.filter(expert=made).update(state=Revision.State.READY)


def saved(tmp_path, config, *, model=tiny_peft.bert) -> dict[str, bytes]:
    tiny_peft.saved(tmp_path, config, base=model)
    return {name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def ask(caller: hf.Caller):
    return caller.json("POST", CHECK, {"method": "linear", "experts": [{"expert": "ann/one", "weight": 1}]})


def assert_refused(ann, word: str) -> dict:
    answer = ask(ann[1])
    assert (answer.status_code, answer.json()["code"]) == (409, "experts-incompatible"), answer.json()
    fault = answer.json()["errors"][0]
    assert fault["pointer"] == "/experts/0/expert"
    assert fault["remedy"]
    assert "ann/one" in answer.json()["detail"]
    assert word in answer.json()["detail"]
    assert Merge.objects.count() == Job.objects.filter(kind="merge").count() == 0
    return fault


@pytest.mark.parametrize("name", KEPT.values())
def test_what_can_be_merged_is_accepted_and_what_needs_the_base_says_so(name, ann, base, tmp_path) -> None:
    kept = walk.KEEPS[name]
    uploaded(ann[0], saved(tmp_path, kept.make(), model=kept.base))
    if kept.blocker and kept.blocker not in ACCEPTED:
        fault = assert_refused(ann, kept.blocker)
        assert "bin/manage add_base_weights tiny/base FOLDER" in fault["remedy"]
        base.weights = {"folder": "tiny", "digest": "b" * 64, "files": {}}
        base.save()
    answer = ask(ann[1])
    assert answer.status_code == 200, answer.json()
    body = answer.json()
    assert body["output"]["kind"] == ("ia3" if kept.kind == "IA3" else "lora")
    assert body["recipe"].get("base_weights") == (base.weights.get("digest") if base.weights else None)
    assert body["cost"] is None or body["experts"][0]["modules"] > 0


@pytest.mark.parametrize("field", [*walk.REFUSED_FIELDS, *walk.WRITTEN_FIELDS])
def test_a_setting_that_is_not_merged_is_refused_by_its_name(field, ann, base, tmp_path) -> None:
    files = saved(tmp_path, tiny_peft.lora(**walk.REFUSED_FIELDS.get(field, {})))
    if field in walk.WRITTEN_FIELDS:
        config = json.loads(files["adapter_config.json"]) | {field: walk.WRITTEN_FIELDS[field]}
        files["adapter_config.json"] = json.dumps(config).encode()
    base.weights = {"folder": "tiny", "digest": "b" * 64, "files": {}}
    base.save()
    uploaded(ann[0], files)
    assert_refused(ann, field)


@pytest.mark.parametrize("kind", walk.REFUSED_KINDS)
def test_a_kind_that_is_not_merged_is_refused_by_its_name(kind, ann, base, tmp_path) -> None:
    uploaded(ann[0], saved(tmp_path, walk.REFUSED_KINDS[kind]()))
    assert assert_refused(ann, "/peft_type")["met"] == kind


@pytest.mark.parametrize("kind", REST)
def test_a_kind_that_needs_more_of_a_model_is_refused_by_its_name(kind, ann, base) -> None:
    name = walk.WRITTEN_KINDS.get(kind, f"base_model.model.query.{kind.lower()}_weight")
    config = json.dumps({"peft_type": kind, "target_modules": ["query"]}).encode()
    weights = save({name: np.ones((2, 2), np.float32)}, metadata={"format": "pt"})
    uploaded(ann[0], {"adapter_config.json": config, "adapter_model.safetensors": weights})
    assert assert_refused(ann, "/peft_type")["met"] == kind


def test_a_setting_that_only_training_reads_refuses_nothing(ann, base, tmp_path) -> None:
    files = saved(tmp_path, tiny_peft.lora())
    fields = {name: value for name, value in walk.INERT_FIELDS.items() if name != "base_model_name_or_path"}
    files["adapter_config.json"] = json.dumps(json.loads(files["adapter_config.json"]) | fields).encode()
    uploaded(ann[0], files)
    assert ask(ann[1]).status_code == 200


def test_a_file_of_integers_is_refused_at_the_upload(ann, base, tmp_path) -> None:
    with pytest.raises(HubError, match="met I32"):
        uploaded(ann[0], saved(tmp_path, walk.ShiraConfig(r=2, target_modules=["query"])))


def test_registering_refuses_as_checking_does(ann, base, tmp_path) -> None:
    uploaded(ann[0], saved(tmp_path, walk.REFUSED_KINDS["OFT"]()))
    body = {"method": "linear", "experts": [{"expert": "ann/one", "weight": 1}]}
    with pytest.raises(HubError) as caught:
        merges.register(user=ann[0], body=body)
    assert caught.value.faults[0].met == "OFT"
