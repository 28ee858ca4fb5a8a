"""What the client makes of a hub's answers: typed refusals, waiting within a limit, jobs followed, keys kept."""

import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from moerge.client import Hub, Reference, errors
from moerge.client.patience import Patience
from tests.unit.client import servers
from tests.unit.client.servers import Reply, as_json, problem

COMMIT = "a" * 40


def job(state: str, progress: float = 0.0, **more):
    return as_json({"id": "j1", "kind": "compress", "state": state, "progress": progress, "message": "", **more})


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (400, errors.HubRefused), (401, errors.Unauthenticated), (403, errors.NotAllowed), (404, errors.NotFound),
        (409, errors.Conflict), (413, errors.TooLarge), (422, errors.Invalid), (500, errors.HubRefused),
    ],
)  # fmt: skip
def test_a_refusal_is_an_error_of_its_own_kind_that_carries_the_problem(server, hub, status, wanted):
    fault = {"pointer": "/density", "met": 7, "wanted": "at most 1", "remedy": "Ask for less.", "rule": "T4"}
    server.routes["/x"] = [problem(status, "some-code", "It is so.", errors=[fault, {"pointer": "/b"}])]
    with pytest.raises(errors.HubRefused) as raised:
        hub.json("/x")
    error = raised.value
    assert type(error) is wanted
    assert (error.status, error.code, error.title, error.detail) == (status, "some-code", "No", "It is so.")
    assert (error.pointer, error.met, error.wanted, error.remedy, error.rule) == (
        "/density", 7, "at most 1", "Ask for less.", "T4")  # fmt: skip
    assert error.request_id == "r-1"
    assert len(error.faults) == 2
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>no</html>",
        b"[1]",
        b'"text"',
        b"[" * 5000,
        b'{"detail": "x", "n": NaN}',
        b'{"n": 1e999}',
        b'{"detail": 7, "errors": {}}',
    ],
)
def test_a_refusal_without_a_problem_is_told_by_its_status(server, hub, body):
    server.routes["/x"] = [Reply(body, 403)]
    with pytest.raises(errors.NotAllowed) as raised:
        hub.json("/x")
    assert raised.value.code == "http-403"
    assert "403" in raised.value.detail


def test_a_refusal_of_the_hub_protocol_is_told_in_its_words(server, hub):
    server.routes["/x"] = [Reply(b'{"error": "The repository is gone."}', 403)]
    with pytest.raises(errors.NotAllowed, match="The repository is gone"):
        hub.json("/x")


@pytest.mark.parametrize("body", [b"<html>yes</html>", b"", b"[" * 100_000, b"NaN", b'{"a": 1, "a": 2}', b'"\\ud800"'])
def test_an_answer_that_is_not_json_is_named_as_such(server, hub, body):
    server.routes["/x"] = [Reply(body)]
    with pytest.raises(errors.AnswerInvalid, match="not JSON"):
        hub.json("/x")


def test_an_answer_without_end_is_not_read_to_its_end(server, hub, monkeypatch):
    monkeypatch.setattr("moerge.client.hub.JSON_BYTES", 1000)
    server.routes["/x"] = [Reply(json.dumps("x" * 998).encode()), Reply(json.dumps("x" * 999).encode())]
    assert hub.json("/x") == "x" * 998
    with pytest.raises(errors.AnswerInvalid, match="larger"):
        hub.json("/x")


def test_an_answer_that_breaks_off_is_asked_for_again(server, hub, clock):
    server.routes["/x"] = [Reply(b'{"a": 1}', cut_after=3), Reply(b'{"a": 1}', cut_after=0), Reply(b'{"a": 1}')]
    assert hub.json("/x") == {"a": 1}
    assert clock.slept == [0.5, 1.0]


@pytest.mark.parametrize("status", [429, 503])
def test_try_again_later_is_done_after_exactly_that_time(server, hub, clock, seen, status):
    server.routes["/x"] = [problem(status, "later", "Not now.", retry_after=7), as_json({"a": 1})]
    assert hub.json("/x") == {"a": 1}
    assert clock.slept == [7.0]
    assert seen == [("Not now.", None)]


def test_a_time_of_day_to_try_again_is_understood(server, hub, clock):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    server.routes["/x"] = [problem(503, "later", "Not now.", retry_after=when), as_json(1)]
    hub.json("/x")
    assert 17 < clock.slept[0] <= 20


@pytest.mark.parametrize("header", ["soon", "-5", "", "0"])
def test_an_odd_retry_after_never_makes_a_tight_loop(server, hub, clock, header):
    server.routes["/x"] = [problem(503, "later", "Not now.", retry_after=header)] * 3 + [as_json(1)]
    hub.json("/x")
    assert len(clock.slept) == 3
    assert min(clock.slept) >= 0.1


