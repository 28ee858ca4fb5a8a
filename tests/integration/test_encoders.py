"""Text encoders as rows: which one answers, how another is added, and what holds at each step of a change."""

import threading

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from moerge.embedding.encoder import load
from registry.errors import Conflict, IndexNotReady, Invalid, QueryInvalid
from registry.models import Embedding, Encoder, Expert, Job, Revision, RoutingSnapshot
from registry.services import encoder_change, encoders, experts, routing, snapshots
from registry.services.router import Router
from tests import encoders as made_encoders
from tests.integration.routables import chance, database_url, expert, person, published, put, serving, stored, until

db = pytest.mark.django_db
committed = pytest.mark.django_db(transaction=True)

SMALL = "small@1"
PACKAGED = encoders.packaged().pk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_encoders.make(tmp_path_factory.mktemp("encoders") / "small")


@pytest.fixture
def small(folder):
    """A second encoder, written down."""
    encoders.register()
    return encoders.add(encoder_id=SMALL, folder=str(folder), dimension=32, max_tokens=64)


@pytest.fixture
def loads():
    """Events without which an encoder does not load, by id."""
    return {}


@pytest.fixture
def router(settings, tmp_path, encoder, folder, loads):
    """A router that really loads the second encoder and moves when `refresh` is called."""

    def loaded(row):
        if row.pk in loads:
            assert loads[row.pk].wait(60)
        return encoder if row.pk == PACKAGED else load(folder=folder, encoder_id=row.pk, max_tokens=row.max_tokens)

    settings.HUB_HOME = tmp_path
    made = Router(load=loaded)
    made.line(encoders.packaged()).loader.join()
    with serving(made) as url:
        settings.HUB_ROUTER_URL = url
        yield made


def settle(router: Router) -> None:
    """Look at the database until all that loads in threads has been taken up."""
    for _ in range(3):
        router.refresh()
        for line in router._lines.values():
            line.loader.join(60)
            if line.follower._opening is not None:
                line.follower._opening.join(60)
    router.refresh()


def states() -> dict[str, str]:
    return dict(Encoder.objects.values_list("pk", "state"))


def run(job: Job) -> Job:
    from workers import runner

    runner.run(job.pk)
    job.refresh_from_db()
    return job


# Rows


@db
def test_the_packaged_encoder_is_active_until_another_one_is():
    assert encoders.active().pk == PACKAGED
    encoders.register()
    encoders.register()
    assert states() == {PACKAGED: "active"}
    Encoder.objects.all().delete()
    Encoder.objects.create(id=SMALL, dimension=32, max_tokens=64, state=Encoder.State.ACTIVE)
    encoders.register()
    assert states() == {PACKAGED: "idle", SMALL: "active"}
    assert encoders.active().pk == SMALL


