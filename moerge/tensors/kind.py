"""What a file in `kinds/` must say about its kind of adapter, and the records all kinds share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Protocol

import numpy as np

from moerge.errors import AdapterInvalid
from moerge.tensors.config import AdapterConfig
from moerge.tensors.files import Array, Float32, SafetensorsFile
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.targets import Targets, of_base

PREFIX = "base_model.model."
SAVE_AGAIN = "Save config and weights together with PeftModel.save_pretrained and upload both."
GIVE_BASE = "Have the operator put the weights of the base model into the hub, or train without this setting."
_NOT_WHOLE = "The delta cannot be formed from the file"


@dataclass(frozen=True)
class Layout:
    """How a delta lies in the base tensor.

    `form` is "linear", "embedding" or "conv"; `kernel` is (in channels, *kernel size) for conv, else empty.
    """

    form: str = "linear"
    kernel: tuple[int, ...] = ()

    def stored(self, delta: Array, *, fan_in_fan_out: bool = False) -> Array:
        """A (d_out, d_in) matrix shaped as the base stores its weight."""
        if self.form == "conv":
            return delta.reshape(delta.shape[0], *self.kernel)
        return delta.T if fan_in_fan_out or self.form == "embedding" else delta

    def canonical(self, weight: Array, *, fan_in_fan_out: bool = False) -> Array:
        """The weight of a base as a (d_out, d_in) matrix."""
        if self.form == "conv":
            return weight.reshape(weight.shape[0], -1)
        return weight.T if fan_in_fan_out or self.form == "embedding" else weight

    def canonical_shape(self, shape: tuple[int, ...], *, fan_in_fan_out: bool = False) -> tuple[int, ...]:
        """The shape that `canonical` gives a weight of this shape."""
        if self.form == "conv":
            return shape[0], prod(shape[1:])
        return shape[::-1] if fan_in_fan_out or self.form == "embedding" else shape


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta `scaling * B @ A` of one module: A (rank, d_in), B (d_out, rank), float32.

    Rows are what the module puts out and columns what it takes in, whatever way the base stores its weight: an
    embedding takes one-hot tokens in (d_in is the vocabulary), a convolution takes flattened patches in.
    """

    A: Float32
    B: Float32
    scaling: float
    layout: Layout = Layout()

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the delta."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def delta(self) -> Float32:
        """The dense delta, (d_out, d_in)."""
        return np.float32(self.scaling) * (self.B @ self.A)

    def weight_delta(self, *, fan_in_fan_out: bool = False) -> Array:
        """The dense delta shaped as the base stores its weight: transposed for embeddings and fan_in_fan_out."""
        return self.layout.stored(self.delta(), fan_in_fan_out=fan_in_fan_out)


@dataclass(frozen=True, eq=False)
class Dense:
    """The delta of one module where it is not of low rank: values (d_out, d_in), float32, rows as in LowRank."""

    values: Float32
    layout: Layout = Layout()

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the delta."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def delta(self) -> Float32:
        """The delta itself, (d_out, d_in)."""
        return self.values

    def weight_delta(self, *, fan_in_fan_out: bool = False) -> Array:
        """The delta shaped as the base stores its weight: transposed for embeddings and fan_in_fan_out."""
        return self.layout.stored(self.values, fan_in_fan_out=fan_in_fan_out)


@dataclass(frozen=True, eq=False)
class Gain:
    """What IA3 multiplies the values of one module with, less one: `l - 1`, (d_in,) where it is feedforward, else
    (d_out,).
    """

    values: Float32
    is_feedforward: bool


@dataclass(frozen=True)
class Blocker:
    """A reason why the delta of an accepted adapter cannot be formed from its files, so it cannot be merged.

    `pointer` is a JSON pointer into the config, or a tensor's name. `needs_base`: the delta can be formed where
    the weights of the base model are at hand.
    """

    pointer: str
    met: str
    reason: str
    remedy: str = ""
    needs_base: bool = False


