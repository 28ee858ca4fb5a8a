"""A model whose experts are chosen while it runs: for every token and module, or for every input."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moerge import table
from moerge.errors import ParameterInvalid
from moerge.routing import packs
from moerge.routing.packs import Pack
from moerge.runtime import experts as folders_of
from moerge.runtime import fetching, loading, strategies, vectors
from moerge.runtime.base import Settings, Strategy
from moerge.runtime.experts import Expert
from moerge.runtime.fetching import Source
from moerge.runtime.inputs import Passage
from moerge.runtime.router import Plan, Router

Scores = Mapping[str, float] | Sequence[Mapping[str, float]]


@cache
def catalogue() -> Mapping[str, Strategy]:
    """Every strategy by name."""
    return {name: module.SPEC for name, module in table.load(strategies).items()}


class RoutedModel:
    """A base model with several experts, of which few act on each token.

    The experts are adapters of a stock PeftModel, `model`, loaded by `load_adapter`, none of them active: PEFT's LoRA
    layers then give the output of the base alone. A hook behind the forward of each of them asks the strategy which
    experts the tokens go to and adds c_e * scaling_e * B_e A_e u for those. Experts may have different ranks, scalings
    (rsLoRA, alpha patterns) and modules; one that lacks a module is not among those chosen from there. DoRA and
    lora_bias act as in PEFT. The model is for inference: it is in eval mode and dropout does nothing.
    """

    def __init__(
        self,
        base: Any,
        experts: Sequence[Expert],
        *,
        strategy: str,
        settings: Settings,
        pack: Pack | None = None,
        head_of: str | None = None,
        skip_gateless: bool = False,
        source: Source | None = None,
    ) -> None:
        """Use `from_folders` or `from_hub`."""
        spec = catalogue().get(strategy)
        if spec is None:
            raise ParameterInvalid(
                f"There is no strategy {strategy!r}.", pointer="strategy", met=strategy, wanted=", ".join(catalogue()),
                remedy="Choose one of these.",
            )  # fmt: skip
        _check(settings)
        self.experts = tuple(expert.name for expert in experts)
        self.strategy = spec
        found = vectors.of(spec.kind, experts, pack, skips_gateless=skip_gateless) if spec.kind else None
        self.model, names = loading.with_experts(base, experts, head_of=head_of)
        self._source = source
        self._plan = Plan(spec, settings, Passage())
        self._routers: dict[str, Router] = {}
        self._plan.passage.watch(self.model.get_base_model())
        for module, layer in loading.lora_layers(self.model, experts).items():
            rows = None if found is None else found.rows.get(module)
            mask = None if found is None else found.masks.get(module)
            present = [
                number for number, expert in enumerate(experts)
                if module in expert.facts.shapes and (found is None or (mask is not None and mask[number]))
            ]  # fmt: skip
            router = Router(
                module=module,
                plan=self._plan,
                experts=tuple(present),
                names=tuple(names[number] for number in present),
                vectors=None if rows is None else torch.from_numpy(rows[present]),
                total=len(experts),
            )
            layer.register_forward_hook(router)
            self._routers[module] = router

    @classmethod
    def from_folders(
        cls,
        model: Any,
        folders: Sequence[str | Path] | Mapping[str, str | Path],
        *,
        strategy: str = "arrow",
        top_k: int = packs.TOP_K,
        temperature: float = packs.TEMPERATURE,
        alpha: float = packs.ALPHA,
        bias: Scores | None = None,
        expert: str | Sequence[str] | None = None,
        head_of: str | None = None,
        skip_gateless: bool = False,
    ) -> Self:
        """From adapters on this machine: folders that PEFT saved, or compressed ones, in a list or by name.

        `model` is a model, which is changed, or where transformers finds one. `bias` is what `set_scores` takes, and
        `expert` what `choose` takes. `head_of` names the expert whose saved modules (a classifier) serve every input.
        With `skip_gateless`, experts without gates are not asked where a strategy needs gates. Raises NotRoutable,
        GatesMissing, ParameterInvalid and what reading an adapter raises.
        """
        named = dict(folders) if isinstance(folders, Mapping) else _names(folders)
        if not named:
            raise ParameterInvalid("No expert is named.", pointer="folders", met="none", wanted="one or more",
                                   remedy="Name folders of adapters.")  # fmt: skip
        settings = Settings(top_k=top_k, temperature=temperature, alpha=alpha)
        with tempfile.TemporaryDirectory(prefix="moerge-") as place:
            experts = [
                folders_of.read(name, folders_of.opened(Path(folder), Path(place) / str(number)))
                for number, (name, folder) in enumerate(named.items())
            ]
            made = cls(
                loading.base_of(model, experts) if isinstance(model, str | Path) else model,
                experts,
                strategy=strategy,
                settings=settings,
                head_of=head_of or _sole(expert),
                skip_gateless=skip_gateless,
            )
        made._prefer(bias, expert)
        return made

    @classmethod
    def from_hub(
        cls,
        base: Any,
        experts: Sequence[str],
        *,
        strategy: str = "arrow",
        top_k: int | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        query: str | Sequence[str] | None = None,
        bias: Scores | None = None,
        expert: str | Sequence[str] | None = None,
        head_of: str | None = None,
        skip_gateless: bool = False,
        compressed: bool = False,
        folder: str | Path | None = None,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> Self:
        """From experts of a hub, `owner/name[@revision]`, fetched and verified, with the hub's routing pack.

        `base` is a model, or where transformers finds one; all experts must belong to one base model of the hub. With
        `compressed` the experts come small and are decoded here. They are kept in `folder`, else in the cache that
        `moerge merge` uses. What is not given of `top_k`, `temperature` and `alpha` is as the pack suggests. `query` is
        what `ask` takes. Raises ClientError, ExpertsIncompatible and what `from_folders` raises.
        """
        spec = catalogue().get(strategy)
        with fetching.Source(endpoint, token).hub() as hub:
            fetched = fetching.fetch(
                hub, experts, kind=spec.kind if spec else None, compressed=compressed,
                folder=None if folder is None else Path(folder),
                base=base if isinstance(base, str) and not Path(base).exists() else None,
            )  # fmt: skip
        pack = fetched.pack
        suggested = Settings() if pack is None else Settings(
            top_k=pack.top_k, temperature=pack.temperature, alpha=pack.alpha
        )  # fmt: skip
        given = {"top_k": top_k, "temperature": temperature, "alpha": alpha}
        settings = Settings(**{**vars(suggested), **{name: one for name, one in given.items() if one is not None}})
        made = cls(
            loading.base_of(base, fetched.experts) if isinstance(base, str | Path) else base,
            fetched.experts,
            strategy=strategy,
            settings=settings,
            pack=pack,
            head_of=head_of or _sole(expert),
            skip_gateless=skip_gateless,
            source=Source(endpoint, token, fetched.base_model),
        )
        made._prefer(bias, expert)
        if query is not None:
            made.ask(query)
        return made

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """As the model's own forward, without gradients."""
        with torch.no_grad():
            return self.model(*arguments, **named)

    forward = __call__

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """As the model's own `generate`."""
        with torch.no_grad():
            return self.model.generate(*arguments, **named)

    def to(self, *arguments: Any, **named: Any) -> Self:
        """Move to a device or another type of numbers, as torch does."""
        self.model.to(*arguments, **named)
        return self

    def usage(self) -> dict[str, dict[str, float]]:
        """{module: {expert: share}}: the share of the weight that each expert was given since the last reset.

        The shares of a module add to 1, and are 0 where no token came by. Padding does not count.
        """
        told = {}
        for module, router in self._routers.items():
            shares = router.used / router.used.sum().clamp(min=torch.finfo(torch.float64).tiny)
            given = dict(zip(router.experts, shares.tolist(), strict=True))
            told[module] = {name: given.get(number, 0.0) for number, name in enumerate(self.experts)}
        return told

    def reset_usage(self) -> None:
        for router in self._routers.values():
            router.used.zero_()

    @contextmanager
    def watching(self) -> Iterator[dict[str, list[Tensor]]]:
        """{module: [(inputs, length, experts) weights of each pass]}, filled while the context lasts."""
        self._plan.watched = {}
        try:
            yield self._plan.watched
        finally:
            self._plan.watched = None

    def set_scores(self, scores: Scores) -> None:
        """How well each expert fits the whole input, by name (0 where it is not named): one record, or one per input.

        top1 takes the best, glider adds alpha times the score to its gates. Raises ParameterInvalid.
        """
        rows = [scores] if isinstance(scores, Mapping) else list(scores)
        unknown = sorted({name for row in rows for name in row} - set(self.experts))
        if unknown or not rows:
            raise ParameterInvalid(
                "Scores must be of the model's own experts.", pointer="scores", met=", ".join(unknown) or "none",
                wanted=", ".join(self.experts), remedy="Name the experts as `experts` does.",
            )  # fmt: skip
        found = torch.tensor([[float(row.get(name, 0.0)) for name in self.experts] for row in rows])
        if not found.isfinite().all():
            raise ParameterInvalid("A score is not finite.", pointer="scores", met="NaN or infinity", wanted="numbers",
                                   remedy="Leave that expert out.")  # fmt: skip
        self._plan.scores = found

    def choose(self, expert: str | Sequence[str]) -> None:
        """Give one expert the score 1 and the others 0: one for every input, or one for each."""
        names = [expert] if isinstance(expert, str) else expert
        self.set_scores([{name: 1.0} for name in names])

    def ask(self, text: str | Sequence[str]) -> None:
        """Have the hub score the model's experts for a text, or for one per input, and use that as `set_scores` does.

        An expert that the hub does not name has the score 0. Raises ClientError, ParameterInvalid without a hub.
        """
        if self._source is None:
            raise ParameterInvalid(
                "This model was made of folders, and knows no hub.", pointer="query", met="no hub", wanted="a hub",
                remedy="Use from_hub, or set_scores.",
            )  # fmt: skip
        texts = [text] if isinstance(text, str) else list(text)
        with self._source.hub() as hub:
            self.set_scores(
                fetching.scores(hub, texts, self.experts, self._source.base_model, strategy=self.strategy.name)
            )

    def _prefer(self, bias: Scores | None, expert: str | Sequence[str] | None) -> None:
        if bias is not None:
            self.set_scores(bias)
        if expert is not None:
            self.choose(expert)