@db
def test_an_encoder_is_tried_before_it_is_written_down(folder, tmp_path):
    call_command(
        "add_encoder", SMALL, str(folder), "--prefix", "query: ", "--thresholds", '{"dense": {"min_score": 0.4}}'
    )
    row = Encoder.objects.get(pk=SMALL)
    assert (row.dimension, row.max_tokens, row.prefix, row.state) == (32, 256, "query: ", "idle")
    assert (row.folder, row.thresholds) == (str(folder), {"dense": {"min_score": 0.4}})
    broken = made_encoders.make(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    refused = {
        "taken": (SMALL, str(folder)),
        "load": ("other", str(broken)),
        "printable": (" other", str(folder)),
        "catalogue": ("other", str(folder), "--thresholds", '{"unheard": {"min_score": 0.4}}'),
        "beyond": ("other", str(folder), "--thresholds", '{"dense": {"min_score": 40}}'),
        "JSON": ("other", str(folder), "--thresholds", "{"),
        "no object": ("other", str(folder), "--thresholds", "[1]"),
        "no thresholds": ("other", str(folder), "--thresholds", '{"dense": 1}'),
        "no number": ("other", str(folder), "--thresholds", '{"dense": {"high": "much"}}'),
    }
    for name, arguments in refused.items():
        with pytest.raises(CommandError):
            call_command("add_encoder", *arguments)
        assert list(states()) == [SMALL], name


@db
def test_ids_that_look_alike_have_folders_of_their_own():
    slugs = [encoders.slug(name) for name in ("a/b", "a-b", "A/B", "x" * 120, "x" * 119 + "y", "../..", "模型")]
    assert len(set(slugs)) == len(slugs)
    assert all(slug.isascii() and "/" not in slug and "." not in slug and len(slug) < 80 for slug in slugs)


# What a change does


@committed
def test_a_change_embeds_all_cards_builds_their_index_and_switches(small, router):
    one = published("ann/a", "Books trips.", "a flight", "a hotel")
    published("ann/b", "Cooks.")
    before = set(Embedding.objects.values_list("pk", flat=True))
    job = encoder_change.begin(SMALL)
    assert states() == {PACKAGED: "active", SMALL: "preparing"}
    assert (job.kind, job.after.kind, job.after.parameters) == ("snapshot", "reembed", {"encoder": SMALL})
    assert encoder_change.begin(SMALL).pk == job.pk
    settle(router)
    assert router.health()["embedding_model"] == PACKAGED
    assert run(job.after).result == {"encoder": SMALL, "cards": 2}
    rows = Embedding.objects.filter(encoder=SMALL)
    assert {len(bytes(row.vector)) for row in rows} == {2 * 32}
    assert sorted(rows.filter(revision=one).values_list("kind", "position")) == [
        ("centroid", 0),
        ("description", 0),
        ("example", 0),
        ("example", 1),
    ]
    assert states() == {PACKAGED: "active", SMALL: "preparing"}
    assert run(job).result["activated_seq"] == 3
    assert states() == {PACKAGED: "idle", SMALL: "active"}
    assert (RoutingSnapshot.objects.get().encoder, RoutingSnapshot.objects.get().seq) == (SMALL, 2)
    settle(router)
    assert (router.health()["embedding_model"], router.state.dimension, router.state.seq) == (SMALL, 32, 3)
    assert before <= set(Embedding.objects.filter(encoder=PACKAGED).values_list("pk", flat=True))


@committed
def test_the_old_encoder_answers_until_the_new_one_is_loaded(small, router, loads):
    loads[SMALL] = threading.Event()
    stored(put("ann/a", "Books trips."), small)
    row = snapshots.build(small)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    router.refresh()
    encoder_change.activate(small, embedded_to=row.seq)
    put_by(small, "ann/b", "Cooks.")
    router.refresh()
    health = router.health()
    assert (health["embedding_model"], health["encoder"], health["other_encoders"]) == (
        PACKAGED,
        "ready",
        {SMALL: "loading"},
    )
    assert routing.route(viewer=None, text="trips")["embedding_model"] == PACKAGED
    # Web knows at once which vectors count; the router cannot compare them yet.
    with pytest.raises(IndexNotReady):
        ask_by_vector(SMALL, 32)
    with pytest.raises(QueryInvalid):
        ask_by_vector(PACKAGED, 384)
    loads[SMALL].set()
    settle(router)
    assert ask_by_vector(SMALL, 32)["embedding_model"] == SMALL
    with pytest.raises(QueryInvalid):
        ask_by_vector(PACKAGED, 384)
    health = router.health()
    assert (health["embedding_model"], health["experts"]) == (SMALL, 2)
    assert "other_encoders" not in health
    assert routing.route(viewer=None, text="trips")["embedding_model"] == SMALL


def ask_by_vector(encoder_id: str, dimension: int) -> dict:
    vector = chance("Books trips.", dimension).tolist()
    return routing.route_vector(viewer=None, vector=vector, embedding_model=encoder_id, min_score=-1)


def put_by(encoder: Encoder, *arguments: str) -> Revision:
    revision = stored(expert(*arguments), encoder)
    routing.publish_to_index(revision)
    return revision


@committed
def test_an_answer_that_takes_two_rounds_is_by_one_encoder_also_when_it_changes_in_between(small, router, monkeypatch):
    for number in range(3):
        stored(put(f"ann/e{number}", "common words"), small)
    settle(router)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    settle(router)
    rounds = []
    real = routing.router_link.route

    def route(body):
        answer = real(body)
        rounds.append((answer["embedding_model"], len(body["texts"])))
        if len(rounds) == 1:
            # As if all hits of the second text were hidden from this caller.
            answer["rankings"][1] |= {"hits": [], "exhausted": False}
            encoder_change.activate(small, embedded_to=0)
            settle(router)
        return answer

    monkeypatch.setattr(routing.router_link, "route", route)
    answer = routing.route(viewer=None, texts=["common", "words"], top_k=1, min_score=-1, strategy="dense")
    assert rounds[:3] == [(PACKAGED, 2), (SMALL, 1), (SMALL, 2)]
    assert answer["embedding_model"] == SMALL
    by_small = routing.route(viewer=None, text="common", top_k=1, min_score=-1, strategy="dense")
    assert answer["answers"][0]["results"] == by_small["results"]


@committed
def test_an_encoder_that_does_not_load_leaves_the_old_one_answering_and_is_told(small, router, monkeypatch):
    def broken(row):
        raise OSError("no such weights")

    stored(put("ann/a", "Books trips."), small)
    router.refresh()
    monkeypatch.setattr(router, "_load", broken)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    encoder_change.activate(small, embedded_to=1)
    settle(router)
    health = router.health()
    assert (health["embedding_model"], health["other_encoders"], health["trouble"]) == (
        PACKAGED,
        {SMALL: "failed"},
        "no such weights",
    )
    answer = routing.route(viewer=None, text="trips", strategy="bm25")
    assert [result["expert"] for result in answer["results"]] == ["ann/a"]
    # Somebody puts the folder right.
    monkeypatch.undo()
    router.line(small)._load = router._load
    monkeypatch.setattr("registry.services.router.RELOAD_SECONDS", 0)
    settle(router)
    health = router.health()
    assert (health["embedding_model"], "trouble" in health, "other_encoders" in health) == (SMALL, False, False)


@committed
def test_what_is_uploaded_during_a_change_is_embedded_by_both(small, router):
    encoder_change.begin(SMALL)
    settle(router)
    revision = published("ann/a", "Books trips.")
    found = set(Embedding.objects.filter(revision=revision).values_list("encoder", flat=True))
    assert found == {PACKAGED, SMALL}


@committed
def test_an_upload_does_not_wait_for_an_encoder_that_answers_nothing_yet(small, router, loads):
    loads[SMALL] = threading.Event()
    encoder_change.begin(SMALL)
    router.refresh()
    revision = published("ann/a", "Books trips.")
    assert set(Embedding.objects.filter(revision=revision).values_list("encoder", flat=True)) == {PACKAGED}
    loads[SMALL].set()


@committed
def test_embedding_goes_on_where_it_stopped(small, router, monkeypatch):
    for number in range(4):
        published(f"ann/e{number}", f"words {number}")
    encoder_change.begin(SMALL)
    settle(router)
    steps = encoder_change.embed_missing(small)
    assert next(step for step in steps if step[0] == 2) == (2, 4)
    steps.close()
    encoded = []
    real = routing.embed_by
    monkeypatch.setattr(routing, "embed_by", lambda *given: (encoded.append(given[2].expert), real(*given))[1])
    assert list(encoder_change.embed_missing(small))[-1] == (4, 4)
    assert encoded == ["ann/e2", "ann/e3"]
    encoded.clear()
    Expert.objects.filter(name="e1").update(description="other words")
    routing.embed(Revision.objects.get(expert__name="e1"))
    routing.publish_to_index(Revision.objects.get(expert__name="e1"))
    encoded.clear()
    assert list(encoder_change.embed_missing(small))[-1] == (4, 4)
    assert encoded == []


@committed
def test_a_card_without_new_vectors_keeps_the_old_encoder_active(small):
    stored(put("ann/a", "x"), small)
    row = snapshots.build(small)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    late = put("ann/b", "y")
    with pytest.raises(IndexNotReady):
        encoder_change.activate(small, embedded_to=row.seq)
    assert states() == {PACKAGED: "active", SMALL: "preparing"}
    stored(late, small)
    assert encoder_change.activate(small, embedded_to=row.seq) == 3


@committed
def test_a_snapshot_that_leaves_somebody_out_does_not_become_active(small, router, monkeypatch):
    published("ann/a", "x")
    job = encoder_change.begin(SMALL)
    settle(router)
    run(job.after)
    # Somebody's vectors vanish between the last look and the build.
    real = snapshots.build

    def build(encoder):
        Embedding.objects.filter(encoder=SMALL).delete()
        return real(encoder)

    monkeypatch.setattr(snapshots, "build", build)
    assert (run(job).state, states()[PACKAGED]) == (Job.State.QUEUED, "active")
    assert not RoutingSnapshot.objects.exists()
    monkeypatch.undo()
    assert (run(job).state, states()[SMALL]) == (Job.State.DONE, "active")


@committed
def test_whoever_publishes_while_the_encoder_changes_is_asked_for_the_new_vectors(small, monkeypatch):
    """A publisher that looked at the old encoder waits for the change and then meets the new one."""
    first, second = stored(expert("ann/a", "x")), stored(stored(expert("ann/b", "y")), small)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    met = {}

    def publish(revision):
        try:
            met[revision.pk] = routing.publish_to_index(revision)
        except IndexNotReady as error:
            met[revision.pk] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=publish, args=(one,)) for one in (first, second)]
    real = routing.tick

    def tick():
        # Only the change gets here before the others wait for it.
        if threading.current_thread() is threading.main_thread():
            for thread in threads:
                thread.start()
            until(lambda: waiting() == 2)
        return real()

    monkeypatch.setattr(routing, "tick", tick)
    change = encoder_change.activate(small, embedded_to=0)
    for thread in threads:
        thread.join(60)
    assert isinstance(met[first.pk], IndexNotReady)
    assert (change, met[second.pk]) == (1, 2)


