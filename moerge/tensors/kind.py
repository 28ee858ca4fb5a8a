"""What a file in `kinds/` must say about its kind of adapter, and the records all kinds share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
        delta = self.delta()
        if self.layout.form == "conv":
            return delta.reshape(delta.shape[0], *self.layout.kernel)
        return delta.T if fan_in_fan_out or self.layout.form == "embedding" else delta


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
    base. `saved` names tensors that replace tensors of the base (modules_to_save, embeddings), `biases` those of bias.
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
    blockers: tuple[Blocker, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_mergeable(self) -> bool:
        return not self.blockers


Tensors = Mapping[str, TensorInfo]
Roles = Mapping[str, Tensors]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of adapter.

    `endings` maps what follows `base_model.model.<module>.` in a tensor's name to the tensor's role; a kind whose
    files are only kept has `markers` instead, beginnings of a part of the name. `blockers` says why deltas cannot be
    formed; `check` looks for what is wrong with the tensors of each module and returns what it found; `low_rank`
    forms the delta of one module. `extras` tells whether the config explains a tensor without a role. `zero_endings`
    end the names of tensors that training moves away from zero.
    """

    name: str
    peft_type: str
    endings: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    blockers: Callable[[AdapterConfig, Header], tuple[Blocker, ...]]
    check: Callable[[AdapterConfig, Roles, Targets], dict[str, ModuleFacts]] | None = None
    low_rank: Callable[[SafetensorsFile, Tensors, ModuleFacts], LowRank] | None = None
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
