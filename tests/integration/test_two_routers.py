"""Two router processes over one database: both follow it, neither knows of the other, and web has the last word."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psycopg
import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.utils import timezone

from moerge.routing import snapshots as files
from registry.errors import IndexNotReady
from registry.models import Embedding, Encoder, Expert, Job, RoutingClock
from registry.services import encoder_change, encoders, experts, routing, snapshots
from tests import encoders as made_encoders
from tests.integration.routables import (
    database_url,
    expert,
    person,
    published,
    put,
    reworded,
    router_process,
    stored,
    until,
)

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pair:
    urls: tuple[str, str]
    home: Path


@pytest.fixture(scope="module")
def processes(django_db_setup, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with router_process(home / "one.log", home) as (one, _), router_process(home / "two.log", home) as (two, _):
        yield Pair((one, two), home)


@pytest.fixture
def routers(processes, settings, transactional_db):
    """The two processes, when both have seen that the database is empty."""
    settings.HUB_HOME = processes.home
    settings.HUB_ROUTER_URL = processes.urls[0]
    until(lambda: all(health(url).get("index_seq") == 0 for url in processes.urls))
    return processes


def health(url: str) -> dict:
    try:
        return httpx.get(url + "/health", timeout=60).json()
    except httpx.TransportError:
        return {}


def both(routers: Pair, **wanted: object) -> bool:
    return all(health(url).items() >= wanted.items() for url in routers.urls)


@pytest.fixture
def found(settings):
    """What web answers by way of one of the processes."""

    def ask(url, text, **options):
        settings.HUB_ROUTER_URL = url
        answer = routing.route(viewer=None, text=text, strategy="bm25", min_score=0, **options)
        return [result["expert"] for result in answer["results"]]

    return ask


def remembered(url: str, text: str, settings) -> list[int]:
    """The revisions that a process names, whoever may see them."""
    return [hit["revision"] for hit in door(url, settings, texts=[text], strategy="bm25")["rankings"][0]["hits"]]


def door(url: str, settings, **body: object) -> dict:
    answer = httpx.post(url + "/route", json=body, headers={"X-Router-Secret": settings.HUB_ROUTER_SECRET}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def clock() -> int:
    return RoutingClock.objects.values_list("seq", flat=True).first() or 0


# Additions, edits, removals


def test_what_is_added_is_seen_by_both_and_what_is_removed_is_gone_at_once(routers, found):
    user = person("ann")
    kept = put("ann/kitchen", "boil an egg")
    gone = put("ann/travel", "book a flight", "fly to Rome")
    until(lambda: all(found(url, "flight") == ["ann/travel"] for url in routers.urls))
    assert [found(url, "egg") for url in routers.urls] == [["ann/kitchen"]] * 2
    experts.delete(user=user, expert=gone.expert)
    assert [found(url, "flight") for url in routers.urls] == [[], []]
    until(lambda: both(routers, index_seq=3, experts=1))
    assert routing.withdraw(kept.expert) == 4
    assert [found(url, "egg", min_seq=4) for url in routers.urls] == [[], []]


def test_whoever_names_a_change_gets_it_from_either_process(routers, found):
    for number in range(3):
        seq = put_and_number(f"ann/e{number}", f"word{number}")
        assert [found(url, f"word{number}", min_seq=seq) for url in routers.urls] == [[f"ann/e{number}"]] * 2
    with pytest.raises(IndexNotReady):
        found(routers.urls[1], "word0", min_seq=seq + 1)


def put_and_number(*arguments: str) -> int:
    return routing.publish_to_index(stored(expert(*arguments)))


def test_after_an_edit_the_old_words_find_nothing_in_either_process(routers, found):
    revision = put("ann/one", "book a flight", "fly to Rome")
    until(lambda: both(routers, index_seq=1))
    reworded(revision, "boil an egg", "cook pasta")
    for url in routers.urls:
        assert found(url, "flight to Rome", min_seq=clock()) == []
        assert found(url, "pasta") == ["ann/one"]


def test_what_is_deleted_is_not_returned_even_while_nobody_can_poll(routers, found, settings):
    revision = put("ann/travel", "book a flight")
    until(lambda: both(routers, index_seq=1))
    table = connection.ops.quote_name(RoutingClock._meta.db_table)
    with psycopg.connect(database_url()) as other:
        other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        Expert.objects.update(deleted_at=timezone.now())
        for url in routers.urls:
            assert remembered(url, "flight", settings) == [revision.pk]
            assert found(url, "flight") == []
        other.rollback()


def test_of_two_transactions_that_commit_in_the_opposite_order_of_their_start_both_are_seen(routers, found):
    first, second = stored(expert("ann/first", "one word")), stored(expert("ann/second", "one word"))
    begun, go = threading.Event(), threading.Event()
    numbers = []

    def late():
        try:
            with transaction.atomic():
                Expert.objects.select_for_update().get(pk=first.expert_id)
                begun.set()
                assert go.wait(60)
                numbers.append(routing.publish_to_index(first))
        finally:
            connection.close()

    thread = threading.Thread(target=late)
    thread.start()
    assert begun.wait(60)
    assert routing.publish_to_index(second) == 1
    until(lambda: both(routers, index_seq=1))
    assert [found(url, "word") for url in routers.urls] == [["ann/second"]] * 2
    go.set()
    thread.join(60)
    assert numbers == [2]
    until(lambda: both(routers, index_seq=2))
    assert [found(url, "word") for url in routers.urls] == [["ann/first", "ann/second"]] * 2


def test_without_the_database_nobody_gets_an_unchecked_answer(routers, found, client):
    put("ann/travel", "book a flight")
    until(lambda: both(routers, index_seq=1))
    known = connection.settings_dict
    name = connection.ops.quote_name(known["NAME"])
    maintenance = database_url().rpartition("/")[0] + "/postgres"
    query = {"text": "flight", "strategy": "bm25", "min_score": 0}
    ask = {"path": "/api/v1/route", "data": query, "content_type": "application/json"}
    assert client.post(**ask).json()["results"]
    with psycopg.connect(maintenance, autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [known["NAME"]])
            for _ in range(2):
                refused = client.post(**ask)
                assert (refused.status_code, "results" in refused.json()) == (503, False)
                assert refused["Retry-After"]
        finally:
            other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    connection.close()
    seq = put_and_number("ann/kitchen", "boil an egg")
    assert [found(url, "egg", min_seq=seq) for url in routers.urls] == [["ann/kitchen"]] * 2


# Snapshots


def test_a_damaged_snapshot_is_passed_by_and_the_next_sound_one_is_used_by_both(routers, found, monkeypatch):
    put("ann/a", "word a")
    first = snapshots.build(encoders.active())
    until(lambda: both(routers, snapshot_seq=first.seq))
    put("ann/b", "word b")
    real = files.write

    def write(folder, *given, **named):
        digest = real(folder, *given, **named)
        path = next(folder.glob("*.columns"))
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(files, "write", write)
    second = snapshots.build(encoders.active())
    monkeypatch.undo()
    until(lambda: all("snapshot_trouble" in health(url) for url in routers.urls))
    assert both(routers, snapshot_seq=first.seq, index_seq=second.seq, experts=2)
    assert [found(url, "word") for url in routers.urls] == [["ann/a", "ann/b"]] * 2
    put("ann/c", "word c")
    third = snapshots.build(encoders.active())
    until(lambda: both(routers, snapshot_seq=third.seq, experts=3))
    assert not any("snapshot_trouble" in health(url) for url in routers.urls)


# A disk that takes for ever to write: where the builder stands when it is killed.
STUCK = """
import os, sys, time
os.fsync = lambda handle: time.sleep(600)
sys.argv = ["manage.py", "build_snapshot"]
exec(open("manage.py").read())
"""


def test_a_builder_that_is_killed_leaves_readers_the_last_snapshot_and_the_next_one_clears_up(routers, found):
    put("ann/a", "word a")
    first = snapshots.build(encoders.active())
    until(lambda: both(routers, snapshot_seq=first.seq))
    put("ann/b", "word b")
    environment = {**os.environ, "DATABASE_URL": database_url(), "HUB_HOME": str(routers.home)}
    child = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, env=environment)
    folder = routers.home / first.folder
    unfinished = folder.with_name("2.tmp")
    try:
        until((unfinished / "meta.json").exists)
        with pytest.raises(IndexNotReady):
            snapshots.build(encoders.active())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
    until(lambda: both(routers, index_seq=2))
    assert both(routers, snapshot_seq=first.seq, experts=2)
    assert [found(url, "word") for url in routers.urls] == [["ann/a", "ann/b"]] * 2
    assert unfinished.exists()
    until(lock_is_free)
    second = snapshots.build(encoders.active())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["1", "2"]
    until(lambda: both(routers, snapshot_seq=second.seq))


def lock_is_free() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        return cursor.fetchone()[0] == 0


# Another encoder

SMALL = "small@1"
QUESTION = "fly me to Rome"
CARDS = {
    "ann/travel": ("Books trips.", "a flight to Rome", "a hotel in Paris"),
    "ann/kitchen": ("Cooks.", "boil an egg"),
    "ann/bank": ("Moves money.", "pay my rent", "what is my balance"),
}


@dataclass
class Asking:
    """A client that asks one process without a pause."""

    url: str
    settings: object
    answers: list[tuple[str, dict[int, float]]]
    stop: threading.Event

    def __call__(self) -> None:
        while not self.stop.is_set():
            answer = door(self.url, self.settings, texts=[QUESTION])
            hits = answer["rankings"][0]["hits"]
            self.answers.append((answer["embedding_model"], {hit["revision"]: hit["parts"]["s_ex"] for hit in hits}))


def expected(encoder, revisions: dict[str, int]) -> dict[int, float]:
    """The best cosine of the question with an example of each card, from the encoder's own vectors."""
    question = encoder.encode([QUESTION])[0]
    return {
        revision: float(np.max(encoder.encode(list(CARDS[name][1:])) @ question))
        for name, revision in revisions.items()
    }


