"""Gates beside an adapter: taken when they fit, refused with all that was met, and nothing of a refused upload stays."""

import numpy as np
import pytest

from registry.models import Blob, Expert, File, Revision
from tests import tiny
from tests.integration import hf
from tests.integration.weights import GATES, SIZE, WEIGHTS, gates, lora

pytestmark = pytest.mark.django_db

BAD = {
    "a key without a module": (
        gates(1, **{"encoder.layer.9.query": np.ones(SIZE, np.float32)}),
        "encoder.layer.9.query",
    ),
    "another width": (gates(1, **{tiny.QUERY: np.ones(SIZE + 1, np.float32)}), tiny.QUERY),
    "NaN": (gates(1, **{tiny.QUERY: np.full(SIZE, np.nan, np.float32)}), tiny.QUERY),
    "zeros": (gates(1, **{tiny.VALUE: np.zeros(SIZE, np.float32)}), tiny.VALUE),
    "another dtype": (gates(1, **{tiny.VALUE: np.ones(SIZE, np.float64)}), tiny.VALUE),
}


@pytest.fixture
def ann():
    return hf.person("ann")


def rest_upload(caller: hf.Caller, name: str, files: dict[str, bytes]):
    """The last answer of an upload over the REST API: of the request that was refused, or of the completion."""
    claims = [{"path": path, "size": len(data), "sha256": tiny.sha256(data)} for path, data in files.items()]
    answer = caller.json("POST", "/api/v1/uploads", {"expert": name, "files": claims})
    for row in answer.json().get("files", []):
        data = files[row["path"]]
        place = f"bytes 0-{len(data) - 1}/{len(data)}"
        sent = caller.send("PUT", row["url"].removeprefix("http://testserver"), data=data, Content_Range=place)
        if sent.status_code >= 400:
            return sent
    return caller.json("POST", f"/api/v1/uploads/{answer.json()['id']}/complete", {})


@pytest.mark.parametrize("way", ["rest", "hub"])
def test_gates_that_fit_are_taken_and_told(ann, way) -> None:
    hf.base()
    tree = {**lora(1), GATES: gates(1)}
    if way == "rest":
        answer = rest_upload(ann[1], "ann/tea", tree)
        assert answer.status_code in {200, 201}, answer.json()
    else:
        ann[1].json("POST", "/api/repos/create", {"name": "tea", "organization": "ann"})
        answer = ann[1].commit("ann/tea", [hf.header(), *hf.added(tree)])
        assert answer.status_code == 200, answer.body
    record = ann[1].get("/api/v1/experts/ann/tea").json()
    assert record["has_gates"]
    assert record["facts"]["gates"] == {"method": "phatgoose", "count": 2, "sha256": hf.sha256(tree[GATES])}
    assert ann[1].get(f"/ann/tea/resolve/main/{GATES}").body == tree[GATES]
    assert b"<dt>Gates</dt><dd>phatgoose, 2 modules</dd>" in ann[1].get("/ann/tea").body


def test_an_expert_without_gates_says_so(ann) -> None:
    hf.expert(ann[0], "tea", lora(1))
    assert ann[1].get("/api/v1/experts/ann/tea").json()["has_gates"] is False


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", ["rest", "hub"])
def test_gates_that_do_not_fit_are_refused_and_nothing_stays(ann, case, way) -> None:
    bad, where = BAD[case]
    hf.base()
    tree = {**lora(1), GATES: bad}
    if way == "rest":
        answer = rest_upload(ann[1], "ann/tea", tree)
        assert answer.status_code == 422
        (fault,) = answer.json()["errors"]
        assert fault["pointer"].startswith(f"/{GATES}/")
        assert where in fault["pointer"]
        assert fault["met"] is not None
        assert fault["wanted"] is not None
        assert fault["remedy"]
    else:
        ann[1].json("POST", "/api/repos/create", {"name": "tea", "organization": "ann"})
        answer = ann[1].commit("ann/tea", [hf.header(), *hf.added(tree)])
        assert answer.status_code == 422
        assert where in answer.headers["X-Error-Message"]
    assert not Revision.objects.exists()
    assert not File.objects.exists()
    if way == "hub":
        assert not Blob.objects.exists()


def test_gates_alone_wait_for_an_adapter_and_are_held_against_it_then(ann) -> None:
    early = hf.expert(ann[0], "early", {GATES: gates(1)})
    assert ann[1].get("/api/v1/experts/ann/early").json()["has_gates"] is False
    hf.put(ann[0], early, lora(1))
    assert ann[1].get("/api/v1/experts/ann/early").json()["has_gates"]
    from registry.errors import UploadInvalid

    wrong = hf.expert(ann[0], "wrong", {GATES: gates(1, **{tiny.QUERY: np.ones(3, np.float32)})})
    with pytest.raises(UploadInvalid, match=tiny.QUERY):
        hf.put(ann[0], wrong, lora(1))
    with pytest.raises(UploadInvalid, match="norm"):
        hf.expert(ann[0], "zero", {GATES: gates(1, **{tiny.QUERY: np.zeros(SIZE, np.float32)})})


def test_new_weights_under_old_gates_are_warned_about(ann) -> None:
    made = hf.expert(ann[0], "tea", {**lora(1), GATES: gates(1)})
    head = hf.put(ann[0], made, {WEIGHTS: lora(2)[WEIGHTS]})
    assert any("other weights" in text for text in head.facts["warnings"])
    assert "gates" in head.facts


def test_gates_of_some_modules_are_taken_with_a_warning(ann) -> None:
    from safetensors.numpy import save

    few = save({tiny.QUERY: np.ones(SIZE, np.float32)}, metadata={"method": "phatgoose"})
    made = hf.expert(ann[0], "tea", {**lora(1), GATES: few})
    facts = Revision.objects.get(expert=made).facts
    assert facts["gates"]["count"] == 1
    assert any(text.startswith("1 of 2 modules") for text in facts["warnings"])


def test_gates_that_name_another_base_are_refused(ann) -> None:
    from safetensors.numpy import save

    from registry.errors import UploadInvalid
    from registry.models import BaseAlias, BaseModel

    BaseAlias.objects.create(key="acme/other", base=BaseModel.objects.create(name="acme/other"))
    tensors = {tiny.QUERY: np.ones(SIZE, np.float32)}
    for said, is_right in ((tiny.BASE, True), (f"{tiny.BASE}@main", True), ("acme/other@v1", False)):
        bad = save(tensors, metadata={"method": "phatgoose", "base_model": said})
        if is_right:
            hf.expert(ann[0], f"tea-{len(said)}", {**lora(1), GATES: bad})
        else:
            with pytest.raises(UploadInvalid, match="acme/other"):
                hf.expert(ann[0], "tea", {**lora(1), GATES: bad})
    assert Expert.objects.filter(name__startswith="tea-").count() == 2


def test_gates_may_be_removed_again(ann) -> None:
    made = hf.expert(ann[0], "tea", {**lora(1), GATES: gates(1)})
    from registry.services import revisions

    revisions.commit(user=ann[0], expert=made, changes=revisions.Changes({}, (GATES,)), message="No gates")
    assert ann[1].get("/api/v1/experts/ann/tea").json()["has_gates"] is False
