"""The upload door: promise, send in pieces, resume, complete."""

import io
import socket
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from django.utils import timezone

from registry.errors import OffsetMismatch, RequestMalformed
from registry.models import Blob, Expert, File, Job, Revision, Upload, UploadFile
from registry.services import bases, revisions, uploads
from registry.services.uploads import Claim, Range
from tests import factories, tiny
from tests.senders import Sender, counts

pytestmark = pytest.mark.django_db


@pytest.fixture
def known_bases():
    bases.sync()


@pytest.fixture
def owner(known_bases):
    return factories.user("ada")


@pytest.fixture
def sender(owner):
    return Sender(factories.key(owner))


class Cut(io.BytesIO):
    """A connection that breaks after so many bytes."""

    def __init__(self, data: bytes, after: int) -> None:
        super().__init__(data)
        self.after = after

    def read(self, size=-1, /):
        if self.tell() >= self.after:
            raise OSError("connection reset")
        return super().read(min(size, self.after - self.tell()))


def start(owner, files, name="ada/tea", **options):
    claims = [Claim(path, len(data), tiny.sha256(data)) for path, data in files.items()]
    return uploads.start(user=owner, expert=name, claims=claims, **options).upload


def test_an_upload_becomes_an_expert_with_exactly_the_bytes_sent(sender):
    files = tiny.adapter()
    answer = sender.send("ada/tea", files, message="first")
    body = answer.json()
    assert answer.status_code == 200, body
    made = Revision.objects.get(commit=body["revision"])
    assert body["expert"] == "ada/tea"
    assert body["state"] == "processing"
    assert [job["kind"] for job in body["jobs"]] == ["check", "compress", "embed", "index"]
    assert {file.path: file.blob_id for file in made.files.all()} == {p: tiny.sha256(d) for p, d in files.items()}
    assert made.message == "first"
    assert made.author.username == "ada"
    record = sender.get("/api/v1/experts/ada/tea").json()
    assert record["visibility"] == "public"
    assert record["base_model"] == tiny.BASE
    assert record["description"] == "Sorts questions about tea by the kind of tea."
    assert record["examples"][1] == "Is tea number 1 a green one?"
    assert record["rank"] == 2
    assert record["licence"] == "apache-2.0"
    assert record["tags"] == ["tea", "lora"]


def test_the_stored_bytes_are_those_that_were_sent(sender, settings):
    files = tiny.adapter()
    sender.send("ada/tea", files)
    stored = {path.name: path.read_bytes() for path in settings.HUB_BLOBS_DIR.rglob("*") if path.is_file()}
    assert stored == {tiny.sha256(data): data for data in files.values()}
    assert [path for path in settings.HUB_STAGING_DIR.iterdir() if path.is_file()] == []


def test_a_private_upload_makes_a_private_expert(sender):
    sender.send("ada/tea", tiny.adapter(), private=True)
    assert Expert.objects.get().visibility == "private"
    assert sender.client.get("/api/v1/experts/ada/tea").status_code == 404


def test_nothing_is_visible_before_the_upload_is_complete(sender):
    files = tiny.adapter()
    before = counts()
    started = sender.start("ada/tea", files).json()
    for row in started["files"]:
        sender.put(row["url"], files[row["path"]])
    assert counts() == before
    assert sender.get("/api/v1/experts/ada/tea").status_code == 404


def test_chunks_in_order_make_the_file_and_each_answer_tells_the_offset(sender):
    data = tiny.weights()
    started = sender.start("ada/tea", {"adapter_model.safetensors": data}).json()
    url = started["files"][0]["url"]
    first = sender.put(url, data[:1000], start=0, size=len(data))
    assert (first.status_code, first.json()["offset"], first.json()["complete"]) == (200, 1000, False)
    assert sender.get(f"/api/v1/uploads/{started['id']}").json()["files"][0]["offset"] == 1000
    last = sender.put(url, data[1000:], start=1000, size=len(data))
    assert (last.json()["offset"], last.json()["complete"]) == (len(data), True)
    answer = sender.complete(started["id"])
    assert answer.json()["state"] == "incomplete"
    assert File.objects.get().blob_id == tiny.sha256(data)


@pytest.mark.parametrize("place", [0, 500, 1001])
def test_a_chunk_out_of_order_is_416_with_the_true_offset_and_changes_nothing(sender, place):
    data = tiny.weights()
    url = sender.start("ada/tea", {"adapter_model.safetensors": data}).json()["files"][0]["url"]
    sender.put(url, data[:1000], start=0, size=len(data))
    answer = sender.put(url, data[place : place + 10], start=place, size=len(data))
    assert answer.status_code == 416
    assert answer.json()["code"] == "offset-mismatch"
    assert answer.json()["offset"] == 1000
    assert answer.headers["Upload-Offset"] == "1000"
    assert answer.json()["errors"] == [
        {"pointer": "Content-Range", "met": place, "wanted": 1000, "remedy": "Go on from byte 1000.", "rule": "A4"}
    ]
    assert sender.put(url, data[1000:], start=1000, size=len(data)).json()["complete"] is True