@dataclass(frozen=True, kw_only=True)
class ModuleFacts:
    """What header and config say about one module whose delta can be formed; `shape` is (d_out, d_in)."""

    rank: int
    shape: tuple[int, int]
    scaling: float
    layout: Layout = Layout()


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What config and header say together.

    `ranks`, `shapes` (d_out, d_in), `scalings` and `layouts` are per module and empty for kinds whose delta needs the
    base. `saved` names tensors that replace tensors of the base (modules_to_save, embeddings), `biases` those of bias;
    both by their names in the file. `biased` are the modules whose output gets a bias of the adapter's own, `gains`
    the lengths of IA3's vectors by module, `feedforward` those modules whose vector multiplies what they take in.
    """

    kind: str
    modules: tuple[str, ...]
    ranks: Mapping[str, int]
    rank: int
    targets: tuple[str, ...]
    n_parameters: int
    shapes: Mapping[str, tuple[int, int]]
    scalings: Mapping[str, float] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    gains: Mapping[str, int] = field(default_factory=dict)
    feedforward: frozenset[str] = frozenset()
    blockers: tuple[Blocker, ...] = ()
    warnings: tuple[str, ...] = ()

    def module(self, name: str) -> ModuleFacts:
        """What is known of one module whose delta can be formed."""
        return ModuleFacts(rank=self.ranks[name], shape=self.shapes[name], scaling=self.scalings[name],
                           layout=self.layouts[name])  # fmt: skip

    @property
    def family(self) -> str:
        """Adapters of one family can be merged with each other: "ia3" multiplies, "lora" adds."""
        return "ia3" if self.kind == "ia3" else "lora"

    @property
    def is_mergeable(self) -> bool:
        """Whether it can be merged from its own files, without the base's weights."""
        return not self.blockers


Tensors = Mapping[str, TensorInfo]
Roles = Mapping[str, Tensors]
# Of the weights of a base, as it stores them, by module.
Shapes = Mapping[str, tuple[int, ...]]


class Weights(Protocol):
    """The tensors of a base model by the names that an adapter has for them; None where it has no such."""

    def shape(self, name: str) -> tuple[int, ...] | None: ...
    def tensor(self, name: str) -> Float32 | None: ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """One module of an adapter that is open for reading: all that its kind may need to say what it does there."""

    file: SafetensorsFile
    config: AdapterConfig
    module: str
    tensors: Tensors
    whole: AdapterFacts
    base: Weights | None = None

    @property
    def facts(self) -> ModuleFacts:
        """What is known of this module, where its delta can be formed."""
        return self.whole.module(self.module)

    def read(self, role: str) -> Float32:
        """The tensor of a role."""
        return self.file.float32(self.tensors[role].name)

    def base_weight(self) -> Float32:
        """The module's weight in the base, (d_out, d_in). Raises AdapterInvalid without a base that has it."""
        name = f"{of_base(self.module)}.weight"
        weight = self.base.tensor(name) if self.base else None
        if weight is None:
            raise without_weight(self.module)
        return self.facts.layout.canonical(weight, fan_in_fan_out=self.config.fan_in_fan_out)


def shape_of(shapes: Shapes, module: str) -> tuple[int, ...]:
    """The shape of a module's weight. Raises AdapterInvalid where the base does not have it."""
    if module not in shapes:
        raise without_weight(module)
    return shapes[module]