def waiting() -> int:
    """How many connections wait for a lock, as another one sees it now."""
    with psycopg.connect(database_url()) as other:
        rows = other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return rows.fetchone()[0]


@committed
def test_no_snapshot_is_built_by_an_encoder_that_answers_no_more(small, settings, tmp_path):
    settings.HUB_HOME = tmp_path
    put("ann/a", "x")
    job = snapshots.ask(is_due=True)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    stored(Revision.objects.get(), small)
    encoder_change.activate(small, embedded_to=0)
    assert run(job).state == Job.State.NOT_APPLICABLE
    assert run(snapshots.ask(is_due=True)).result["encoder"] == SMALL


@committed
def test_only_one_change_is_on_its_way_and_naming_the_active_encoder_calls_it_off(small, folder):
    encoders.add(encoder_id="third", folder=str(folder), dimension=32, max_tokens=64)
    with pytest.raises(Invalid):
        encoder_change.begin("unheard-of")
    assert encoder_change.begin(PACKAGED) is None
    job = encoder_change.begin(SMALL)
    with pytest.raises(Conflict):
        encoder_change.begin("third")
    assert encoder_change.begin(PACKAGED) is None
    assert states() == {PACKAGED: "active", SMALL: "idle", "third": "idle"}
    assert {one.state for one in Job.objects.all()} == {Job.State.CANCELLED}
    with pytest.raises(Conflict):
        encoder_change.activate(small, embedded_to=0)
    again = encoder_change.begin(SMALL)
    assert (again.pk, {one.state for one in Job.objects.all()}) == (job.pk, {Job.State.QUEUED})


@committed
def test_an_expert_that_is_renamed_after_a_change_is_asked_for_by_the_new_encoder(small):
    user = person("ann")
    revision = stored(put("ann/a", "x"), small)
    Encoder.objects.filter(pk=SMALL).update(state=Encoder.State.PREPARING)
    encoder_change.activate(small, embedded_to=0)
    Embedding.objects.filter(encoder=PACKAGED).delete()
    experts.yank(user=user, expert=revision.expert)
    experts.yank(user=user, expert=revision.expert, yanked=False)
    assert snapshots.build(small).counts["experts"] == 1


@db
def test_the_command_tells_what_it_did(small, capsys):
    call_command("change_encoder", SMALL)
    assert Job.objects.get(kind="snapshot").pk in capsys.readouterr().out
    call_command("change_encoder", PACKAGED)
    assert "is the active encoder" in capsys.readouterr().out
    with pytest.raises(CommandError, match="no encoder"):
        call_command("change_encoder", "unheard-of")
