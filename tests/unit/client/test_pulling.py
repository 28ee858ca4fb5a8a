"""An expert into a folder: every file verified, all of them or none, never beside the folder."""

import fcntl
import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from moerge import client, compression
from moerge.client import Reference, download, errors, pulling
from moerge.errors import AdapterInvalid, EncodedInvalid
from tests import tiny
from tests.unit.client import hubs
from tests.unit.client.servers import Reply, as_json, problem, stored

REFERENCE = Reference.parse(hubs.NAME)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def tree() -> dict[str, bytes]:
    return tiny.lora(seed=4, rank=8, modules=(tiny.QUERY, tiny.VALUE)) | {"notes/a b.md": b"# Notes\n"}


def encode(tree: dict[str, bytes], work: Path, **options) -> bytes:
    """The compressed form of a tree, by the library."""
    source = tiny.write(tree, work / "source")
    compression.compress(source, work / "out", **({"density": 0.1} | options))
    return (work / "out").read_bytes()


@pytest.fixture
def encoded(tree, tmp_path) -> bytes:
    (tmp_path / "encode").mkdir()
    return encode(tree, tmp_path / "encode")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_come_as_they_are_and_nothing_else_is_left(server, hub, tree, place):
    hubs.publish(server, tree)
    pulled = client.pull(hub, REFERENCE, place / "out")
    assert content(place / "out") == tree
    assert [path.name for path in place.iterdir()] == ["out"]
    assert (pulled.commit, pulled.kept, pulled.encoded) == (hubs.COMMIT, (), None)
    assert pulled.downloaded_bytes == sum(map(len, tree.values()))
    assert [file.path for file in pulled.files] == list(tree)


def test_what_lies_there_unchanged_is_kept_and_what_changed_is_fetched(server, hub, tree, place):
    hubs.publish(server, tree)
    out = tiny.write(tree, place / "out")
    (out / "adapter_config.json").write_bytes(tree["adapter_config.json"][:-1] + b" ")
    (out / "mine.txt").write_text("mine")
    pulled = client.pull(hub, REFERENCE, out)
    assert content(out) == tree | {"mine.txt": b"mine"}
    assert set(pulled.kept) == tree.keys() - {"adapter_config.json"}
    assert pulled.downloaded_bytes == len(tree["adapter_config.json"])
    assert len(server.asked) == 2
    assert not (place / ".out.pull").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_one_damaged_file_leaves_the_folder_as_it_was(server, hub, tree, place, is_there):
    hubs.publish(server, tree)
    server.routes[hubs.address("notes/a b.md")] = stored(b"# Motes\n", "tag")
    if is_there:
        tiny.write({"README.md": b"old"}, place / "out")
    with pytest.raises(errors.DownloadDamaged, match=r"notes/a b\.md"):
        client.pull(hub, REFERENCE, place / "out")
    assert content(place) == ({"out/README.md": b"old"} if is_there else {})
    assert not (place / ".out.pull").exists()


def test_a_pull_that_broke_off_goes_on_in_the_next_call(server, hub, tree, place):
    hubs.publish(server, tree)
    server.routes[hubs.address(WEIGHTS)] = stored(tree[WEIGHTS], "tag", cuts=[20_000, *[0] * 20])
    with pytest.raises(errors.BrokenOff):
        client.pull(hub, REFERENCE, place / "out")
    assert not (place / "out").exists()
    server.asked.clear()
    server.routes[hubs.address(WEIGHTS)] = stored(tree[WEIGHTS], "tag")
    client.pull(hub, REFERENCE, place / "out")
    assert content(place / "out") == tree
    assert [path.name for path in place.iterdir()] == ["out"]
    assert [asked.headers.get("range") for asked in server.of(hubs.address(WEIGHTS))] == ["bytes=20000-"]
    assert server.of(hubs.address("README.md")) == []


def test_what_an_earlier_revision_left_half_done_does_not_come_along(server, hub, tree, place):
    tiny.write({"old.json": b"{}", f".{WEIGHTS}.part": b"x", "old/x.md": b"x"}, place / ".out.pull")
    hubs.publish(server, tree)
    client.pull(hub, REFERENCE, place / "out")
    assert content(place) == {f"out/{path}": data for path, data in tree.items()}
    assert not (place / "out" / "old").exists()


def test_nothing_is_asked_of_a_hub_when_the_folder_is_a_file(server, hub, place):
    (place / "out").write_text("file")
    with pytest.raises(errors.PathUnsafe, match="not a folder"):
        client.pull(hub, REFERENCE, place / "out")
    assert server.asked == []


