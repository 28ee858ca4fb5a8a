"""What makes an expert routable: its vectors, the change log under one clock, and routers that follow it."""

import threading

import numpy as np
import pytest
from django.db import InterfaceError, OperationalError, connection, transaction

from moerge import embedding
from moerge.routing import cards
from registry.errors import IndexNotReady
from registry.models import Embedding, Expert, Job, Ref, Revision, RoutingChange, RoutingClock
from registry.services import experts, routing
from registry.services.router import Router
from tests.integration.routables import expert, next_head, person, published, serving, still_loading, until

db = pytest.mark.django_db
committed = pytest.mark.django_db(transaction=True)


def clock() -> int:
    return RoutingClock.objects.values_list("seq", flat=True).first() or 0


def log() -> list[tuple[int, str, str]]:
    rows = RoutingChange.objects.order_by("seq").select_related("expert__namespace")
    return [(row.seq, row.operation, row.expert.full_name) for row in rows]


def known(router: Router) -> dict[str, int]:
    """Ids in the router's state and the revision each stands for."""
    parts = router.state.partitions.values()
    return {name: part.card(name).revision for part in parts for name in part.experts()}


# Vectors


@db
def test_embedding_stores_the_vectors_of_description_centroid_and_examples(router, encoder):
    revision = expert("ann/travel", "Books trips.", "a flight", "a hotel")
    assert routing.embed(revision) == {"encoder": encoder.id, "vectors": 4, "reused": False}
    rows = {(row.kind, row.position): row for row in Embedding.objects.filter(revision=revision)}
    assert set(rows) == {("description", 0), ("centroid", 0), ("example", 0), ("example", 1)}
    met = {key: np.frombuffer(row.vector, dtype="<f2").astype(np.float32) for key, row in rows.items()}
    description, flight, hotel = encoder.encode(["travel. Books trips.", "a flight", "a hotel"])
    mean = (flight + hotel) / np.linalg.norm(flight + hotel)
    wanted = dict(zip(rows, [None] * 4, strict=True)) | {
        ("description", 0): description,
        ("centroid", 0): mean,
        ("example", 0): flight,
        ("example", 1): hotel,
    }
    for key, vector in wanted.items():
        assert met[key] == pytest.approx(vector, abs=2e-3), key
    assert {row.encoder for row in rows.values()} == {embedding.ENCODER_ID}
    assert len({row.text_digest for row in rows.values()}) == 1


@db
def test_a_card_that_did_not_change_is_not_encoded_again(router, settings):
    revision = expert("ann/travel", "Books trips.", "a flight")
    routing.embed(revision)
    before = set(Embedding.objects.values_list("pk", flat=True))
    settings.HUB_ROUTER_URL = "http://127.0.0.1:9"
    assert routing.embed(revision)["reused"] is True
    assert set(Embedding.objects.values_list("pk", flat=True)) == before
    Expert.objects.update(description="Books journeys.")
    with pytest.raises(IndexNotReady):
        routing.embed(Revision.objects.get())


@db
def test_a_card_that_changed_gets_new_vectors_in_place_of_the_old(router):
    revision = expert("ann/travel", "Books trips.", "a flight", "a hotel")
    routing.embed(revision)
    digest = Embedding.objects.first().text_digest
    Expert.objects.update(examples=["a train"])
    routing.embed(Revision.objects.get())
    rows = Embedding.objects.filter(revision=revision)
    assert rows.count() == 3
    assert digest not in set(rows.values_list("text_digest", flat=True))


@db
def test_nothing_can_be_embedded_while_the_encoder_loads(settings):
    with serving(still_loading()) as url:
        settings.HUB_ROUTER_URL = url
        with pytest.raises(IndexNotReady) as caught:
            routing.embed(expert("ann/travel"))
    assert caught.value.retry_after_seconds
    assert not Embedding.objects.exists()


# The log


@db
def test_publishing_counts_up_and_keeps_one_change_per_expert(router):
    first, second = published("ann/a", "x"), published("ann/b", "y")
    assert log() == [(1, "put", "ann/a"), (2, "put", "ann/b")]
    assert routing.publish_to_index(first) == 3
    assert log() == [(2, "put", "ann/b"), (3, "put", "ann/a")]
    assert routing.withdraw(second.expert) == 4
    assert log() == [(3, "put", "ann/a"), (4, "remove", "ann/b")]
    assert routing.withdraw(second.expert) is None
    assert clock() == 4


