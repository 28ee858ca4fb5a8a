"""What stock clients send: repositories, preupload, commits as a stream, identity, card checks."""

import base64
import io
import json
import tracemalloc

import pytest

from registry.models import Blob, Expert, Job, Ref, Revision
from registry.services import keys
from tests import tiny
from tests.integration import hf

pytestmark = pytest.mark.django_db


@pytest.fixture
def ada():
    return hf.person("ada")


@pytest.fixture
def repo(ada):
    hf.base()
    assert ada[1].json("POST", "/api/repos/create", {"name": "bank", "organization": None}).status_code == 200
    return Expert.objects.get(name="bank")


def counts() -> tuple[int, ...]:
    return tuple(model.objects.count() for model in (Revision, Blob, Job, Ref))


def staged(settings) -> list[str]:
    return [path.name for path in settings.HUB_STAGING_DIR.iterdir()]


def test_a_repository_is_made_once_and_its_address_has_the_host_of_the_request(ada):
    _, caller = ada
    body = {"name": "bank", "organization": None, "type": "model", "visibility": "private"}
    made = caller.send(
        "POST", "/api/repos/create", data=json.dumps(body), kind="application/json", Host="hub.example:8443"
    )
    url = "http://hub.example:8443/ada/bank"
    assert (made.status_code, made.json()) == (200, {"url": url, "name": "ada/bank", "id": "ada/bank"})
    assert Expert.objects.get(name="bank").visibility == "private"
    again = caller.json("POST", "/api/repos/create", {"name": "Bank", "organization": "ada"})
    assert (again.status_code, again.json()["url"]) == (409, "http://testserver/ada/bank")
    assert Expert.objects.count() == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "bank", "organization": "bob"}, 403),
        ({"name": "bank", "organization": "merges"}, 403),
        ({"name": "../bank"}, 422),
        ({"name": "a--b"}, 422),
        ({"name": "bank", "type": "dataset"}, 422),
        ({"name": 5}, 400),
        ({}, 400),
    ],
)
def test_a_repository_that_may_not_be_is_refused_with_a_reason(ada, body, status):
    hf.person("bob")
    response = ada[1].json("POST", "/api/repos/create", body)
    assert response.status_code == status
    assert response["X-Error-Message"]
    assert response.json()["errors"][0]["message"]
    assert Expert.objects.count() == 0


def test_writing_needs_a_key_with_scope_write(ada, repo):
    user, _ = ada
    reader = hf.Caller(keys.create(user=user, name="r", scopes=["read"])[1])
    for method, path in (
        ("POST", "/api/repos/create"),
        ("DELETE", "/api/repos/delete"),
        ("POST", "/api/repos/move"),
        ("PUT", "/api/models/ada/bank/settings"),
        ("POST", "/api/models/ada/bank/branch/dev"),
        ("POST", "/api/models/ada/bank/tag/main"),
        ("POST", "/api/models/ada/bank/preupload/main"),
        ("POST", "/api/models/ada/bank/commit/main"),
    ):
        assert reader.json(method, path, {"name": "x"}).status_code == 403
        assert hf.Caller().json(method, path, {"name": "x"}).status_code == 401
    assert Expert.objects.filter(deleted_at=None).count() == 1


def test_a_repository_is_moved_hidden_and_deleted(ada, repo):
    _, caller = ada
    moved = caller.json("POST", "/api/repos/move", {"fromRepo": "ada/bank", "toRepo": "ada/money", "type": "model"})
    assert moved.status_code == 200
    assert caller.get("/api/models/ada/bank")["X-Error-Code"] == "RepoNotFound"
    hidden = caller.json("PUT", "/api/models/ada/money/settings", {"visibility": "private"})
    assert hidden.json() == {"private": True, "gated": False}
    assert hf.Caller().get("/api/models/ada/money").status_code == 404
    shown = caller.json("PUT", "/api/models/ada/money/settings", {"private": False, "gated": False})
    assert shown.json()["private"] is False
    assert caller.json("PUT", "/api/models/ada/money/settings", {"gated": "auto"}).status_code == 422
    assert caller.json("DELETE", "/api/repos/delete", {"name": "money", "organization": "ada"}).status_code == 200
    gone = caller.json("DELETE", "/api/repos/delete", {"name": "money", "organization": "ada"})
    assert (gone.status_code, gone["X-Error-Code"]) == (404, "RepoNotFound")


