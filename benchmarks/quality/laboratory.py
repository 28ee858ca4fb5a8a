"""Trains, compresses and evaluates: results of fresh experts, of the demo experts, and of merges of those."""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import demos, encoder, merges, results, training, variants
from benchmarks.quality.cache import Cache
from benchmarks.quality.demos import Demo
from benchmarks.quality.encoder import Base
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.results import Measured, Results
from benchmarks.quality.tasks import Rows, Task
from benchmarks.quality.variants import ABSENT, ORIGINAL, Variant

# Four of the demo experts: one data set, other intents, and unequal ranks, scalings and kinds.
MERGED = ("travel-desk", "kitchen-and-dining", "work-and-pay", "small-talk")
MERGE_DENSITIES = (0.2, 0.05)


@dataclass
class Laboratory:
    """A base, a folder for trained experts and outcomes, and what has been computed of the base."""

    base: Base
    work: Path
    densities: tuple[float, ...]
    base_features: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def cache(self) -> Cache:
        """Outcomes of earlier runs."""
        return Cache(self.work / "outcomes")

    def experts(
        self, kinds: Sequence[str], tasks: Sequence[Task], *, seeds: Sequence[int], rows: int | None
    ) -> list[Results]:
        """Every kind on every task. Seeds go round outermost: a run that is stopped has seen all of it."""
        found: dict[tuple[str, str], dict[Variant, list[_Look]]] = {}
        for seed in seeds:
            for kind in kinds:
                for task in tasks:
                    plan = training.plan(kind, task.name, rows)
                    say(f"{kind} {task.name}, seed {seed}: training")
                    folder = training.trained(self.base, task, plan, seed=seed, folder=self.work / "experts")
                    looks = found.setdefault((kind, task.name), {})
                    for variant in variants.of_kind(kind, self.densities):
                        say(f"{kind} {task.name}, seed {seed}: {variant.label}")
                        look = self._look(kind, folder, variant, self._with_head(folder, task.test))
                        looks.setdefault(variant, []).append(look)
        return [_results(kind, task, looks) for (kind, task), looks in found.items()]

    def demos(self, experts: Sequence[Demo]) -> list[Results]:
        """Every demo expert, by the nearest label text, under the presets for LoRA."""
        found = []
        for demo in experts:
            looks: dict[Variant, list[_Look]] = {}
            for variant in variants.of_kind("lora", self.densities):
                say(f"demo {demo.name}: {variant.label}")
                looks[variant] = [self._look("lora", demo.folder, variant, self._by_text(demo))]
            found.append(_results("demo", demo.name, looks))
        return found

    def merges(self, experts: Sequence[Demo]) -> list[Results]:
        """What each task keeps when four experts are merged, originals beside compressed ones."""
        found = []
        used = [demo for demo in experts if demo.name in MERGED]
        chosen = [ORIGINAL, *(variants.at("default", density) for density in MERGE_DENSITIES)]
        # A merge weighs experts against each other by their size, which the unbiased scale of the preset exaggerates.
        chosen += [Variant("rule norm", "default", density, "norm") for density in MERGE_DENSITIES]
        for method in merges.METHODS:
            looks: dict[str, dict[Variant, list[_Look]]] = {demo.name: {} for demo in used}
            for variant in chosen:
                say(f"{method} of {len(used)} experts: {variant.label}")
                with tempfile.TemporaryDirectory() as name:
                    folders = [self._folder("lora", demo.folder, variant, Path(name) / demo.name)[0] for demo in used]
                    model = merges.merged(method, folders, self.base)
                for demo in used:
                    looks[demo.name][variant] = [_Look(self._by_text(demo)(model))]
            for demo in used:
                looks[demo.name][ABSENT] = [_Look(self._by_text(demo)(self.base.model))]
                alone = Variant("the expert alone")
                looks[demo.name][alone] = [self._look("lora", demo.folder, ORIGINAL, self._by_text(demo))]
            of_tasks = [_results(f"merge {method}", name, of_task) for name, of_task in looks.items()]
            found += [*of_tasks, results.pooled(of_tasks, "all four tasks")]
        return found

    def _look(self, kind: str, folder: Path, variant: Variant, judge: Callable[[Any], Outcome]) -> "_Look":
        if variant is ABSENT:
            return _Look(judge(self.base.model))
        with tempfile.TemporaryDirectory() as name:
            found, ratio, cosine = self._folder(kind, folder, variant, Path(name))
            return _Look(judge(variants.load(kind, found, self.base)), ratio, cosine)

    def _folder(
        self, kind: str, folder: Path, variant: Variant, place: Path
    ) -> tuple[Path, float | None, float | None]:
        """The folder to load; for a compressed expert, how many times smaller it is and the cosine that is left."""
        if variant is ORIGINAL:
            return folder, None, None
        place.mkdir(parents=True, exist_ok=True)
        report, decoded = variants.compressed(kind, folder, variant, place, self.base)
        return decoded, report.ternary_ratio, report.product_cosine if report.modules else report.cosine

    def _with_head(self, folder: Path, rows: Rows) -> Callable[[Any], Outcome]:
        weight, bias = training.read_head(folder)
        head = hashlib.sha256((folder / training.HEAD_FILE).read_bytes()).hexdigest()

        def judge(model: Any) -> Outcome:
            name = encoder.digest(model)

            def compute() -> Outcome:
                found = self._features(model, name, rows)
                return encoder.outcome(found @ weight.T + bias, rows)

            return self.cache.outcome(("head", name, head, rows.sha256), compute)

        return judge

    def _by_text(self, demo: Demo) -> Callable[[Any], Outcome]:
        def judge(model: Any) -> Outcome:
            parts = ("text", encoder.digest(model), repr(demo.label_texts), demo.test.sha256)
            return self.cache.outcome(parts, lambda: demos.outcome(model, demo, self.base))

        return judge

    def _features(self, model: Any, name: str, rows: Rows) -> torch.Tensor:
        """Features of all rows; those of the untouched base serve every seed, and every expert that was erased."""
        if name != encoder.digest(self.base.model):
            return encoder.features(model, self.base.tokens(rows.texts))
        if rows.sha256 not in self.base_features:
            self.base_features[rows.sha256] = encoder.features(model, self.base.tokens(rows.texts))
        return self.base_features[rows.sha256]


@dataclass(frozen=True)
class _Look:
    """One variant under one seed."""

    outcome: Outcome
    ratio: float | None = None
    cosine: float | None = None


def _results(kind: str, task: str, looks: dict[Variant, list[_Look]]) -> Results:
    measured = [
        Measured(
            variant.label,
            tuple(look.outcome for look in of_seeds),
            _mean([look.ratio for look in of_seeds]),
            _mean([look.cosine for look in of_seeds]),
        )
        for variant, of_seeds in looks.items()
    ]
    return Results(kind, task, tuple(measured))


def _mean(values: Sequence[float | None]) -> float | None:
    """None where nothing is there to be averaged; an adapter that was erased has no cosine."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
