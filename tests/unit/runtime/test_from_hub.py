"""RoutedModel.from_hub over a scripted hub: what it asks for, what it uses of the answers, and what it does not believe."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from moerge import compression
from moerge.client import Hub
from moerge.client.errors import AnswerInvalid
from moerge.errors import ExpertsIncompatible, ParameterInvalid
from moerge.routing import packs
from moerge.routing.packs import Member, Pack
from moerge.runtime import RoutedModel, fetching
from tests import tiny_peft
from tests.unit.client import servers
from tests.unit.client.hubs import sha256
from tests.unit.client.servers import Reply, as_json, stored
from tests.unit.runtime import reference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = ("ann/tea", "bob/coffee")
COMMITS = ("a" * 40, "b" * 40)
PACKS, ROUTE = "/api/v1/routing/packs", "/api/v1/route"
BASE = "tiny/llama"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of two experts."""
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("published") / "expert"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            config = LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "down_proj"][: 2 - number])
            tiny_peft.saved(folder, config, base=reference.llama, seed=number + 1)
        found.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("adapter_")})
    return found


@pytest.fixture
def server(trees, tmp_path, monkeypatch):
    """A hub with both experts and their compressed forms."""
    monkeypatch.setenv("MOERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with servers.running() as hub:
        for name, commit, tree in zip(NAMES, COMMITS, trees, strict=True):
            publish(hub, name, commit, tree)
        hub.routes["/api/v1/experts"] = lambda asked: as_json(
            {
                "items": [{"expert": NAMES[0], "base_model": BASE}] if asked.query["base_model"] == "alias" else [],
                "next": None,
            }
        )
        yield hub


def publish(hub, name, commit, tree, *, base=BASE):
    rows = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in tree.items()]
    record = {"expert": name, "revision": commit, "base_model": base, "state": "ready", "files": rows}
    hub.routes[f"/api/v1/experts/{name}/revisions/main"] = [as_json(record)]
    for path, data in tree.items():
        hub.routes[f"/{name}/resolve/{commit}/{path}"] = stored(data, path)


def pack_of(trees, kind, vectors, *, commits=COMMITS, sources=None):
    """A pack whose vectors are ones that no expert has by itself."""
    rows, masks = packs.stacked(vectors)
    members = tuple(
        Member(expert=name, revision=commit, sha256=source, rank=64, scale=1.0, target_modules=("q_proj",))
        for name, commit, source in zip(
            NAMES, commits, sources or [sha256(tree["adapter_model.safetensors"]) for tree in trees], strict=True
        )
    )
    given = {"arrow": {"arrow": rows, "arrow_sigma": {name: mask.astype(np.float32) for name, mask in masks.items()}}}
    more = given.get(kind, {kind: rows})
    return packs.write(
        Pack(base_model=BASE, members=members, kinds=(kind,), masks={kind: masks}, top_k=1, temperature=2.0, **more)
    )


def unlike(trees, tmp_path):
    """Parts of both experts, and unit vectors of one coordinate each that float16 keeps."""
    parts = []
    for number, tree in enumerate(trees):
        folder = tmp_path / f"read-{number}"
        folder.mkdir()
        for name, data in tree.items():
            (folder / name).write_bytes(data)
        parts.append(reference.parts(folder))
    vectors = []
    for number, one in enumerate(parts):
        rows = {module: np.zeros(part.A.shape[1], np.float32) for module, part in one.items()}
        for row in rows.values():
            row[3 + number] = 1.0
        vectors.append(rows)
    return parts, vectors


def logits(model):
    with torch.no_grad():
        return model(tiny_peft.tokens()).logits


def as_torch(vectors):
    return [{module: torch.from_numpy(row) for module, row in one.items()} for one in vectors]


