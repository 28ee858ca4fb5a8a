"""The REST API: what each door lets whom do, and how it refuses."""

import json
from datetime import timedelta

import pytest
from django.urls import URLPattern, get_resolver
from django.utils import timezone

from registry.models import ApiKey, Expert, Job, Merge, Revision
from registry.services import experts
from tests import factories, tiny
from tests.integration import hf
from tests.integration.merges import merge_of

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def rob():
    return hf.person("rob", ["read", "write", "merge"])


def faults(answer) -> list[tuple]:
    return [(fault["pointer"], fault["met"]) for fault in answer.json()["errors"]]


def assert_problem(answer, status: int, code: str) -> dict:
    body = answer.json()
    assert (answer.status_code, answer["Content-Type"], body["code"]) == (status, "application/problem+json", code), (
        body
    )
    assert {"type", "title", "status", "detail", "code", "request_id", "errors"} <= set(body)
    assert body["request_id"] == answer["X-Request-Id"]
    return body


def test_an_expert_tells_its_state_files_and_jobs(ann) -> None:
    made = factories.revision(ann[0], factories.expert(ann[0], "tea"))
    record = hf.Caller().get("/api/v1/experts/ann/tea").json()
    assert (record["expert"], record["state"], record["revision"]) == ("ann/tea", "processing", made.commit)
    assert record["base_model"] == tiny.BASE
    assert {row["path"]: row["size"] for row in record["files"]}["adapter_config.json"] == len(tiny.config())
    assert [job["kind"] for job in record["jobs"]] == ["check", "compress", "embed", "index"]
    assert {"id", "kind", "state", "progress", "error"} <= set(record["jobs"][0])
    assert record["compressed"] is None
    assert record["created_at"].endswith("Z")


def test_a_list_holds_what_the_caller_may_see_in_pages(ann, rob) -> None:
    for name in ("a", "b", "c"):
        factories.expert(ann[0], name, private=name == "b")
    seen = rob[1].get("/api/v1/experts?owner=ann&sort=name").json()
    assert [row["expert"] for row in seen["items"]] == ["ann/a", "ann/c"]
    first = ann[1].get("/api/v1/experts?owner=ann&sort=name&limit=2").json()
    assert [row["expert"] for row in first["items"]] == ["ann/a", "ann/b"]
    second = ann[1].get(first["next"].removeprefix("http://testserver")).json()
    assert ([row["expert"] for row in second["items"]], second["next"]) == (["ann/c"], None)


def test_search_finds_words_of_the_description_tags_and_names(ann) -> None:
    made = factories.revision(ann[0], factories.expert(ann[0], "leafy")).expert
    other = factories.expert(ann[0], "else")
    for query in (
        "search=kinds of tea",
        "search=leaf",
        "tag=tea",
        f"base_model={tiny.BASE}",
        "kind=lora",
        "licence=apache-2.0",
    ):
        found = [row["expert"] for row in hf.Caller().get(f"/api/v1/experts?{query}").json()["items"]]
        assert found == [made.full_name], query
    experts.yank(user=ann[0], expert=other, yanked=True, reason="")
    assert hf.Caller().get("/api/v1/experts?search=else").json()["items"] == []


@pytest.mark.parametrize("query", ["sort=best", "limit=0", "limit=x", "limit=201", "cursor=-1"])
def test_a_wrong_query_parameter_is_named(query: str) -> None:
    body = assert_problem(hf.Caller().get(f"/api/v1/experts?{query}"), 422, "request-invalid")
    assert body["errors"][0]["pointer"] == f"?{query.partition('=')[0]}"