@db
def test_only_the_head_of_a_living_expert_with_vectors_of_its_card_is_published(router):
    old = expert("ann/a", "x")
    routing.embed(old)
    new = next_head(old.expert)
    assert routing.publish_to_index(old) is None
    with pytest.raises(IndexNotReady):
        routing.publish_to_index(new)
    routing.embed(new)
    Expert.objects.update(description="reworded")
    with pytest.raises(IndexNotReady):
        routing.publish_to_index(new)
    Expert.objects.update(description="x")
    for field in ("yanked_at", "deleted_at"):
        Expert.objects.update(**{field: "2026-01-01T00:00:00Z"})
        assert routing.publish_to_index(new) is None
        Expert.objects.update(**{field: None})
    assert clock() == 0
    assert routing.publish_to_index(new) == 1


@db
def test_a_transaction_that_is_rolled_back_leaves_neither_number_nor_change(router):
    revision = expert("ann/a", "x")
    routing.embed(revision)
    with transaction.atomic():
        assert routing.publish_to_index(revision) == 1
        transaction.set_rollback(True)
    assert (clock(), log()) == (0, [])
    assert routing.publish_to_index(revision) == 1


@db
def test_yanking_and_deleting_take_an_expert_out_and_unyanking_puts_it_back(router):
    user = person("ann")
    revision = published("ann/a", "x")
    row = revision.expert
    router.refresh()
    assert known(router) == {"ann/a": revision.pk}
    experts.yank(user=user, expert=row)
    router.refresh()
    assert (known(router), log()[-1][1:]) == ({}, ("remove", "ann/a"))
    experts.yank(user=user, expert=row, yanked=False)
    router.refresh()
    assert known(router) == {"ann/a": revision.pk}
    experts.delete(user=user, expert=row)
    router.refresh()
    assert (known(router), clock()) == ({}, 4)


@db
def test_a_name_that_becomes_free_belongs_to_whoever_takes_it_next(router):
    user = person("ann")
    old = published("ann/a", "old words")
    router.refresh()
    experts.delete(user=user, expert=old.expert)
    new = published("ann/a", "new words")
    router.refresh()
    assert known(router) == {"ann/a": new.pk}
    routing.withdraw(old.expert)
    router.refresh()
    assert known(router) == {"ann/a": new.pk}


@db
def test_two_experts_may_swap_names_between_two_looks_of_a_router(router):
    first, second = published("ann/a", "one"), published("ann/b", "two")
    router.refresh()
    for row, name in ((first.expert, "c"), (second.expert, "a"), (first.expert, "b")):
        Expert.objects.filter(pk=row.pk).update(name=name, key=name)
        routing.changed(Expert.objects.get(pk=row.pk))
    router.refresh()
    assert known(router) == {"ann/a": second.pk, "ann/b": first.pk}


@db
def test_a_renamed_expert_is_routed_under_its_new_name_while_its_new_vectors_are_made(router):
    user = person("ann")
    revision = published("ann/a", "book a flight")
    router.refresh()
    renamed = experts.rename(user=user, expert=revision.expert, full_name="ann/z")
    router.refresh()
    assert known(router) == {"ann/z": revision.pk}
    again = Job.objects.filter(revision=revision).order_by("created_at")
    assert [job.kind for job in again] == ["embed", "index"]
    assert again[1].after == again[0]
    stale = RoutingChange.objects.get()
    assert (stale.card["expert"], stale.card["name"]) == ("ann/z", "a")
    head = Revision.objects.get()
    routing.embed(head)
    routing.publish_to_index(head)
    assert RoutingChange.objects.get().card["name"] == renamed.name == "z"


@db
def test_a_change_that_routing_does_not_read_says_nothing_to_the_routers(router):
    revision = published("ann/a", "x")
    assert routing.changed(revision.expert) is None
    assert routing.changed(expert("ann/never-published").expert) is None
    assert clock() == 1


@db
def test_an_older_revision_stays_routable_while_the_next_one_is_worked_on(router):
    old = published("ann/a", "old words")
    new = next_head(old.expert, state=Revision.State.PROCESSING)
    Expert.objects.update(description="new words")
    router.refresh()
    answer = routing.route(viewer=None, text="old words", min_score=0)
    assert [result["revision"] for result in answer["results"]] == [old.commit]
    new = Revision.objects.get(pk=new.pk)
    routing.embed(new)
    routing.publish_to_index(new)
    Revision.objects.filter(pk=new.pk).update(state=Revision.State.READY)
    router.refresh()
    answer = routing.route(viewer=None, text="old words", min_score=0)
    assert [result["revision"] for result in answer["results"]] == [new.commit]
    assert answer["results"][0]["parts"]["bm25"] < answer_of("new words")["results"][0]["parts"]["bm25"]


def answer_of(text):
    return routing.route(viewer=None, text=text, min_score=0)


