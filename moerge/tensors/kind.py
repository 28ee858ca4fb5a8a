"""What a file in `kinds/` must say about its kind of adapter, and the records all kinds share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moerge.errors import AdapterInvalid
from moerge.tensors.config import AdapterConfig
from moerge.tensors.files import Array, Float32, SafetensorsFile
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.targets import Targets

PREFIX = "base_model.model."


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
    the lengths of IA3's vectors by module.
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


class Weights(Protocol):
    """The base model's weights by the module they belong to, as the base stores them; None where it has no such."""

    def weight(self, module: str) -> Float32 | None: ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """One module of an adapter that is open for reading: all that its kind may need to say what it adds there."""

    file: SafetensorsFile
    config: AdapterConfig
    module: str
    tensors: Tensors
    facts: ModuleFacts
    base: Weights | None = None

    def read(self, role: str) -> Float32:
        """The tensor of a role, as float32."""
        return self.file.float32(self.tensors[role].name)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of adapter.

    `endings` maps what follows `base_model.model.<module>.` in a tensor's name to the tensor's role; a kind whose
    files are only kept has `markers` instead, beginnings of a part of the name. `blockers` says why deltas cannot be
    formed; `check` looks for what is wrong with the tensors of each module and returns what it found; `delta` forms
    the delta of one module, `bias` what it adds to the module's output whatever comes in (for modules with the role
    "bias"), `gain` what it multiplies (for those with the role "gain"). `extras` tells whether the config explains a
    tensor without a role. `zero_endings` end the names of tensors that training moves away from zero.
    """

    name: str
    peft_type: str
    endings: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    blockers: Callable[[AdapterConfig, Header], tuple[Blocker, ...]]
    check: Callable[[AdapterConfig, Roles, Targets], dict[str, ModuleFacts]] | None = None
    delta: Callable[[Site], LowRank | Dense] | None = None
    bias: Callable[[Site], Float32] | None = None
    gain: Callable[[Site], Gain] | None = None
    extras: Callable[[AdapterConfig, str], bool] | None = None
    zero_endings: tuple[str, ...] = ()


def stored_only(
    name: str, *, why: str, markers: tuple[str, ...] = (), endings: Mapping[str, str] | None = None
) -> Kind:
    """A kind that PEFT loads and whose files are checked and kept, but which cannot be merged; `why` completes
    "This kind of adapter cannot be merged: ...".
    """
    blocker = Blocker("/peft_type", name.upper(), f"This kind of adapter cannot be merged: {why}",
                      "Route and download it as it is; only LoRA and LoHa experts can be merged.")  # fmt: skip
    return Kind(
        name=name, peft_type=name.upper(), endings=endings or {}, markers=markers,
        blockers=lambda _config, _header: (blocker,),
    )  # fmt: skip


def invalid(detail: str, *, pointer: str, met: object, wanted: object, remedy: str, rule: str = "T4") -> AdapterInvalid:
    """An AdapterInvalid whose message repeats the values met and wanted."""
    return AdapterInvalid(
        f"{detail}: met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy, rule=rule
    )
