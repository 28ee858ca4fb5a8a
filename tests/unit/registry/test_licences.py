"""Licences of parents together: every class, every pair that does not get along, every label that promises too much."""

import pytest

from registry.checks import licences
from registry.checks.licences import BLOCK, OK, WARN

CLASSES = {
    "permissive": [
        "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-3.0",
        "odc-by", "MIT", "Apache-2.0", "Apache License 2.0", "BSD-3-Clause", "CC0-1.0", "ODC-By-1.0", "MIT License",
    ],
    "share-alike": [
        "cc-by-sa-4.0", "cc-by-sa-3.0", "mpl-2.0", "lgpl-2.1", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "odbl",
        "GPL-3.0-only", "GPL-2.0-or-later", "gpl-2.0+", "AGPL-3.0-or-later", "LGPL-2.1-only", "ODbL-1.0", "gpl", "GPLv3",
    ],
    "non-commercial": [
        "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC-BY-NC-2.0", "cc by nc 4.0", "my-nc-tag", "fair-noncommercial-research-license",
    ],
    "no-derivatives": ["cc-by-nd-4.0", "cc-by-nc-nd-4.0", "CC-BY-NC-ND-3.0"],
    "use-restricted": [
        "openrail", "openrail++", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
        "creativeml-openrail-m", "llama2", "llama3", "llama3.1", "Llama3.3", "llama4", "gemma", "qwen-research", "deepseek",
        "apple-amlr", "apple-ascl", "mrl", "Llama 3.1 Community License Agreement",
    ],
    "unknown": ["other", "unknown", "", "   ", "mine", "ask-me", "incomplete-nd4", "encore", "ncx"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in CLASSES.items() for text in texts])
def test_an_identifier_is_of_the_class_that_the_table_says_in_any_spelling(kind: str, text: str) -> None:
    assert licences.class_of(text) == kind


