"""Private repositories on the Hub protocol: to those who may not read them they are exactly as absent."""

import json

import pytest

from registry.models import Expert, Membership, Merge, MergeParent, Ref, Revision
from tests import tiny
from tests.integration import hf
from tests.integration.merges import merge_of

pytestmark = pytest.mark.django_db
READS = [
    ("GET", "/api/models/{id}"),
    ("HEAD", "/api/models/{id}"),
    ("GET", "/api/models/{id}?blobs=true"),
    ("GET", "/api/models/{id}/revision/main"),
    ("GET", "/api/models/{id}/revision/{commit}"),
    ("GET", "/api/models/{id}/revision/unknown"),
    ("GET", "/api/models/{id}/auth-check"),
    ("GET", "/api/models/{id}/refs"),
    ("GET", "/api/models/{id}/commits/main"),
    ("GET", "/api/models/{id}/tree/main"),
    ("GET", "/api/models/{id}/tree/main/nowhere"),
    ("POST", "/api/models/{id}/paths-info/main"),
    ("GET", "/{id}/resolve/main/README.md"),
    ("HEAD", "/{id}/resolve/main/README.md"),
    ("GET", "/{id}/resolve/{commit}/adapter_model.safetensors"),
    ("HEAD", "/{id}/resolve/main/nowhere.json"),
    ("GET", "/{id}/raw/main/README.md"),
    ("GET", "/api/models/{id}/revision/compeft-k10"),
    ("GET", "/{id}/resolve/compeft-k10/adapter_config.json"),
]
# What its reader has to wait for.
MADE = [
    ("GET", "/api/models/{id}/tree/compeft-k10"),
    ("HEAD", "/{id}/resolve/compeft-k10/adapter_model.safetensors"),
]
WRITES = [
    ("PUT", "/api/models/{id}/settings"),
    ("POST", "/api/models/{id}/branch/dev"),
    ("DELETE", "/api/models/{id}/branch/dev"),
    ("POST", "/api/models/{id}/tag/main"),
    ("DELETE", "/api/models/{id}/tag/v1"),
    ("POST", "/api/models/{id}/preupload/main"),
    ("POST", "/api/models/{id}/commit/main"),
]


def outcome(response) -> tuple:
    """All of an answer but what differs from request to request."""
    text = response.content.decode()
    try:
        record = json.loads(text)
        record.pop("request_id")
        text = json.dumps(record)
    except ValueError:
        pass
    headers = {name: value for name, value in response.items() if name not in {"X-Request-Id", "Content-Length"}}
    return response.status_code, text, headers


@pytest.fixture
def secret():
    user, owner = hf.person("ada")
    return hf.expert(user, "bank", tiny.lora(), private=True), owner


@pytest.mark.parametrize(("method", "path"), [*READS, *MADE, *WRITES])
@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_a_hidden_repository_answers_exactly_as_an_absent_one(secret, who, method, path):
    made, _ = secret
    commit = Ref.objects.get(expert=made, name="main").revision.commit
    caller = hf.Caller() if who == "nobody" else hf.person("eve")[1]
    hidden = caller.send(method, path.format(id="ada/bank", commit=commit), data=b"{}", kind="application/json")
    absent = caller.send(method, path.format(id="ada/none", commit=commit), data=b"{}", kind="application/json")
    ownerless = caller.send(method, path.format(id="zed/none", commit=commit), data=b"{}", kind="application/json")
    assert outcome(hidden) == outcome(absent) == outcome(ownerless)
    assert hidden.status_code == (401 if (method, path) in WRITES and who == "nobody" else 404)
    if hidden.status_code == 404:
        assert hidden["X-Error-Code"] == "RepoNotFound"
    assert "X-Repo-Commit" not in hidden
    assert "ada" not in outcome(hidden)[1]


@pytest.mark.parametrize(("method", "path"), READS)
def test_its_owner_reads_it(secret, method, path):
    made, owner = secret
    commit = Ref.objects.get(expert=made, name="main").revision.commit
    response = owner.send(method, path.format(id="ada/bank", commit=commit), data=b"{}", kind="application/json")
    unknown = "nowhere" in path or "unknown" in path
    assert response.status_code == (404 if unknown else 200)
    assert response.get("X-Error-Code") != "RepoNotFound"
    if response.status_code == 200:
        assert response["Cache-Control"] == "private, no-store"


def test_a_member_of_the_namespace_reads_it_and_may_not_change_it(secret):
    made, _ = secret
    member, caller = hf.person("bob")
    Membership.objects.create(namespace=made.namespace, user=member, role=Membership.Role.READER)
    assert caller.get("/api/models/ada/bank").status_code == 200
    refused = caller.json("PUT", "/api/models/ada/bank/settings", {"visibility": "public"})
    assert (refused.status_code, refused.json()["code"]) == (403, "not-allowed")
    assert Expert.objects.get(pk=made.pk).visibility == "private"


def test_a_key_without_scope_read_sees_what_everybody_sees(secret):
    made, _ = secret
    from registry.services import keys

    writer = hf.Caller(keys.create(user=made.created_by, name="ci", scopes=["write"])[1])
    commit = Ref.objects.get(expert=made, name="main").revision.commit
    for method, path in READS:
        hidden = writer.send(method, path.format(id="ada/bank", commit=commit), data=b"{}", kind="application/json")
        assert hidden["X-Error-Code"] == "RepoNotFound"
    assert writer.get("/api/models").json() == []
    hf.expert(made.created_by, "open", tiny.lora(seed=3))
    assert writer.get("/api/models/ada/open").status_code == 200