def test_waiting_ends_when_the_time_of_the_call_is_over(server, hub, clock):
    server.routes["/x"] = [problem(503, "later", "Not now.", retry_after=25)]
    with pytest.raises(errors.WaitedTooLong, match="Not now") as raised:
        hub.json("/x")
    # Of 60 s, two pauses of 25 fit; a third would not, and is not begun.
    assert clock.slept == [25.0, 25.0]
    assert isinstance(raised.value.__cause__, errors.Unavailable)


def test_a_conflict_is_waited_for_only_when_the_hub_says_that_it_passes(server, hub, clock):
    server.routes["/x"] = [problem(409, "not-ready", "Being made.", retry_after=2), as_json(1)]
    assert hub.json("/x") == 1
    assert clock.slept == [2.0]
    for reply in (problem(409, "not-ready", "It failed."), problem(409, "name-taken", "Taken.", retry_after=2)):
        server.routes["/x"] = [reply, as_json(1)]
        with pytest.raises(errors.Conflict):
            hub.json("/x")
    assert clock.slept == [2.0]


def test_a_broken_gateway_is_tried_a_few_times_and_an_error_of_the_hub_is_not(server, hub, clock):
    server.routes["/x"] = [problem(502, "", "")] * 2 + [as_json(1)]
    assert hub.json("/x") == 1
    assert clock.slept == [0.5, 1.0]
    server.routes["/x"] = [problem(504, "", "")]
    with pytest.raises(errors.HubRefused):
        hub.json("/x")
    assert clock.slept[2:] == [0.5, 1.0, 2.0, 4.0]


def test_the_job_that_makes_what_is_missing_is_followed_to_its_end(server, hub, clock, seen):
    missing = problem(503, "not-made", "It is being made.", retry_after=30, job="j1", job_url="http://elsewhere/j1")
    server.routes["/x"] = [missing, as_json({"a": 1})]
    server.routes["/api/v1/jobs/j1"] = [job("queued"), job("running", 0.5, message="encoding"), job("done", 1)]
    assert hub.json("/x") == {"a": 1}
    assert seen == [("It is being made.", 0.0), ("encoding", 0.5)]
    # One second between looks, and not the thirty of Retry-After.
    assert clock.slept == [1.0, 1.0, 0.25]


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_failed_ends_the_waiting_with_its_reason(server, hub, clock, state):
    server.routes["/x"] = [problem(503, "not-made", "It is being made.", retry_after=2, job="j1")]
    server.routes["/api/v1/jobs/j1"] = [job(state, error={"detail": "The disk is full."})]
    with pytest.raises(errors.JobFailed, match="The disk is full"):
        hub.json("/x")
    assert clock.slept == []


def test_a_job_whose_end_did_not_help_is_not_asked_again(server, hub, clock):
    server.routes["/x"] = [problem(503, "not-made", "It is being made.", retry_after=2, job="j1")]
    server.routes["/api/v1/jobs/j1"] = [job("done", 1.0)]
    with pytest.raises(errors.WaitedTooLong):
        hub.json("/x")
    assert clock.slept == [0.25, *[2.0] * 29]
    assert len(server.of("/api/v1/jobs/j1")) == 1


@pytest.mark.parametrize(
    "reply", [problem(404, "job-not-found", "Hidden."), Reply(b"<html>"), Reply(b"[]"), Reply(b"{}", cut_after=1)]
)
def test_a_job_that_cannot_be_read_leaves_retry_after_to_go_by(server, hub, clock, reply):
    server.routes["/x"] = [problem(503, "not-made", "It is being made.", retry_after=9, job="j1"), as_json(1)]
    server.routes["/api/v1/jobs/j1"] = [reply]
    assert hub.json("/x") == 1
    assert clock.slept == [9.0]


@pytest.mark.parametrize("name", ["../../users", "a/b", "", 7, None, "x" * 65])
def test_an_odd_job_id_is_not_asked_for(server, hub, name):
    server.routes["/x"] = [problem(503, "not-made", "Later.", retry_after=1, job=name), as_json(1)]
    hub.json("/x")
    assert {asked.path for asked in server.asked} == {"/x"}


def test_nobody_at_the_address_is_told_after_a_few_tries(clock):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        patience = lambda seconds: Patience(seconds, clock=clock, sleep=clock.sleep)  # noqa: E731
        with Hub(address, patience=patience) as hub, pytest.raises(errors.HubUnreachable, match=address):
            hub.json("/x")
    assert clock.slept == [0.5, 1.0, 2.0, 4.0]


