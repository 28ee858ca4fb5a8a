"""Experts of a running hub in one model: by the hub's packs, its compressed forms and its scores."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertModel

from moerge.client.errors import HubRefused
from moerge.errors import ExpertsIncompatible
from moerge.runtime import RoutedModel
from tests.e2e.test_journey import BASE, EXPERTS, minilm
from tests.hubs import Hub

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = ("travel-desk", "kitchen-and-dining", "small-talk")
TEXTS = ["please book me a flight to Rome", "what can I cook with rice and eggs", "do you have any hobbies"]


@pytest.fixture
def routed(hub: Hub, tmp_path: Path):
    def make(names=NAMES, **settings):
        return RoutedModel.from_hub(
            settings.pop("base", BertModel.from_pretrained(minilm())), [f"admin/{name}" for name in names],
            endpoint=hub.url, token=hub.api_key, folder=tmp_path / "pulled", **settings,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def given():
    return AutoTokenizer.from_pretrained(minilm())(TEXTS, return_tensors="pt", padding=True)


def alone(name: str, given) -> torch.Tensor:
    model = PeftModel.from_pretrained(BertModel.from_pretrained(minilm()), str(EXPERTS / name)).eval()
    with torch.no_grad():
        return model(**given).last_hidden_state


def test_top1_is_the_single_adapter_of_the_expert_that_the_hub_finds(routed, given) -> None:
    model = routed(strategy="top1", query=TEXTS)
    found = model(**given).last_hidden_state
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], alone(name, given)[row], rtol=0, atol=1e-5)
    for shares in model.usage().values():
        assert sum(shares.values()) in (0, pytest.approx(1))


def test_arrow_by_the_hubs_pack_is_arrow_by_the_folders(routed, given) -> None:
    """Directions of a pack are rounded to float16, which moves outputs of about 1 by less than a hundredth."""
    by_pack = routed(strategy="arrow", top_k=2)
    by_folders = RoutedModel.from_folders(
        BertModel.from_pretrained(minilm()), [EXPERTS / name for name in NAMES], strategy="arrow", top_k=2
    )
    found, wanted = by_pack(**given).last_hidden_state, by_folders(**given).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)
    assert not torch.equal(found, wanted)
    for module, shares in by_folders.usage().items():
        told = by_pack.usage()[module]
        assert list(told.values()) == pytest.approx(list(shares.values()), abs=0.02), module


def test_compressed_experts_are_routed_as_they_decode(routed, given) -> None:
    model = routed(strategy="arrow", compressed=True)
    found = model(**given).last_hidden_state
    assert found.isfinite().all()
    assert all(sum(shares.values()) == pytest.approx(1) for shares in model.usage().values())
    assert not torch.equal(found, routed(strategy="arrow")(**given).last_hidden_state)


def test_what_the_hub_does_not_have_is_told(routed) -> None:
    with pytest.raises(ExpertsIncompatible, match=f"belong to {BASE}"):
        routed(base="bert-base-uncased")
    with pytest.raises(HubRefused):
        routed(strategy="phatgoose")
