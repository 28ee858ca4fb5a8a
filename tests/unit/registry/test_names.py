"""Names of owners, branches and files."""

import pytest
from django.urls import URLPattern, URLResolver, get_resolver

from registry.checks import names
from registry.errors import NameInvalid


def first_segments(patterns, prefix=""):
    """The first path segment of every route that does not start with a variable."""
    for pattern in patterns:
        route = prefix + str(pattern.pattern).removeprefix("^")
        if isinstance(pattern, URLResolver):
            yield from first_segments(pattern.url_patterns, route)
        elif isinstance(pattern, URLPattern):
            segment = route.split("/")[0].rstrip("$\\Z")
            if segment and not segment.startswith(("<", "(", "_")):
                yield segment.replace("\\", "")


SEGMENTS = sorted(set(first_segments(get_resolver().url_patterns)))


def test_the_url_conf_has_routes_to_look_at():
    assert {"api", "administration", "healthz", "readyz", "metrics"} <= set(SEGMENTS)


@pytest.mark.parametrize("segment", [*SEGMENTS, "static", "merges"])
def test_every_first_segment_of_the_site_is_a_reserved_owner_name(segment):
    with pytest.raises(NameInvalid):
        names.check_owner(segment)


@pytest.mark.parametrize(
    ("one", "other", "collide"),
    [
        ("My-LoRA", "my_l0ra", True),
        ("My-LoRA", "MYIORA", True),
        ("a.b_c-d", "ABCD", True),
        ("o", "0", True),
        ("Illi", "1111", True),
        ("abc", "abd", False),
        ("s5", "ss", False),
    ],
)
def test_look_alikes_share_a_key_and_others_do_not(one, other, collide):
    assert (names.strict_key(one) == names.strict_key(other)) is collide


@pytest.mark.parametrize("part", ["a", "A9", "a.b-c_d", "x" * 96])
def test_a_plain_part_is_fine(part):
    names.check_part(part, pointer="/name")


@pytest.mark.parametrize(
    "part", ["", "-a", "a-", ".a", "a.", "_a", "a--b", "a..b", "a.git", "x" * 97, "a b", "é", "a/b", "a\n"]
)
def test_a_part_that_stock_clients_refuse_is_refused(part):
    with pytest.raises(NameInvalid) as error:
        names.check_part(part, pointer="/name")
    assert error.value.faults[0].pointer == "/name"
    assert error.value.faults[0].remedy


@pytest.mark.parametrize("branch", ["dev", "v1.0", "a+b=c,d~e"])
def test_a_plain_branch_is_fine(branch):
    names.check_branch(branch)


@pytest.mark.parametrize(
    "branch", ["compeft-default", "merge--abc", "refs", "refs-x", "a" * 40, "a/b", "..", "a..b", "", "-x", "x" * 128]
)
def test_the_hubs_own_branch_names_and_paths_are_refused(branch):
    with pytest.raises(NameInvalid):
        names.check_branch(branch)


@pytest.mark.parametrize("full_name", ["a", "a/b/c", "/b", "a/", "a /b"])
def test_a_full_name_has_two_parts(full_name):
    with pytest.raises(NameInvalid):
        names.split(full_name)
