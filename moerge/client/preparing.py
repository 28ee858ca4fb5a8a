"""A recipe made ready to be carried out here: experts fetched where they are references, opened, and pinned by content.

What is pinned is what a hub pins, so that the same experts give the same bytes on either side.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moerge.client import environment, pulling
from moerge.client.drafts import Draft, Named
from moerge.client.hub import Hub
from moerge.compression.adapters import CONFIG_FILE, WEIGHTS_FILE
from moerge.errors import ExpertsIncompatible, MoergeError, RecipeInvalid
from moerge.merging import catalogue, sidecar
from moerge.merging import recipe as recipes
from moerge.merging.recipe import Recipe
from moerge.merging.run import ACCEPTED
from moerge.merging.statistics import Statistics
from moerge.tensors import adapters, bases, files, header
from moerge.tensors.adapters import Adapter, AdapterConfig, AdapterFacts, BaseWeights

# The revision of what no hub has.
LOCAL = "local"
# What a request says to a hub beside the recipe.
_TERMS = ("acknowledge_licences", "licence")
_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, sidecar.FILE})


@dataclass(frozen=True)
class Ready:
    """A recipe and all that carrying it out takes, by digest: adapters, or the folders of full checkpoints.

    `base` stands where the result depends on the base's weights.
    """

    recipe: Recipe
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    base: BaseWeights | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Placed:
    """An expert as it lies on this disk."""

    named: Named
    position: int
    folder: Path
    revision: str
    hub_base: str = ""  # what the hub calls its base

    @property
    def pointer(self) -> str:
        return f"/experts/{self.position}"

    @property
    def config(self) -> AdapterConfig:
        return adapters.parse_config((self.folder / CONFIG_FILE).read_bytes())

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE

    @property
    def is_checkpoint(self) -> bool:
        """Whether it holds the weights of a whole model."""
        has_tensors = any(self.folder.glob("*.safetensors"))
        return has_tensors and not any((self.folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))


@contextmanager
def prepared(draft: Draft, *, hub: Hub | None = None) -> Iterator[Ready]:
    """Everything open for as long as the context lasts. `hub` is where references are fetched from.

    Raises RecipeInvalid, ExpertsIncompatible with a pointer to the expert, what pulling raises, OSError.
    """
    draft = replace(draft, fields={name: value for name, value in draft.fields.items() if name not in _TERMS})
    _check_rest(draft)
    placed = [_place(named, position, hub) for position, named in enumerate(draft.experts)]
    with ExitStack() as opened:
        base = opened.enter_context(BaseWeights(draft.base)) if draft.base else None
        if all(one.is_checkpoint for one in placed):
            yield _of_checkpoints(draft, placed, base)
        else:
            yield _of_adapters(draft, placed, base)


def _check_rest(draft: Draft) -> None:
    """Refuse all that is wrong apart from the experts' content, before anything is fetched. Raises RecipeInvalid."""
    unknown = {"expert": "-", "revision": "-", "digest": "-", "statistics": "-"}
    pairs = zip(draft.experts, draft.weights(), strict=True)
    recipes.parse({**draft.fields, "experts": [{**named.fields, **weight, **unknown} for named, weight in pairs]})


def _place(named: Named, position: int, hub: Hub | None) -> _Placed:
    """Folder and revision of an expert; a reference is fetched, or found where it was fetched before."""
    if named.folder is not None:
        return _Placed(named, position, named.folder, LOCAL)
    reference = named.reference
    if reference is None or hub is None:
        raise RecipeInvalid(
            f"{named.text} is on a hub, and none is named.", pointer=f"/experts/{position}/expert", met=named.text,
            wanted="a folder, or a hub", remedy="Name the hub, or the expert's folder.",
        )  # fmt: skip
    snapshot = hub.snapshot(reference)
    folder = environment.cache() / "experts" / reference.owner / reference.name / snapshot.commit
    pulling.pull(hub, reference, folder, only=_FILES, snapshot=snapshot)
    return _Placed(named, position, folder, snapshot.commit, snapshot.base_model)


def _of_checkpoints(draft: Draft, placed: Sequence[_Placed], base: BaseWeights | None) -> Ready:
    found = {one.position: bases.digest(one.folder) for one in placed}
    items = [
        _item(one, weight, {"digest": found[one.position]}) for one, weight in zip(placed, draft.weights(), strict=True)
    ]
    fields = {**draft.fields, "output": _output(draft, "full")}
    if draft.base is not None:
        fields.setdefault("base_model", str(draft.base))
    return Ready(
        recipes.parse({**fields, **_weights_of(base, fields), "experts": items}),
        checkpoints={found[one.position]: one.folder for one in placed},
        base=base,
    )


