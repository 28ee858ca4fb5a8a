"""Snapshots of the routing index: built from one moment, opened after a check of every byte, followed from there on."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.utils import timezone

from moerge.routing import snapshots as files
from moerge.routing.base import Query
from registry.errors import IndexNotReady
from registry.jobs import JobKind
from registry.models import Embedding, Expert, Job, RoutingChange, RoutingClock, RoutingSnapshot
from registry.services import encoders, entries, following, routing, snapshots
from registry.services.following import Follower
from tests.integration.routables import chance, put, reworded, stored, until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def home(settings, tmp_path):
    settings.HUB_HOME = tmp_path
    return tmp_path


def clock() -> int:
    return RoutingClock.objects.values_list("seq", flat=True).first() or 0


def build() -> RoutingSnapshot:
    return snapshots.build(encoders.active())


def follower() -> Follower:
    """A router's index that has looked at the database and waited for what it began to open."""
    made = Follower(encoders.active(), wake=lambda: None)
    settle(made)
    return made


def settle(made: Follower) -> None:
    """Look at the database until nothing more is opened."""
    for _ in range(10):
        before = made._opening
        if before is not None:
            before.join(timeout=30)
        made.follow(clock())
        if made._opening is before:
            return
    raise AssertionError("it opens the same again and again")


def known(made: Follower) -> dict[str, int]:
    return {name: part.card(name).revision for part in made.state.partitions.values() for name in part.experts()}


