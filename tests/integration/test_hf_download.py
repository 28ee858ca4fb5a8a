"""GET and HEAD of a file by the Hub protocol: bytes, ranges, validators, headers, and what browsers may not do with it."""

import pytest

from registry.models import Expert, Ref
from tests import tiny
from tests.integration import hf

pytestmark = pytest.mark.django_db
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files():
    return tiny.lora(seed=1)


@pytest.fixture
def repo(files):
    user, caller = hf.person("ada")
    made = hf.expert(user, "bank", files)
    head = Ref.objects.get(expert=made, name="main").revision
    return made, head.commit, caller


def test_a_file_comes_whole_with_commit_digest_and_length(repo, files):
    _, commit, _ = repo
    response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}")
    assert response.status_code == 200
    assert response.body == files[WEIGHTS]
    assert response["X-Repo-Commit"] == commit
    assert response["ETag"] == f'"{hf.sha256(files[WEIGHTS])}"'
    assert response["X-Linked-Etag"] == response["ETag"]
    assert response["X-Linked-Size"] == str(len(files[WEIGHTS]))
    assert response["Content-Length"] == str(len(files[WEIGHTS]))
    assert response["Accept-Ranges"] == "bytes"
    assert "X-Xet-Hash" not in response
    assert "Link" not in response
    assert "Content-Encoding" not in response


def test_a_small_text_is_known_by_its_git_id(repo, files):
    response = hf.Caller().head("/ada/bank/resolve/main/README.md")
    assert response["ETag"] == f'"{hf.git_id(files["README.md"])}"'
    assert "X-Linked-Etag" not in response


def test_head_tells_everything_and_sends_nothing(repo, files):
    whole = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}")
    response = hf.Caller().head(f"/ada/bank/resolve/main/{WEIGHTS}", Accept_Encoding="identity")
    assert response.status_code == 200
    assert response.content == b""
    same = ("ETag", "Content-Length", "X-Repo-Commit", "X-Linked-Size", "Accept-Ranges", "Content-Type")
    assert {name: response[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=3-999999", 3, None),
    ],
)
def test_a_range_gives_exactly_these_bytes(repo, files, asked, start, stop):
    data = files[WEIGHTS]
    response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range=asked)
    wanted = data[start:stop]
    first = len(data) + start if start < 0 else start
    assert response.status_code == 206
    assert response.body == wanted
    assert response["Content-Length"] == str(len(wanted))
    assert response["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(data)}"
    assert response["X-Repo-Commit"]
    assert response["ETag"] == f'"{hf.sha256(data)}"'


def test_a_range_past_the_end_is_416_with_the_size(repo, files):
    size = len(files[WEIGHTS])
    for asked in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
        response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range=asked)
        assert response.status_code == 416
        assert response["Content-Range"] == f"bytes */{size}"
        assert response["X-Error-Message"] == f"The file has {size} bytes."


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,4-5", "lines=0-1", "bytes=", "bytes=-", "bytes=9-3", "bytes=a-b", "bytes=" + "9" * 5000 + "-"]
)
def test_a_range_that_is_not_one_span_of_bytes_gives_the_whole_file(repo, files, asked):
    response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range=asked)
    assert response.status_code == 200
    assert response.body == files[WEIGHTS]
    assert "Content-Range" not in response


def test_if_range_resumes_only_the_same_bytes(repo, files):
    etag = f'"{hf.sha256(files[WEIGHTS])}"'
    same = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range="bytes=4-", If_Range=etag)
    other = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range="bytes=4-", If_Range='"other"')
    weak = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", Range="bytes=4-", If_Range=f"W/{etag}")
    assert (same.status_code, same.body) == (206, files[WEIGHTS][4:])
    assert (other.status_code, other.body) == (200, files[WEIGHTS])
    assert (weak.status_code, weak.body) == (200, files[WEIGHTS])


def test_a_known_etag_is_answered_304_without_bytes(repo, files):
    etag = f'"{hf.sha256(files[WEIGHTS])}"'
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", If_None_Match=known)
        assert (response.status_code, response.content) == (304, b"")
        assert response["ETag"] == etag
    changed = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", If_None_Match='"x"')
    assert (changed.status_code, changed.body) == (200, files[WEIGHTS])


def test_a_failed_precondition_is_412(repo, files):
    etag = f'"{hf.sha256(files[WEIGHTS])}"'
    assert hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", If_Match='"x"').status_code == 412
    held = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}", If_Match=etag)
    assert (held.status_code, held.body) == (200, files[WEIGHTS])