def test_a_link_in_the_folder_leads_nobody_out_of_it(server, hub, tree, place):
    outside, out = place / "outside", place / "out"
    outside.mkdir()
    out.mkdir()
    (out / "notes").symlink_to(outside)
    hubs.publish(server, tree)
    with pytest.raises(errors.PathUnsafe):
        client.pull(hub, REFERENCE, out)
    assert content(outside) == {}
    assert not (out / "README.md").exists()


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(server, hub, tree, place):
    out, outside = place / "out", place / "outside.md"
    out.mkdir()
    outside.write_bytes(tree["README.md"])
    (out / "README.md").symlink_to(outside)
    for wanted in (tree["README.md"], b"new"):
        hubs.publish(server, tree | {"README.md": wanted})
        client.pull(hub, REFERENCE, out)
        assert outside.read_bytes() == tree["README.md"]
        assert (out / "README.md").read_bytes() == wanted
        assert not (out / "README.md").is_symlink()


def test_a_folder_where_a_file_must_lie_is_refused_before_anything_moves(server, hub, tree, place):
    (place / "out" / WEIGHTS).mkdir(parents=True)
    hubs.publish(server, tree)
    with pytest.raises(errors.PathUnsafe, match="is a folder"):
        client.pull(hub, REFERENCE, place / "out")
    assert content(place) == {}


def test_two_pulls_do_not_write_to_one_folder(server, hub, tree, place):
    hubs.publish(server, tree)
    (place / ".out.pull").mkdir()
    lock = os.open(place / ".out.pull", os.O_RDONLY)
    # Held by a reader, it keeps writers out.
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        with pytest.raises(errors.FolderBusy):
            client.pull(hub, REFERENCE, place / "out")
        assert (place / ".out.pull").is_dir()
    finally:
        os.close(lock)
    client.pull(hub, REFERENCE, place / "out")
    assert content(place / "out") == tree


def test_a_stage_that_leads_elsewhere_is_not_used(server, hub, tree, place):
    (place / "elsewhere").mkdir()
    (place / ".out.pull").symlink_to(place / "elsewhere")
    hubs.publish(server, tree)
    with pytest.raises(errors.PathUnsafe):
        client.pull(hub, REFERENCE, place / "out")
    assert content(place) == {}


def test_files_gather_inside_the_folder_where_nothing_can_be_made_beside_it(server, hub, tree, place, monkeypatch):
    (place / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != place)
    hubs.publish(server, tree)
    server.routes[hubs.address(WEIGHTS)] = stored(tree[WEIGHTS], "tag", cuts=[20_000, *[0] * 20])
    with pytest.raises(errors.BrokenOff):
        client.pull(hub, REFERENCE, place / "out")
    assert [path.name for path in (place / "out").iterdir()] == [".pull"]
    server.routes[hubs.address(WEIGHTS)] = stored(tree[WEIGHTS], "tag")
    client.pull(hub, REFERENCE, place / "out")
    assert content(place) == {f"out/{path}": data for path, data in tree.items()}


def test_the_working_folder_itself_may_be_pulled_into(server, hub, tree, place, monkeypatch):
    monkeypatch.chdir(place)
    hubs.publish(server, tree)
    client.pull(hub, REFERENCE, ".")
    assert content(place) == tree