def test_only_who_may_write_changes_or_deletes_an_expert(ann, rob) -> None:
    factories.expert(ann[0], "tea")
    path = "/api/v1/experts/ann/tea"
    assert_problem(rob[1].json("PATCH", path, {"visibility": "private"}), 403, "not-allowed")
    assert_problem(rob[1].send("DELETE", path), 403, "not-allowed")
    assert_problem(hf.Caller().json("PATCH", path, {"visibility": "private"}), 401, "unauthenticated")
    reader = hf.Caller(factories.key(ann[0], "read"))
    assert_problem(reader.json("PATCH", path, {"visibility": "private"}), 403, "scope-missing")
    assert Expert.objects.get().visibility == "public"
    assert ann[1].json("PATCH", path, {"visibility": "private"}).json()["visibility"] == "private"
    assert_problem(rob[1].get(path), 404, "expert-not-found")
    assert ann[1].send("DELETE", path).status_code == 204
    assert_problem(ann[1].get(path), 404, "expert-not-found")


def test_a_key_without_scope_read_sees_only_what_everybody_sees(ann) -> None:
    factories.expert(ann[0], "secret", private=True)
    writer = hf.Caller(factories.key(ann[0], "write"))
    assert_problem(writer.get("/api/v1/experts/ann/secret"), 404, "expert-not-found")
    assert ann[1].get("/api/v1/experts/ann/secret").status_code == 200


def test_a_misspelt_field_is_refused_by_name(ann) -> None:
    answer = ann[1].json("POST", "/api/v1/experts", {"expert": "ann/tea", "privat": True})
    assert faults(answer) == [("/privat", None)]
    assert Expert.objects.count() == 0


@pytest.mark.parametrize("path", ["/api/v1/experts", "/api/v1/merges", "/api/v1/route/merge"])
@pytest.mark.parametrize(
    "body", [b"{", b'{"a": NaN}', b"\xff", b'{"a":' * 5000, b"[" * 20000 + b"]" * 20000], ids=range(5)
)
def test_a_body_that_is_no_json_is_malformed(path: str, body: bytes, ann) -> None:
    answer = ann[1].send("POST", path, data=body, kind="application/json")
    (fault,) = assert_problem(answer, 400, "request-malformed")["errors"]
    assert fault["pointer"] == ""
    assert fault["met"]
    assert fault["wanted"]
    assert fault["remedy"]


def test_a_body_above_its_limit_is_too_large(ann, settings) -> None:
    body = b'{"method": "' + b"x" * settings.HUB_JSON_MAX_BYTES + b'"}'
    assert_problem(ann[1].send("POST", "/api/v1/merges", data=body, kind="application/json"), 413, "too-large")


def test_hidden_and_absent_are_answered_with_the_same_bytes(ann, rob) -> None:
    made = factories.revision(ann[0], factories.expert(ann[0], "secret", private=True))
    job = made.jobs.first()
    merge = merge_of([made.expert])
    file = made.files.get(path="adapter_config.json")
    pairs = [
        ("/api/v1/experts/ann/secret", "/api/v1/experts/ann/nothin"),
        ("/api/v1/experts/ann/secret/revisions", "/api/v1/experts/ann/nothin/revisions"),
        ("/api/v1/experts/ann/secret/revisions/main", "/api/v1/experts/ann/nothin/revisions/main"),
        ("/api/v1/experts/ann/secret/compressed", "/api/v1/experts/ann/nothin/compressed"),
        (f"/api/v1/jobs/{job.pk}", f"/api/v1/jobs/{'0' * 32}"),
        (f"/api/v1/merges/{merge.pk}", f"/api/v1/merges/{'0' * 16}"),
        (f"/api/v1/by-hash/{file.blob_id}", f"/api/v1/by-hash/{'0' * 64}"),
        ("/api/models/ann/secret", "/api/models/ann/nothin"),
        ("/ann/secret/resolve/main/adapter_config.json", "/ann/nothin/resolve/main/adapter_config.json"),
    ]
    for caller in (hf.Caller(), rob[1]):
        for hidden, absent in pairs:
            one, other = caller.get(hidden), caller.get(absent)
            assert one.status_code == other.status_code == 404, hidden
            bodies = []
            for answer, name in ((one, hidden), (other, absent)):
                text = json.dumps({**answer.json(), "request_id": ""})
                for word in name.split("/"):
                    if len(word) > 5 and word not in {"experts", "models", "merges", "revisions", "by-hash"}:
                        text = text.replace(word, "?")
                bodies.append(text)
            assert bodies[0] == bodies[1]
    assert ann[1].get(pairs[0][0]).status_code == 200