def test_an_empty_file_is_sent_and_has_no_range(repo):
    made, _, caller = repo
    hf.put(made.created_by, made, {"NOTES.txt": b""})
    whole = caller.get("/ada/bank/resolve/main/NOTES.txt")
    assert (whole.status_code, whole.body, whole["Content-Length"]) == (200, b"", "0")
    assert caller.get("/ada/bank/resolve/main/NOTES.txt", Range="bytes=0-").status_code == 416


def test_browsers_get_an_attachment_that_they_cannot_run(repo):
    made, _, caller = repo
    hf.put(made.created_by, made, {"docs/Überblick.md": b"# <script>alert(1)</script>\n"})
    response = caller.get("/ada/bank/resolve/main/docs/%C3%9Cberblick.md")
    assert response.status_code == 200
    assert response["Content-Disposition"] == "attachment; filename*=utf-8''%C3%9Cberblick.md"
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in response["Content-Security-Policy"]
    assert response.body == b"# <script>alert(1)</script>\n"


def test_public_bytes_of_a_commit_may_be_kept_for_ever_and_private_ones_never(repo):
    made, commit, caller = repo
    fixed = caller.head(f"/ada/bank/resolve/{commit}/{WEIGHTS}")
    moving = caller.head(f"/ada/bank/resolve/main/{WEIGHTS}")
    Expert.objects.filter(pk=made.pk).update(visibility="private")
    hidden = caller.head(f"/ada/bank/resolve/{commit}/{WEIGHTS}")
    assert fixed["Cache-Control"] == "public, max-age=31536000, immutable"
    assert moving["Cache-Control"] == "public, no-cache"
    assert hidden.status_code == 200
    assert hidden["Cache-Control"] == "private, no-store"


def test_one_download_is_counted_when_the_weights_are_sent(repo):
    made, _, caller = repo

    def count() -> int:
        return Expert.objects.get(pk=made.pk).downloads

    caller.head(f"/ada/bank/resolve/main/{WEIGHTS}")
    caller.get("/ada/bank/resolve/main/adapter_config.json")
    caller.get(f"/ada/bank/resolve/main/{WEIGHTS}", If_None_Match="*")
    caller.get(f"/ada/bank/resolve/main/{WEIGHTS}", Range="bytes=10-")
    assert count() == 0
    caller.get(f"/ada/bank/resolve/main/{WEIGHTS}")
    assert count() == 1
    caller.get(f"/ada/bank/resolve/main/{WEIGHTS}", Range="bytes=0-9")
    assert count() == 2


def test_an_absent_file_is_told_with_the_commit_so_that_clients_remember(repo):
    _, commit, caller = repo
    for method in ("GET", "HEAD"):
        response = caller.send(method, "/ada/bank/resolve/main/config.json")
        assert response.status_code == 404
        assert response["X-Error-Code"] == "EntryNotFound"
        assert response["X-Repo-Commit"] == commit
        assert "config.json" in response["X-Error-Message"]


def test_an_unknown_revision_is_told_apart_from_an_unknown_file(repo):
    for revision in ("dev", "0" * 39, "a" * 40, "refs%2Fpr%2F1", "v%C3%A9rsion"):
        response = hf.Caller().get(f"/ada/bank/resolve/{revision}/README.md")
        assert (response.status_code, response["X-Error-Code"]) == (404, "RevisionNotFound")


def test_bytes_that_the_storage_lost_are_a_fault_of_the_hub_and_not_an_absent_file(repo, files, blobs_folder):
    digest = hf.sha256(files[WEIGHTS])
    (blobs_folder / digest[:2] / digest[2:4] / digest).unlink()
    response = hf.Caller().get(f"/ada/bank/resolve/main/{WEIGHTS}")
    assert response.status_code == 500
    assert "X-Error-Code" not in response


@pytest.mark.parametrize("name", ["main", "refs/heads/main", "refs%2Fheads%2Fmain"])
def test_a_branch_is_found_by_its_short_and_its_long_name(repo, files, name):
    response = hf.Caller().get(f"/ada/bank/resolve/{name}/README.md")
    assert response.body == files["README.md"]


def test_an_encoded_slash_belongs_to_the_revision_when_the_server_tells_how_it_was_written(repo):
    client = hf.Caller().client
    raw = client.get("/ada/bank/resolve/main/docs/a.md", RAW_URI="/ada/bank/resolve/main%2Fdocs/a.md?download=true")
    assert raw["X-Error-Code"] == "RevisionNotFound"
    plain = client.get("/ada/bank/resolve/main/docs/a.md", RAW_URI="/ada/bank/resolve/main/docs/a.md")
    assert plain["X-Error-Code"] == "EntryNotFound"


def test_raw_sends_the_same_bytes(repo, files):
    response = hf.Caller().get("/ada/bank/raw/main/adapter_config.json")
    assert response.body == files["adapter_config.json"]
    assert response["Content-Type"] == "application/json"