def test_a_key_that_is_not_known_is_refused_even_for_public_things(secret):
    made, _ = secret
    Expert.objects.filter(pk=made.pk).update(visibility="public")
    for path in ("/api/models/ada/bank", "/ada/bank/resolve/main/README.md", "/api/whoami-v2", "/api/models"):
        response = hf.Caller("moe_wrong").get(path)
        assert response.status_code == 401
        assert response["X-Error-Message"] == "Invalid credentials in Authorization header"
        assert "X-Error-Code" not in response


def test_a_private_repository_is_listed_for_its_owner_alone(secret):
    _, owner = secret
    names = [row["id"] for row in owner.get("/api/models").json()]
    assert names == ["ada/bank"]
    assert hf.Caller().get("/api/models").json() == []
    assert hf.person("eve")[1].get("/api/models?author=ada&search=bank").json() == []


def test_a_cookie_reads_and_never_writes(secret):
    made, _ = secret
    browser = hf.Caller()
    browser.client.force_login(made.created_by)
    response = browser.get("/ada/bank/resolve/main/README.md")
    assert response.status_code == 200
    refused = browser.json("PUT", "/api/models/ada/bank/settings", {"visibility": "public"})
    assert refused.status_code == 401
    assert Expert.objects.get(pk=made.pk).visibility == "private"


def test_a_deleted_repository_is_absent_for_its_owner_too(secret):
    _, owner = secret
    assert owner.json("DELETE", "/api/repos/delete", {"name": "bank", "organization": None}).status_code == 200
    assert owner.get("/api/models/ada/bank")["X-Error-Code"] == "RepoNotFound"
    assert owner.get("/ada/bank/resolve/main/README.md")["X-Error-Code"] == "RepoNotFound"


def test_creating_over_somebody_elses_private_repository_tells_nothing(secret):
    _, eve = hf.person("eve")
    over = eve.json("POST", "/api/repos/create", {"name": "bank", "organization": "ada"})
    beside = eve.json("POST", "/api/repos/create", {"name": "none", "organization": "ada"})
    assert outcome(over) == outcome(beside)
    assert over.status_code == 403


def test_a_digest_that_one_may_not_read_is_as_good_as_absent(secret):
    made, owner = secret
    weights = Ref.objects.get(expert=made, name="main").revision.files.get(path="adapter_model.safetensors").blob
    user, eve = hf.person("eve")
    hf.expert(user, "mine", {"NOTES.txt": b"mine\n"})

    def copy(oid: str):
        value = {"path": "adapter_model.safetensors", "algo": "sha256", "oid": oid, "size": weights.size_bytes}
        return eve.commit("eve/mine", [hf.header(), {"key": "lfsFile", "value": value}])

    theirs, nothing = copy(weights.sha256), copy("0" * 64)
    assert theirs.status_code == nothing.status_code == 400
    assert (
        theirs.content.decode().replace(weights.sha256, "0" * 64).split("request_id")[0]
        == (nothing.content.decode().split("request_id")[0])
    )
    value = {"path": "copy.safetensors", "algo": "sha256", "oid": weights.sha256, "size": weights.size_bytes}
    assert owner.commit("ada/bank", [hf.header(), {"key": "lfsFile", "value": value}]).status_code == 200


def test_a_merge_is_a_repository_for_those_who_see_all_its_parents(secret):
    made, owner = secret
    user, eve = hf.person("eve")
    public = hf.expert(user, "open", tiny.lora(seed=5))
    merge = merge_of([made, public], files=tiny.lora(seed=9))
    for path in (
        f"/api/models/merges/{merge.pk}",
        f"/merges/{merge.pk}/resolve/main/README.md",
        f"/merges/{merge.pk}/resolve/{merge.commit}/README.md",
        f"/ada/bank/resolve/merge--{merge.pk}/README.md",
    ):
        response = owner.get(path)
        assert response.status_code == 200
        assert response["Cache-Control"] == "private, no-store"
        assert eve.get(path)["X-Error-Code"] == "RepoNotFound"
    # By the name of the parent that everybody sees, the merge stays hidden as a revision that is not there.
    hidden = eve.get(f"/api/models/eve/open/revision/merge--{merge.pk}")
    absent = eve.get("/api/models/eve/open/revision/merge--0000")
    assert outcome(hidden) == outcome(absent)
    assert hidden["X-Error-Code"] == "RevisionNotFound"
    assert eve.get(f"/api/models/eve/open/revision/{merge.commit}")["X-Error-Code"] == "RevisionNotFound"
    assert owner.get(f"/api/models/eve/open/revision/merge--{merge.pk}").json()["sha"] == merge.commit


def test_a_merge_goes_by_the_names_of_its_parents_alone(secret):
    made, owner = secret
    Expert.objects.filter(pk=made.pk).update(visibility="public")
    made.refresh_from_db()
    other = hf.expert(made.created_by, "other", tiny.lora(seed=6))
    merge = merge_of([made, made], files=tiny.lora(seed=9))
    assert owner.get(f"/api/models/ada/bank/revision/merge--{merge.pk}").status_code == 200
    assert owner.get(f"/api/models/{other.full_name}/revision/merge--{merge.pk}")["X-Error-Code"] == "RevisionNotFound"
    assert owner.get(f"/api/models/merges/{merge.pk}/revision/dev")["X-Error-Code"] == "RevisionNotFound"
    assert owner.commit(f"merges/{merge.pk}", [hf.header(), *hf.added({"NOTES.txt": b"x"})]).status_code == 403
    assert Revision.objects.filter(merge=merge).count() == MergeParent.objects.filter(merge=merge).count() - 1
    assert Merge.objects.get(pk=merge.pk).state == Merge.State.READY