def _of_adapters(draft: Draft, placed: Sequence[_Placed], base: BaseWeights | None) -> Ready:
    facts = [_about(one) for one in placed]
    names = [one.config.base_model_name_or_path for one in placed]
    fields = {**draft.fields, "output": _output(draft, "ia3" if all(one.family == "ia3" for one in facts) else "lora")}
    if fields.get("base_model") is None:
        fields["base_model"] = _base_model(draft, placed, names)
    said = fields.get("base_model")
    base = base if _needs_base(fields["output"], facts) else None
    spec = catalogue().get(str(fields.get("method")))
    loaded, items, statistics, warnings = {}, [], {}, []
    for one, fact, name, weight in zip(placed, facts, names, draft.weights(), strict=True):
        adapter = _load(one, base)
        loaded[adapter.digest] = adapter
        found = {"digest": adapter.digest}
        if spec is not None and spec.needs and (beside := _statistics(one, adapter)):
            statistics[beside] = sidecar.load(one.folder / sidecar.FILE)
            found["statistics"] = beside
        items.append(_item(one, weight, found) | ({"base_model": name} if said is None and name else {}))
        warnings += [f"{one.named.text}: {text}" for text in fact.warnings]
        if draft.fields.get("base_model") not in {None, name} and name is not None:
            warnings.append(f"{one.named.text} says that it was trained on {name}; the recipe says {said}.")
    return Ready(
        recipes.parse({**fields, **_weights_of(base, fields), "experts": items}),
        adapters=loaded,
        statistics=statistics,
        base=base,
        warnings=tuple(warnings),
    )


def _base_model(draft: Draft, placed: Sequence[_Placed], names: Sequence[str | None]) -> str | None:
    """What the base is called: by the hub that knows all experts, else by all configs; None where they differ."""
    by_hub = {one.hub_base for one in placed}
    if len(by_hub) == 1 and "" not in by_hub:
        return by_hub.pop()
    if len(set(names)) == 1:
        return names[0]
    # Whoever gives the base's folder has said that it is one base.
    return None if draft.base is None else str(draft.base)


def _about(one: _Placed) -> AdapterFacts:
    try:
        return adapters.check(one.config, header.read(one.weights))
    except (MoergeError, FileNotFoundError) as error:
        raise _of_expert(one, error) from error


def _load(one: _Placed, base: BaseWeights | None) -> Adapter:
    try:
        return adapters.load(one.config, one.weights, accept=ACCEPTED, base=base)
    except MoergeError as error:
        raise _of_expert(one, error) from error


def _statistics(one: _Placed, adapter: Adapter) -> str | None:
    """The SHA-256 of what lies beside an adapter, held against it; None where nothing does."""
    path = one.folder / sidecar.FILE
    if not path.is_file():
        return None
    try:
        head = header.read(path)
        sidecar.check(head, modules=adapter.facts.modules, shapes=adapter.facts.shapes)
        sidecar.verify(path, head)
    except MoergeError as error:
        raise _of_expert(one, error) from error
    return files.sha256(path)


def _output(draft: Draft, kind: str) -> Any:
    """The output that is asked for, of this kind where none is named."""
    given = draft.fields.get("output", {})
    return {"kind": kind, **given} if isinstance(given, dict) else given


def _needs_base(output: Any, facts: Sequence[AdapterFacts]) -> bool:
    """Whether the result depends on the base's weights: as a hub decides it, so that both name them or none does."""
    fields = output if isinstance(output, dict) else {}
    kept = ACCEPTED if fields.get("saved") is not None else ()
    blocked = any(blocker.pointer not in kept for fact in facts for blocker in fact.blockers)
    has_gains = fields.get("kind") != "ia3" and any(fact.family == "ia3" for fact in facts)
    return fields.get("kind") == "full" or blocked or has_gains


def _weights_of(base: BaseWeights | None, fields: Mapping[str, Any]) -> dict[str, str]:
    """The digest of the base, where it is used, unless the recipe names one itself, which is then held against it."""
    return {} if base is None or "base_weights" in fields else {"base_weights": base.digest}


def _item(one: _Placed, weight: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, Any]:
    """An expert as the library parses it. What the author said of its content must be so."""
    for name, value in found.items():
        given = one.named.fields.get(name, value)
        if given != value:
            raise ExpertsIncompatible(
                f"{one.named.text} is not what the recipe was written for.", pointer=f"{one.pointer}/{name}",
                met=value, wanted=given, remedy=f"Bring back that content, or leave {name} out of the recipe.",
            )  # fmt: skip
    return {**one.named.fields, **weight, **found, "expert": one.named.full_name, "revision": one.revision}


def _of_expert(one: _Placed, error: MoergeError | FileNotFoundError) -> ExpertsIncompatible:
    """What is wrong with one expert, said of the recipe."""
    if isinstance(error, FileNotFoundError):
        return ExpertsIncompatible(
            f"{one.named.text} is no adapter: there is no {Path(error.filename).name} in it.",
            pointer=f"{one.pointer}/expert", met="nothing", wanted=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="Name the folder that PEFT's save_pretrained wrote.",
        )  # fmt: skip
    return ExpertsIncompatible(
        f"{one.named.text} cannot be merged: {error.detail}", pointer=f"{one.pointer}/expert", met=error.met,
        wanted=error.wanted, remedy=error.remedy, rule=error.rule,
    )  # fmt: skip