def carry_out(job: Job) -> None:
    """Run a change's two jobs as workers do."""
    from workers import runner

    for one in (job.after, job):
        runner.run(one.pk)
        one.refresh_from_db()
        assert one.state == Job.State.DONE, (one.kind, one.state, one.error, one.message)


def test_an_encoder_replaces_another_while_queries_are_answered_and_the_way_back_is_free(
    routers, settings, encoder, tmp_path
):
    from moerge.embedding.encoder import load

    folder = made_encoders.make(tmp_path / "small")
    small = load(folder=folder, encoder_id=SMALL, max_tokens=64)
    call_command("add_encoder", SMALL, str(folder), "--max-tokens", "64")
    until(lambda: both(routers, encoder="ready"))
    revisions = {name: published(name, *card).pk for name, card in list(CARDS.items())[:2]}
    until(lambda: both(routers, index_seq=clock(), embedding_model=encoder.id))
    stop = threading.Event()
    clients = [Asking(url, settings, [], stop) for url in routers.urls]
    threads = [threading.Thread(target=client) for client in clients]
    for thread in threads:
        thread.start()
    try:
        job = encoder_change.begin(SMALL)
        # An upload in the middle of it.
        revisions["ann/bank"] = published("ann/bank", *CARDS["ann/bank"]).pk
        carry_out(job)
        until(lambda: both(routers, embedding_model=SMALL, index_seq=clock(), experts=3))
        turned_at = [len(client.answers) for client in clients]
        until(lambda: all(len(client.answers) > at + 3 for client, at in zip(clients, turned_at, strict=True)))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    wanted = {encoder.id: expected(encoder, revisions), SMALL: expected(small, revisions)}
    for client in clients:
        models = [model for model, _ in client.answers]
        # One change, and never back and forth.
        assert models == sorted(models, key=[encoder.id, SMALL].index)
        assert set(models) == {encoder.id, SMALL}
        for model, parts in client.answers:
            assert parts == {revision: pytest.approx(wanted[model][revision], abs=2e-3) for revision in parts}
        assert client.answers[-1][1].keys() == set(revisions.values())
    assert {row.pk: row.state for row in Encoder.objects.all()} == {encoder.id: "idle", SMALL: "active"}
    # The way back makes no vector anew.
    rows = set(Embedding.objects.filter(encoder=encoder.id).values_list("pk", flat=True))
    carry_out(encoder_change.begin(encoder.id))
    until(lambda: both(routers, embedding_model=encoder.id))
    assert set(Embedding.objects.filter(encoder=encoder.id).values_list("pk", flat=True)) == rows
    for url in routers.urls:
        hits = door(url, settings, texts=[QUESTION])["rankings"][0]["hits"]
        assert {hit["revision"]: hit["parts"]["s_ex"] for hit in hits} == {
            revision: pytest.approx(cosine, abs=2e-3) for revision, cosine in wanted[encoder.id].items()
        }