def test_what_arrived_of_a_cut_chunk_counts_and_the_upload_goes_on_from_there(owner):
    data = tiny.weights(rank=200)
    upload = start(owner, {"adapter_model.safetensors": data})
    arguments = {"user": owner, "upload_id": upload.pk, "path": "adapter_model.safetensors"}
    with pytest.raises(RequestMalformed) as cut:
        uploads.put_chunk(**arguments, stream=Cut(data, after=70_001), where=None)
    assert cut.value.faults[0].remedy == "Go on from byte 70001."
    assert [offset for _, offset in uploads.offsets(upload)] == [70_001]
    rest = data[70_001:]
    _, offset = uploads.put_chunk(**arguments, stream=io.BytesIO(rest), where=Range(70_001, len(data)))
    assert offset == len(data)
    _, made = uploads.complete(user=owner, upload_id=upload.pk)
    assert made.files.get().blob_id == tiny.sha256(data)


def test_bytes_that_staging_lost_are_asked_for_again(owner, settings):
    data = tiny.weights()
    upload = start(owner, {"adapter_model.safetensors": data})
    arguments = {"user": owner, "upload_id": upload.pk, "path": "adapter_model.safetensors"}
    uploads.put_chunk(**arguments, stream=io.BytesIO(data[:2000]), where=Range(0, 2000))
    staged = next(path for path in settings.HUB_STAGING_DIR.iterdir() if path.stat().st_size == 2000)
    with staged.open("r+b") as file:
        file.truncate(1500)
    with pytest.raises(OffsetMismatch) as mismatch:
        uploads.put_chunk(**arguments, stream=io.BytesIO(data[2000:]), where=Range(2000, len(data)))
    assert mismatch.value.offset == 1500


def test_bytes_that_a_killed_process_wrote_but_never_counted_are_written_again(owner, settings):
    data = tiny.weights()
    upload = start(owner, {"adapter_model.safetensors": data})
    arguments = {"user": owner, "upload_id": upload.pk, "path": "adapter_model.safetensors"}
    uploads.put_chunk(**arguments, stream=io.BytesIO(data[:2000]), where=Range(0, 2000))
    staged = next(path for path in settings.HUB_STAGING_DIR.iterdir() if path.stat().st_size == 2000)
    with staged.open("ab") as file:
        file.write(b"\xff" * 300)
    assert [offset for _, offset in uploads.offsets(upload)] == [2000]
    uploads.put_chunk(**arguments, stream=io.BytesIO(data[2000:]), where=Range(2000, len(data)))
    _, made = uploads.complete(user=owner, upload_id=upload.pk)
    assert made.files.get().blob_id == tiny.sha256(data)


def test_a_file_that_is_not_what_was_promised_is_dropped_and_can_be_sent_again(sender):
    right, wrong = tiny.weights(seed=1), tiny.weights(seed=2)
    before = counts()
    url = sender.start("ada/tea", {"adapter_model.safetensors": right}).json()["files"][0]["url"]
    answer = sender.put(url, wrong)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "pointer": "/adapter_model.safetensors/sha256",
            "met": tiny.sha256(wrong),
            "wanted": tiny.sha256(right),
            "remedy": "Send the file again.",
            "rule": "U5",
        }
    ]
    assert counts() == before
    assert UploadFile.objects.get().offset == 0
    assert sender.put(url, right).json()["complete"] is True


def test_a_wrong_digest_is_also_found_when_the_file_came_in_chunks(sender):
    data = tiny.weights()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    url = sender.start("ada/tea", {"adapter_model.safetensors": data}).json()["files"][0]["url"]
    sender.put(url, changed[:5000], start=0, size=len(data))
    answer = sender.put(url, changed[5000:], start=5000, size=len(data))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["met"] == tiny.sha256(changed)


def test_more_bytes_than_promised_are_refused_before_they_are_read(sender):
    data = tiny.card()
    url = sender.start("ada/tea", {"README.md": data}).json()["files"][0]["url"]
    answer = sender.put(url, data * 10)
    assert answer.status_code == 413
    assert answer.json()["errors"][0]["wanted"] == f"at most {len(data)} bytes"
    assert UploadFile.objects.get().offset == 0


