"""Kinship before a merge: measured once for each pair of contents, by a job that only those see who see every expert."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from registry import jobs
from registry.models import Job, Kinship
from registry.services import experts, kinship
from tests import tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND, ready
from workers import runner

pytestmark = pytest.mark.django_db

THIRD = tiny.lora(seed=3, rank=3, alpha=3, modules=(tiny.QUERY,))
CHECK = "/api/v1/merges/check"


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def three(ann):
    return [ready(ann[0], name, files) for name, files in (("a", FIRST), ("b", SECOND), ("c", THIRD))]


def asked(caller: hf.Caller, *names: str) -> dict:
    body = {"method": "linear", "experts": [{"expert": f"ann/{name}"} for name in names]}
    answer = caller.json("POST", CHECK, body)
    assert answer.status_code == 200, answer.json()
    return answer.json()["kinship"]


def delta(files: dict[str, bytes]) -> np.ndarray:
    """Both modules as one vector of float64, zeros where there is none, straight from the file."""
    config, tensors = json.loads(files["adapter_config.json"]), load(files["adapter_model.safetensors"])
    found = []
    for module in (tiny.QUERY, tiny.VALUE):
        a = tensors.get(f"base_model.model.{module}.lora_A.weight", np.zeros((1, 384)))
        b = tensors.get(f"base_model.model.{module}.lora_B.weight", np.zeros((384, 1)))
        found.append((config["lora_alpha"] / config["r"] * b.astype(np.float64) @ a).ravel())
    return np.concatenate(found)


def test_pairs_are_measured_by_a_job_and_told_from_then_on(ann, three) -> None:
    before = asked(ann[1], "a", "b")
    assert (before["state"], before["pairs"]) == ("measuring", [])
    assert ann[1].get(f"/api/v1/jobs/{before['job']}").json()["kind"] == "kinship"
    assert asked(ann[1], "b", "a")["job"] == before["job"]
    runner.run(before["job"])
    assert Job.objects.get(pk=before["job"]).state == Job.State.DONE, Job.objects.get(pk=before["job"]).error
    after = asked(ann[1], "a", "b")
    assert (after["state"], after["job"]) == ("ready", None)
    (pair,) = after["pairs"]
    assert {pair["first"], pair["second"]} == {"ann/a", "ann/b"}
    x, y = delta(FIRST), delta(SECOND)
    assert pair["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
    assert pair["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert pair["distance"] == pytest.approx(np.linalg.norm(x - y), rel=1e-4)
    both = (x != 0) & (y != 0)
    assert pair["conflict"] == pytest.approx((x * y < 0)[both].mean(), abs=1e-4)


def test_another_recipe_measures_only_what_is_missing(ann, three) -> None:
    runner.run(asked(ann[1], "a", "b")["job"])
    known = Kinship.objects.get()
    more = asked(ann[1], "a", "b", "c")
    assert [{pair["first"], pair["second"]} for pair in more["pairs"]] == [{"ann/a", "ann/b"}]
    assert len(Job.objects.get(pk=more["job"]).parameters["pairs"]) == 2
    runner.run(more["job"])
    assert Kinship.objects.count() == 3
    assert Kinship.objects.get(pk=known.pk).created_at == known.created_at
    assert asked(ann[1], "c", "b")["state"] == "ready"
    # A copy under another name has the same content.
    ready(ann[0], "copy", FIRST)
    assert asked(ann[1], "copy", "b")["state"] == "ready"


def test_who_has_no_account_gets_what_is_known_and_starts_nothing(ann, three) -> None:
    anonymous = hf.Caller()
    answer = asked(anonymous, "a", "b")
    assert (answer["state"], answer["job"], answer["pairs"]) == ("partial", None, [])
    assert answer["reason"]
    assert not Job.objects.filter(kind="kinship").exists()
    runner.run(asked(ann[1], "a", "b")["job"])
    assert asked(anonymous, "a", "b")["state"] == "ready"


def test_only_who_sees_every_expert_sees_the_job(ann, three) -> None:
    job = asked(ann[1], "a", "b")["job"]
    stranger = hf.person("rob")[1]
    assert stranger.get(f"/api/v1/jobs/{job}").status_code == 200
    experts.change_visibility(user=ann[0], expert=three[1], visibility="private")
    assert stranger.get(f"/api/v1/jobs/{job}").status_code == 404
    assert hf.Caller().get(f"/api/v1/jobs/{job}").status_code == 404
    assert ann[1].get(f"/api/v1/jobs/{job}").status_code == 200
    experts.delete(user=ann[0], expert=three[1])
    assert ann[1].get(f"/api/v1/jobs/{job}").status_code == 404


def test_a_measurement_can_be_cancelled_and_is_started_again_by_the_next_question(ann, three) -> None:
    job = asked(ann[1], "a", "b")["job"]
    assert ann[1].json("POST", f"/api/v1/jobs/{job}/cancel", {}).json()["state"] == "cancelled"
    runner.run(job)
    assert not Kinship.objects.exists()
    assert asked(ann[1], "a", "b")["job"] == job
    lease = jobs.claim(job)
    jobs.cancel(Job.objects.get(pk=job))
    from workers.jobs import kinship as measuring

    with pytest.raises(runner.Stopped):
        measuring.run(runner.Work(lease))
    assert not Kinship.objects.exists()


def test_too_many_values_or_too_many_questions_start_no_job(ann, three, settings) -> None:
    settings.HUB_KINSHIP_MAX_VALUES = 3 * 384 * 384 - 1
    large = asked(ann[1], "a", "b")
    assert (large["state"], large["job"]) == ("partial", None)
    assert str(3 * 384 * 384) in large["reason"]
    settings.HUB_KINSHIP_MAX_VALUES += 1
    settings.HUB_MERGE_MAX_QUEUED = 1
    assert asked(ann[1], "a", "b")["state"] == "measuring"
    assert asked(ann[1], "b", "c")["state"] == "partial"
    assert Job.objects.filter(kind="kinship").count() == 1


def test_the_order_of_a_pair_does_not_matter_and_nobody_waits_for_its_job(ann, three) -> None:
    assert kinship.pair_of("b", "a") == kinship.pair_of("a", "b") == ("a", "b")
    assert Job.objects.get(pk=asked(ann[1], "a", "b")["job"]).priority == jobs.NOBODY_WAITS


def test_experts_of_ia3_are_compared_by_their_gains(ann) -> None:
    gains = {"a": [1.5, 0.5, 1.0, 2.0], "b": [0.5, 0.5, 2.0, 1.0]}
    for name, values in gains.items():
        config = {
            "peft_type": "IA3", "base_model_name_or_path": tiny.BASE, "feedforward_modules": [], "target_modules": ["query"],
        }  # fmt: skip
        tensor = np.tile(np.float32(values), 96)[:, None]
        files = {
            "README.md": tiny.card(),
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": save(
                {f"base_model.model.{tiny.QUERY}.ia3_l": tensor}, metadata={"format": "pt"}
            ),
        }
        ready(ann[0], name, files)
    job = asked(ann[1], "a", "b")["job"]
    runner.run(job)
    assert Job.objects.get(pk=job).state == Job.State.DONE, Job.objects.get(pk=job).error
    (pair,) = asked(ann[1], "a", "b")["pairs"]
    # Gains less one, by hand: a = (.5, -.5, 0, 1), b = (-.5, -.5, 1, 0), 96 times.
    assert pair["cosine"] == pytest.approx(0.0, abs=1e-6)
    assert pair["distance"] == pytest.approx((96 * (1 + 0 + 1 + 1)) ** 0.5, rel=1e-5)
    assert pair["conflict"] == pytest.approx(0.5)