def test_what_is_private_shows_in_no_list_of_a_stranger(ann, rob) -> None:
    made = factories.ready(factories.revision(ann[0], factories.expert(ann[0], "secret", private=True)))
    merge_of([made.expert])
    lists = [
        "/api/v1/experts",
        "/api/v1/merges",
        "/api/models",
        "/api/models?search=secret",
        "/search?search=secret",
        "/",
        "/ann",
    ]
    for caller in (hf.Caller(), rob[1]):
        for path in lists:
            assert b"ann/secret" not in caller.get(path).content, path
    assert b"ann/secret" in ann[1].get("/api/v1/experts").content


def test_jobs_are_told_to_whom_the_expert_is_visible_and_commanded_by_its_writers(ann, rob) -> None:
    made = factories.revision(ann[0], factories.expert(ann[0], "tea"))
    job = made.jobs.get(kind="check")
    assert hf.Caller().get(f"/api/v1/jobs/{job.pk}").json()["state"] == "queued"
    assert_problem(rob[1].send("POST", f"/api/v1/jobs/{job.pk}/cancel"), 403, "not-allowed")
    assert_problem(hf.Caller().send("POST", f"/api/v1/jobs/{job.pk}/cancel"), 401, "unauthenticated")
    assert ann[1].send("POST", f"/api/v1/jobs/{job.pk}/cancel").json()["state"] == "cancelled"
    assert set(made.jobs.values_list("state", flat=True)) == {"cancelled"}
    assert_problem(rob[1].send("POST", f"/api/v1/jobs/{job.pk}/retry"), 403, "not-allowed")
    assert ann[1].send("POST", f"/api/v1/jobs/{job.pk}/retry").json()["state"] == "queued"
    assert set(made.jobs.values_list("state", flat=True)) == {"queued"}
    assert Revision.objects.get().state == "processing"


def test_a_key_makes_weaker_keys_and_is_stored_as_a_digest(ann) -> None:
    made = ann[1].json("POST", "/api/v1/keys", {"name": "ci", "scopes": ["read"]})
    secret = made.json()["key"]
    assert made.status_code == 201
    assert not ApiKey.objects.filter(digest__contains=secret[4:20]).exists()
    assert ApiKey.objects.get(name="ci").digest == tiny.sha256(secret.encode())
    weak = hf.Caller(secret)
    assert_problem(weak.json("POST", "/api/v1/keys", {"name": "x", "scopes": ["write"]}), 403, "scope-missing")
    assert_problem(ann[1].json("POST", "/api/v1/keys", {"name": "x", "scopes": ["admin"]}), 403, "scope-missing")
    listed = weak.get("/api/v1/keys").json()["items"]
    assert secret not in json.dumps(listed)
    assert ann[1].send("DELETE", f"/api/v1/keys/{made.json()['id']}").status_code == 204
    assert_problem(weak.get("/api/v1/keys"), 401, "unauthenticated")


def test_a_key_ends_with_its_time_and_with_its_user(ann) -> None:
    past, future = timezone.now() - timedelta(seconds=1), timezone.now() + timedelta(hours=1)
    key = ApiKey.objects.get(user=ann[0])
    for ends, status in ((past, 401), (future, 200), (None, 200)):
        ApiKey.objects.filter(pk=key.pk).update(expires_at=ends)
        assert ann[1].get("/api/v1/keys").status_code == status
    ann[0].is_active = False
    ann[0].save()
    assert_problem(ann[1].get("/api/v1/experts"), 401, "unauthenticated")