def test_arrow_goes_by_the_pack_of_the_revisions_that_were_pulled(server, trees, tmp_path):
    parts, vectors = unlike(trees, tmp_path)
    server.routes[PACKS] = [Reply(pack_of(trees, "arrow", vectors))]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, endpoint=server.url, token="key-7")
    (asked,) = server.of(PACKS)
    assert json.loads(asked.body) == {
        "base_model": BASE, "experts": [f"{name}@{commit}" for name, commit in zip(NAMES, COMMITS, strict=True)],
        "kinds": ["arrow"],
    }  # fmt: skip
    assert {one.headers["authorization"] for one in server.asked} == {"Bearer key-7"}
    assert "key-7" not in repr(vars(routed))
    # top_k 1 and the temperature are those that the pack suggests.
    wanted, _ = reference.looped(reference.llama(), parts, as_torch(vectors), reference.arrow(top_k=1, temperature=2.0))
    found = routed(tiny_peft.tokens()).logits
    torch.testing.assert_close(found, logits(wanted), rtol=0, atol=1e-5)
    by_folders = RoutedModel.from_folders(reference.llama(), folders_in(tmp_path), top_k=1)
    assert (by_folders(tiny_peft.tokens()).logits - found).abs().max() > 1e-3


def folders_in(tmp_path: Path) -> list[Path]:
    return [tmp_path / "read-0", tmp_path / "read-1"]


def test_a_pack_made_of_other_weights_is_not_used_for_arrow(server, trees, tmp_path):
    _, vectors = unlike(trees, tmp_path)
    server.routes[PACKS] = [Reply(pack_of(trees, "arrow", vectors, sources=["0" * 64, "1" * 64]))]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, endpoint=server.url, top_k=1)
    own = RoutedModel.from_folders(reference.llama(), folders_in(tmp_path), top_k=1)
    assert torch.equal(routed(tiny_peft.tokens()).logits, own(tiny_peft.tokens()).logits)


def test_gates_come_with_the_pack(server, trees, tmp_path):
    parts, vectors = unlike(trees, tmp_path)
    server.routes[PACKS] = [Reply(pack_of(trees, "phatgoose", vectors))]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, strategy="phatgoose", top_k=2, endpoint=server.url)
    wanted, _ = reference.looped(reference.llama(), parts, as_torch(vectors), reference.phatgoose(top_k=2))
    torch.testing.assert_close(routed(tiny_peft.tokens()).logits, logits(wanted), rtol=0, atol=1e-5)


def test_compressed_experts_are_decoded_and_judged_by_what_they_became(server, trees, tmp_path):
    _, vectors = unlike(trees, tmp_path)
    for number, name in enumerate(NAMES):
        place = tmp_path / f"{number}.compeft.safetensors"
        compression.compress(tmp_path / f"read-{number}", place, density=0.3)
        server.routes[f"/api/v1/experts/{name}/compressed"] = [
            Reply(place.read_bytes(), headers={"ETag": f'"{sha256(place.read_bytes())}"'})
        ]
        compression.decompress(place, tmp_path / f"decoded-{number}")
    server.routes[PACKS] = [Reply(pack_of(trees, "arrow", vectors))]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, compressed=True, endpoint=server.url, top_k=1)
    own = RoutedModel.from_folders(reference.llama(), [tmp_path / "decoded-0", tmp_path / "decoded-1"], top_k=1)
    assert torch.equal(routed(tiny_peft.tokens()).logits, own(tiny_peft.tokens()).logits)
    weights = "/resolve/" + COMMITS[0] + "/adapter_model.safetensors"
    assert not [one for one in server.asked if one.path.endswith(weights)]


def test_the_hub_scores_the_experts_for_each_text(server):
    def route(asked):
        body = json.loads(asked.body)
        assert {name: value for name, value in body.items() if name != "texts"} == {
            "base_model": BASE, "top_k": 2, "min_score": 0, "filters": {"experts": list(NAMES)},
        }  # fmt: skip
        fits = [NAMES[1] if "coffee" in text else NAMES[0] for text in body["texts"]]
        return as_json({"answers": [{"results": [{"expert": name, "score": 0.4}]} for name in fits], "index_seq": 1})

    server.routes[ROUTE] = route
    texts = ["a cup of tea", "a cup of coffee", *["tea"] * 31]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, strategy="top1", endpoint=server.url, query=texts)
    assert [len(json.loads(asked.body)["texts"]) for asked in server.of(ROUTE)] == [32, 1]
    assert server.of(PACKS) == []
    routed(tiny_peft.tokens(33, 4))
    used = routed.usage()["model.layers.0.self_attn.q_proj"]
    assert used == pytest.approx({NAMES[0]: 32 / 33, NAMES[1]: 1 / 33})
    routed.reset_usage()
    routed.ask("any coffee?")
    routed(tiny_peft.tokens(2, 4))
    assert routed.usage()["model.layers.0.self_attn.q_proj"] == {NAMES[0]: 0.0, NAMES[1]: 1.0}


