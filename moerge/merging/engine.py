"""Apply one merge method to deltas, tensor by tensor, whatever form the method has.

Experts are put into the order of their digests first, so that floating-point sums do not depend on the order of a
request; methods that are ordered by nature keep the order they are given.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import threadpoolctl

from moerge import table
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import factors, methods, parts, statistics
from moerge.merging.base import Parameters, Spec
from moerge.merging.exclusive import Split
from moerge.merging.sources import Block, Delta, Factors, Source, Stream, Watch, delta_dtype

Array = npt.NDArray[Any]

# Experts times values of one block: 2 MiB in float32, which stays in cache.
_BLOCK_TOTAL = 1 << 19
_BLOCK_SMALLEST = 1 << 16


class ElementWise(Protocol):
    """A method on stretches of values. `prepare` may be absent; the state is then None."""

    SPEC: Spec

    def prepare(self, stream: Stream, parameters: Parameters) -> Any: ...
    def merge(self, block: Block, state: Any, parameters: Parameters) -> Array: ...


class Linear(Protocol):
    """A method whose result is a sum of deltas."""

    SPEC: Spec

    def coefficients(self, weights: Array, parameters: Parameters) -> Array: ...


class Core(Protocol):
    """A method on the R x R cores of matrices, float64, and on the values of all other tensors."""

    SPEC: Spec

    def merge(self, cores: Array, weights: Array, ranks: tuple[int, ...], parameters: Parameters) -> Array: ...
    def merge_vectors(self, values: Array, weights: Array, parameters: Parameters) -> Array: ...


class FactorWise(Protocol):
    """A method on rank units."""

    SPEC: Spec

    def merge(self, items: Sequence[Factors], weights: Array, parameters: Parameters) -> Factors: ...


class Ordered(Protocol):
    """A method that takes one expert after the other. The state may be kept and continued."""

    SPEC: Spec

    def step(self, state: Any, deltas: Mapping[str, Delta], weight: float, parameters: Parameters) -> Any: ...
    def finish(self, state: Any) -> Mapping[str, Delta]: ...


class Whole(Protocol):
    """A method that sees all tensors of all experts at once."""

    SPEC: Spec

    def merge(self, stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]: ...


@dataclass(frozen=True)
class Settings:
    """How to compute, which never changes what comes out.

    `compiled` asks for the compiled loops or forbids them; None takes them where they are worth it.
    """

    block_values: int | None = None
    threads: int = 1
    watch: Watch = field(default_factory=Watch)
    compiled: bool | None = None


def merge(
    spec: Spec,
    sources: Sequence[Source],
    parameters: Parameters,
    *,
    seed: int = 0,
    settings: Settings | None = None,
) -> Iterator[tuple[str, Delta]]:
    """Yield name and merged delta of every tensor, in sorted-name order: factors where the result is low rank exactly.

    Raises ExpertsIncompatible when experts disagree about a shape or have nothing to merge.
    """
    stream = _stream(spec, sources, parameters, seed=seed, settings=settings or Settings())
    method: Any = _methods()[spec.name]
    with one_blas_thread():
        yield from _by_form(spec, method, stream, parameters)


def split(spec: Spec, sources: Sequence[Source], parameters: Parameters, *, settings: Settings | None = None) -> Split:
    """The shared and the exclusive parts, in the order of `sources`.

    Raises RecipeInvalid when the method has none, and ExpertsIncompatible as `merge` does.
    """
    known = [name for name, method in _methods().items() if hasattr(method, "split")]
    if spec.name not in known:
        raise RecipeInvalid(
            f"{spec.name} makes no exclusive parts.",
            pointer="/method",
            met=spec.name,
            wanted="one of " + ", ".join(known),
            remedy="Use a method that has a shared part and exclusive ones.",
        )
    stream = _stream(spec, sources, parameters, seed=0, settings=settings or Settings())
    with one_blas_thread():
        return cast("Split", _methods()[spec.name].split(stream, parameters))


def _stream(spec: Spec, sources: Sequence[Source], parameters: Parameters, *, seed: int, settings: Settings) -> Stream:
    """The experts in canonical order, checked."""
    if not sources:
        raise ExpertsIncompatible(
            "There are no experts to merge.", pointer="/experts", met=0, wanted="at least 1", remedy="Name an expert."
        )
    ordered = list(sources) if spec.is_ordered else sorted(sources, key=lambda item: (item.digest, item.weight))
    stream = Stream(
        tuple(ordered),
        seed=seed,
        missing=str(parameters.get("missing", "zero")),
        block_values=settings.block_values or max(_BLOCK_SMALLEST, _BLOCK_TOTAL // len(ordered)),
        threads=settings.threads,
        watch=settings.watch,
        compiled=settings.compiled,
    )
    _check(stream)
    statistics.check(spec, stream.sources)
    return stream


def one_blas_thread() -> AbstractContextManager[Any]:
    """BLAS splits work by its number of threads and rounds accordingly; one thread gives the same bits everywhere."""
    limits: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return limits


@cache
def _blas() -> Any:
    """The BLAS that numpy has loaded; looking for it takes milliseconds."""
    return threadpoolctl.ThreadpoolController()


@cache
def _methods() -> dict[str, Any]:
    return dict(table.load(methods))


def _check(stream: Stream) -> None:
    if not stream.shapes:
        raise ExpertsIncompatible(
            "The experts have no tensors.", pointer="/experts", met=0, wanted="at least one tensor", remedy=""
        )
    for name, shape in stream.shapes.items():
        if 0 in shape:
            raise ExpertsIncompatible(
                f"{name} has no values.", pointer="/experts", met=list(shape), wanted="a positive shape", remedy=""
            )


def _by_form(spec: Spec, method: Any, stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    stream.watch.expected = len(stream.names)
    if spec.form == "whole":
        yield from _whole(cast("Whole", method), stream, parameters)
    elif spec.form == "ordered":
        yield from _ordered(cast("Ordered", method), stream, parameters)
    elif spec.form == "core":
        for name in stream.names:
            yield name, _core(cast("Core", method), stream, name, parameters)
            stream.watch.step()
    elif spec.form == "factor":
        for name in stream.names:
            yield name, _factor(method, stream, name, parameters)
            stream.watch.step()
    elif hasattr(method, "coefficients"):
        for name in stream.names:
            yield name, _sum(cast("Linear", method), stream, name, parameters)
            stream.watch.step()
    else:
        yield from _element_wise(cast("ElementWise", method), stream, parameters)


def _element_wise(method: ElementWise, stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    blocks = sum(len(stream.spans(name)) for name in stream.names)
    has_state = hasattr(method, "prepare")
    stream.watch.expected = blocks * (1 + len(stream.sources)) if has_state else blocks
    state = method.prepare(stream, parameters) if has_state else None
    for name in stream.names:
        yield name, stream.map_blocks(name, lambda block: method.merge(block, state, parameters))


def _sum(method: Linear, stream: Stream, name: str, parameters: Parameters) -> Delta:
    """A sum of deltas: on factors where all experts have factors, else block by block."""
    members = stream.members(name)
    coefficients = method.coefficients(stream.weights[list(members)], parameters)
    owners = stream.owners(name)
    deltas = [stream.sources[i].held(name) for i in owners]
    if all(isinstance(delta, Factors) for delta in deltas):
        found = dict(zip(members, coefficients, strict=True))
        return factors.stack(cast("list[Factors]", deltas), [found[i] for i in owners])
    stream.watch.expected += len(stream.spans(name))
    return stream.map_blocks(name, lambda block: parts.weighted_total(block.values, coefficients))


def _factor(method: Any, stream: Stream, name: str, parameters: Parameters) -> Delta:
    owners = stream.owners(name)
    deltas = [stream.sources[i].read(name) for i in owners]
    if all(isinstance(delta, Factors) for delta in deltas):
        chosen = cast("FactorWise", method)
        return chosen.merge(cast("list[Factors]", deltas), stream.weights[list(owners)], parameters)
    if hasattr(method, "coefficients"):
        return _sum(cast("Linear", method), stream, name, parameters)
    raise ExpertsIncompatible(
        f"{name} is a plain tensor, and {method.SPEC.name} works on the factors of adapters.",
        pointer="/method",
        met=method.SPEC.name,
        wanted="a method on deltas",
        remedy="Choose linear or ties.",
    )


def _core(method: Core, stream: Stream, name: str, parameters: Parameters) -> Delta:
    deltas = [source.read(name) if name in source.tensors else None for source in stream.sources]
    present = [delta for delta in deltas if delta is not None]
    dtype = np.result_type(*(delta_dtype(delta) for delta in present))
    if all(isinstance(delta, Factors) for delta in present):
        held = factors.cores(cast("list[Factors | None]", deltas))
        return held.expand(method.merge(held.cores, stream.weights, held.ranks, parameters), dtype)
    shape = stream.shapes[name]
    values = np.stack([np.zeros(shape) if delta is None else _dense(delta).astype(np.float64) for delta in deltas])
    if len(shape) == 2:
        whole = (0,) * len(values)
        return method.merge(values, stream.weights, whole, parameters).astype(dtype)
    return method.merge_vectors(values, stream.weights, parameters).astype(dtype)


def _ordered(method: Ordered, stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    state: Any = None
    stream.watch.expected = len(stream.sources)
    for source in stream.sources:
        deltas = {name: source.read(name) for name in stream.names if name in source.tensors}
        state = method.step(state, deltas, source.weight, parameters)
        stream.watch.step()
    merged = method.finish(state)
    for name in stream.names:
        dtypes = [delta_dtype(source.read(name)) for source in stream.sources if name in source.tensors]
        yield name, _cast(merged[name], np.result_type(*dtypes))


def _whole(method: Whole, stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    for name, delta in method.merge(stream, parameters):
        dtypes = [delta_dtype(found) for found in stream.held(name) if found is not None]
        yield name, _cast(delta, np.result_type(*dtypes))
        stream.watch.step()


def _cast(delta: Delta, dtype: np.dtype[Any]) -> Delta:
    if isinstance(delta, Factors):
        return Factors(delta.B.astype(dtype), delta.A.astype(dtype))
    return delta.astype(dtype)


def _dense(delta: Delta) -> Array:
    return delta.delta() if isinstance(delta, Factors) else delta