def test_a_commit_makes_a_revision_whose_files_resolve_at_once(ada, repo, settings):
    _, caller = ada
    files = tiny.lora(seed=1)
    response = caller.commit("ada/bank", [hf.header("First", description="With a reason."), *hf.added(files)])
    assert response.status_code == 200
    record = response.json()
    revision = Revision.objects.get()
    assert record == {
        "success": True,
        "commitOid": revision.commit,
        "commitUrl": f"http://testserver/ada/bank/commit/{revision.commit}",
        "hookOutput": "",
    }
    assert revision.message == "First\n\nWith a reason."
    for path, data in files.items():
        assert hf.Caller().get(f"/ada/bank/resolve/main/{path}").body == data
    assert sorted(Job.objects.values_list("kind", flat=True)) == ["check", "compress", "embed", "index"]
    assert staged(settings) == []


def test_a_commit_adds_changes_and_deletes_on_the_named_branch(ada, repo):
    _, caller = ada
    caller.commit(
        "ada/bank",
        [hf.header(), *hf.added({"a.txt": b"1\n", "b.txt": b"2\n", "old/c.txt": b"3\n", "old/d.txt": b"4\n"})],
    )
    caller.json("POST", "/api/models/ada/bank/branch/dev", {})
    lines = [
        hf.header("Change"),
        *hf.added({"a.txt": b"11\n"}),
        {"key": "deletedFile", "value": {"path": "b.txt"}},
        {"key": "deletedFolder", "value": {"path": "old/"}},
    ]
    assert caller.commit("ada/bank", lines, branch="dev").status_code == 200
    tree = {row["path"]: row["size"] for row in caller.get("/api/models/ada/bank/tree/dev?recursive=true").json()}
    assert tree == {"a.txt": 3}
    assert len(caller.get("/api/models/ada/bank/tree/main").json()) == 3


def test_the_same_commit_again_is_the_same_revision(ada, repo):
    _, caller = ada
    lines = [hf.header(), *hf.added(tiny.lora(seed=1))]
    first = caller.commit("ada/bank", lines).json()["commitOid"]
    before = counts()
    assert caller.commit("ada/bank", lines).json()["commitOid"] == first
    assert counts() == before


def test_a_commit_on_a_parent_that_has_moved_is_412_and_changes_nothing(ada, repo):
    _, caller = ada
    first = caller.commit("ada/bank", [hf.header(), *hf.added({"a.txt": b"1\n"})]).json()["commitOid"]
    second = caller.commit("ada/bank", [hf.header(parentCommit=first), *hf.added({"a.txt": b"2\n"})])
    assert second.status_code == 200
    before = counts()
    stale = caller.commit("ada/bank", [hf.header(parentCommit=first), *hf.added({"a.txt": b"3\n"})])
    assert stale.status_code == 412
    assert counts() == before
    empty = caller.commit("ada/bank", [hf.header(parentCommit="0" * 40), *hf.added({"a.txt": b"3\n"})])
    assert empty.status_code == 412


def test_the_empty_tree_is_the_parent_of_the_first_commit(ada, repo):
    _, caller = ada
    sha = caller.get("/api/models/ada/bank").json()["sha"]
    assert caller.commit("ada/bank", [hf.header(parentCommit=sha), *hf.added({"a.txt": b"1\n"})]).status_code == 200
    assert caller.get(f"/api/models/ada/bank/tree/{sha}").json() == []


def test_deleting_what_is_not_there_is_an_absent_entry(ada, repo):
    _, caller = ada
    caller.commit("ada/bank", [hf.header(), *hf.added({"a.txt": b"1\n"})])
    for key, path in (("deletedFile", "b.txt"), ("deletedFolder", "old")):
        response = caller.commit("ada/bank", [hf.header(), {"key": key, "value": {"path": path}}])
        assert (response.status_code, response["X-Error-Code"]) == (404, "EntryNotFound")


def test_only_a_branch_takes_commits(ada, repo):
    _, caller = ada
    first = caller.commit("ada/bank", [hf.header(), *hf.added({"a.txt": b"1\n"})]).json()["commitOid"]
    caller.json("POST", "/api/models/ada/bank/tag/main", {"tag": "v1"})
    for revision in ("v1", first, "dev", "refs%2Fpr%2F1"):
        response = caller.commit("ada/bank", [hf.header(), *hf.added({"a.txt": b"2\n"})], branch=revision)
        assert (response.status_code, response["X-Error-Code"]) == (404, "RevisionNotFound")
    asked = caller.send("POST", "/api/models/ada/bank/commit/main?create_pr=1")
    assert asked.status_code == 501


