"""Base models: every name leads to one row, and a question is asked where none does."""

import pytest

from registry.errors import BaseUnknown, NameInvalid, NameTaken
from registry.models import BaseAlias, BaseModel
from registry.services import bases
from tests import factories

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def known_bases():
    return bases.sync()


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("SENTENCE-TRANSFORMERS/ALL-MINILM-L6-V2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("https://huggingface.co/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("bert-base-uncased/", "google-bert/bert-base-uncased"),
        (" gpt2 ", "openai-community/gpt2"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
        ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistralai/Mistral-7B-v0.1"),
        ("mlx-community/Llama-3.2-1B-4bit", "meta-llama/Llama-3.2-1B"),
    ],
)
def test_every_name_of_a_base_leads_to_it(name, base):
    assert bases.resolve(name).name == base


@pytest.mark.parametrize(
    "name", ["somebody/Qwen2.5-7B-Instruct", "somebody/gpt2-tuned", "unsloth/never-heard-of", "4bit", "-4bit"]
)
def test_a_name_that_only_looks_like_one_is_not_known(name):
    with pytest.raises(BaseUnknown) as error:
        bases.resolve(name)
    assert error.value.faults[0].met == name


def test_a_copy_that_points_at_its_origin_resolves_to_the_origin():
    origin = bases.resolve("gpt2")
    copy = BaseModel.objects.create(name="me/gpt2-nf4", quantised_from=origin)
    BaseAlias.objects.create(key="me/gpt2-nf4", base=copy, is_quantised=True)
    assert bases.resolve("me/GPT2-nf4") == origin


def test_syncing_again_changes_nothing_and_keeps_what_people_added():
    user = factories.user()
    mine = bases.register(user=user, name="me/mine", licence="MIT")
    before = (BaseModel.objects.count(), BaseAlias.objects.count())
    bases.sync()
    assert (BaseModel.objects.count(), BaseAlias.objects.count()) == before
    assert bases.resolve("me/mine") == mine
    assert mine.licence == "mit"


def test_syncing_restores_the_shapes_of_the_list_and_spares_learned_ones():
    BaseModel.objects.filter(name="openai-community/gpt2").update(shapes={"h.*.attn.c_attn": [1, 1]})
    BaseModel.objects.filter(name="facebook/opt-125m").update(shapes={"fc": [5, 4]})
    bases.sync()
    assert bases.resolve("gpt2").shapes["h.*.attn.c_attn"] == [2304, 768]
    assert bases.resolve("facebook/opt-125m").shapes == {"fc": [5, 4]}


def test_a_base_is_registered_once_and_an_alias_is_not_registered_again():
    user = factories.user()
    made = bases.register(user=user, name="me/My-Base")
    assert bases.register(user=user, name="me/my-base") == made
    assert bases.resolve("ME/MY-BASE") == made
    with pytest.raises(NameTaken) as taken:
        bases.register(user=user, name="unsloth/llama-3-8b-bnb-4bit")
    assert "meta-llama/Meta-Llama-3-8B" in taken.value.faults[0].remedy


@pytest.mark.parametrize("name", ["/root/x", "../x", "a/b/c", "a b/c", "", "me/"])
def test_a_path_cannot_be_registered(name):
    with pytest.raises(NameInvalid):
        bases.register(user=factories.user(), name=name)


@pytest.mark.parametrize(
    ("module", "shape", "wanted"),
    [
        ("encoder.layer.4.attention.self.query", (384, 384), None),
        ("bert.encoder.layer.11.output.dense", (384, 1536), None),
        ("0.auto_model.encoder.layer.0.intermediate.dense", (1536, 384), None),
        ("encoder.layer.4.attention.output.dense", (384, 1536), (384, 384)),
        ("encoder.layer.4.output.dense", (384, 384), (384, 1536)),
        ("bert.encoder.layer.0.intermediate.dense", (384, 1536), (1536, 384)),
        ("pooler.dense", (7, 9), None),
    ],
)
def test_shapes_are_compared_by_the_end_of_a_modules_name(module, shape, wanted):
    found = bases.mismatch(bases.resolve("all-MiniLM-L6-v2"), {module: shape})
    assert found == (None if wanted is None else (module, shape, wanted))


def test_a_base_is_registered_through_the_door_and_then_taken(client):
    from tests import tiny
    from tests.senders import Sender

    sender = Sender(factories.key(factories.user("ada")))
    named = tiny.fitting({"fc": (8, 8)}, base_model_name_or_path="ada/own")
    assert sender.send("ada/tea", named).json()["code"] == "base-unknown"
    assert sender.post("/api/v1/bases", {"name": "ada/own"}).status_code == 201
    assert sender.send("ada/tea", named).status_code == 200