def test_completing_too_early_names_every_file_and_how_far_it_is(sender):
    files = tiny.adapter()
    started = sender.start("ada/tea", files).json()
    url = {row["path"]: row["url"] for row in started["files"]}
    sender.put(url["README.md"], files["README.md"])
    sender.put(
        url["adapter_config.json"], files["adapter_config.json"][:7], start=0, size=len(files["adapter_config.json"])
    )
    answer = sender.complete(started["id"])
    assert answer.status_code == 422
    assert [(e["pointer"], e["met"], e["wanted"]) for e in answer.json()["errors"]] == [
        ("/adapter_config.json", "7 bytes", f"{len(files['adapter_config.json'])} bytes"),
        ("/adapter_model.safetensors", "0 bytes", f"{len(files['adapter_model.safetensors'])} bytes"),
    ]


def test_completing_twice_gives_the_same_revision(sender):
    files = tiny.adapter()
    started = sender.start("ada/tea", files).json()
    for row in started["files"]:
        sender.put(row["url"], files[row["path"]])
    first, second = sender.complete(started["id"]).json(), sender.complete(started["id"]).json()
    assert first == second
    assert Revision.objects.count() == 1
    assert Job.objects.count() == 4


def test_an_upload_whose_process_died_after_the_bytes_were_kept_completes_when_asked_again(owner, monkeypatch):
    files = tiny.adapter()
    upload = start(owner, files)
    for path, data in files.items():
        uploads.put_chunk(user=owner, upload_id=upload.pk, path=path, stream=io.BytesIO(data), where=None)

    class Killed(BaseException):
        pass

    def die(*_args, **_options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(revisions, "_publish", die)
        with pytest.raises(Killed):
            uploads.complete(user=owner, upload_id=upload.pk)
    assert Blob.objects.count() == 3
    assert Expert.objects.count() == 0
    _, made = uploads.complete(user=owner, upload_id=upload.pk)
    assert made.files.count() == 3
    assert Upload.objects.get().state == "completed"


def test_bytes_that_were_damaged_while_they_waited_are_asked_for_again(sender, settings):
    data = tiny.card()
    before = counts()
    started = sender.start("ada/tea", {"README.md": data}).json()
    sender.put(started["files"][0]["url"], data)
    staged = next(path for path in settings.HUB_STAGING_DIR.iterdir() if path.stat().st_size == len(data))
    staged.write_bytes(data.replace(b"tea", b"TEA"))
    answer = sender.complete(started["id"])
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["wanted"] == tiny.sha256(data)
    assert counts() == before
    assert sender.get(f"/api/v1/uploads/{started['id']}").json()["files"][0]["offset"] == 0
    assert sender.put(started["files"][0]["url"], data).status_code == 200
    assert sender.complete(started["id"]).status_code == 200


def test_an_aborted_upload_takes_no_more_bytes_and_leaves_none(sender, settings):
    data = tiny.card()
    started = sender.start("ada/tea", {"README.md": data}).json()
    sender.put(started["files"][0]["url"], data)
    gone = sender.client.delete(f"/api/v1/uploads/{started['id']}", headers=sender.headers)
    assert gone.status_code == 204
    assert list(settings.HUB_STAGING_DIR.iterdir()) == []
    assert sender.put(started["files"][0]["url"], data).status_code == 409
    assert sender.complete(started["id"]).status_code == 409


def test_an_upload_whose_time_is_over_takes_no_more_bytes(sender):
    started = sender.start("ada/tea", {"README.md": tiny.card()}).json()
    Upload.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert sender.put(started["files"][0]["url"], tiny.card()).status_code == 409
    assert sender.complete(started["id"]).status_code == 409


def test_an_upload_is_nobody_elses(sender):
    started = sender.start("ada/tea", tiny.adapter()).json()
    other = Sender(factories.key(factories.user("bob")))
    path = f"/api/v1/uploads/{started['id']}"
    absent = other.get("/api/v1/uploads/" + "0" * 32)
    assert other.get(path).status_code == absent.status_code == 404
    assert other.put(started["files"][0]["url"], b"x").status_code == 404
    assert other.complete(started["id"]).status_code == 404
    assert other.client.delete(path, headers=other.headers).status_code == 404


def test_without_a_key_or_with_a_reading_key_nothing_starts(owner, client):
    body = {"expert": "ada/tea", "files": []}
    assert client.post("/api/v1/uploads", body, content_type="application/json").status_code == 401
    reader = Sender(factories.key(owner, "read"))
    assert reader.start("ada/tea", tiny.adapter()).status_code == 403
    assert Upload.objects.count() == 0


def test_a_file_that_the_caller_can_read_need_not_be_sent_again(sender):
    files = tiny.adapter()
    sender.send("ada/tea", files)
    again = sender.start("ada/more-tea", files).json()
    assert {row["path"]: row["offset"] for row in again["files"]} == {path: len(data) for path, data in files.items()}
    answer = sender.complete(again["id"])
    assert answer.status_code == 200
    assert Blob.objects.count() == 3


def test_nobody_learns_that_a_private_file_exists_nor_gets_it_by_its_digest(sender):
    files = tiny.adapter()
    sender.send("ada/tea", files, private=True)
    other = Sender(factories.key(factories.user("bob")))
    started = other.start("bob/tea", files).json()
    assert {row["offset"] for row in started["files"]} == {0}
    assert other.complete(started["id"]).status_code == 422
    for row in started["files"]:
        assert other.put(row["url"], files[row["path"]]).status_code == 200
    assert other.complete(started["id"]).status_code == 200
    assert Blob.objects.count() == 3


def test_leftovers_of_training_are_named_and_not_waited_for(sender):
    leftovers = {
        "training_args.bin": b"x",
        "optimizer.pt": b"x",
        "runs/may/events.out.tfevents.1": b"x",
        "rng_state_0.pth": b"x",
    }
    started = sender.start("ada/tea", {**tiny.adapter(), **leftovers})
    body = started.json()
    assert {row["path"] for row in body["ignored"]} == set(leftovers)
    assert {row["path"] for row in body["files"]} == set(tiny.adapter())


def test_an_empty_file_needs_one_request_like_every_other(sender):
    files = {"NOTICE": b"", "README.md": tiny.card()}
    started = sender.start("ada/tea", files).json()
    url = {row["path"]: row["url"] for row in started["files"]}
    sender.put(url["README.md"], files["README.md"])
    assert sender.complete(started["id"]).status_code == 422
    assert sender.put(url["NOTICE"], b"").status_code == 200
    assert sender.complete(started["id"]).status_code == 200


def test_an_unanswered_base_is_asked_for_and_the_answer_needs_no_bytes_again(sender):
    files = tiny.adapter(**{"adapter_config.json": tiny.config(base_model_name_or_path=None), "README.md": b"# Tea\n"})
    before = counts()
    refused = sender.send("ada/tea", files)
    assert refused.status_code == 422
    assert refused.json()["code"] == "base-unknown"
    assert counts() == before
    answer = sender.complete(Upload.objects.get().pk, card={"base_model": "all-minilm-l6-V2"})
    assert answer.status_code == 200, answer.json()
    assert Revision.objects.get().base_model.name == tiny.BASE
    assert File.objects.get(path="adapter_config.json").blob_id == tiny.sha256(files["adapter_config.json"])


def test_an_upload_that_expects_another_parent_is_stale(sender):
    sender.send("ada/tea", tiny.adapter(seed=1))
    answer = sender.send("ada/tea", tiny.adapter(seed=2), parent_commit="0" * 40)
    assert answer.status_code == 412
    assert answer.json()["errors"][0]["wanted"] == Revision.objects.get().commit


@pytest.mark.parametrize(
    "header", ["bytes 0-9", "bytes 5-4/100", "bytes 0-100/100", "bytes 0-3/100", "bytes */100", "octets 0-4/100"]
)
def test_a_content_range_that_does_not_fit_the_body_is_400(sender, header):
    url = sender.start("ada/tea", {"README.md": b"x" * 100}).json()["files"][0]["url"]
    headers = {**sender.headers, "Content-Range": header}
    answer = sender.client.put(url, b"x" * 5, content_type="application/octet-stream", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["pointer"] == "Content-Range"


@pytest.mark.django_db(transaction=True)
def test_an_upload_survives_a_connection_that_is_really_cut(live_server):
    bases.sync()
    sender = Sender(factories.key(factories.user("ada")))
    files = tiny.adapter(
        **{"adapter_model.safetensors": tiny.weights(rank=100), "adapter_config.json": tiny.config(r=100)}
    )
    started = sender.start("ada/tea", files).json()
    rows = {row["path"]: row for row in started["files"]}
    data = files["adapter_model.safetensors"]
    path = urlsplit(rows["adapter_model.safetensors"]["url"]).path
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += f"Authorization: {sender.headers['Authorization']}\r\n\r\n"
    with socket.create_connection((live_server.thread.host, live_server.thread.port)) as link:
        link.sendall(head.encode() + data[:300_000])
        link.shutdown(socket.SHUT_WR)
        assert b" 400 " in link.recv(1000)
    offset = {row["path"]: row["offset"] for row in sender.get(f"/api/v1/uploads/{started['id']}").json()["files"]}
    assert offset["adapter_model.safetensors"] == 300_000
    rest = data[300_000:]
    assert sender.put(rows["adapter_model.safetensors"]["url"], rest, start=300_000, size=len(data)).status_code == 200
    for name in ("adapter_config.json", "README.md"):
        sender.put(rows[name]["url"], files[name])
    assert sender.complete(started["id"]).json()["state"] == "processing"