def test_a_key_of_somebody_else_cannot_be_revoked(ann, rob) -> None:
    key = ApiKey.objects.get(user=ann[0])
    assert_problem(rob[1].send("DELETE", f"/api/v1/keys/{key.pk}"), 404, "not-found")
    assert ann[1].get("/api/v1/keys").status_code == 200


@pytest.mark.parametrize("key", ["moe_wrong", "", "x" * 500])
def test_a_wrong_key_is_refused_even_where_none_is_needed(key: str) -> None:
    answer = hf.Caller().send("GET", "/api/v1/experts", Authorization=f"Bearer {key}")
    assert_problem(answer, 401, "unauthenticated")
    assert answer["WWW-Authenticate"].startswith("Bearer")


def test_a_session_needs_the_csrf_token_to_write(ann, client) -> None:
    from django.test import Client

    browser = Client(enforce_csrf_checks=True)
    browser.force_login(ann[0])
    body = json.dumps({"expert": "ann/tea"})
    assert browser.post("/api/v1/experts", body, content_type="application/json").status_code == 403
    assert Expert.objects.count() == 0


def test_by_hash_names_files_that_the_caller_may_read(ann) -> None:
    made = factories.revision(ann[0], factories.expert(ann[0], "tea"))
    digest = tiny.sha256(tiny.config())
    record = hf.Caller().get(f"/api/v1/by-hash/{digest}").json()
    assert record["found_in"] == [{"repo": "ann/tea", "revision": made.commit, "path": "adapter_config.json"}]
    assert record["size"] == len(tiny.config())


def test_the_methods_are_told_with_their_parameters() -> None:
    from django.core.management import call_command

    call_command("sync_catalogue", verbosity=0)
    items = hf.Caller().get("/api/v1/methods").json()["items"]
    found = {row["name"]: row["spec"] for row in items if row["family"] == "merge"}
    assert {"linear", "task_arithmetic", "ties", "dare", "cat", "svd"} <= set(found)
    density = next(item for item in found["ties"]["parameters"] if item["name"] == "density")
    assert (density["default"], density["minimum"], density["maximum"]) == (0.2, 0, 1)
    assert {"codec", "strategy"} <= {row["family"] for row in items}