def without_weight(module: str) -> AdapterInvalid:
    """What is raised where a delta depends on a weight of the base that is not at hand."""
    return invalid("The delta of a module depends on a weight that the base at hand does not have", pointer=module,
                   met="no such tensor, or several", wanted=f"{of_base(module)}.weight", remedy=GIVE_BASE)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of adapter.

    `endings` maps what follows `base_model.model.<module>.` in a tensor's name to the tensor's role; a kind whose
    files are only kept has `markers` instead, beginnings of a part of the name. `blockers` says why deltas cannot be
    formed; `check` looks for what is wrong with the tensors of each module and returns what it found, `feedforward`
    the same for vectors that multiply, of which it returns those of inputs. `with_base` says what is known of the
    modules once the shapes of the base's weights are. `delta` forms the delta of one module, `bias` what it adds to
    the module's output whatever comes in, `gain` what it multiplies. `extras` tells whether the config explains a
    tensor without a role. `zero_endings` end the names of tensors that training moves away from zero.
    """

    name: str
    peft_type: str
    endings: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    blockers: Callable[[AdapterConfig, Header], tuple[Blocker, ...]]
    check: Callable[[AdapterConfig, Roles, Targets, Header], dict[str, ModuleFacts]] | None = None
    feedforward: Callable[[Roles, Targets], frozenset[str]] | None = None
    with_base: Callable[[AdapterConfig, AdapterFacts, Shapes], dict[str, ModuleFacts]] | None = None
    delta: Callable[[Site], LowRank | Dense] | None = None
    bias: Callable[[Site], Float32] | None = None
    gain: Callable[[Site], Gain] | None = None
    extras: Callable[[AdapterConfig, str], bool] | None = None
    zero_endings: tuple[str, ...] = ()


def replaced(config: AdapterConfig) -> list[Blocker]:
    """Blockers for tensors of the base that the adapter replaces, which is more than a delta says."""
    found = []
    if config.bias != "none":
        found.append(Blocker("/bias", config.bias, f"{_NOT_WHOLE}: trained biases of the base are part of the adapter",
                             GIVE_BASE, needs_base=True))  # fmt: skip
    if config.modules_to_save:
        found.append(Blocker("/modules_to_save", ", ".join(config.modules_to_save)[:200],
                             f"{_NOT_WHOLE}: whole modules of the base are replaced", GIVE_BASE,
                             needs_base=True))  # fmt: skip
    return found


def on_base(config: AdapterConfig, facts: AdapterFacts, shapes: Shapes) -> dict[str, ModuleFacts]:
    """Facts of modules whose factors lie flat in the file, so that only the base tells a convolution from a matrix."""
    found = {name: facts.module(name) for name in facts.shapes}
    for name in found.keys() & shapes.keys():
        shape, fact = shapes[name], found[name]
        layout = Layout("conv", shape[1:]) if len(shape) > 2 else Layout()
        check_fit(name, fact.shape, layout.canonical_shape(shape, fan_in_fan_out=config.fan_in_fan_out))
        found[name] = replace(fact, layout=layout)
    return found


def core_layout(core: TensorInfo, inner: TensorInfo) -> Layout:
    """The layout of a kernel in Tucker form, from its core (r, r, height, width) and inner factor (r, in).

    Raises AdapterInvalid where they do not fit. A convolution over one dimension has cores of width 1.
    """
    shape = core.shape
    if len(shape) != 4 or shape[0] != shape[1] or inner.shape[:1] != shape[:1] or len(inner.shape) != 2:
        raise invalid("The core of a convolution does not fit its factors", pointer=core.name,
                      met=f"{list(shape)} and {list(inner.shape)}", wanted="(rank, rank, height, width) and (rank, in)",
                      remedy=SAVE_AGAIN)  # fmt: skip
    return Layout("conv", (inner.shape[1], *(shape[2:] if shape[3] != 1 else shape[2:3])))


def flat_kernels(header: Header, endings: tuple[str, ...]) -> list[Blocker]:
    """A blocker where the core of a convolution does not tell over how many dimensions it goes."""
    return [
        Blocker(name, str(list(info.shape)), "The file does not tell a convolution over one dimension from one of "
                "width 1 over two", GIVE_BASE, needs_base=True)
        for name, info in header.tensors.items()
        if name.endswith(endings) and info.shape[-1:] == (1,)
    ][:1]  # fmt: skip


def check_fit(module: str, mine: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises AdapterInvalid where a module's (out, in) is not that of the base."""
    if mine != wanted:
        raise invalid("A module does not fit the base model", pointer=module, met=list(mine),
                      wanted=f"{list(wanted)} (out, in)",
                      remedy="Name the base model this adapter was trained on.")  # fmt: skip


def stored_only(
    name: str, *, why: str, markers: tuple[str, ...] = (), endings: Mapping[str, str] | None = None
) -> Kind:
    """A kind that PEFT loads and whose files are checked and kept, but which cannot be merged; `why` completes
    "This kind of adapter cannot be merged: ...".
    """
    blocker = Blocker("/peft_type", name.upper(), f"This kind of adapter cannot be merged: {why}",
                      "Route and download it as it is; experts of LoRA, AdaLoRA, LoHa, LoKr, "
                      "VeRA and IA3 can be merged.")  # fmt: skip
    return Kind(
        name=name, peft_type=name.upper(), endings=endings or {}, markers=markers,
        blockers=lambda _config, _header: (blocker,),
    )  # fmt: skip


def invalid(detail: str, *, pointer: str, met: object, wanted: object, remedy: str, rule: str = "T4") -> AdapterInvalid:
    """An AdapterInvalid whose message repeats the values met and wanted."""
    return AdapterInvalid(
        f"{detail}: met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy, rule=rule
    )
