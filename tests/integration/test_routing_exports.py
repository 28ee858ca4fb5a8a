"""The experts of one base as a configuration of vLLM Semantic Router and as cards: complete, valid, nobody's secrets."""

import json
from typing import Any

import pytest
import yaml

from registry.models import Expert
from tests.integration import hf
from tests.integration.routables import expert, next_head

pytestmark = pytest.mark.django_db
PATH = "/api/v1/routing/export?base_model=base/one"
# Texts that would end a value, start another one, or be read as something else than text.
HOSTILE = [
    '"\nrouting: {decisions: []}\n#', "'", "a: b # c", "- x\n- y", "&a *a", "!!python/object:os.system [ls]", "---", "%TAG",
    "null", "yes", "0x1F", "1e5", "2026-01-01", "{{ jinja }}", "tab\there", "\u2028\u0085 separators", "\N{PILE OF POO} Zürich",
    "key ${HF_TOKEN} $PATH $$ $", "\\x00 \\", "x" * 4000,
]  # fmt: skip


def fetched(query: str = "&format=vllm-sr", caller: hf.Caller | None = None, *, status: int = 200) -> str:
    answer = (caller or hf.Caller()).get(PATH + query)
    assert answer.status_code == status, answer.body
    return answer.body.decode()


def checked(text: str) -> dict[str, Any]:
    """The configuration in a text, if it keeps the rules of release v0.3.0 for what it uses. Raises AssertionError."""
    config = yaml.safe_load(text)
    fields(config, {"version": str, "listeners": list, "providers": dict, "routing": dict})
    assert config["version"] == "v0.3"
    for row in config["listeners"]:
        fields(row, {"name": str, "address": str, "port": int, "timeout": str})
    providers, routing = config["providers"], config["routing"]
    fields(providers, {"defaults": dict, "models": list})
    fields(providers["defaults"], {"default_model": str})
    for row in providers["models"]:
        fields(row, {"name": str, "provider_model_id": str, "backend_refs": list})
        for backend in row["backend_refs"]:
            fields(backend, {"name": str, "endpoint": str, "protocol": str, "weight": int})
            host, _, port = backend["endpoint"].rpartition(":")
            assert host
            assert port.isdigit()
    fields(routing, {"modelCards": list, "signals": dict, "decisions": list})
    loras: dict[str, set[str]] = {}
    for row in routing["modelCards"]:
        fields(row, {"name": str, "loras": list})
        assert row["name"] not in loras
        for lora in row["loras"]:
            fields(lora, {"name": str, "description": str})
        loras[row["name"]] = {lora["name"] for lora in row["loras"]}
        assert len(loras[row["name"]]) == len(row["loras"])
    models = {row["name"] for row in providers["models"]}
    assert models <= loras.keys()
    assert providers["defaults"]["default_model"] in models
    fields(routing["signals"], {"embeddings": list})
    signals = set()
    for row in routing["signals"]["embeddings"]:
        fields(row, {"name": str, "threshold": float, "aggregation_method": str, "candidates": list})
        assert row["aggregation_method"] in {"mean", "max", "any"}
        assert 0 <= row["threshold"] <= 1
        assert row["candidates"]
        assert all(isinstance(text, str) and text.strip() for text in row["candidates"])
        assert row["name"] not in signals
        signals.add(row["name"])
    names = [row["name"] for row in routing["decisions"]]
    assert len(set(names)) == len(names)
    for row in routing["decisions"]:
        fields(row, {"name": str, "description": str, "priority": int, "rules": dict, "modelRefs": list})
        fields(row["rules"], {"operator": str, "conditions": list})
        assert row["rules"]["operator"] in {"AND", "OR", "NOT"}
        for condition in row["rules"]["conditions"]:
            assert condition == {"type": "embedding", "name": condition["name"]}
            assert condition["name"] in signals
        for model in row["modelRefs"]:
            fields(model, {"model": str, "lora_name": str, "use_reasoning": bool})
            assert model["lora_name"] in loras[model["model"]]
    return config


def fields(record: Any, wanted: dict[str, type]) -> None:
    assert {name: type(value) for name, value in record.items()} == wanted


def by_name(config: dict[str, Any]) -> dict[str, list[str]]:
    return {row["name"]: row["candidates"] for row in config["routing"]["signals"]["embeddings"]}


def test_every_expert_is_a_lora_a_signal_with_its_texts_and_a_decision() -> None:
    expert("ann/tea-desk", "Answers on tea.", "is it green", "how long does it brew")
    expert("bob/bare")
    expert("bob/other", "Elsewhere.", base="base/two")
    config = checked(fetched())
    assert by_name(config) == {
        "ann/tea-desk": ["tea desk. Answers on tea.", "is it green", "how long does it brew"],
        "bob/bare": ["bare."],
    }
    assert config["routing"]["modelCards"] == [
        {
            "name": "base/one",
            "loras": [
                {"name": "ann/tea-desk", "description": "Answers on tea."},
                {"name": "bob/bare", "description": ""},
            ],
        }
    ]
    assert {row["name"]: row["modelRefs"][0]["lora_name"] for row in config["routing"]["decisions"]} == {
        "ann/tea-desk": "ann/tea-desk",
        "bob/bare": "bob/bare",
    }
    # One priority for all: then the nearest one wins.
    assert len({row["priority"] for row in config["routing"]["decisions"]}) == 1
    assert {row["threshold"] for row in config["routing"]["signals"]["embeddings"]} == {0.72}