@db
def test_a_rebuild_publishes_what_can_be_routed_and_withdraws_what_cannot(router):
    from django.core.management import call_command

    kept, lost, gone = published("ann/kept", "x", "y"), published("ann/lost", "z"), published("ann/gone", "w")
    bare = expert("ann/bare", "v")
    Revision.objects.filter(pk=bare.pk).update(base_model=None)
    Embedding.objects.filter(revision=lost).update(encoder="an older one")
    RoutingChange.objects.filter(expert=kept.expert).delete()
    Expert.objects.filter(pk=gone.expert_id).update(yanked_at="2026-01-01T00:00:00Z")
    call_command("rebuild_index")
    router.refresh()
    assert known(router) == {"ann/kept": kept.pk, "ann/lost": lost.pk}
    assert [line[1:] for line in log()] == [("put", "ann/kept"), ("put", "ann/lost"), ("remove", "ann/gone")]


# Following


@db
def test_a_router_that_follows_step_by_step_ends_where_a_fresh_one_begins(router, encoder):
    for number in range(4):
        published(f"ann/e{number}", f"words {number}", f"example {number}")
    router.refresh()
    rows = {row.name: row for row in Expert.objects.all()}
    routing.withdraw(rows["e1"])
    router.refresh()
    Expert.objects.filter(name="e2").update(description="other words")
    head = Revision.objects.get(expert=rows["e2"])
    routing.embed(head)
    routing.publish_to_index(head)
    published("ann/e9", "nine", base="base/two")
    router.refresh()
    fresh = Router(load=lambda row: encoder)
    fresh.refresh()
    assert known(fresh) == known(router)
    assert fresh.state.seq == router.state.seq == clock() == 7
    for name, part in fresh.state.partitions.items():
        for one in part.experts():
            mine = router.state.partitions[name].entry(one)
            assert np.array_equal(part.entry(one).vectors, mine.vectors)
            assert part.entry(one).card == mine.card


@db
def test_an_entry_read_from_rows_equals_one_made_from_texts(router, encoder):
    revision = published("ann/travel-desk", "Books trips.", "a flight", "a hotel", "a train")
    router.refresh()
    card = routing.card_of(revision.expert, revision)
    made = cards.entry(card, encoder.encode(list(cards.texts(card))))
    stored = router.state.partitions["base/one"].entry("ann/travel-desk")
    # One batch of texts or another moves the last bit of a vector, and float16 may round that bit up.
    assert stored.vectors == pytest.approx(made.vectors, abs=2.5e-4)
    assert (stored.card, stored.counts) == (made.card, made.counts)


@db
def test_an_expert_whose_stored_vectors_do_not_fit_is_left_out_and_the_others_stay(router):
    good, short, narrow = published("ann/good", "x"), published("ann/short", "y", "z"), published("ann/narrow", "w")
    Embedding.objects.filter(revision=short, kind="example").delete()
    Embedding.objects.filter(revision=narrow, kind="centroid").update(vector=b"1234")
    router.refresh()
    assert known(router) == {"ann/good": good.pk}
    assert router.state.seq == 3


@db
def test_vectors_of_another_encoder_are_not_read(router):
    revision = published("ann/a", "x")
    Embedding.objects.filter(revision=revision).update(encoder="another")
    router.refresh()
    assert known(router) == {}


@db
def test_a_database_that_was_set_back_is_read_anew(router):
    published("ann/a", "x")
    kept = published("ann/b", "y")
    published("ann/c", "z")
    router.refresh()
    RoutingChange.objects.exclude(seq=2).delete()
    RoutingClock.objects.update(seq=2)
    router.refresh()
    assert (known(router), router.state.seq) == ({"ann/b": kept.pk}, 2)


@committed
def test_of_two_transactions_that_end_in_the_opposite_order_no_change_is_lost(router):
    """The one that started first commits last, and a router looks in between."""
    first, second = expert("ann/first", "x"), expert("ann/second", "y")
    routing.embed(first)
    routing.embed(second)
    numbers = {}

    def publish(revision):
        try:
            numbers[revision.pk] = routing.publish_to_index(revision)
        finally:
            connection.close()

    late = threading.Thread(target=publish, args=(second,))
    with transaction.atomic():
        numbers[first.pk] = routing.publish_to_index(first)
        late.start()
        until(lambda: waiting_for_a_lock() or not late.is_alive())
        looked = in_another_connection(lambda: (router.refresh(), router.state.seq, known(router)))
        assert looked[1:] == (0, {})
    late.join(timeout=30)
    assert numbers == {first.pk: 1, second.pk: 2}
    router.refresh()
    assert known(router) == {"ann/first": first.pk, "ann/second": second.pk}


