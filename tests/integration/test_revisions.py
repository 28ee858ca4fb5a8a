"""Commits on real PostgreSQL: trees, states, races, and nothing left behind by a refusal."""

import re
import threading
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from registry import jobs, selectors
from registry.errors import (
    ExpertNotFound,
    FileNotFound,
    NameTaken,
    NotAllowed,
    ParentStale,
    QuotaExceeded,
    RevisionNotFound,
    TooLarge,
    UploadInvalid,
)
from registry.models import AuditEvent, Blob, Expert, File, Job, Ref, Revision
from registry.services import bases, blobs, experts, revisions
from tests import factories, tiny
from tests.senders import counts

pytestmark = pytest.mark.django_db
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@pytest.fixture
def owner():
    bases.sync()
    return factories.user("ada")


@pytest.fixture
def expert(owner):
    return factories.expert(owner, "tea")


def commit(owner, expert, files, **options):
    deleted = options.pop("deleted", ())
    folders = options.pop("folders", ())
    changes = factories.changes(files, deleted=deleted, folders=folders)
    return revisions.commit(user=owner, expert=expert, changes=changes, message="m", **options)


def tree(revision):
    return {file.path: file.blob_id for file in File.objects.filter(revision=revision)}


def digests(files):
    return {path: tiny.sha256(data) for path, data in files.items()}


def test_a_complete_tree_becomes_a_processing_revision_with_four_jobs_in_order(owner, expert):
    made = commit(owner, expert, tiny.adapter())
    assert made.state == Revision.State.PROCESSING
    found = list(Job.objects.filter(revision=made))
    assert [job.kind for job in found] == ["check", "compress", "embed", "index"]
    assert [job.after_id for job in found] == [None, *[job.pk for job in found[:3]]]
    assert re.fullmatch("[0-9a-f]{40}", made.commit)
    assert selectors.head(expert) == made


def test_files_pushed_in_pieces_are_incomplete_until_config_and_weights_are_there(owner, expert):
    files = tiny.adapter()
    first = commit(owner, expert, {CARD: files[CARD]})
    second = commit(owner, expert, {WEIGHTS: files[WEIGHTS]})
    assert (first.state, second.state) == (Revision.State.INCOMPLETE, Revision.State.INCOMPLETE)
    assert Job.objects.count() == 0
    third = commit(owner, expert, {CONFIG: files[CONFIG]})
    assert third.state == Revision.State.PROCESSING
    assert tree(third) == digests(files)
    assert third.parent == second
    assert Job.objects.filter(revision=third).count() == 4
    expert.refresh_from_db()
    assert expert.base_model.name == tiny.BASE


def test_config_and_weights_that_do_not_fit_are_refused_when_they_meet(owner, expert):
    commit(owner, expert, {WEIGHTS: tiny.weights(rank=3)})
    before = counts()
    with pytest.raises(UploadInvalid) as refusal:
        commit(owner, expert, {CONFIG: tiny.config(r=2)})
    assert refusal.value.faults[0].met == 3
    assert counts() == before


def test_a_new_config_is_checked_against_the_weights_that_are_there(owner, expert):
    commit(owner, expert, tiny.adapter())
    with pytest.raises(UploadInvalid):
        commit(owner, expert, {CONFIG: tiny.config(r=8)})


def test_a_base_that_is_not_known_waits_for_the_weights(owner, expert):
    made = commit(owner, expert, {CONFIG: tiny.config(base_model_name_or_path=None)})
    assert made.state == Revision.State.INCOMPLETE
    assert made.base_model is None


def test_a_change_keeps_the_other_files_of_its_parent(owner, expert):
    files = tiny.adapter(seed=1)
    commit(owner, expert, files)
    second = commit(owner, expert, {CARD: tiny.card("Another task.")})
    assert tree(second) == digests({**files, CARD: tiny.card("Another task.")})
    expert.refresh_from_db()
    assert expert.description == "Another task."


