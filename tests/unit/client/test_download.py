"""One file from a server that may break off, lie or change its mind: whole and verified, or nothing."""

import hashlib
from pathlib import Path

import pytest

from moerge.client import download
from moerge.client.download import Wanted
from moerge.client.errors import AnswerInvalid, BrokenOff, DownloadDamaged, NotFound
from tests.unit.client.servers import Reply, stored

DATA = bytes(range(256)) * 4000
SHA = hashlib.sha256(DATA).hexdigest()
OTHER = DATA[::-1]
OTHER_SHA = hashlib.sha256(OTHER).hexdigest()


def known(**changes):
    """A file whose size and hash the caller knows."""
    return Wanted(**({"path": "/file", "label": "weights", "size": len(DATA), "sha256": SHA} | changes))


def unknown():
    return Wanted("/file", "weights")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


def part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def ranges(server):
    return [asked.headers.get("range") for asked in server.of("/file")]


def test_a_file_arrives_whole_under_its_name_and_leaves_nothing_beside_it(server, hub, target, seen):
    server.routes["/file"] = stored(DATA, "git-tag")
    found = download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert (found.size, found.digest, found.etag) == (len(DATA), SHA, "git-tag")
    assert [path.name for path in target.parent.iterdir()] == ["weights.bin"]
    assert seen[-1] == ("weights", 1.0)
    assert server.asked[0].headers["accept-encoding"] == "identity"


def test_what_breaks_off_goes_on_where_it_stopped_if_the_file_is_still_the_same(server, hub, target, clock):
    server.routes["/file"] = stored(DATA, SHA, cuts=[100_000, 70_000])
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=170000-"]
    assert [asked.headers.get("if-range") for asked in server.asked] == [None, f'"{SHA}"', f'"{SHA}"']
    assert clock.slept == [0.5, 0.5]


def test_a_server_without_ranges_sends_the_whole_file_again(server, hub, target):
    server.routes["/file"] = stored(DATA, SHA, knows_ranges=False, cuts=[100_000])
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-"]


def test_size_and_hash_are_taken_from_the_answer_when_nobody_told_them(server, hub, target):
    server.routes["/file"] = stored(DATA, SHA, cuts=[5])
    found = download.fetch(hub, unknown(), target)
    assert (found.size, found.digest) == (len(DATA), SHA)
    assert target.read_bytes() == DATA


def test_the_linked_etag_is_the_hash_where_both_are_there(server, hub, target):
    server.routes["/file"] = [Reply(DATA, headers={"ETag": '"0123"', "X-Linked-Etag": f'"{SHA}"'})]
    assert download.fetch(hub, unknown(), target).digest == SHA


def test_a_file_that_changed_midway_is_taken_whole_in_its_new_state(server, hub, target):
    before, after = stored(DATA, SHA, cuts=[100_000]), stored(OTHER, OTHER_SHA)
    server.routes["/file"] = lambda asked: (after if "range" in asked.headers else before)(asked)
    found = download.fetch(hub, unknown(), target)
    assert found.digest == OTHER_SHA
    assert target.read_bytes() == OTHER


def test_a_part_of_another_file_is_never_joined_to_what_is_there(server, hub, target):
    """This server ignores If-Range: only the ETag of its answer tells."""
    rest = {"ETag": f'"{OTHER_SHA}"', "Content-Range": f"bytes 100000-{len(DATA) - 1}/{len(DATA)}"}
    server.routes["/file"] = [
        Reply(DATA, headers={"ETag": f'"{SHA}"'}, cut_after=100_000),
        Reply(OTHER[100_000:], 206, rest),
        Reply(OTHER, headers={"ETag": f'"{OTHER_SHA}"'}),
    ]
    assert download.fetch(hub, unknown(), target).digest == OTHER_SHA
    assert target.read_bytes() == OTHER
    assert ranges(server) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("told", ["bytes 99999-{last}/{size}", "bytes 100001-{last}/{size}", "bytes */{size}", "",
                                  "bytes 100000-{last}/*"])  # fmt: skip
def test_a_part_that_begins_elsewhere_is_not_used(server, hub, target, told):
    told = told.format(last=len(DATA) - 1, size=len(DATA))
    server.routes["/file"] = [
        Reply(DATA, headers={"ETag": f'"{SHA}"'}, cut_after=100_000),
        Reply(DATA[100_000:], 206, {"ETag": f'"{SHA}"', "Content-Range": told}),
        Reply(DATA, headers={"ETag": f'"{SHA}"'}),
    ]
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", None]