WEIGHTS = tiny.lora(seed=1)["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("files", "pointer"),
    [
        ({"weights.safetensors": b"\x80\x04\x95" + b"\0" * 64}, "/weights.safetensors"),
        ({"adapter_model.safetensors": WEIGHTS[:-5]}, "/adapter_model.safetensors"),
        ({"adapter_model.bin": b"PK\x03\x04"}, "/adapter_model.bin"),
        ({"../up.txt": b"1"}, "/..~1up.txt"),
        ({**tiny.lora(), "adapter_config.json": tiny.lora(rank=3)["adapter_config.json"]}, "/adapter"),
        ({**tiny.lora(), "adapter_config.json": b'{"peft_type": NaN}'}, "/adapter_config.json"),
        (tiny.lora(base="nobody/knows"), "/adapter_config.json/base_model_name_or_path"),
    ],
)
def test_a_file_that_breaks_a_rule_is_named_and_leaves_nothing_behind(ada, repo, settings, files, pointer):
    _, caller = ada
    before = counts()
    if "nobody/knows" in str(files):
        files = {**files, "README.md": b"# No base\n"}
    response = caller.commit("ada/bank", [hf.header(), *hf.added(files)])
    assert response.status_code == 422
    errors = response.json()["errors"]
    assert errors[0]["pointer"].startswith(pointer)
    assert errors[0]["message"]
    assert response["X-Error-Message"]
    assert counts() == before
    assert staged(settings) == []
    assert [path for path in settings.HUB_BLOBS_DIR.rglob("*") if path.is_file()] == []


HEADER = json.dumps(hf.header()).encode() + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no json\n",
        b"[1]\n",
        b'{"key": "header"}\n',
        b'{"key": "header", "value": {"summary": 5}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "QQ=", "encoding": "base64"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "Q\\nQ==", "encoding": "base64"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "QQ==", "encoding": "rot13"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "encoding": "base64"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "QQ==',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "' + b"A" * 100_001 + b'"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "' + b"A" * 99_998 + b"==" + b'AAAA"}}\n',
        HEADER + b'{"key": "file", "value": {"path": "a.txt", "content": "' + b"A" * 100_000,
        HEADER + b'{"key": "wish", "value": {}}\n',
        HEADER + b"[" * 100_000 + b"\n",
    ],
)
def test_a_body_that_cannot_be_read_is_400_and_leaves_nothing_behind(ada, repo, settings, data):
    _, caller = ada
    before = counts()
    response = caller.send("POST", "/api/models/ada/bank/commit/main", data=data, kind="application/x-ndjson")
    assert response.status_code == 400
    assert response.json()["errors"]
    assert counts() == before
    assert staged(settings) == []


def test_a_commit_without_a_summary_or_changes_is_told_so(ada, repo):
    _, caller = ada
    assert caller.commit("ada/bank", hf.added({"a.txt": b"1\n"})).status_code == 400
    assert caller.commit("ada/bank", [hf.header("")]).status_code == 400


def test_limits_cut_a_commit_while_it_arrives(ada, repo, settings):
    _, caller = ada
    settings.HUB_FILE_MAX_BYTES = 1_000_000
    settings.HUB_UPLOAD_MAX_BYTES = 1_500_000
    before = counts()
    for lines in (
        [*hf.added({"a.txt": b"x" * 1_000_001})],
        [*hf.added({"a.txt": b"x" * 900_000, "b.txt": b"x" * 900_000})],
    ):
        response = caller.commit("ada/bank", [hf.header(), *lines])
        assert response.status_code == 413
    wide = b'{"key":"header","value":{' + b",".join(b'"%d":"%s"' % (n, b"x" * 60_000) for n in range(20)) + b"}}\n"
    assert caller.send("POST", "/api/models/ada/bank/commit/main", data=wide).status_code == 413
    settings.HUB_UPLOAD_MAX_FILES = 2
    many = caller.commit("ada/bank", [hf.header(), *hf.added({f"{n}.txt": b"1\n" for n in range(9)})])
    assert many.status_code == 413
    assert counts() == before
    assert staged(settings) == []


