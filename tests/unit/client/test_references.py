"""owner/name[@revision], by the rules that hubs and stock clients apply."""

import pytest

from moerge.client import Reference
from moerge.client.errors import AddressInvalid


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ann/tea", ("ann", "tea", "main")),
        ("ann/tea@v1.0", ("ann", "tea", "v1.0")),
        ("A.n_n-1/t.e_a-2@compeft-k10", ("A.n_n-1", "t.e_a-2", "compeft-k10")),
        (f"a/b@{'0' * 40}", ("a", "b", "0" * 40)),
        ("merges/m1@merge--ab", ("merges", "m1", "merge--ab")),
        (f"a/{'x' * 96}", ("a", "x" * 96, "main")),
    ],
)
def test_a_reference_is_read(text, parts):
    found = Reference.parse(text)
    assert (found.owner, found.name, found.revision) == parts
    assert str(found) == f"{parts[0]}/{parts[1]}@{parts[2]}"


@pytest.mark.parametrize(
    "text",
    [
        "", "ann", "ann/", "/tea", "ann/tea/x", "ann//tea", "../tea", "ann/..", "ann/.tea", "-ann/tea", "ann/tea-",
        "ann/te--a", "ann/te..a", "ann/tea.git", "ann/tea@", "ann/tea@a/b", "ann/tea@a b", "ann/tea@..", "ann/tea@a..b",
        "ann/tea@x@y", "änn/tea", "ann/tea?x", "ann/tea#x", f"a/{'x' * 97}", "ann/tea\n", f"a/b@{'x' * 128}",
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_the_form_it_must_have(text):
    with pytest.raises(AddressInvalid, match="not a reference") as raised:
        Reference.parse(text)
    assert "owner/name" in raised.value.wanted