def test_files_and_folders_can_be_deleted_and_absent_ones_cannot(owner, expert):
    files = {**tiny.adapter(), "a/x.md": b"x", "a/b/y.md": b"y", "ab.md": b"z"}
    commit(owner, expert, files)
    made = commit(owner, expert, {}, deleted=(CARD,), folders=("a/",))
    assert set(tree(made)) == {CONFIG, WEIGHTS, "ab.md"}
    with pytest.raises(FileNotFound):
        commit(owner, expert, {}, deleted=(CARD,))
    with pytest.raises(FileNotFound):
        commit(owner, expert, {}, folders=("a",))


def test_the_same_tree_again_is_the_same_revision(owner, expert):
    files = tiny.adapter()
    first = commit(owner, expert, files)
    before = counts()
    assert commit(owner, expert, files) == first
    assert counts() == before


def test_a_commit_whose_answer_was_lost_can_be_repeated_with_its_old_parent(owner, expert):
    first = commit(owner, expert, tiny.adapter(seed=1))
    changed = {CARD: tiny.card("Other.")}
    second = commit(owner, expert, changed, parent_commit=first.commit)
    assert commit(owner, expert, changed, parent_commit=first.commit) == second
    with pytest.raises(ParentStale) as stale:
        commit(owner, expert, {CARD: tiny.card("Third.")}, parent_commit=first.commit)
    assert stale.value.status == 412
    assert (stale.value.faults[0].met, stale.value.faults[0].wanted) == (first.commit, second.commit)


def test_a_commit_id_depends_on_the_parent_and_the_tree_and_not_on_time(owner):
    one, two = factories.expert(owner, "one"), factories.expert(owner, "two")
    a, b = tiny.adapter(seed=1), tiny.adapter(seed=2)
    first = commit(owner, one, a)
    commit(owner, one, b)
    back = commit(owner, one, a)
    assert back.manifest_digest == first.manifest_digest
    assert back.commit != first.commit
    assert commit(owner, two, a).commit != first.commit


def test_going_back_to_an_older_tree_moves_main_and_makes_a_revision_of_its_own(owner, expert):
    a, b = tiny.adapter(seed=1), tiny.adapter(seed=2)
    made = [commit(owner, expert, files) for files in (a, b, a)]
    assert len({revision.pk for revision in made}) == 3
    assert selectors.head(expert) == made[2]
    assert made[2].parent == made[1]


def test_a_branch_moves_alone(owner, expert):
    head = commit(owner, expert, tiny.adapter(seed=1))
    Ref.objects.create(expert=expert, name="dev", revision=head)
    made = commit(owner, expert, {CARD: tiny.card("On the branch.")}, branch="dev")
    assert selectors.head(expert) == head
    assert Ref.objects.get(expert=expert, name="dev").revision == made
    expert.refresh_from_db()
    assert expert.description == "Sorts questions about tea by the kind of tea."
    with pytest.raises(RevisionNotFound):
        commit(owner, expert, tiny.adapter(), branch="nowhere")


def test_who_may_not_write_commits_nothing_and_a_private_expert_stays_hidden(owner, expert):
    other = factories.user("bob")
    with pytest.raises(NotAllowed):
        commit(other, expert, tiny.adapter())
    experts.change_visibility(user=owner, expert=expert, visibility="private")
    with pytest.raises(ExpertNotFound):
        commit(other, expert, tiny.adapter())
    assert Revision.objects.count() == 0


def test_a_deleted_expert_takes_no_commit(owner, expert):
    experts.delete(user=owner, expert=expert)
    with pytest.raises(ExpertNotFound):
        commit(owner, expert, tiny.adapter())


def test_a_new_expert_and_its_first_revision_come_together_or_not_at_all(owner):
    before = counts()
    with pytest.raises(UploadInvalid):
        commit(owner, revisions.New("ada/new"), tiny.adapter(**{CONFIG: tiny.config(r=5)}))
    assert counts() == before
    made = commit(owner, revisions.New("ada/new", is_private=True), tiny.adapter())
    assert made.expert.full_name == "ada/new"
    assert made.expert.visibility == "private"
    with pytest.raises(NameTaken):
        commit(owner, revisions.New("ada/NEW"), tiny.adapter(seed=3))


def test_a_refusal_at_the_last_step_leaves_no_rows(owner, expert, monkeypatch):
    before = counts()

    def broken(*_args, **_options):
        raise RuntimeError("the queue table is gone")

    monkeypatch.setattr(jobs, "enqueue_pipeline", broken)
    with pytest.raises(RuntimeError):
        commit(owner, expert, tiny.adapter())
    after = counts()
    rows = {"Blob", "blob files"}
    assert {name: count for name, count in after.items() if name not in rows} == {
        name: count for name, count in before.items() if name not in rows
    }