def folders(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.glob("index/*/*"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_snapshot_and_the_changes_after_it_give_the_answers_of_the_whole_log():
    gone, edited, renamed = put("ann/gone", "old news", "x1"), put("ann/edit", "first words", "x2"), put("ann/name")
    for number in range(4):
        put(f"ann/e{number}", f"common words {number}", f"example {number}", base=f"base/{number % 2}")
    row = build()
    whole = Follower(encoders.active(), wake=lambda: None)
    routing.withdraw(gone.expert)
    edited = reworded(edited, "other words", "x3", "x4")
    Expert.objects.filter(pk=renamed.expert_id).update(name="other", key="other")
    with transaction.atomic():
        routing.changed(Expert.objects.get(pk=renamed.expert_id))
    added = put("bob/new", "common words of bob")
    made = follower()
    assert made.figures()["snapshot_seq"] == row.seq == 7
    RoutingSnapshot.objects.all().delete()
    whole.follow(clock())
    assert whole.figures()["snapshot_seq"] is None
    assert known(made) == known(whole)
    assert known(made).keys() == {"ann/edit", "ann/other", "bob/new", *(f"ann/e{number}" for number in range(4))}
    assert (known(made)["ann/edit"], known(made)["bob/new"]) == (edited.pk, added.pk)
    for text in ("common words", "first words", "other words", "x3"):
        query = Query(text=text, vector=chance(text))
        met, wanted = (one.state.rank(query).hits for one in (made, whole))
        assert [(hit.expert, hit.score, hit.parts) for hit in met] == [
            (hit.expert, hit.score, hit.parts) for hit in wanted
        ]
        by_name = {hit.expert: hit.parts for hit in met}
        # Against the vectors themselves, as float16 keeps them.
        assert by_name["ann/edit"]["s_ex"] == pytest.approx(
            max(float(chance(text) @ chance(example)) for example in ("x3", "x4")), abs=1e-3
        )
    assert "bm25" in by_name["bob/new"]
    assert not made.state.rank(Query(text="news"), strategy="bm25").hits


def test_an_empty_hub_has_a_snapshot_too():
    row = build()
    made = follower()
    assert (row.seq, row.counts["experts"], made.figures()["snapshot_seq"], len(made.state)) == (0, 0, 0, 0)


def test_the_last_two_snapshots_are_kept_as_rows_and_folders(home):
    built = []
    for number in range(4):
        put(f"ann/e{number}")
        built.append(build())
    assert [row.seq for row in built] == [1, 2, 3, 4]
    assert [row.seq for row in RoutingSnapshot.objects.order_by("seq")] == [3, 4]
    assert folders(home) == sorted(row.folder for row in built[2:])
    assert built[-1].counts == {
        "bases": 1,
        "experts": 4,
        "left_out": 0,
        "vectors": 8,
        "bytes": sum(path.stat().st_size for path in (home / built[-1].folder).iterdir()),
    }


def test_nothing_is_built_twice_and_what_is_damaged_is_built_anew(home):
    put("ann/a", "x", "y")
    first = build()
    assert build().pk == first.pk
    flip(next((home / first.folder).glob("*.columns")))
    second = build()
    assert (second.seq, second.digest) == (first.seq, first.digest)
    assert second.pk != first.pk
    assert follower().figures()["snapshot_seq"] == 1


def test_of_a_snapshot_with_one_wrong_bit_nothing_is_used_and_the_log_is_replayed(home):
    revision = put("ann/a", "x", "y")
    row = build()
    names = sorted(path.name for path in (home / row.folder).iterdir())
    assert len(names) >= 3
    for name in names:
        flip(home / row.folder / name)
        made = follower()
        figures = made.figures()
        assert (figures["snapshot_seq"], figures["index_seq"], known(made)) == (None, 1, {"ann/a": revision.pk}), name
        assert name in figures["snapshot_trouble"]
        flip(home / row.folder / name)
    assert follower().figures()["snapshot_seq"] == 1


def test_a_snapshot_that_was_passed_by_is_tried_again_only_when_it_changed(home, monkeypatch):
    put("ann/a", "x")
    row = build()
    opened = []
    real = files.open
    monkeypatch.setattr(files, "open", lambda *given, **named: (opened.append(given[1]), real(*given, **named))[1])
    path = next((home / row.folder).glob("*.vectors"))
    flip(path)
    made = follower()
    for _ in range(3):
        settle(made)
    assert len(opened) == 1
    assert made.figures()["snapshot_trouble"]
    opened.clear()
    again = build()
    settle(made)
    assert again.pk != row.pk
    assert made.figures() == {"index": "ready", "index_seq": 1, "experts": 1, "snapshot_seq": 1}


def test_a_snapshot_that_was_built_anew_at_the_same_number_takes_the_place_of_the_first():
    revision = put("ann/a", "x")
    put("ann/b", "y")
    Embedding.objects.filter(revision=revision).delete()
    row = build()
    made = follower()
    assert known(made).keys() == {"ann/b"}
    stored(revision)
    snapshots.forget(row)
    assert build().seq == made.figures()["snapshot_seq"] == 2
    settle(made)
    assert known(made).keys() == {"ann/a", "ann/b"}


def test_when_the_latest_snapshot_is_damaged_the_one_before_it_is_used(home):
    one = put("ann/a", "x")
    first = build()
    two = put("ann/b", "y")
    flip(next((home / build().folder).glob("*.columns")))
    made = follower()
    figures = made.figures()
    assert (figures["snapshot_seq"], figures["index_seq"]) == (first.seq, 2)
    assert "Snapshot 2" in figures["snapshot_trouble"]
    assert known(made) == {"ann/a": one.pk, "ann/b": two.pk}


def test_a_router_without_the_files_goes_on_by_the_log_and_says_so_once(settings, tmp_path, caplog):
    put("ann/a", "x")
    build()
    put("ann/b", "y")
    build()
    settings.HUB_HOME = tmp_path / "elsewhere"
    made = follower()
    assert (len(made.state), made.figures()["snapshot_seq"]) == (2, None)
    assert "Snapshot" in made.figures()["snapshot_trouble"]
    told = [record for record in caplog.records if "passed by" in record.getMessage()]
    assert len(told) == 1


@pytest.fixture
def slow(monkeypatch):
    """An event until which no snapshot is opened."""
    go, real = threading.Event(), files.open

    def opened(*given, **named):
        assert go.wait(30)
        return real(*given, **named)

    monkeypatch.setattr(files, "open", opened)
    yield go
    go.set()


def test_a_snapshot_that_is_being_checked_delays_nothing(slow):
    put("ann/a", "x")
    build()
    made = Follower(encoders.active(), wake=lambda: None)
    made.follow(clock())
    assert made.figures() == {"index": "ready", "index_seq": 1, "experts": 1, "snapshot_seq": None}
    put("ann/b", "y")
    made.follow(clock())
    assert (made.state.seq, len(made.state)) == (2, 2)
    slow.set()
    settle(made)
    assert made.figures() == {"index": "ready", "index_seq": 2, "experts": 2, "snapshot_seq": 1}


def test_with_many_changes_to_come_a_snapshot_is_waited_for_instead_of_replaying_them(slow, monkeypatch):
    monkeypatch.setattr(following, "REPLAY_COUNT", 2)
    for number in range(3):
        put(f"ann/e{number}")
    build()
    replayed = []
    real = entries.of
    monkeypatch.setattr(entries, "of", lambda changes, encoder: (replayed.extend(changes), real(changes, encoder))[1])
    made = Follower(encoders.active(), wake=lambda: None)
    made.follow(clock())
    assert made.state is None
    slow.set()
    settle(made)
    assert (len(made.state), made.figures()["snapshot_seq"], replayed) == (3, 3, [])


def test_many_changes_are_replayed_when_no_snapshot_can_be_opened(monkeypatch, home):
    monkeypatch.setattr(following, "REPLAY_COUNT", 2)
    for number in range(3):
        put(f"ann/e{number}")
    flip(next((home / build().folder).glob("*.columns")))
    made = follower()
    assert (len(made.state), made.figures()["snapshot_seq"]) == (3, None)


def test_a_database_that_was_set_back_is_followed_from_its_own_snapshot():
    put("ann/a", "x")
    first = build()
    put("ann/b", "y")
    build()
    made = follower()
    assert made.figures()["snapshot_seq"] == 2
    RoutingSnapshot.objects.filter(seq=2).delete()
    RoutingChange.objects.filter(seq=2).delete()
    RoutingClock.objects.update(seq=1)
    settle(made)
    assert (made.figures()["snapshot_seq"], list(known(made))) == (first.seq, ["ann/a"])


# Building


def test_a_build_reads_one_moment_whatever_is_published_meanwhile(monkeypatch):
    for number in range(3):
        put(f"ann/e{number}", f"words {number}")
    edited = Expert.objects.get(name="e2")
    real = entries.of

    def meanwhile():
        put("ann/late", "late words")
        reworded(edited.revisions.get(), "new words", "with an example")
        connection.close()

    def of(changes, encoder):
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join(30)
        return real(changes, encoder)

    monkeypatch.setattr(entries, "of", of)
    row = build()
    monkeypatch.undo()
    assert (row.seq, row.counts["experts"], row.counts["left_out"], row.counts["vectors"]) == (3, 3, 0, 6)
    made = follower()
    assert (made.figures()["snapshot_seq"], made.state.seq) == (3, 5)
    assert known(made).keys() == {"ann/e0", "ann/e1", "ann/e2", "ann/late"}
    assert made.state.partitions["base/one"].card("ann/e2").description == "new words"


def test_whoever_lacks_fitting_vectors_is_left_out_and_counted():
    put("ann/good", "x")
    Embedding.objects.filter(revision=put("ann/bare", "y")).delete()
    row = build()
    assert (row.counts["experts"], row.counts["left_out"]) == (1, 1)


def test_of_two_changes_under_one_name_the_later_one_is_built():
    put("ann/a", "old")
    later = put("ann/b", "new")
    change = RoutingChange.objects.get(revision=later)
    change.card["expert"] = "ann/a"
    change.save()
    row = build()
    assert (row.counts["experts"], row.counts["left_out"]) == (1, 0)
    assert known(follower()) == {"ann/a": later.pk}


def test_only_one_builder_works_at_a_time():
    put("ann/a", "x")
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [snapshots._LOCK])
    with pytest.raises(IndexNotReady):
        build()
    assert not RoutingSnapshot.objects.exists()
    other.close()
    until(lock_is_free)
    assert build().seq == 1


def lock_is_free() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        return cursor.fetchone()[0] == 0


def test_the_command_builds_and_tells(capsys):
    put("ann/a", "x")
    call_command("build_snapshot")
    row = RoutingSnapshot.objects.get()
    assert capsys.readouterr().out.startswith(f"{row.folder}: 1 experts, 2 vectors, ")


# When one is asked for


def test_a_snapshot_is_asked_for_when_more_changed_than_an_overlay_may_hold(settings):
    settings.HUB_OVERLAY_MAX_EXPERTS = 2
    put("ann/a")
    put("ann/b")
    assert snapshots.ask() is None
    put("ann/c")
    job = snapshots.ask()
    assert (job.kind, job.priority, job.parameters) == (JobKind.SNAPSHOT, 6, {"encoder": encoders.packaged().pk})
    from workers import runner

    runner.run(job.pk)
    job.refresh_from_db()
    assert (job.state, job.result["index_seq"]) == (Job.State.DONE, 3)
    assert snapshots.ask() is None
    for number in range(3):
        put(f"bob/e{number}")
    assert snapshots.ask().pk == job.pk
    job.refresh_from_db()
    assert job.state == Job.State.QUEUED


def test_in_a_large_hub_the_overlay_may_hold_a_twentieth(settings):
    settings.HUB_OVERLAY_MAX_EXPERTS = 1
    row = RoutingSnapshot.objects.create(
        encoder=encoders.packaged().pk, seq=0, folder="x", digest="", counts={"experts": 40}
    )
    put("ann/a")
    put("ann/b")
    assert snapshots.ask() is None
    put("ann/c")
    assert snapshots.ask() is not None
    row.delete()


def test_once_a_day_a_snapshot_is_asked_for_where_there_is_anything_to_put_in():
    assert snapshots.ask(is_due=True) is None
    put("ann/a")
    assert snapshots.ask() is None
    assert snapshots.ask(is_due=True) is not None


def test_a_build_that_failed_is_not_asked_for_again_at_once(settings):
    settings.HUB_OVERLAY_MAX_EXPERTS = 0
    put("ann/a")
    job = snapshots.ask()
    Job.objects.update(state=Job.State.FAILED, finished_at=timezone.now())
    assert snapshots.ask() is None
    Job.objects.update(finished_at=timezone.now() - timedelta(minutes=11))
    assert snapshots.ask().pk == job.pk
    assert Job.objects.get().state == Job.State.QUEUED