@committed
def test_callers_that_name_the_number_of_a_change_see_it_at_once(router):
    router._follower.start()
    try:
        for number in range(3):
            revision = expert(f"ann/e{number}", f"words {number}")
            routing.embed(revision)
            seq = routing.publish_to_index(revision)
            answer = routing.route(viewer=None, text="words", min_seq=seq, min_score=0)
            assert answer["index_seq"] >= seq
            assert f"ann/e{number}" in [result["expert"] for result in answer["results"]]
        with pytest.raises(IndexNotReady) as caught:
            routing.route(viewer=None, text="words", min_seq=seq + 1)
        assert (caught.value.status, caught.value.retry_after_seconds) == (503, 1)
    finally:
        router.stop()


@committed
def test_a_router_that_lags_is_unavailable_for_who_names_a_later_change(router, monkeypatch):
    monkeypatch.setattr("registry.services.router.WAIT_SECONDS", 0.05)
    router.refresh()
    published("ann/a", "x")
    assert routing.route(viewer=None, text="x")["index_seq"] == 0
    with pytest.raises(IndexNotReady):
        routing.route(viewer=None, text="x", min_seq=1)


@committed
def test_two_routers_see_a_change_without_being_asked(router, encoder):
    other = Router(load=lambda row: encoder).start()
    router._follower.start()
    try:
        revision = published("ann/a", "x")
        for one in (router, other):
            until(lambda one=one: one.state is not None and one.state.seq == 1)
            assert known(one) == {"ann/a": revision.pk}
        routing.withdraw(revision.expert)
        for one in (router, other):
            until(lambda one=one: one.state.seq == 2)
            assert known(one) == {}
    finally:
        router.stop()
        other.stop()


@committed
@pytest.mark.parametrize("trouble", [OperationalError("gone"), InterfaceError("closed")])
def test_a_router_goes_on_after_any_trouble_of_the_database(router, monkeypatch, trouble):
    real, asked = RoutingClock.objects.order_by, []

    def away(*fields):
        asked.append(fields)
        if len(asked) == 1:
            raise trouble
        return real(*fields)

    monkeypatch.setattr(RoutingClock.objects, "order_by", away, raising=False)
    router._follower.start()
    try:
        until(lambda: router.state is not None)
    finally:
        router.stop()


@committed
def test_a_router_survives_the_loss_of_its_database_connection(router):
    router._follower.start()
    try:
        until(lambda: router.state is not None)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            assert cursor.fetchone()[0] >= 1
        published("ann/a", "x")
        until(lambda: router.state.seq == 1)
    finally:
        router.stop()


def waiting_for_a_lock() -> bool:
    def ask():
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return cursor.fetchone()[0]

    return in_another_connection(ask) > 0


def in_another_connection(ask):
    """What `ask` returns in a thread with a database connection of its own."""
    found = []

    def run():
        try:
            found.append(ask())
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=30)
    return found[0]


# Jobs


@committed
def test_the_jobs_embed_and_publish_and_tell_the_number(router):
    from registry import jobs
    from workers import runner

    revision = expert("ann/a", "x", "y")
    Revision.objects.update(state=Revision.State.PROCESSING)
    first = jobs.enqueue(jobs.JobKind.EMBED, revision=revision)
    second = jobs.enqueue(jobs.JobKind.INDEX, revision=revision, after=first)
    runner.run(first.pk)
    assert Embedding.objects.filter(revision=revision).count() == 3
    runner.run(second.pk)
    rows = {row.kind: row for row in Job.objects.all()}
    assert {row.state for row in rows.values()} == {Job.State.DONE}, [row.error for row in rows.values()]
    assert rows["index"].result == {"index_seq": 1}
    router.refresh()
    assert [result["expert"] for result in answer_of("x")["results"]] == ["ann/a"]


@committed
def test_jobs_of_what_cannot_be_routed_are_not_applicable(router):
    from registry import jobs
    from workers import runner

    old = expert("ann/a", "x")
    next_head(old.expert)
    bare = expert("ann/b", "x")
    Revision.objects.filter(pk=bare.pk).update(base_model=None)
    for revision in (old, bare):
        for kind in (jobs.JobKind.EMBED, jobs.JobKind.INDEX):
            job = jobs.enqueue(kind, revision=revision)
            runner.run(job.pk)
            assert Job.objects.get(pk=job.pk).state == Job.State.NOT_APPLICABLE
    assert clock() == 0
    assert Ref.objects.count() == 2


@committed
def test_the_embed_job_waits_while_the_router_is_away(settings):
    from registry import jobs
    from workers import runner

    settings.HUB_ROUTER_URL = "http://127.0.0.1:9"
    job = jobs.enqueue(jobs.JobKind.EMBED, revision=expert("ann/a", "x"))
    runner.run(job.pk)
    met = Job.objects.get(pk=job.pk)
    assert (met.state, met.attempt) == (Job.State.QUEUED, 0)