def test_card_fields_given_beside_the_files_win_and_stay_until_others_are_given(owner, expert):
    given = {"description": "Given.", "examples": ["one"], "licence": "MIT", "tags": ["x"]}
    commit(owner, expert, tiny.adapter(seed=1), card=given)
    expert.refresh_from_db()
    assert (expert.description, expert.examples, expert.licence, expert.tags) == ("Given.", ["one"], "mit", ["x"])
    commit(owner, expert, {WEIGHTS: tiny.weights(seed=5)})
    expert.refresh_from_db()
    assert (expert.description, expert.licence) == ("Given.", "mit")
    commit(owner, expert, {WEIGHTS: tiny.weights(seed=6)}, card={"description": "Anew."})
    expert.refresh_from_db()
    assert (expert.description, expert.examples) == ("Anew.", ["one"])


def test_an_instruction_given_beside_the_files_is_the_uploaders_own(owner, expert):
    commit(owner, expert, tiny.adapter(seed=1), card={"instruction": "Book it."})
    expert.refresh_from_db()
    assert (expert.instruction, expert.is_instruction_generated) == ("Book it.", False)


def test_a_generated_instruction_stays_as_long_as_the_words_it_was_written_from(owner, expert):
    commit(owner, expert, tiny.adapter(seed=1), card={"description": "Books.", "examples": ["one"]})
    type(expert).objects.filter(pk=expert.pk).update(instruction="Written.", is_instruction_generated=True)
    commit(owner, expert, {WEIGHTS: tiny.weights(seed=5)})
    expert.refresh_from_db()
    assert (expert.instruction, expert.is_instruction_generated) == ("Written.", True)
    commit(owner, expert, {WEIGHTS: tiny.weights(seed=6)}, card={"description": "Cooks."})
    expert.refresh_from_db()
    assert (expert.instruction, expert.is_instruction_generated) == ("", False)


def test_an_answer_about_the_base_holds_for_later_weights_too(owner, expert):
    files = tiny.adapter(**{CONFIG: tiny.config(base_model_name_or_path="/tmp/x"), CARD: b"# T\n"})
    commit(owner, expert, files, card={"base_model": tiny.BASE})
    made = commit(owner, expert, {WEIGHTS: tiny.weights(seed=9)})
    assert made.base_model.name == tiny.BASE
    assert made.facts["base_stated"] == "/tmp/x"


def test_the_base_in_the_front_matter_answers_for_the_config(owner, expert):
    files = tiny.fitting({"transformer.h.0.attn.c_attn": (384, 384)}, base_model_name_or_path=None)
    with pytest.raises(UploadInvalid) as refusal:  # its layers are other ones, so it was looked at
        commit(owner, expert, {**files, CARD: tiny.card(base_model="gpt2")})
    assert refusal.value.faults[0].wanted == [2304, 768]


def test_a_card_that_names_another_base_than_the_config_is_warned_about(owner, expert):
    made = commit(owner, expert, tiny.adapter(**{CARD: tiny.card(base_model="gpt2")}))
    assert made.base_model.name == tiny.BASE
    assert made.facts["warnings"] == [
        f"The card names openai-community/gpt2 as base, the config {tiny.BASE}; the config holds."
    ]


def test_a_quantised_name_leads_to_its_base_and_the_stored_config_keeps_it(owner, expert):
    name = "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit"
    shapes = {"model.layers.3.self_attn.k_proj": (512, 2048)}
    files = tiny.fitting(shapes, base_model_name_or_path=name)
    made = commit(owner, expert, {**files, CARD: tiny.card(base_model=name)})
    assert made.base_model.name == "meta-llama/Llama-3.2-1B-Instruct"
    assert made.facts["base_stated"] == name
    assert tree(made)[CONFIG] == tiny.sha256(files[CONFIG])