def test_too_many_requests_of_one_caller_are_told_when_to_come_back(ann, settings) -> None:
    from django.core.cache import cache

    cache.clear()
    settings.HUB_RATE_LIMITS = True
    settings.HUB_RATE_ANONYMOUS_PER_MINUTE = 3
    answers = [hf.Caller().get("/api/v1/methods") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert_problem(answers[3], 429, "rate-exceeded")
    assert 1 <= int(answers[3]["Retry-After"]) <= 61
    assert ann[1].get("/api/v1/methods").status_code == 200
    cache.clear()


def test_an_unknown_address_is_a_problem_for_machines_and_a_page_for_people(client) -> None:
    client.raise_request_exception = False
    assert_problem(client.get("/api/v1/nothing"), 404, "not-found")
    page = client.get("/a/b/c/d")
    assert (page.status_code, page["Content-Type"]) == (404, "text/html; charset=utf-8")


def test_every_operation_of_the_openapi_file_documents_its_refusals() -> None:
    schema = hf.Caller().get("/api/v1/openapi.json").json()
    operations = [
        (path, method, operation) for path, methods in schema["paths"].items() for method, operation in methods.items()
    ]
    served = {
        str(pattern.pattern) for pattern in get_resolver("api.v1.urls").url_patterns if isinstance(pattern, URLPattern)
    }
    assert len({path for path, _, _ in operations}) == len(served) - 1  # the file itself
    for path, method, operation in operations:
        statuses = set(operation["responses"])
        assert {"401", "429", "503"} <= statuses, (method, path)
        for status, response in operation["responses"].items():
            if status >= "400":
                assert "application/problem+json" in response["content"], (method, path, status)


def test_answers_say_no_more_than_the_schema_names(ann) -> None:
    """Mass assignment and leaks: no password, mail or digest of a key appears anywhere."""
    factories.revision(ann[0], factories.expert(ann[0], "tea"))
    ann[0].email = "ann@example.org"
    ann[0].save()
    for path in ("/api/v1/experts", "/api/v1/experts/ann/tea", "/api/v1/keys", "/api/models/ann/tea", "/ann/tea"):
        text = ann[1].get(path).content.decode()
        assert "ann@example.org" not in text
        assert "pbkdf2" not in text
        assert ApiKey.objects.first().digest not in text


def test_routing_questions_that_break_a_rule_are_refused_before_the_router_is_asked() -> None:
    caller = hf.Caller()
    for body, pointer in (
        ({"text": "x", "top_k": 51}, "/top_k"),
        ({"text": "x", "topk": 5}, "/topk"),
        ({"text": "x", "min_score": 2}, "/min_score"),
        ({"texts": ["x"] * 33}, "/texts"),
    ):
        answer = caller.json("POST", "/api/v1/route", body)
        assert_problem(answer, 422, "request-invalid")
        assert answer.json()["errors"][0]["pointer"] == pointer
    assert Job.objects.count() == 0


NUL_PATHS = (
    "/a%00b/c", "/a%00b", "/merges/a%00", "/docs/a%00", "/?q=a&base_model=%00", "/search?search=%00",
    "/api/v1/experts/a%00/b", "/api/v1/experts?owner=a%00", "/api/v1/jobs/a%00", "/api/v1/merges/a%00",
    "/api/v1/by-hash/a%00", "/api/v1/methods?family=%00", "/api/v1/experts/a/b/compressed?revision=%00",
)  # fmt: skip


@pytest.mark.parametrize("path", NUL_PATHS)
def test_an_address_with_a_nul_character_is_refused_and_not_looked_up(path: str, client) -> None:
    answer = client.get(path)
    assert answer.status_code == 400
    if path.startswith("/api/"):
        assert_problem(answer, 400, "request-malformed")


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "a\0"},
        {"experts": [{"expert": "ann/tea", "revision": "a\0"}]},
        {"experts": [{"expert": "a\0/b"}]},
        {"licence": "a\0"},
        {"parameters": {"a\0": 1}},
    ],
)
@pytest.mark.parametrize("sign", ["\0", "\ud800"])
@pytest.mark.parametrize("path", ["/api/v1/merges/check", "/api/v1/merges"])
def test_a_recipe_with_a_character_that_no_text_has_is_refused(changes: dict, sign: str, path: str, ann) -> None:
    factories.ready(factories.revision(ann[0], factories.expert(ann[0], "tea")))
    body = {"method": "linear", "experts": [{"expert": "ann/tea", "weight": 1}], **changes}
    text = json.dumps(body).replace(json.dumps("\0")[1:-1], json.dumps(sign)[1:-1])
    problem = assert_problem(ann[1].send("POST", path, data=text, kind="application/json"), 422, "recipe-invalid")
    assert problem["errors"][0]["met"] == f"U+{ord(sign):04X}"
    assert not Merge.objects.exists()


def test_an_object_that_is_none_is_named_by_its_own_field(ann) -> None:
    answer = ann[1].json("POST", "/api/v1/route/merge", {"text": "a trip", "output": 5})
    assert faults(answer) == [("/output", None)]
    assert faults(ann[1].json("POST", "/api/v1/route/merge", [1])) == [("", None)]


def test_start_is_a_truth_value_in_a_check_too(ann) -> None:
    answer = ann[1].json("POST", "/api/v1/merges/check", {"method": "linear", "experts": [], "start": "no"})
    assert faults(answer) == [("/start", "no")]
