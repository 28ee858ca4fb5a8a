"""Whatever JSON a hub answers with, the client makes a record or a typed error of it, and no path leads out of the folder."""

import contextlib
from pathlib import PurePosixPath
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.cli import problems
from moerge.client import errors, records
from moerge.client.references import Reference

NUMBERS = st.integers() | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
COMMIT = st.text("0123456789abcdef", min_size=40, max_size=40)
PARTS = st.sampled_from(["a", "B", ".", "..", "/", "//", "\\", "~", ":", "\x00", "\u202e", "é", " "])
PATH = st.lists(PARTS, max_size=6).map("".join)


def maybe(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, at times anything."""
    return st.one_of(usual, usual, usual, JSON)


FILE = st.fixed_dictionaries({"path": maybe(PATH), "size": maybe(st.integers(0, 10**6)), "sha256": maybe(DIGEST)})
NODE = st.fixed_dictionaries(
    {"type": maybe(st.sampled_from(["file", "directory"])), "path": maybe(PATH), "size": maybe(st.integers(0, 9)),
     "oid": maybe(COMMIT)},
    optional={"lfs": maybe(st.fixed_dictionaries({"oid": maybe(DIGEST)}))},
)  # fmt: skip
RECORD = st.fixed_dictionaries({"revision": maybe(COMMIT), "files": maybe(st.lists(maybe(FILE), max_size=4))})
JOB = st.fixed_dictionaries({"id": JSON, "state": JSON, "progress": JSON, "message": JSON, "error": JSON})
PROBLEM = st.fixed_dictionaries(
    dict.fromkeys(("detail", "code", "title", "request_id", "job", "error"), JSON)
    | {
        "errors": maybe(
            st.lists(maybe(st.fixed_dictionaries({"pointer": JSON, "met": JSON, "remedy": JSON})), max_size=3)
        )
    }
)


def check_paths(found: records.Snapshot) -> None:
    for file in found.files:
        path = PurePosixPath("/folder") / file.path
        assert ".." not in path.parts
        assert path.parts[:2] == ("/", "folder")
        assert str(path) == f"/folder/{file.path}"
        assert type(file.size) is int
        assert file.size >= 0
    assert len({file.path for file in found.files}) == len(found.files)


@settings(deadline=None)
@given(maybe(RECORD))
def test_a_record_is_a_snapshot_or_a_typed_error(body):
    with contextlib.suppress(errors.AnswerInvalid, errors.PathUnsafe):
        check_paths(records.snapshot(body, full_name="a/b", commit_field="revision"))


@settings(deadline=None)
@given(maybe(st.lists(maybe(NODE), max_size=4)))
def test_a_tree_is_a_snapshot_or_a_typed_error(nodes):
    with contextlib.suppress(errors.AnswerInvalid, errors.PathUnsafe):
        check_paths(records.derived(nodes, full_name="a/b", commit="0" * 40))


@settings(deadline=None)
@given(maybe(JOB))
def test_a_job_is_a_record_or_a_typed_error(body):
    with contextlib.suppress(errors.AnswerInvalid):
        assert 0 <= records.job(body).progress <= 1


@settings(deadline=None)
@given(st.integers(100, 599), maybe(PROBLEM))
def test_a_problem_is_always_an_error_that_can_be_told(status, body):
    found = errors.of_problem(status, body)
    assert found.status == status
    assert found.detail
    told = problems.of(found, command="pull")
    assert told.status == 1
    assert all(isinstance(line, str) for line in told.lines())


@settings(deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z0-9._-]{1,9}/[A-Za-z0-9._-]{1,9}(@[^@]{1,9})?", fullmatch=True))
def test_a_reference_goes_into_an_address_as_it_is_or_is_refused(text):
    try:
        found = Reference.parse(text)
    except errors.AddressInvalid:
        return
    for part in (found.owner, found.name, found.revision):
        assert part.isascii()
        assert part not in {".", ".."}
        assert not set(part) & set("/?#%\\ \n")
    assert text in {found.full_name, str(found)}