def test_scores_of_many_experts_are_asked_for_in_parts(server):
    def route(asked):
        named = json.loads(asked.body)["filters"]["experts"]
        assert json.loads(asked.body)["top_k"] == len(named) <= 50
        return as_json(
            {"answers": [{"results": [{"expert": name, "score": int(name[5:]) / 100} for name in named]}] * 2}
        )

    server.routes[ROUTE] = route
    names = [f"Ann/e{number}" for number in range(60)]
    with Hub(server.url) as hub:
        found = fetching.scores(hub, ["a", "b"], names, BASE, strategy="top1")
    assert found == [{name: number / 100 for number, name in enumerate(names)}] * 2


def test_glider_asks_for_the_score_of_that_name(server, trees, tmp_path):
    parts, vectors = unlike(trees, tmp_path)
    server.routes[PACKS] = [Reply(pack_of(trees, "phatgoose", vectors))]
    results = [{"expert": NAMES[1], "score": 0.8}, {"expert": NAMES[0], "score": 0.1}]
    server.routes[ROUTE] = [as_json({"answers": [{"results": results}], "index_seq": 1})]
    routed = RoutedModel.from_hub(
        reference.llama(), NAMES, strategy="glider", top_k=2, alpha=2.0, query="make coffee", endpoint=server.url
    )
    assert json.loads(server.of(ROUTE)[0].body)["strategy"] == "glider"
    rule = reference.phatgoose(top_k=2, alpha=2.0, scores=[[0.1, 0.8]] * 3)
    wanted, _ = reference.looped(reference.llama(), parts, as_torch(vectors), rule)
    torch.testing.assert_close(routed(tiny_peft.tokens()).logits, logits(wanted), rtol=0, atol=1e-5)


def test_another_base_is_refused_before_anything_is_fetched(server, trees):
    with pytest.raises(ExpertsIncompatible, match="belong to tiny/llama, not to other/base"):
        RoutedModel.from_hub("other/base", NAMES, endpoint=server.url)
    publish(server, NAMES[1], COMMITS[1], trees[1], base="tiny/other")
    with pytest.raises(ExpertsIncompatible, match="several base models") as caught:
        RoutedModel.from_hub(reference.llama(), NAMES, endpoint=server.url)
    assert "bob/coffee@main: tiny/other" in caught.value.detail
    assert not [asked for asked in server.asked if "/resolve/" in asked.path]


def test_an_alias_of_the_base_is_the_base(server):
    with Hub(server.url) as hub:
        found = fetching.fetch(hub, NAMES, kind=None, compressed=False, folder=None, base="alias")
    assert (found.base_model, [one.name for one in found.experts]) == (BASE, list(NAMES))


@pytest.mark.parametrize("names", [[], ["ann/tea", "ann/tea"]])
def test_experts_are_named_once_each(server, names):
    with pytest.raises(ParameterInvalid, match="named once"):
        RoutedModel.from_hub(reference.llama(), names, endpoint=server.url)


def test_answers_that_do_not_fit_the_question_are_refused(server, trees, tmp_path):
    _, vectors = unlike(trees, tmp_path)
    server.routes[PACKS] = [Reply(pack_of(trees, "arrow", vectors, commits=("a" * 40, "c" * 40)))]
    with pytest.raises(AnswerInvalid, match="odd pack"):
        RoutedModel.from_hub(reference.llama(), NAMES, endpoint=server.url)
    server.routes[ROUTE] = [
        as_json({"answers": []}),
        as_json({"answers": [{"results": [{"expert": "eve/else", "score": 1}]}]}),
        as_json({"answers": [{"results": [{"expert": NAMES[0], "score": "1"}]}]}),
    ]
    routed = RoutedModel.from_hub(reference.llama(), NAMES, strategy="top1", endpoint=server.url)
    for _ in range(3):
        with pytest.raises(AnswerInvalid):
            routed.ask("tea")
