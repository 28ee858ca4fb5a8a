"""Routing a query: what the router ranks, and what of it each caller may see."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import routing as benchmark
from moerge.routing import catalogue
from moerge.routing.base import Query
from moerge.routing.state import State
from registry.errors import BaseUnknown, IndexNotReady, QueryInvalid, TooLarge
from registry.models import Expert, Revision
from registry.services import encoders, router_link, routing
from registry.services.router import Router
from tests.integration.routables import base_model, expert, person, published, serving, still_loading

pytestmark = pytest.mark.django_db


@pytest.fixture
def experts(router):
    """Three experts on one base and one on another."""
    made = {
        "travel": published("ann/travel", "Books trips.", "book a flight to Rome", "find me a hotel in Oslo", tags=("a", "b")),
        "kitchen": published("ann/kitchen", "Helps to cook.", "how long do I boil an egg", "what can I use instead of salt"),
        "bank": published("bob/bank", "Questions on money.", "my card was declined", licence="mit", tags=("b",)),
        "other": published("bob/travel-other", "Books trips.", "book a flight to Rome", base="base/two"),
    }  # fmt: skip
    router.refresh()
    return made


def names(answer):
    return [result["expert"] for result in answer["results"]]


def test_an_answer_names_the_right_expert_first_with_all_its_parts(experts, encoder):
    answer = routing.route(viewer=None, text="reserve a plane ticket to Rome", base_model="base/one", min_score=0)
    assert names(answer)[0] == "ann/travel"
    assert sorted(names(answer)) == ["ann/kitchen", "ann/travel", "bob/bank"]
    first = answer["results"][0]
    assert first["revision"] == experts["travel"].commit
    assert first["base_model"] == "base/one"
    assert first["confidence"] in {"high", "medium"}
    assert first["matched_example_index"] == 0
    assert "matched_example" not in first
    parts = first["parts"]
    dense = 0.6 * parts["s_ex"] + 0.2 * parts["s_desc"] + 0.2 * parts["s_cen"]
    assert first["score"] == pytest.approx(0.5 * dense + 0.5 * parts["bm25"] / (parts["bm25"] + 60), abs=1e-5)
    query, example = encoder.encode(["reserve a plane ticket to Rome", "book a flight to Rome"])
    assert parts["s_ex"] == pytest.approx(float(query @ example), abs=1e-4)
    description = encoder.encode(["travel. Books trips."])[0]
    assert parts["s_desc"] == pytest.approx(float(query @ description), abs=1e-4)
    assert {key: answer[key] for key in ("abstained", "strategy", "degraded", "index_seq", "embedding_model")} == {
        "abstained": False,
        "strategy": "hybrid",
        "degraded": False,
        "index_seq": 4,
        "embedding_model": encoder.id,
    }


def test_uploaded_cards_are_ranked_as_the_benchmark_ranks_them(router, encoder):
    records = [
        {"name": "bank help", "description": "Questions on money.", "examples": ["my card was declined", "what is my balance?"]},
        {"name": "yes-no_answers", "description": "Say yes or no.", "examples": ["Premise: it rains. Hypothesis: it is dry. Yes or no?"]},
        {"name": "nli choices", "description": "Choose.", "examples": ["Premise: he sleeps. Choices: (a) yes (b) no"], "categories": ["nli"]},
        {"name": "travel", "description": "", "examples": ["book a flight to Rome", "find me a hotel", "is my train late?"]},
        {"name": "only words", "description": "Answers questions about trains: yes or no.", "examples": []},
        {"name": "kitchen", "description": "Helps to cook.", "examples": ["how long do I boil an egg?"], "domains": ["food"]},
    ]  # fmt: skip
    made = [benchmark.card_of({"id": f"ann/{row['name'].replace(' ', '-')}", **row}) for row in records]
    state = State(encoder_id=encoder.id, dimension=384).changed(seq=1, put=benchmark.entries(made, encoder.encode))
    for card in made:
        published(card.expert, card.description, *card.examples, tags=card.tags)
    router.refresh()
    queries = [
        "Premise: a dog runs. Hypothesis: it moves. Yes or no?",
        "is my train to Oslo late?",
        "boil rice",
        "balance?",
    ]
    for strategy in catalogue():
        for text, vector in zip(queries, encoder.encode(queries), strict=True):
            query = Query(text=text, vector=None if strategy == "bm25" else vector)
            wanted = state.rank(query, strategy=strategy, limit=10).hits
            met = routing.route(viewer=None, text=text, base_model="base/one", strategy=strategy, min_score=0)[
                "results"
            ]
            assert [hit["expert"] for hit in met] == [hit.expert for hit in wanted]
            assert [hit["score"] for hit in met] == pytest.approx([hit.score for hit in wanted], abs=1e-4)
            assert [hit["confidence"] for hit in met] == [hit.confidence for hit in wanted]


def test_explain_tells_the_matched_example(experts):
    answer = routing.route(viewer=None, text="hotel rooms in Oslo", base_model="base/one", min_score=0, explain=True)
    assert answer["results"][0]["matched_example"] == "find me a hotel in Oslo"
    assert answer["results"][0]["matched_example_index"] == 1


def test_several_texts_get_their_answers_in_order(experts):
    texts = ["boil eggs", "declined card", "fly to Rome"]
    answer = routing.route(viewer=None, texts=texts, base_model="base/one", top_k=1, min_score=0)
    assert [names(one) for one in answer["answers"]] == [["ann/kitchen"], ["bob/bank"], ["ann/travel"]]
    assert answer["index_seq"] == 4


def test_a_base_model_is_found_by_its_alias_and_never_mixed_with_another(experts, router):
    base_model("base/three", "short-three")
    published("ann/third", "Books trips.", base="base/three")
    router.refresh()
    text = "book a flight to Rome"
    assert names(routing.route(viewer=None, text=text, base_model="Short-Three", min_score=0)) == ["ann/third"]
    assert names(routing.route(viewer=None, text=text, base_model="base/two", min_score=0)) == ["bob/travel-other"]
    assert len(names(routing.route(viewer=None, text=text, min_score=0))) == 5
    # The threshold among the one expert of this base, not among the three of the first.
    assert routing.route(viewer=None, text=text, base_model="base/two")["min_score"] == 0.118


def test_an_unknown_base_model_is_refused(experts):
    with pytest.raises(BaseUnknown) as caught:
        routing.route(viewer=None, text="x", base_model="base/none")
    assert caught.value.faults[0].pointer == "/base_model"


def test_a_private_expert_is_returned_to_its_own_people_alone(experts, router):
    published("carl/secret", "Books trips.", "book a flight to Rome", private=True)
    router.refresh()
    ask = {"text": "book a flight to Rome", "base_model": "base/one", "min_score": 0}
    carl = Expert.objects.get(name="secret").namespace.members.get()
    assert "carl/secret" in names(routing.route(viewer=carl, **ask))
    assert "carl/secret" in names(routing.route(viewer=person("root", staff=True), **ask))
    for viewer in (None, person("dora")):
        answer = routing.route(viewer=viewer, **ask)
        assert len(names(answer)) == 3
        assert "carl/secret" not in str(answer)


@pytest.mark.parametrize("how", ["private", "deleted", "yanked", "failed", "processing", "incomplete"])
def test_what_is_hidden_is_gone_at_once_though_the_router_still_knows_it(experts, how):
    row = experts["travel"].expert
    ask = {"text": "book a flight to Rome", "base_model": "base/one", "min_score": 0}
    assert "ann/travel" in names(routing.route(viewer=None, **ask))
    if how == "private":
        Expert.objects.filter(pk=row.pk).update(visibility=Expert.Visibility.PRIVATE)
    elif how in {"deleted", "yanked"}:
        Expert.objects.filter(pk=row.pk).update(**{f"{how}_at": "2026-01-01T00:00:00Z"})
    else:
        Revision.objects.filter(expert=row).update(state=how)
    assert sorted(names(routing.route(viewer=None, **ask))) == ["ann/kitchen", "bob/bank"]


def test_hidden_experts_do_not_crowd_out_the_visible_ones(router):
    for number in range(26):
        published(f"carl/p{number:02d}", "book a flight", private=True)
    published("ann/public", "cook an egg")
    router.refresh()
    answer = routing.route(viewer=None, text="book a flight", top_k=1, min_score=0)
    assert names(answer) == ["ann/public"]


def test_filters_leave_only_what_passes_them(experts):
    def filtered(**filters):
        return sorted(names(routing.route(viewer=None, text="anything at all", filters=filters, min_score=0)))

    assert filtered(owner="Bob") == ["bob/bank", "bob/travel-other"]
    assert filtered(tags=["b"]) == ["ann/travel", "bob/bank"]
    assert filtered(tags=["b", "a"]) == ["ann/travel"]
    assert filtered(licence="MIT") == ["bob/bank"]
    assert filtered(owner="ann", licence="mit") == []
    base = routing.route(viewer=None, text="trip", base_model="base/two", filters={"owner": "ann"}, min_score=0)
    assert base["abstained"] is True


def test_a_filter_by_name_leaves_the_experts_named_that_the_caller_may_see(experts, router):
    published("carl/secret", "Books trips.", "book a flight to Rome", private=True)
    router.refresh()

    def named(*wanted, viewer=None, **options):
        filters = {"experts": list(wanted), **options}
        return sorted(names(routing.route(viewer=viewer, text="book a flight", filters=filters, min_score=0)))

    assert named("ann/travel", "Bob/Bank") == ["ann/travel", "bob/bank"]
    assert named("ann/travel", "bob/travel-other", owner="bob") == ["bob/travel-other"]
    assert named("carl/secret", "carl/never", "ann/kitchen") == ["ann/kitchen"]
    carl = Expert.objects.get(name="secret").namespace.members.get()
    assert named("carl/secret", viewer=carl) == ["carl/secret"]
    assert named() == []
    assert len(named(*[f"nobody/n{number}" for number in range(63)], "ann/travel")) == 1


@pytest.mark.parametrize("strategy", ["hybrid", "dense", "centroid", "glider", "two_stage", "skills", "bm25"])
def test_every_strategy_answers_by_name(experts, strategy):
    text = "book a cheap flight to Rome"
    answer = routing.route(viewer=None, text=text, base_model="base/one", strategy=strategy, min_score=0)
    assert (names(answer)[0], answer["strategy"], answer["degraded"]) == ("ann/travel", strategy, False)


def test_glider_compares_the_written_instruction(experts, router, encoder):
    instruction = "Translate the sentence into French."
    row = experts["kitchen"].expert
    Expert.objects.filter(pk=row.pk).update(instruction=instruction)
    row.refresh_from_db()
    routing.embed(experts["kitchen"])
    routing.publish_to_index(experts["kitchen"])
    router.refresh()
    ask = {"viewer": None, "text": "say it in French", "base_model": "base/one", "min_score": 0}
    first = routing.route(**ask, strategy="glider")["results"][0]
    query, written = encoder.encode([ask["text"], instruction])
    assert first["expert"] == "ann/kitchen"
    assert first["score"] == pytest.approx(float(query @ written), abs=1e-3)
    before = routing.route(**ask)["results"]
    assert next(hit for hit in before if hit["expert"] == "ann/kitchen")["parts"]["bm25"] == 0.0


def test_a_vector_made_by_the_caller_is_compared_by_meaning_alone(experts, encoder):
    text = "reserve a plane ticket to Rome"
    vector = encoder.encode([text])[0].tolist()
    ask = {"viewer": None, "base_model": "base/one", "min_score": 0, "explain": True}
    by_vector = routing.route_vector(**ask, vector=vector, embedding_model=encoder.id, top_k=2)
    by_text = routing.route(**ask, text=text, strategy="dense", top_k=2)
    assert (by_vector["strategy"], by_vector["degraded"], by_vector["embedding_model"]) == ("dense", False, encoder.id)
    assert [(hit["expert"], hit["score"], hit["matched_example"]) for hit in by_vector["results"]] == [
        (hit["expert"], pytest.approx(hit["score"], abs=1e-5), hit["matched_example"]) for hit in by_text["results"]
    ]
    only = routing.route_vector(
        **ask, vector=vector, embedding_model=encoder.id, filters={"experts": ["bob/bank"], "owner": "bob"}
    )
    assert names(only) == ["bob/bank"]
    assert routing.route_vector(**{**ask, "min_score": 0.99}, vector=vector, embedding_model=encoder.id)["abstained"]


def test_a_vector_never_shows_a_hidden_expert(experts, encoder):
    vector = encoder.encode(["book a flight to Rome"])[0].tolist()
    ask = {"viewer": None, "vector": vector, "embedding_model": encoder.id, "min_score": 0}
    assert "ann/travel" in names(routing.route_vector(**ask))
    Expert.objects.filter(name="travel").update(visibility=Expert.Visibility.PRIVATE)
    assert "ann/travel" not in str(routing.route_vector(**ask))


def unit_vector(count=384, length=1.0):
    return [length / count**0.5] * count


WRONG_VECTORS = {
    "too short": ({"vector": unit_vector(383)}, "/vector", "383 values", "384 values"),
    "too long": ({"vector": unit_vector(385)}, "/vector", "385 values", "384 values"),
    "empty": ({"vector": []}, "/vector", "0 values", "384 values"),
    "not of length 1": ({"vector": unit_vector(length=1.0011)}, "/vector", "length 1.0011", "length 1 +- 0.001"),
    "zero": ({"vector": [0.0] * 384}, "/vector", "length 0", "length 1 +- 0.001"),
    "NaN": ({"vector": [*unit_vector()[:-1], float("nan")]}, "/vector/383", "nan", "a finite number"),
    "infinite": ({"vector": [float("-inf"), *unit_vector()[1:]]}, "/vector/0", "-inf", "a finite number"),
    "of another encoder": ({"embedding_model": "other@1"}, "/embedding_model", "other@1", None),
}


@pytest.mark.parametrize("name", WRONG_VECTORS)
def test_a_vector_that_the_encoder_cannot_have_made_is_refused(experts, encoder, name):
    fields, pointer, met, wanted = WRONG_VECTORS[name]
    ask = {"vector": unit_vector(), "embedding_model": encoder.id, **fields}
    with pytest.raises(QueryInvalid) as caught:
        routing.route_vector(viewer=None, **ask)
    fault = caught.value.faults[0]
    assert (fault.pointer, fault.met, fault.wanted) == (pointer, met, wanted or encoder.id)
    assert fault.remedy


@pytest.mark.parametrize("length", [0.9991, 1.0009])
def test_a_vector_of_nearly_length_one_is_taken(experts, encoder, length):
    answer = routing.route_vector(
        viewer=None, vector=unit_vector(length=length), embedding_model=encoder.id, min_score=0
    )
    assert len(names(answer)) == 4


def test_the_doors_take_vectors_and_names_and_refuse_what_is_none(experts, encoder, client):
    def post(path, **body):
        answer = client.post("/api/v1/route" + path, body, content_type="application/json")
        return answer.status_code, answer.json()

    vector = encoder.encode(["book a flight to Rome"])[0].tolist()
    status, answer = post("/vector", vector=vector, embedding_model=encoder.id, base_model="base/one")
    assert (status, answer["results"][0]["expert"]) == (200, "ann/travel")
    for path, body, pointer in (
        ("/vector", {"vector": vector[1:], "embedding_model": encoder.id}, "/vector"),
        ("/vector", {"vector": vector}, "/embedding_model"),
        ("/vector", {"vector": ["x"] * 384, "embedding_model": encoder.id}, "/vector/0"),
        ("/vector", {"vector": vector, "embedding_model": encoder.id, "text": "x"}, "/text"),
        ("", {"text": "x", "strategy": "oracle"}, "/strategy"),
        ("", {"text": "x", "filters": {"experts": ["ann/travel"] * 65}}, "/filters/experts"),
        ("", {"text": "x", "filters": {"experts": ["travel"]}}, "/filters/experts/0"),
    ):
        status, answer = post(path, **body)
        assert (status, answer["errors"][0]["pointer"]) == (422, pointer)
    assert "hybrid" in str(post("", text="x", strategy="oracle")[1]["errors"][0]["wanted"])


def test_an_answer_below_the_threshold_is_empty_and_says_so(experts):
    ask = {"viewer": None, "text": "book a flight to Rome", "base_model": "base/one"}
    best = routing.route(**ask)["results"][0]["score"]
    above = routing.route(**ask, min_score=best + 0.01)
    assert (above["results"], above["abstained"], above["min_score"]) == ([], True, best + 0.01)
    assert (above["best_score"], above["default_min_score"]) == (best, 0.132)
    at = routing.route(**ask, min_score=best)
    assert (len(at["results"]), at["abstained"]) == (3, False)
    off_topic = routing.route(**{**ask, "text": "zxqv wvut"})
    assert (off_topic["results"], off_topic["abstained"], off_topic["min_score"]) == ([], True, 0.132)


def test_top_k_limits_the_results(experts):
    assert len(names(routing.route(viewer=None, text="book a flight", top_k=2, min_score=0))) == 2


def test_without_an_encoder_words_alone_answer_and_the_answer_says_so(experts, settings):
    bare = still_loading()
    bare.refresh()
    with serving(bare) as url:
        settings.HUB_ROUTER_URL = url
        answer = routing.route(viewer=None, text="flight Rome", base_model="base/one")
    assert names(answer) == ["ann/travel"]
    assert answer["results"][0]["parts"].keys() == {"bm25"}
    assert (answer["degraded"], answer["strategy"], answer["embedding_model"]) == (True, "bm25", None)


def test_asking_for_words_alone_is_not_degraded(experts):
    answer = routing.route(viewer=None, text="flight Rome", base_model="base/one", strategy="bm25")
    assert (answer["degraded"], answer["strategy"]) == (False, "bm25")


WRONG = {
    "empty": ({"text": ""}, QueryInvalid, "/text"),
    "blank": ({"text": " \n"}, QueryInvalid, "/text"),
    "too long": ({"text": "x" * 20_001}, TooLarge, "/text"),
    "one of several is blank": ({"texts": ["x", "\t"]}, QueryInvalid, "/texts/1"),
    "one of several is too long": ({"texts": ["x", "y" * 20_001]}, TooLarge, "/texts/1"),
    "33 texts": ({"texts": ["x"] * 33}, QueryInvalid, "/texts"),
    "no texts": ({"texts": []}, QueryInvalid, "/texts"),
    "neither": ({}, QueryInvalid, "/text"),
    "both": ({"text": "x", "texts": ["x"]}, QueryInvalid, "/text"),
    "no results": ({"text": "x", "top_k": 0}, QueryInvalid, "/top_k"),
    "51 results": ({"text": "x", "top_k": 51}, QueryInvalid, "/top_k"),
    "unknown strategy": ({"text": "x", "strategy": "oracle"}, QueryInvalid, "/strategy"),
    "path as base": ({"text": "x", "base_model": "/tmp/base"}, BaseUnknown, "/base_model"),
    "empty base": ({"text": "x", "base_model": ""}, BaseUnknown, "/base_model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_query_that_breaks_a_rule_is_refused_with_its_field(router, name):
    router.refresh()
    ask, error, pointer = WRONG[name]
    with pytest.raises(error) as caught:
        routing.route(viewer=None, **ask)
    fault = caught.value.faults[0]
    assert fault.pointer == pointer
    assert fault.wanted
    assert fault.remedy


def test_the_longest_text_and_the_most_texts_are_answered(experts):
    answer = routing.route(
        viewer=None, texts=["flight " * 2857 + "x"] * 32, base_model="base/one", min_score=0, top_k=50
    )
    assert len(answer["answers"]) == 32
    assert all(names(one)[0] == "ann/travel" for one in answer["answers"])


@pytest.mark.parametrize("text", ["book \ud83d a flight", "book\0a flight", "book a flight ✈️ nach Zürich 机票"])
def test_texts_with_odd_characters_are_answered_like_any_other(experts, text):
    assert names(routing.route(viewer=None, text=text, base_model="base/one", min_score=0))[0] == "ann/travel"


def test_no_experts_at_all_give_an_empty_answer(router):
    router.refresh()
    answer = routing.route(viewer=None, text="hello")
    assert (answer["results"], answer["abstained"], answer["index_seq"]) == ([], True, 0)


def test_a_router_that_has_read_nothing_yet_is_not_ready(router, monkeypatch):
    monkeypatch.setattr("registry.services.router.WAIT_SECONDS", 0.05)
    with pytest.raises(IndexNotReady) as caught:
        routing.route(viewer=None, text="hello")
    assert caught.value.retry_after_seconds


def test_a_router_that_is_away_is_unavailable_and_found_again_when_it_is_back(experts, router, settings):
    ask = {"viewer": None, "text": "book a flight", "base_model": "base/one", "min_score": 0}
    assert routing.route(**ask)["results"]
    with serving(router) as url:
        settings.HUB_ROUTER_URL = url
        assert routing.route(**ask)["results"]
    with pytest.raises(IndexNotReady) as caught:
        routing.route(**ask)
    assert caught.value.status == 503
    assert caught.value.retry_after_seconds == 2
    with pytest.raises(IndexNotReady):
        routing.router_health()
    with serving(router, port=int(url.rpartition(":")[2])):
        assert routing.route(**ask)["results"]


def test_the_router_answers_nobody_without_the_secret(experts, settings):
    import httpx

    for headers in ({}, {"X-Router-Secret": "wrong"}):
        for path in ("/route", "/encode", "/nothing"):
            refused = httpx.post(settings.HUB_ROUTER_URL + path, json={"texts": ["x"]}, headers=headers)
            assert refused.status_code == 403
            assert set(refused.json()) == {"detail"}


def test_the_router_refuses_what_is_not_a_request_of_its_doors(experts, settings, router, encoder):
    import httpx

    headers = {"X-Router-Secret": settings.HUB_ROUTER_SECRET}
    url = settings.HUB_ROUTER_URL
    assert httpx.post(url + "/route", content=b"{", headers=headers).status_code == 400
    assert httpx.post(url + "/route", json={"unknown": 1}, headers=headers).status_code == 400
    assert httpx.get(url + "/route", headers=headers).status_code == 404
    blank = httpx.post(url + "/encode", json={"texts": [""], "encoder": encoder.id}, headers=headers)
    assert (blank.status_code, blank.json()["pointer"]) == (422, "/texts/0")
    with serving(still_loading()) as other:
        busy = httpx.post(other + "/encode", json={"texts": ["x"], "encoder": encoder.id}, headers=headers)
    assert (busy.status_code, busy.headers["Retry-After"]) == (503, "2")


def test_health_tells_what_is_ready(experts, encoder, settings):
    met = routing.router_health()
    assert met == {
        "encoder": "ready",
        "embedding_model": encoder.id,
        "index": "ready",
        "index_seq": 4,
        "experts": 4,
        "snapshot_seq": None,
    }
    with serving(still_loading()) as url:
        settings.HUB_ROUTER_URL = url
        assert (routing.router_health()["encoder"], routing.router_health()["index"]) == ("loading", "loading")


def test_an_encoder_that_cannot_load_is_told_and_words_go_on(experts, settings):
    def broken(_):
        raise OSError("no such weights")

    lame = Router(load=broken)
    lame.refresh()
    lame.line(encoders.packaged()).loader.join()
    with serving(lame) as url:
        settings.HUB_ROUTER_URL = url
        health = routing.router_health()
        assert (health["encoder"], health["trouble"]) == ("failed", "no such weights")
        assert routing.route(viewer=None, text="flight Rome")["degraded"] is True


def test_an_expert_that_is_not_published_is_not_routable(experts, router):
    routing.embed(expert("ann/later", "book a flight to Rome"))
    router.refresh()
    answer = routing.route(viewer=None, text="book a flight to Rome", base_model="base/one", min_score=0)
    assert "ann/later" not in names(answer)


def test_too_many_texts_are_refused_at_once_through_both_doors_and_the_others_answered(
    router, encoder, client, settings
):
    """The encoder is held, so at least one of two texts waits, and no more may."""
    router.refresh()
    settings.HUB_ROUTER_TIMEOUT_SECONDS = 120
    router._queue._max_waiting_texts = router._queue._queries.texts_at_once = 1
    body = {"texts": ["never asked before", "nor this one"], "limit": 3}
    with ThreadPoolExecutor(1) as pool:
        with encoder._model_lock:
            caller = pool.submit(router_link.route, body)
            while not router._queue._queries.count():
                assert not caller.done()
                time.sleep(0.001)
            answer = client.post("/api/v1/route", {"text": "one too many"}, content_type="application/json")
        assert caller.result()["embedding_model"] == encoder.id
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["code"] == "router-busy"
