"""Instructions by a configured language model: a real server on a local port answers as OpenAI's do."""

import json

import pytest

from registry import jobs
from registry.errors import EgressFailed, EgressRefused
from registry.models import Embedding, Expert, Job, Revision, RoutingChange
from registry.services import describing, routing
from tests.integration.routables import published
from tests.unit.registry.test_egress import answering, server
from workers.jobs import describe
from workers.runner import NotApplicable, Work

pytestmark = pytest.mark.django_db

WRITTEN = "Book the trip that is asked for."


def completion(text, **more):
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **more}).encode()
    return answering(body=body)


def work(revision):
    return Work(jobs.Lease("j", "describe", "w", revision.pk, None, {}))


@pytest.fixture
def model(settings):
    """A server whose answer a test sets, configured as the hub's language model."""
    with server(completion("  Book the trip\n that is asked for.\x07 ")) as made:
        settings.HUB_DESCRIBE_URL = f"http://127.0.0.1:{made.server_port}/v1/"
        settings.HUB_DESCRIBE_MODEL = "tiny"
        settings.HUB_DESCRIBE_KEY = "secret"
        settings.HUB_EGRESS_HOSTS = [f"127.0.0.1:{made.server_port}"]
        yield made


@pytest.fixture
def travel(router):
    return published("ann/travel", "Books trips.", "book a flight to Rome", "find me a hotel")


def test_the_model_is_told_description_and_examples_and_its_answer_is_kept_clean(model, travel):
    assert describe.run(work(travel)) == {"characters": len(WRITTEN)}
    row = Expert.objects.get(name="travel")
    assert (row.instruction, row.is_instruction_generated) == (WRITTEN, True)
    ((path, headers, body),) = model.seen
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer secret", "tiny")
    told = body["messages"][-1]["content"]
    assert all(text in told for text in ("travel", "Books trips.", "book a flight to Rome", "find me a hotel"))


def test_a_written_instruction_comes_into_the_index_by_the_jobs_that_follow(model, travel, router):
    describe.run(work(travel))
    assert sorted(Job.objects.values_list("kind", flat=True)) == ["embed", "index"]
    revision = Revision.objects.get(pk=travel.pk)
    routing.embed(revision)
    routing.publish_to_index(revision)
    kinds = Embedding.objects.filter(revision=travel).values_list("kind", flat=True)
    assert sorted(kinds) == ["centroid", "description", "example", "example", "instruction"]
    assert RoutingChange.objects.get(revision=travel).card["instruction"] == WRITTEN
    router.refresh()
    answer = routing.route(viewer=None, text=WRITTEN, strategy="glider", min_score=0)
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_an_instruction_of_the_uploader_is_never_replaced(model, travel):
    Expert.objects.filter(pk=travel.expert_id).update(instruction="Mine.")
    with pytest.raises(NotApplicable):
        describe.run(work(travel))
    assert model.seen == []
    assert describing.store(travel.expert_id, "Other.", told=("Books trips.", travel.expert.examples)) is False
    row = Expert.objects.get(pk=travel.expert_id)
    assert (row.instruction, row.is_instruction_generated) == ("Mine.", False)


def test_an_expert_that_was_described_anew_meanwhile_keeps_no_instruction_of_the_old_words(model, travel):
    assert describing.store(travel.expert_id, "Old.", told=("Other words.", travel.expert.examples)) is False
    assert Expert.objects.get(pk=travel.expert_id).instruction == ""


def test_without_a_configured_model_nobody_is_asked(travel, settings):
    describing.enqueue(travel)
    assert not Job.objects.filter(kind="describe").exists()
    with pytest.raises(NotApplicable):
        describe.run(work(travel))


def test_an_index_job_asks_for_an_instruction_once_and_only_where_there_is_none(model, travel):
    describing.enqueue(travel)
    describing.enqueue(travel)
    assert Job.objects.filter(kind="describe").count() == 1
    other = published("ann/other", "Cooks.")
    Expert.objects.filter(pk=other.expert_id).update(instruction="Cook.")
    other.expert.refresh_from_db()
    describing.enqueue(other)
    assert Job.objects.filter(kind="describe").count() == 1


@pytest.mark.parametrize(
    "answer",
    [
        completion(" \n\x00 "), completion(None), completion(["x"]), answering(body=b"[]"), answering(body=b"{}"),
        answering(body=b'{"choices": []}'), answering(500), answering(body=b"{"),
    ],
)  # fmt: skip
def test_an_answer_without_a_text_fails_the_job_and_the_expert_stays_routable(model, travel, router, answer):
    model.answer = answer
    with pytest.raises(EgressFailed):
        describe.run(work(travel))
    assert Expert.objects.get(pk=travel.expert_id).instruction == ""
    router.refresh()
    assert routing.route(viewer=None, text="book a flight to Rome", min_score=0)["results"][0]["expert"] == "ann/travel"


def test_a_private_server_that_is_not_allowed_is_not_asked(model, travel, settings):
    settings.HUB_EGRESS_HOSTS = []
    with pytest.raises(EgressRefused):
        describe.run(work(travel))
    settings.HUB_DESCRIBE_URL = settings.HUB_DESCRIBE_URL.replace("http://", "https://")
    with pytest.raises(EgressRefused):
        describe.run(work(travel))
    assert model.seen == []


def test_a_long_answer_is_cut_at_a_word():
    assert describing.clean("word " * 2000) == ("word " * 800).strip()
    assert describing.clean("x" * 5000) == "x" * 4000
    assert describing.clean("a\u202eb\tc\r\nd\x1b[0m") == "a b c d [0m"