class Arriving(io.RawIOBase):
    """A body that is made while it is read, so that it is never in memory as a whole."""

    def __init__(self, size: int) -> None:
        self.left = [
            HEADER,
            b'{"key": "file", "value": {"content": "',
            *([base64.b64encode(b"line of a large text file\n   " * 3 * 3_000)] * (size // 252_000)),
            b'", "path": "large.txt", "encoding": "base64"}}\n',
        ]
        self.length = sum(len(part) for part in self.left)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self.left:
            return 0
        part = self.left[0][: len(buffer)]
        self.left[0] = self.left[0][len(part) :]
        if not self.left[0]:
            self.left.pop(0)
        buffer[: len(part)] = part
        return len(part)


def test_a_line_of_30_mb_is_taken_with_bounded_memory(settings, tmp_path):
    from api.hf import ndjson

    settings.HUB_STAGING_DIR = tmp_path / "alone"
    body = Arriving(30_000_000)
    limits = ndjson.Limits(line_bytes=1 << 20, file_bytes=1 << 30, total_bytes=1 << 30, lines=10)
    reader = ndjson.Reader(body, limits)
    tracemalloc.start()
    lines = list(reader)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert body.length > 30_000_000
    content = lines[1]["value"]["content"]
    assert lines[1]["value"]["path"] == "large.txt"
    assert content.size_bytes == content.path.stat().st_size > 22_000_000
    assert content.path.read_bytes().startswith(b"line of a large text file\n   line of")
    assert peak_bytes < 8_000_000
    reader.discard()
    assert list((tmp_path / "alone").iterdir()) == []


def test_preupload_sends_every_file_inside_the_commit_and_knows_what_is_the_same(ada, repo):
    _, caller = ada
    caller.commit("ada/bank", [hf.header(), *hf.added({"a.txt": b"1\n", "old.txt": b"0\n"})])
    names = ["a.txt", "new.safetensors", "runs/events.out.tfevents.1", "training_args.bin"]
    files = [{"path": name, "size": 9, "sample": ""} for name in names]
    response = caller.json("POST", "/api/models/ada/bank/preupload/main", {"files": files})
    assert response.json() == {
        "files": [
            {"path": "a.txt", "uploadMode": "regular", "shouldIgnore": False, "oid": hf.git_id(b"1\n")},
            {"path": "new.safetensors", "uploadMode": "regular", "shouldIgnore": False},
            {"path": "runs/events.out.tfevents.1", "uploadMode": "regular", "shouldIgnore": True},
            {"path": "training_args.bin", "uploadMode": "regular", "shouldIgnore": True},
        ]
    }
    topic, _, message = response["X-HF-Warning"].partition("; ")
    assert topic == "leftovers"
    assert "training_args.bin" in message
    assert "X-HF-Warning" not in caller.json("POST", "/api/models/ada/bank/preupload/main", {"files": files[:2]})
    assert caller.json("POST", "/api/models/ada/bank/preupload/no", {"files": []})["X-Error-Code"] == "RevisionNotFound"
    assert caller.json("POST", "/api/models/ada/bank/preupload/main", {}).status_code == 400


def test_a_key_tells_its_owner(ada):
    _, caller = ada
    record = caller.get("/api/whoami-v2").json()
    assert (record["type"], record["name"], record["orgs"]) == ("user", "ada", [])
    assert record["auth"]["accessToken"]["displayName"] == "laptop"
    assert record["auth"]["accessToken"]["role"] == "write"
    assert hf.Caller().get("/api/whoami-v2").status_code == 401


def test_a_card_is_checked_as_yaml(ada):
    _, caller = ada

    def check(text: str):
        return caller.json("POST", "/api/validate-yaml", {"content": text, "repoType": "model"})

    assert check(tiny.card().decode()).json() == {"errors": [], "warnings": []}
    assert check("# A title alone\n").json()["warnings"][0]["message"]
    for wrong in (
        "---\nlicense: [mit\n---\n",
        "---\n- a list\n---\n",
        "---\na: 1\na: 2\n---\n",
        "---\na: &x 1\nb: *x\n---\n",
    ):
        response = check(wrong)
        assert response.status_code == 400
        assert response.json()["errors"][0]["message"]
    assert caller.json("POST", "/api/validate-yaml", {"repoType": "model"}).status_code == 400


def test_small_questions_of_clients_are_answered(ada):
    assert hf.Caller().get("/api/agent-harnesses").json() == {"standardEnvVars": [], "harnesses": {}}


def test_a_body_that_is_too_long_or_no_object_is_refused(ada, settings):
    _, caller = ada
    settings.HUB_JSON_MAX_BYTES = 1000
    assert caller.json("POST", "/api/repos/create", {"name": "x" * 2000}).status_code == 413
    assert caller.json("POST", "/api/repos/create", ["x"]).status_code == 400
    assert caller.send("POST", "/api/repos/create", data=b"{", kind="application/json").status_code == 400


@pytest.mark.parametrize("text", ["\0", "ba\0nk", "\ud800"])
def test_text_that_no_database_can_hold_is_refused_wherever_it_stands(ada, repo, text):
    _, caller = ada
    assert caller.json("POST", "/api/repos/create", {"name": text}).status_code == 400
    assert caller.json("DELETE", "/api/repos/delete", {"name": text}).status_code == 400
    assert caller.json("POST", "/api/repos/move", {"fromRepo": f"ada/{text}", "toRepo": "ada/b"}).status_code == 400
    assert caller.json("POST", "/api/models/ada/bank/tag/main", {"tag": text}).status_code == 400
    assert caller.commit("ada/bank", [hf.header(text), *hf.added({"a.txt": b"1"})]).status_code == 400
    assert caller.commit("ada/bank", [hf.header(), *hf.added({text: b"1"})]).status_code == 400