def test_hostile_cards_stay_texts_and_reach_no_environment() -> None:
    for number, text in enumerate(HOSTILE):
        expert(f"ann/e{number:02d}", text, text, "plain")
    text = fetched()
    config = checked(text)
    assert len(by_name(config)) == len(HOSTILE)
    for number, written in enumerate(HOSTILE):
        _, example, plain = by_name(config)[f"ann/e{number:02d}"]
        assert plain == "plain"
        # But for white space, line ends and dollars, which the other program would replace, it is what was written.
        assert "".join(example.split()) == "".join(written.split())
        assert "${" not in example
        assert "\n" not in example
    assert "$P" not in text
    # In quotes, because readers of YAML differ in what they take for a number or a date.
    for written in ("null", "yes", "0x1F", "1e5", "2026-01-01"):
        assert text.count(f' "{written}"\n') == 3  # of the LoRA, the candidate and the decision


def test_the_threshold_of_the_signals_is_the_callers() -> None:
    expert("ann/tea", "Tea.")
    config = checked(fetched("&format=vllm-sr&threshold=0.5"))
    assert config["routing"]["signals"]["embeddings"][0]["threshold"] == 0.5
    for wrong in ("1.1", "-1", "nan", "x"):
        assert '"?threshold"' in fetched(f"&format=vllm-sr&threshold={wrong}", status=422)


def test_cards_come_as_the_bench_reads_them(tmp_path) -> None:
    from benchmarks import routing as bench

    expert("ann/tea", "Tea — Zürich.", "is it green", " ", tags=("drinks",))
    expert("bob/bare")
    text = fetched("&format=jsonl")
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "id": "ann/tea", "suite": "ann", "name": "tea", "description": "Tea — Zürich.", "examples": ["is it green"],
            "tags": ["drinks"],
        },
        {"id": "bob/bare", "suite": "bob", "name": "bare", "description": "", "examples": [], "tags": []},
    ]  # fmt: skip
    path = tmp_path / "cards.jsonl"
    path.write_text(text)
    made = [bench.card_of(record) for record in bench.lines(path, needed=("id", "name"))]
    assert [card.expert for card in made] == ["ann/tea", "bob/bare"]


@pytest.mark.parametrize("kind", ["vllm-sr", "jsonl"])
def test_what_the_caller_may_not_see_or_route_is_not_exported(kind: str) -> None:
    carl = hf.person("carl")[1]
    expert("carl/secret", "Hidden words.", "hush hush", private=True)
    expert("ann/tea", "Tea.")
    for state in ("yanked_at", "deleted_at"):
        row = expert(f"ann/{state[:4]}", "Gone.").expert
        Expert.objects.filter(pk=row.pk).update(**{state: "2026-01-01T00:00:00Z"})
    next_head(expert("ann/slow", "Not yet.").expert, state="processing")
    for text in (fetched(f"&format={kind}"), fetched(f"&format={kind}", hf.person("dora")[1])):
        assert "ann/tea" in text
        for hidden in ("secret", "hush", "Hidden", "Gone", "Not yet"):
            assert hidden not in text
    assert "hush hush" in fetched(f"&format={kind}", carl)
    assert "Gone" not in fetched(f"&format={kind}&owner=ann", carl)


def test_filters_narrow_an_export() -> None:
    expert("ann/tea", "Tea.", tags=("drinks",), licence="mit")
    expert("ann/cake", "Cake.", tags=("food",), licence="mit")
    expert("bob/tea", "Tea.", tags=("drinks",))
    assert list(by_name(checked(fetched("&format=vllm-sr&owner=ann")))) == ["ann/cake", "ann/tea"]
    assert list(by_name(checked(fetched("&format=vllm-sr&tag=drinks")))) == ["ann/tea", "bob/tea"]
    assert list(by_name(checked(fetched("&format=vllm-sr&licence=mit&tag=food")))) == ["ann/cake"]


def test_what_cannot_be_exported_is_refused_with_the_field(monkeypatch) -> None:
    expert("ann/tea", "Tea.")
    expert("ann/cake", "Cake.")
    assert '"?format"' in fetched("&format=xml", status=422)
    assert '"?format"' in fetched("", status=422)
    assert "no-store" in hf.Caller().get(f"{PATH}&format=jsonl")["Cache-Control"]
    none = hf.Caller().get("/api/v1/routing/export?format=jsonl&base_model=base/none")
    assert (none.status_code, none.json()["code"]) == (422, "base-unknown")
    assert "Take a filter away" in fetched("&format=jsonl&owner=nobody", status=404)
    monkeypatch.setattr("registry.services.routing_exports.MOST_EXPERTS", 1)
    assert "Narrow it" in fetched("&format=vllm-sr", status=422)