def test_wrong_bytes_are_thrown_away_and_what_was_there_before_stays(server, hub, target):
    target.write_bytes(b"before")
    server.routes["/file"] = stored(DATA[:-1] + b"?", SHA)
    with pytest.raises(DownloadDamaged) as raised:
        download.fetch(hub, known(), target)
    assert raised.value.wanted == SHA
    assert raised.value.met == f"SHA-256 {hashlib.sha256(DATA[:-1] + b'?').hexdigest()}"
    assert target.read_bytes() == b"before"
    assert not part_of(target).exists()
    assert len(server.asked) == 1


def test_wrong_bytes_under_an_etag_that_is_their_promised_hash_are_refused(server, hub, target):
    server.routes["/file"] = stored(OTHER, SHA)
    with pytest.raises(DownloadDamaged):
        download.fetch(hub, unknown(), target)
    assert list(target.parent.iterdir()) == []


def test_pieces_that_are_not_one_file_together_are_fetched_again_in_one_piece(server, hub, target):
    """Both pieces come under one ETag, as from two servers behind one address that do not hold the same."""
    rest = {"ETag": f'"{SHA}"', "Content-Range": f"bytes 100000-{len(DATA) - 1}/{len(DATA)}"}
    server.routes["/file"] = [
        Reply(OTHER, headers={"ETag": f'"{SHA}"'}, cut_after=100_000),
        Reply(DATA[100_000:], 206, rest),
        Reply(DATA, headers={"ETag": f'"{SHA}"'}),
    ]
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", None]


def test_the_size_is_learned_from_a_part_when_the_whole_did_not_tell_it(server, hub, target):
    first = Reply(DATA, headers={"ETag": f'"{SHA}"', "Transfer-Encoding": "chunked"}, length=None)
    first.body = b"%x\r\n" % 100_000 + DATA[:100_000] + b"\r\n"
    told = f"bytes 100000-{len(DATA) - 1}/{len(DATA)}"
    server.routes["/file"] = [
        first,
        Reply(DATA[100_000:150_000], 206, {"ETag": f'"{SHA}"', "Content-Range": told}, length=None),
        Reply(DATA[150_000:], 206, {"ETag": f'"{SHA}"', "Content-Range": told.replace("100000-", "150000-")}),
    ]
    assert download.fetch(hub, unknown(), target).digest == SHA
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]


def test_a_weak_tag_does_not_stand_for_bytes(server, hub, target):
    told = f"bytes 100000-{len(DATA) - 1}/{len(DATA)}"
    server.routes["/file"] = [
        Reply(DATA, headers={"ETag": f'W/"{SHA}"'}, cut_after=100_000),
        Reply(DATA[100_000:], 206, {"ETag": f'W/"{SHA}"', "Content-Range": told}),
    ]
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert "if-range" not in server.asked[1].headers


def test_a_part_of_a_file_of_another_size_is_refused(server, hub, target):
    told = {"ETag": f'"{SHA}"', "Content-Range": f"bytes 100000-{len(DATA)}/{len(DATA) + 1}"}
    server.routes["/file"] = [
        Reply(DATA, headers={"ETag": f'"{SHA}"'}, cut_after=100_000),
        Reply(DATA[100_000:] + b"x", 206, told),
    ]
    with pytest.raises(DownloadDamaged, match=f"{len(DATA) + 1} bytes"):
        download.fetch(hub, known(), target)
    assert len(server.asked) == 2


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, hub, target):
    part_of(target).write_bytes(DATA[:300_000])
    server.routes["/file"] = stored(DATA, "git-tag")
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server) == ["bytes=300000-"]
    assert "if-range" not in server.asked[0].headers


def test_a_whole_part_is_only_verified(server, hub, target):
    part_of(target).write_bytes(DATA)
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert server.asked == []


@pytest.mark.parametrize("left", [b"x" * 300_000, DATA + b"x", OTHER])
def test_a_part_of_something_else_is_found_by_the_hash_and_fetched_again(server, hub, target, left):
    part_of(target).write_bytes(left)
    server.routes["/file"] = stored(DATA, SHA)
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA
    assert ranges(server)[-1] is None


def test_without_a_known_hash_an_old_part_is_not_trusted(server, hub, target):
    part_of(target).write_bytes(DATA[:1000])
    server.routes["/file"] = stored(DATA, SHA)
    download.fetch(hub, unknown(), target)
    assert ranges(server) == [None]