def test_the_decoded_weights_are_those_of_the_library_and_the_rest_is_the_revision(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    pulled = client.pull(hub, REFERENCE, place / "out", compressed=True, density=0.1)
    compression.decompress(place.parent / "encode" / "out", place.parent / "expected")
    found, expected = load_file(place / "out" / WEIGHTS), load_file(place.parent / "expected" / WEIGHTS)
    assert found.keys() == expected.keys() == load_file(place.parent / "encode" / "source" / WEIGHTS).keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    rest = {path: data for path, data in content(place / "out").items() if path != WEIGHTS}
    assert rest == {path: data for path, data in tree.items() if path != WEIGHTS}
    assert [path.name for path in place.iterdir()] == ["out"]
    assert server.of(hubs.address(WEIGHTS)) == []
    assert server.of(hubs.ENCODED)[0].query == {"revision": hubs.COMMIT, "density": "0.1"}
    assert pulled.encoded.facts["sha256"] == hubs.sha256(encoded)
    assert pulled.encoded.facts["density"] == "0.1"
    assert {file.path: (file.size, file.sha256) for file in pulled.files} == {
        path: (len(data), hubs.sha256(data)) for path, data in content(place / "out").items()
    }
    assert pulled.downloaded_bytes == len(encoded) + sum(map(len, rest.values()))


def test_without_a_choice_the_hub_chooses(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert server.of(hubs.ENCODED)[0].query == {"revision": hubs.COMMIT}
    client.pull(hub, REFERENCE, place / "out", compressed=True, preset="int4")
    assert server.of(hubs.ENCODED)[1].query == {"revision": hubs.COMMIT, "preset": "int4"}


def test_weights_that_are_there_are_replaced_by_the_decoded_ones(server, hub, tree, encoded, place):
    out = tiny.write(tree, place / "out")
    hubs.publish(server, tree, encoded=encoded)
    pulled = client.pull(hub, REFERENCE, out, compressed=True)
    assert (out / WEIGHTS).read_bytes() != tree[WEIGHTS]
    assert "adapter_config.json" in pulled.kept


def test_the_form_is_waited_for_while_the_hub_makes_it(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    pending = problem(503, "form-pending", "The compressed form is being made.", retry_after=2, job="j")
    server.routes[hubs.ENCODED] = [pending, pending, *server.routes[hubs.ENCODED]]
    client.pull(hub, REFERENCE, place / "out", compressed=True, density=0.125)
    assert (place / "out" / WEIGHTS).is_file()
    assert [asked.query["density"] for asked in server.of(hubs.ENCODED)] == ["0.125"] * 3


def test_a_form_that_cannot_be_made_leaves_nothing(server, hub, tree, place):
    hubs.publish(server, tree)
    server.routes[hubs.ENCODED] = [problem(409, "form-failed", "The disk is full.")]
    with pytest.raises(errors.Conflict, match="disk is full"):
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert list(place.iterdir()) == []


def test_bytes_that_break_a_rule_of_the_format_are_named_and_leave_nothing(server, hub, tree, encoded, place):
    start = encoded.index(b'"planes_sha256":"') + 17
    forged = encoded[:start] + b"0" * 64 + encoded[start + 64 :]
    hubs.publish(server, tree, encoded=forged)
    with pytest.raises(EncodedInvalid) as raised:
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert raised.value.rule == "C7.hash"
    assert list(place.iterdir()) == []


def test_bytes_that_are_not_those_of_the_etag_are_refused(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    server.routes[hubs.ENCODED] = [Reply(encoded[:-1] + b"?", headers={"ETag": f'"{hubs.sha256(encoded)}"'})]
    with pytest.raises(errors.DownloadDamaged, match="compressed weights"):
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert list(place.iterdir()) == []


def test_a_form_of_other_weights_is_refused(server, hub, tree, place, tmp_path):
    (tmp_path / "b").mkdir()
    other = encode(tiny.lora(seed=5, rank=8, modules=(tiny.QUERY, tiny.VALUE)), tmp_path / "b")
    hubs.publish(server, tree, encoded=other)
    with pytest.raises(EncodedInvalid, match="other weights") as raised:
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert raised.value.wanted == hubs.sha256(tree[WEIGHTS])
    assert list(place.iterdir()) == []


def test_a_form_that_does_not_fit_the_config_is_refused(server, hub, tree, encoded, place):
    other = tree | {"adapter_config.json": tiny.config(r=4, target_modules=["query", "value"])}
    hubs.publish(server, other, encoded=encoded)
    with pytest.raises(AdapterInvalid, match="rank"):
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert list(place.iterdir()) == []


def test_a_form_that_claims_more_than_the_original_holds_is_not_decoded(server, hub, tree, place, tmp_path):
    """A few kilobytes of it would decode to 64 MB, for an original of one value."""
    zeros = np.zeros((8, 2**20), np.float32)
    zeros[0, 0] = 1
    bomb = {f"base_model.model.{tiny.QUERY}.lora_A.weight": zeros,
            f"base_model.model.{tiny.QUERY}.lora_B.weight": zeros.T.copy()}  # fmt: skip
    (tmp_path / "b").mkdir()
    small = encode({**tree, WEIGHTS: save(bomb, {"format": "pt"})}, tmp_path / "b")
    assert len(small) < 10_000
    hubs.publish(server, tree, encoded=small)
    with pytest.raises(EncodedInvalid) as raised:
        client.pull(hub, REFERENCE, place / "out", compressed=True)
    assert raised.value.rule in {"C2.values", "C2.budget"}
    assert list(place.iterdir()) == []


def test_every_claim_of_a_hub_is_checked_and_told(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    verified = client.verify(hub, REFERENCE, place)
    assert verified.commit == hubs.COMMIT
    assert [(found.name, found.kind) for found in verified.found] == [
        *((path, "file") for path in tree), ("adapter", "adapter"), ("compressed form", "encoded")]  # fmt: skip
    assert verified.found[-1].checks[-2:] == (
        "its tensors are those of adapter_config.json (LORA)",
        "made from these weights",
    )


def test_a_hub_without_a_compressed_form_says_so(server, hub, tree, place):
    hubs.publish(server, tree)
    server.routes[hubs.ENCODED] = [problem(404, "file-not-found", "Nothing to compress.")]
    found = client.verify(hub, REFERENCE, place).found[-1]
    assert (found.checks, found.warnings) == ((), ("Nothing to compress.",))


def test_weights_that_hold_a_nan_are_found(server, hub, tree, place):
    arrays = load_file(tiny.write(tree, place / "x") / WEIGHTS)
    first = min(arrays)
    arrays[first] = arrays[first].copy()
    arrays[first][0, 0] = np.nan
    hubs.publish(server, tree | {WEIGHTS: save(arrays, {"format": "pt"})})
    (place / "work").mkdir()
    with pytest.raises(AdapterInvalid, match="not finite"):
        client.verify(hub, REFERENCE, place / "work")


def test_a_file_that_is_not_what_the_record_says_is_found(server, hub, tree, encoded, place):
    hubs.publish(server, tree, encoded=encoded)
    server.routes[hubs.address("README.md")] = stored(tree["README.md"][::-1], "tag")
    with pytest.raises(errors.DownloadDamaged, match=r"README\.md"):
        client.verify(hub, REFERENCE, place)


def derive(server, tree: dict[str, bytes], commit: str = "d" * 40, **changes) -> None:
    """A revision that the Hub protocol alone knows, as the hub tells of what it derives."""
    server.routes[f"/api/v1/experts/{hubs.NAME}/revisions/compeft-k10"] = [problem(404, "revision-not-found", "None.")]
    server.routes[f"/api/models/{hubs.NAME}/revision/compeft-k10"] = [as_json({"sha": commit})]
    nodes = [{"type": "directory", "path": "notes", "oid": "0" * 40, "size": 0}]
    for path, data in tree.items():
        node = {"type": "file", "path": path, "size": len(data), "oid": git_name(data)}
        if path == WEIGHTS:
            node |= {"oid": "0" * 40, "lfs": {"oid": hubs.sha256(data), "size": len(data)}}
        nodes.append(node | changes.get(path.partition(".")[0], {}))
        server.routes[f"/{hubs.NAME}/resolve/{commit}/{quote(path)}"] = stored(data, "tag")
    server.routes[f"/api/models/{hubs.NAME}/tree/{commit}"] = [as_json(nodes)]


def git_name(data: bytes) -> str:
    """As `git hash-object` computes it."""
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


def test_the_name_that_git_gives_is_known(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert download.git_sha1(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert git_name(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_revision_that_the_hub_derives_is_pulled_and_verified_too(server, hub, tree, place):
    derive(server, tree)
    pulled = client.pull(hub, Reference.parse(f"{hubs.NAME}@compeft-k10"), place / "out")
    assert content(place / "out") == tree
    assert pulled.commit == "d" * 40
    again = client.pull(hub, Reference.parse(f"{hubs.NAME}@compeft-k10"), place / "out")
    assert set(again.kept) == tree.keys()
    assert {asked.query["recursive"] for asked in server.of(f"/api/models/{hubs.NAME}/tree/{'d' * 40}")} == {"true"}


@pytest.mark.parametrize("path", [WEIGHTS, "README.md"])
def test_a_damaged_file_of_a_derived_revision_is_found_by_either_digest(server, hub, tree, place, path):
    derive(server, tree)
    server.routes[f"/{hubs.NAME}/resolve/{'d' * 40}/{path}"] = stored(tree[path][::-1], "tag")
    with pytest.raises(errors.DownloadDamaged, match=path):
        client.pull(hub, Reference.parse(f"{hubs.NAME}@compeft-k10"), place / "out")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("change", [{"oid": "x"}, {"oid": None}, {"size": -1}, {"path": 7}, {"lfs": {"oid": "0" * 40}}])
def test_an_odd_tree_is_refused(server, hub, tree, place, change):
    derive(server, tree, README=change)
    with pytest.raises(errors.AnswerInvalid):
        client.pull(hub, Reference.parse(f"{hubs.NAME}@compeft-k10"), place / "out")


def test_a_revision_that_nobody_knows_is_told_in_the_words_of_the_api(server, hub, place):
    server.routes[f"/api/v1/experts/{hubs.NAME}/revisions/none"] = [problem(404, "revision-not-found", "No none.")]
    with pytest.raises(errors.NotFound, match=r"No none\."):
        client.pull(hub, Reference.parse(f"{hubs.NAME}@none"), place / "out")


def test_the_budget_follows_the_original():
    files = (client.File(WEIGHTS, 1000, "0" * 64),)
    budget = pulling.budget_of(client.Snapshot("a/b", hubs.COMMIT, "", files))
    assert budget.output_bytes == budget.values == 1000 + 2**24