def test_the_first_expert_of_an_unlisted_base_teaches_its_shapes(owner):
    bases.register(user=owner, name="ada/own-base")
    one, two = factories.expert(owner, "one"), factories.expert(owner, "two")
    name = {"base_model_name_or_path": "ada/own-base"}
    commit(owner, one, tiny.fitting({"block.0.fc": (24, 8)}, **name))
    with pytest.raises(UploadInvalid) as refusal:
        commit(owner, two, tiny.fitting({"block.5.fc": (8, 24)}, **name))
    assert refusal.value.faults[0].pointer == f"/{WEIGHTS}/block.5.fc"
    assert (refusal.value.faults[0].met, refusal.value.faults[0].wanted) == ([8, 24], [24, 8])
    commit(owner, two, tiny.fitting({"block.7.fc": (24, 8)}, seed=4, **name))


def test_a_private_expert_teaches_nobody(owner):
    bases.register(user=owner, name="ada/own-base")
    hidden = factories.expert(owner, "hidden", private=True)
    commit(owner, hidden, tiny.fitting({"block.0.fc": (24, 8)}, base_model_name_or_path="ada/own-base"))
    assert bases.resolve("ada/own-base").shapes == {}


def test_facts_tell_rank_modules_and_what_the_card_lacks(owner, expert):
    made = commit(owner, expert, tiny.adapter(**{CARD: b"---\nlicense: mit\n---\n# Only a heading\n"}))
    assert made.adapter_kind == "lora"
    assert (made.rank, made.parameter_count) == (2, 2 * (384 + 384) * 2)
    assert made.facts["targets"] == ["query", "value"]
    assert made.facts["shapes"] == {
        "encoder.layer.*.attention.self.query": [384, 384],
        "encoder.layer.*.attention.self.value": [384, 384],
    }
    assert len(made.facts["warnings"]) == 2
    assert made.facts["card_data"] == {"license": "mit"}


def test_weights_are_large_files_and_texts_are_small_ones(owner, expert):
    made = commit(owner, expert, tiny.adapter())
    assert {file.path for file in made.files.filter(is_large=True)} == {WEIGHTS}