def _sole(expert: str | Sequence[str] | None) -> str | None:
    """The one expert that was chosen for all inputs; its head is the one to use."""
    return expert if isinstance(expert, str) else None


def _names(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    """Folders by the shortest end of their path that no other has."""
    parts = [Path(folder).absolute().parts for folder in folders]
    named: dict[str, str | Path] = {}
    for folder, mine in zip(folders, parts, strict=True):
        length = next(
            (n for n in range(1, len(mine)) if sum(other[-n:] == mine[-n:] for other in parts) == 1), len(mine)
        )
        named["/".join(mine[-length:])] = folder
    if len(named) < len(parts):
        raise ParameterInvalid("A folder is named twice.", pointer="folders", met=", ".join(map(str, folders)),
                               wanted="each once", remedy="Give names to them: {name: folder}.")  # fmt: skip
    return named


def _check(settings: Settings) -> None:
    rules = {
        "top_k": (isinstance(settings.top_k, int) and settings.top_k >= 1, "a whole number from 1"),
        "temperature": (0 < settings.temperature < float("inf"), "a finite number above 0"),
        "alpha": (0 <= settings.alpha < float("inf"), "a finite number from 0"),
    }
    for name, (is_right, wanted) in rules.items():
        if not is_right:
            met = getattr(settings, name)
            raise ParameterInvalid(f"{name} is {met}.", pointer=name, met=met, wanted=wanted,
                                   remedy=f"Give {name} as {wanted}.")  # fmt: skip
