"""What a file in `kinds/` must say about its kind of adapter, and the records all kinds share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moerge.errors import AdapterInvalid
from moerge.tensors.files import Array, Float32, SafetensorsFile
from moerge.tensors.header import Header, TensorInfo

PREFIX = "base_model.model."
# Names that base models give to their input and output embeddings; PEFT stores a copy of those layers when they were
# resized or targeted.
EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "word_embeddings", "wte", "embeddings", "tok_embeddings", "shared", "embed_in",
     "embed_out", "output"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter_config.json, parsed. Values that this record does not name are kept in `raw` and never acted upon."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    base_model_name_or_path: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


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
    """A reason why the delta of an accepted adapter cannot be formed from its files, so it cannot be merged."""

    pointer: str
    met: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What config and header say together. `shapes` are (d_out, d_in) of each module whose delta can be formed."""

    kind: str
    modules: tuple[str, ...]
    ranks: Mapping[str, int]
    rank: int
    targets: tuple[str, ...]
    n_parameters: int
    shapes: Mapping[str, tuple[int, int]]
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_mergeable(self) -> bool:
        return not self.blockers


Roles = Mapping[str, Mapping[str, TensorInfo]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of adapter.

    `endings` maps what follows `base_model.model.<module>.` in a tensor's name to the tensor's role.
    `blockers` says why deltas cannot be formed; `check` looks for what is wrong with the tensors of each module and
    returns ranks and delta shapes; `low_rank` forms the delta of one module. Where PEFT knows the kind and we only
    keep its files, `check` and `low_rank` are None. `zero_roles` are the roles that training moves away from zero.
    """

    name: str
    peft_type: str
    endings: Mapping[str, str]
    blockers: Callable[[AdapterConfig, Header], tuple[Blocker, ...]]
    check: Callable[[AdapterConfig, Roles], tuple[dict[str, int], dict[str, tuple[int, int]]]] | None = None
    low_rank: Callable[[AdapterConfig, SafetensorsFile, str, Mapping[str, TensorInfo]], LowRank] | None = None
    zero_roles: frozenset[str] = frozenset()
    has_targets: bool = True


def invalid(detail: str, *, pointer: str, met: object, wanted: object, remedy: str, rule: str = "T4") -> AdapterInvalid:
    """An AdapterInvalid whose message repeats the values met and wanted."""
    return AdapterInvalid(
        f"{detail}: met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy, rule=rule
    )