def test_a_rolled_back_commit_sends_nothing_and_a_committed_one_sends_its_first_job(
    owner, expert, monkeypatch, django_capture_on_commit_callbacks
):
    sent = []
    monkeypatch.setattr(jobs, "send", lambda _job_id, kind, *_, **__: sent.append(kind))

    def fail_late(*_args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, django_capture_on_commit_callbacks(execute=True):
        patch.setattr(revisions, "_finished", fail_late)
        with pytest.raises(ZeroDivisionError):
            commit(owner, expert, tiny.adapter())
    assert sent == []
    assert Job.objects.count() == 0
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        commit(owner, expert, tiny.adapter())
        assert sent == []
    assert sent == ["check"]
    assert len(callbacks) == 1


@pytest.mark.parametrize(
    ("files", "pointer"),
    [({"Notes.md": b"x"}, "/notes.md"), ({"notes.md/x.md": b"x"}, "/notes.md~1x.md")],
)
def test_a_tree_that_some_systems_cannot_hold_is_refused(owner, expert, files, pointer):
    commit(owner, expert, {"notes.md": b"n"})
    with pytest.raises(UploadInvalid) as refusal:
        commit(owner, expert, files)
    assert refusal.value.faults[0].pointer == pointer


def test_limits_hold_for_the_whole_tree_and_not_only_for_what_is_new(owner, expert, settings):
    commit(owner, expert, {"a.md": b"x" * 60, "b.md": b"y" * 30})
    settings.HUB_UPLOAD_MAX_BYTES = 100
    commit(owner, expert, {"c.md": b"z" * 10})
    with pytest.raises(TooLarge) as refusal:
        commit(owner, expert, {"d.md": b"!"})
    assert (refusal.value.faults[0].met, refusal.value.faults[0].wanted) == (101, "at most 100 bytes")
    commit(owner, expert, {"d.md": b"!"}, deleted=("c.md",))
    settings.HUB_UPLOAD_MAX_FILES = 3
    with pytest.raises(TooLarge):
        commit(owner, expert, {"e.md": b""})


def test_the_quota_counts_bytes_that_a_namespace_holds_twice_once(owner, expert, settings):
    commit(owner, expert, {"a.md": b"x" * 60})
    commit(owner, factories.expert(owner, "two"), {"a.md": b"x" * 60})
    settings.HUB_NAMESPACE_MAX_BYTES = 100
    commit(owner, expert, {"b.md": b"y" * 40})
    with pytest.raises(QuotaExceeded) as refusal:
        commit(owner, expert, {"c.md": b"z"})
    assert refusal.value.faults[0].met == 101
    other = factories.user("bob")
    commit(other, factories.expert(other), {"c.md": b"z"})


def test_bytes_that_are_stored_already_are_referred_to_and_touched(owner, expert):
    blob = blobs.keep(blobs.stage_bytes(b"words"))
    Blob.objects.update(touched_at=timezone.now() - timedelta(days=9))
    started = timezone.now()
    made = revisions.commit(user=owner, expert=expert, changes=revisions.Changes({"a.md": blob}))
    assert tree(made) == {"a.md": blob.pk}
    assert Blob.objects.get().touched_at >= started


def test_stored_bytes_are_checked_like_new_ones(owner, expert):
    blob = blobs.keep(blobs.stage_bytes(b"\x80\x04\x95 pickle"))
    with pytest.raises(UploadInvalid):
        revisions.commit(user=owner, expert=expert, changes=revisions.Changes({WEIGHTS: blob}))


def test_a_listed_base_learns_nothing(owner, expert):
    before = bases.resolve(tiny.BASE).shapes
    commit(owner, expert, tiny.fitting({"pooler.dense": (384, 384)}))
    assert bases.resolve(tiny.BASE).shapes == before


def test_a_commit_is_written_down(owner, expert):
    made = commit(owner, expert, tiny.adapter())
    event = AuditEvent.objects.get(action="revision.commit")
    assert (event.actor, event.subject) == (owner, f"ada/tea@{made.commit}")


class Racers:
    """Threads that commit at the same moment, each on a connection of its own."""

    def __init__(self, owner, expert, trees, **options):
        self.results = [None] * len(trees)
        barrier = threading.Barrier(len(trees))

        def run(place, files):
            try:
                changes = factories.changes(files)
                barrier.wait(timeout=20)
                self.results[place] = revisions.commit(user=owner, expert=expert, changes=changes, **options)
            except Exception as error:  # noqa: BLE001 - the outcome is what is asserted
                self.results[place] = error
            finally:
                connection.close()

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(trees)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)


@pytest.mark.django_db(transaction=True)
def test_of_concurrent_commits_on_one_parent_one_wins_and_the_others_are_stale():
    bases.sync()
    owner = factories.user("ada")
    expert = factories.expert(owner, "tea")
    head = commit(owner, expert, tiny.adapter())
    trees = [{CARD: tiny.card(f"Version {n}.")} for n in range(4)]
    racers = Racers(owner, expert, trees, parent_commit=head.commit)
    winners = [result for result in racers.results if isinstance(result, Revision)]
    assert len(winners) == 1
    assert sum(isinstance(result, ParentStale) for result in racers.results) == 3
    assert selectors.head(expert) == winners[0]
    assert Revision.objects.count() == 2
    assert Job.objects.count() == 8


@pytest.mark.django_db(transaction=True)
def test_concurrent_commits_without_a_parent_all_take_effect_one_after_the_other():
    bases.sync()
    owner = factories.user("ada")
    expert = factories.expert(owner, "tea")
    commit(owner, expert, tiny.adapter())
    trees = [{f"notes-{n}.md": f"note {n}".encode()} for n in range(4)]
    racers = Racers(owner, expert, trees)
    assert all(isinstance(result, Revision) for result in racers.results), racers.results
    head = selectors.head(expert)
    assert {f"notes-{n}.md" for n in range(4)} < set(tree(head))
    assert Revision.objects.count() == 5


@pytest.mark.django_db(transaction=True)
def test_concurrent_identical_commits_make_one_revision():
    bases.sync()
    owner = factories.user("ada")
    expert = factories.expert(owner, "tea")
    racers = Racers(owner, expert, [tiny.adapter(seed=1)] * 3)
    assert len({result.pk for result in racers.results}) == 1
    assert Revision.objects.count() == 1
    assert Job.objects.count() == 4
    assert Expert.objects.get().adapter_kind == "lora"