def test_the_key_goes_to_the_hub_and_to_nobody_it_redirects_to(server, hub):
    with servers.running() as elsewhere:
        server.routes["/x"] = [Reply(b"", 302, {"Location": f"{elsewhere.url.replace('127.0.0.1', 'localhost')}/y"})]
        elsewhere.routes["/y"] = [as_json("there")]
        assert hub.json("/x") == "there"
        assert "authorization" not in elsewhere.asked[0].headers
    assert server.asked[0].headers["authorization"] == "Bearer key-1"
    assert server.asked[0].headers["user-agent"].startswith("moerge/")


def test_redirects_without_end_are_an_odd_answer(server, hub):
    server.routes["/x"] = [Reply(b"", 302, {"Location": "/x"})]
    with pytest.raises(errors.AnswerInvalid, match="redirects"):
        hub.json("/x")


def test_the_argument_wins_over_the_environment_and_no_key_sends_none(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    server.routes["/x"] = [as_json(1)]
    with Hub(server.url + "/", "given") as hub:
        hub.json("/x")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with Hub() as hub:
        hub.json("/x")
    monkeypatch.delenv("HF_TOKEN")
    with Hub() as hub:
        hub.json("/x")
    assert [asked.headers.get("authorization") for asked in server.asked] == [
        "Bearer given", "Bearer of-the-environment", None]  # fmt: skip


@pytest.mark.parametrize("proxy", ["http_proxy", "ALL_PROXY"])
def test_a_hub_on_this_machine_is_not_asked_through_a_proxy(server, monkeypatch, proxy):
    monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    server.routes["/x"] = [as_json(1)]
    with Hub(server.url) as hub:
        assert hub.json("/x") == 1


@pytest.mark.parametrize(
    "address", ["", "  ", "ftp://h", "hub.example", "http://", "http://h:x", "http://h:0", "http://a:b@h", "http://h/?q",
                "http://h/#f", "http://h o", "http://hüb"],
)  # fmt: skip
def test_what_is_no_address_of_a_hub_is_refused_before_anything_is_sent(address):
    with pytest.raises(errors.AddressInvalid) as raised:
        Hub(address)
    assert raised.value.pointer == "--endpoint"


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "x" * 513])
def test_what_is_no_key_is_refused_without_repeating_it(key):
    with pytest.raises(errors.AddressInvalid) as raised:
        Hub("http://h", key)
    assert key not in str(vars(raised.value))