def test_a_file_that_became_shorter_is_fetched_from_its_start(server, hub, target):
    part_of(target).write_bytes(DATA[:300_000])
    short = DATA[:1000]
    server.routes["/file"] = stored(short, "tag")
    wanted = known(size=None, sha256=hashlib.sha256(short).hexdigest())
    download.fetch(hub, wanted, target)
    assert target.read_bytes() == short
    assert ranges(server) == ["bytes=300000-", None]


@pytest.mark.parametrize("more", [1, 30_000_000])
def test_an_answer_without_end_is_cut_at_the_size_that_was_told(server, hub, target, more):
    server.routes["/file"] = [Reply(DATA + b"x" * more, length=None)]
    with pytest.raises(DownloadDamaged, match="more than 1024000 bytes"):
        download.fetch(hub, known(), target)
    assert len(server.asked) == 1
    assert list(target.parent.iterdir()) == []


def test_another_length_than_was_told_is_refused_before_a_byte_is_taken(server, hub, target):
    server.routes["/file"] = stored(DATA + b"more", SHA)
    with pytest.raises(DownloadDamaged, match=f"{len(DATA) + 4} bytes"):
        download.fetch(hub, known(), target)
    assert list(target.parent.iterdir()) == []


def test_an_answer_without_length_that_ends_early_is_gone_on_with(server, hub, target):
    server.routes["/file"] = [
        Reply(DATA[:200_000], headers={"ETag": f'"{SHA}"'}, length=None),
        Reply(DATA[200_000:], 206, {"ETag": f'"{SHA}"', "Content-Range": f"bytes 200000-{len(DATA) - 1}/{len(DATA)}"}),
    ]
    download.fetch(hub, known(), target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("headers", [{}, {"ETag": '"0123"'}, {"ETag": f'W/"{SHA}"'}, {"ETag": f'"{SHA[:-1]}"'}])
def test_a_file_whose_hash_nobody_tells_is_not_taken(server, hub, target, headers):
    server.routes["/file"] = [Reply(DATA, headers=headers)]
    with pytest.raises(AnswerInvalid, match="SHA-256"):
        download.fetch(hub, unknown(), target)
    assert not target.exists()


def test_bytes_that_were_encoded_on_the_way_are_refused(server, hub, target):
    server.routes["/file"] = [Reply(DATA, headers={"ETag": f'"{SHA}"', "Content-Encoding": "gzip"})]
    with pytest.raises(AnswerInvalid) as raised:
        download.fetch(hub, known(), target)
    assert raised.value.met == "Content-Encoding gzip"


def test_a_transfer_that_never_moves_is_given_up_and_what_has_come_is_kept(server, hub, target, clock):
    server.routes["/file"] = stored(DATA, SHA, cuts=[4096, *[0] * 20])
    with pytest.raises(BrokenOff):
        download.fetch(hub, known(), target)
    assert part_of(target).read_bytes() == DATA[:4096]
    assert not target.exists()
    assert clock.slept == [0.5, 1.0, 2.0, 4.0]


def test_a_slow_transfer_may_take_longer_than_waiting_may(server, hub, target, clock):
    """Each of 200 answers brings some bytes: at half a second a pause, 100 s in all, of which 60 may be waited."""
    server.routes["/file"] = stored(DATA, SHA, cuts=[len(DATA) // 200] * 199)
    download.fetch(hub, known(), target)
    assert sum(clock.slept) > 60
    assert target.read_bytes() == DATA


def test_a_file_that_changes_at_every_attempt_is_given_up(server, hub, target):
    count = 0

    def answer(asked):
        nonlocal count
        count += 1
        if "range" not in asked.headers:
            return Reply(DATA, headers={"ETag": f'"{SHA}"'}, cut_after=1000)
        return Reply(
            DATA[1000:], 206, {"ETag": f'"{count}"', "Content-Range": f"bytes 1000-{len(DATA) - 1}/{len(DATA)}"}
        )

    server.routes["/file"] = answer
    with pytest.raises(DownloadDamaged, match="changes while"):
        download.fetch(hub, unknown(), target)
    assert list(target.parent.iterdir()) == []
    assert count == 6


def test_an_empty_file_is_made_without_asking(server, hub, target):
    empty = hashlib.sha256(b"").hexdigest()
    download.fetch(hub, known(size=0, sha256=empty), target)
    assert target.read_bytes() == b""
    assert server.asked == []


def test_parameters_are_sent_and_a_refusal_passes_through(server, hub, target):
    with pytest.raises(NotFound):
        download.fetch(hub, Wanted("/file", "weights", {"density": "0.1"}), target)
    assert server.asked[0].query == {"density": "0.1"}
    assert list(target.parent.iterdir()) == []