# Of the experts, of the base: verdict, and the licence of the result.
TOGETHER = {
    "permissive licences join": (["mit", "bsd-3-clause"], "apache-2.0", OK, "apache-2.0"),
    "one permissive licence stays": (["mit", "mit"], "mit", OK, "mit"),
    "permissive joins share-alike": (["mit", "gpl-3.0"], "apache-2.0", OK, "gpl-3.0"),
    "the strongest of the GNU licences": (["lgpl-3.0", "gpl-3.0"], "mit", OK, "gpl-3.0"),
    "the network licence takes all": (["gpl-3.0", "lgpl-2.1"], "agpl-3.0", OK, "agpl-3.0"),
    "a file licence goes under the GNU ones": (["mpl-2.0", "gpl-2.0"], "mit", OK, "gpl-2.0"),
    "the newer of two creative commons": (["cc-by-sa-3.0", "cc-by-sa-4.0"], "mit", OK, "cc-by-sa-4.0"),
    "two versions apart": (["gpl-2.0", "agpl-3.0"], "mit", BLOCK, None),
    "only means only": (["gpl-2.0-only", "gpl-3.0-only"], "mit", BLOCK, None),
    "later versions are allowed": (["gpl-2.0-or-later", "agpl-3.0"], "mit", OK, "agpl-3.0"),
    "later versions without a number": (["gpl", "gpl-3.0"], "mit", OK, "gpl-3.0"),
    "creative commons and GNU 2": (["cc-by-sa-4.0", "gpl-2.0"], "mit", BLOCK, None),
    "creative commons goes one way": (["cc-by-sa-4.0", "gpl-3.0"], "mit", OK, "gpl-3.0"),
    "a database licence alone": (["odbl", "cc-by-sa-4.0"], "mit", BLOCK, None),
    "the base counts as a parent": (["gpl-2.0", "mit"], "agpl-3.0", BLOCK, None),
    "non-commercial rules": (["cc-by-nc-4.0", "mit"], "apache-2.0", OK, "cc-by-nc-4.0"),
    "non-commercial share-alike rules": (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "mit", OK, "cc-by-nc-sa-4.0"),
    "a non-commercial base rules": (["mit"], "cc-by-nc-4.0", OK, "cc-by-nc-4.0"),
    "no trade with free software": (["cc-by-nc-4.0", "gpl-3.0"], "mit", BLOCK, None),
    "no derivatives, not even alone": (["cc-by-nd-4.0"], "mit", BLOCK, None),
    "no derivatives, with non-commercial": (["mit", "cc-by-nc-nd-4.0"], "mit", BLOCK, None),
    "no derivatives of the base": (["mit"], "cc-by-nd-4.0", BLOCK, None),
    "restrictions of use are carried": (["mit", "openrail++"], "apache-2.0", OK, "openrail"),
    "restrictions of the base are carried": (["mit", "apache-2.0"], "llama3.1", OK, "llama3.1"),
    "restrictions add up": (["gemma", "mit"], "llama3.1", OK, "other"),
    "restrictions and non-commercial add up": (["cc-by-nc-4.0"], "llama2", OK, "other"),
    "no restrictions of use with free software": (["gpl-3.0", "mit"], "llama3.1", BLOCK, None),
    "nor with the network licence": (["agpl-3.0", "bigcode-openrail-m"], "mit", BLOCK, None),
    "the lesser licence bears them": (["lgpl-3.0", "gemma"], "mit", OK, "other"),
    "unknown warns": (["mit", "other"], "mit", WARN, "other"),
    "missing warns": (["mit", ""], "mit", WARN, "other"),
    "a base without a licence warns": (["mit", "mit"], "", WARN, "other"),
    "what blocks is worse than what warns": (["", "cc-by-nd-4.0"], "mit", BLOCK, None),
    "several licences hold at once": (["mit and gpl-3.0"], "llama3", BLOCK, None),
    "one of several may be chosen": (["gpl-3.0 OR mit"], "llama3", OK, "llama3"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOGETHER)
def test_licences_together(case: str) -> None:
    texts, base, wanted, result = TOGETHER[case]
    parents = [(f"ann/{place}", text) for place, text in enumerate(texts)]
    for order in (parents, parents[::-1]):
        found = licences.verdict(order, ("the base", base))
        assert found.verdict == wanted
        assert result in (None, found.licence)
        assert len(found.notices) == len(texts) + 1


def test_a_verdict_names_the_pair_the_rule_and_what_is_carried() -> None:
    found = licences.verdict([("ann/a", "mit"), ("bob/b", "GPL-3.0")], ("meta/llama", "llama3.1"))
    (reason,) = found.reasons
    assert (reason.verdict, set(reason.parents)) == (BLOCK, {"bob/b", "meta/llama"})
    assert "llama3.1" in reason.detail
    assert "gpl-3.0" in reason.detail
    assert reason.rule == "share-alike with use-restricted"
    assert found.carried == ("gpl-3.0", "llama3.1")
    assert found.classes == ("permissive", "share-alike", "use-restricted")
    assert found.notices == ("ann/a: mit", "bob/b: GPL-3.0", "meta/llama: llama3.1")


@pytest.mark.parametrize(
    ("parents", "label", "wanted"),
    [
        (["cc-by-nc-4.0", "mit"], "mit", BLOCK),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-sa-4.0", OK),
        (["gpl-3.0", "mit"], "apache-2.0", BLOCK),
        (["gpl-3.0", "mit"], "agpl-3.0", OK),
        (["agpl-3.0", "mit"], "gpl-3.0", BLOCK),
        (["llama3.1", "mit"], "mit", BLOCK),
        (["llama3.1", "mit"], "gemma", BLOCK),
        (["llama3.1", "mit"], "llama3.1", OK),
        (["llama3.1", "gemma"], "llama3.1 and gemma", OK),
        (["mit", "apache-2.0"], "cc-by-nc-4.0", OK),
        (["mit", "apache-2.0"], "my own", WARN),
    ],
)
def test_a_label_must_carry_on_what_the_parents_ask_for(parents: list[str], label: str, wanted: str) -> None:
    found = licences.verdict([(f"ann/{text}", text) for text in parents], None, label)
    assert found.verdict == wanted
    if wanted == OK:
        assert found.licence == licences.normal(label)


def test_an_upload_is_warned_when_its_licence_contradicts_the_base_or_is_not_known() -> None:
    assert licences.of_upload("mit", ("a/base", "apache-2.0")) == []
    assert licences.of_upload("llama3.1", ("a/base", "llama3.1")) == []
    assert licences.of_upload("mit", None) == []
    assert licences.of_upload("mit", ("a/base", "")) == []
    for licence, base in [
        ("mit", "llama3.1"),
        ("apache-2.0", "cc-by-nc-4.0"),
        ("mit", "gpl-3.0"),
        ("gpl-3.0", "gemma"),
    ]:
        (warning,) = licences.of_upload(licence, ("a/base", base))
        assert "a/base" in warning
        assert base in warning
    assert "'ask me'" in licences.of_upload("ask me", None)[0]
    assert "no licence" in licences.of_upload("", ("a/base", "mit"))[0]