class TestSnapshots:
    FILES = [{"path": "a/b.json", "size": 3, "sha256": "0" * 64, "url": "http://elsewhere/x"}]
    RECORD = {"expert": "ann/tea", "revision": COMMIT, "base_model": "bert", "files": FILES}

    def test_an_expert_is_read_at_the_commit_its_revision_means(self, server, hub):
        server.routes["/api/v1/experts/ann/tea/revisions/v1.0"] = [as_json(self.RECORD)]
        found = hub.snapshot(Reference.parse("ann/tea@v1.0"))
        assert (found.full_name, found.commit, found.base_model) == ("ann/tea", COMMIT, "bert")
        assert [(file.path, file.size, file.sha256) for file in found.files] == [("a/b.json", 3, "0" * 64)]

    def test_an_expert_that_is_hidden_is_asked_for_once(self, server, hub):
        server.routes["/api/v1/experts/ann/tea/revisions/main"] = [problem(404, "expert-not-found", "Hidden.")]
        with pytest.raises(errors.NotFound, match="Hidden"):
            hub.snapshot(Reference.parse("ann/tea"))
        assert len(server.asked) == 1

    def test_a_merge_is_waited_for(self, server, hub, seen, clock):
        body = {"repo": "merges/m1", "commit": COMMIT, "base_model": "bert", "files": []}
        running = {"id": "j", "kind": "merge", "state": "running", "progress": 0.25, "message": "layer 1"}
        server.routes["/api/v1/merges/m1"] = [
            as_json(body | {"state": "running", "job": running}),
            as_json(body | {"state": "ready", "files": self.FILES, "job": running | {"state": "done"}}),
        ]
        assert hub.snapshot(Reference.parse("merges/m1")).commit == COMMIT
        assert seen == [("layer 1", 0.25)]
        assert clock.slept == [1.0]

    def test_a_merge_that_nobody_has_read_yet_is_computed_for_this_reader(self, server, hub, clock, seen):
        """The job is known from the hub's "not yet", and followed to its end."""
        body = {"repo": "merges/m1", "commit": COMMIT, "base_model": "bert", "files": []}
        server.routes["/api/v1/merges/m1"] = [
            as_json({**body, "state": "registered", "job": None}), as_json({**body, "state": "ready", "job": None}),
        ]  # fmt: skip
        pending = problem(503, "merge-pending", "It is computed.", retry_after=5, job="j1")
        server.routes["/api/models/merges/m1/tree/main"] = [pending, as_json([])]
        server.routes["/api/v1/jobs/j1"] = [job("running", 0.5), job("done")]
        assert hub.snapshot(Reference.parse("merges/m1")).commit == COMMIT
        assert ("It is computed.", 0.5) in seen
        assert sum(clock.slept) < 5
        assert len(server.of("/api/models/merges/m1/tree/main")) == 2

    def test_a_merge_that_failed_tells_why(self, server, hub):
        failed = {"id": "j", "kind": "merge", "state": "failed", "error": {"detail": "NaN in a parent."}}
        server.routes["/api/v1/merges/m1"] = [
            as_json({"commit": COMMIT, "state": "failed", "files": [], "job": failed})
        ]
        with pytest.raises(errors.JobFailed, match="NaN in a parent"):
            hub.snapshot(Reference.parse("merges/m1"))

    def test_a_merge_has_one_revision(self, server, hub):
        server.routes["/api/v1/merges/m1"] = [as_json({"commit": COMMIT, "state": "ready", "files": [], "job": None})]
        assert hub.snapshot(Reference.parse(f"merges/m1@{COMMIT}")).files == ()
        with pytest.raises(errors.AddressInvalid):
            hub.snapshot(Reference.parse("merges/m1@v2"))

    @pytest.mark.parametrize(
        "change",
        [
            {"revision": None}, {"revision": "A" * 40}, {"files": None}, {"files": [[]]}, {"files": [{"path": 7}]},
            {"files": [FILES[0] | {"size": -1}]}, {"files": [FILES[0] | {"size": True}]},
            {"files": [FILES[0] | {"sha256": "0" * 63}]}, {"files": [FILES[0] | {"sha256": None}]},
        ],
    )  # fmt: skip
    def test_an_odd_record_is_refused(self, server, hub, change):
        server.routes["/api/v1/experts/ann/tea/revisions/main"] = [as_json(self.RECORD | change)]
        with pytest.raises(errors.AnswerInvalid):
            hub.snapshot(Reference.parse("ann/tea"))

    @pytest.mark.parametrize(
        "path",
        [
            "../x", "a/../x", "/etc/passwd", "a//b", "", ".", "a/.", "~/x", "a\\b", "C:x", "a\nb", "a\x00b", "a\u202eb",
            "x" * 256, "a/",
        ],
    )  # fmt: skip
    def test_a_file_that_would_lie_elsewhere_is_refused(self, server, hub, path):
        server.routes["/api/v1/experts/ann/tea/revisions/main"] = [
            as_json(self.RECORD | {"files": [self.FILES[0] | {"path": path}]})
        ]
        with pytest.raises(errors.PathUnsafe):
            hub.snapshot(Reference.parse("ann/tea"))

    @pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b")])
    def test_paths_that_cannot_lie_side_by_side_are_refused(self, server, hub, paths):
        files = [self.FILES[0] | {"path": path} for path in paths]
        server.routes["/api/v1/experts/ann/tea/revisions/main"] = [as_json(self.RECORD | {"files": files})]
        with pytest.raises(errors.PathUnsafe):
            hub.snapshot(Reference.parse("ann/tea"))


class TestPosting:
    def test_a_body_arrives_as_json_and_the_status_comes_back(self, server, hub):
        server.routes["/x"] = [Reply(b'{"a": 1}', 202)]
        assert hub.post("/x", {"tea": "gr\u00fcn"}) == (202, {"a": 1})
        (asked,) = server.asked
        assert (asked.method, asked.headers["content-type"]) == ("POST", "application/json")
        assert json.loads(asked.body) == {"tea": "gr\u00fcn"}

    def test_it_is_sent_again_where_no_answer_came_and_where_the_hub_says_later(self, server, hub, clock):
        server.routes["/x"] = [
            Reply(b'{"a": 1}', 202, cut_after=3), problem(503, "later", "Not now.", retry_after=7), Reply(b'{"a": 1}'),
        ]  # fmt: skip
        assert hub.post("/x", {"n": 1}) == (200, {"a": 1})
        assert [json.loads(asked.body) for asked in server.asked] == [{"n": 1}] * 3
        assert clock.slept == [0.5, 7.0]

    def test_a_refusal_is_not_tried_again(self, server, hub):
        server.routes["/x"] = [problem(422, "recipe-invalid", "No.")]
        with pytest.raises(errors.Invalid, match="No"):
            hub.post("/x", {})
        assert len(server.asked) == 1

    def test_a_job_is_cancelled_by_one_request_that_waits_for_nothing(self, server, hub, clock):
        server.routes["/api/v1/jobs/j1/cancel"] = [job("cancelled")]
        assert hub.cancel("j1").state == "cancelled"
        server.routes["/api/v1/jobs/j1/cancel"] = [problem(503, "later", "Not now.", retry_after=7)]
        assert hub.cancel("j1") is None
        assert ([asked.method for asked in server.asked], clock.slept) == (["POST"] * 2, [])
