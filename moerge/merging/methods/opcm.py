"""OPCM: merge experts as they arrive, each projected away from what the merge so far already uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors
from moerge.merging.base import Parameters, Spec, number
from moerge.merging.sources import Delta, Factors

Array = npt.NDArray[Any]

SPEC = Spec(
    name="opcm",
    title="OPCM",
    form="ordered",
    rank_rule="sum",
    summary="Experts one after the other, each without the part that would overwrite the leading directions so far.",
    when="Experts arrive over time and the old ones are no longer at hand; order matters.",
    paper="arXiv 2501.09522",
    is_ordered=True,
    parameters=(
        number(
            "alpha",
            default=0.5,
            minimum=0.0,
            maximum=1.0,
            help="Share of the singular values that the protected leading directions hold.",
        ),
    ),
)
# Directions below this share of the largest are not part of what a merge uses.
_SUPPORT = 1e-10


@dataclass(frozen=True)
class State:
    """The merge so far, its norm divided by the mean norm of the experts, and their norms: enough to go on with."""

    deltas: Mapping[str, Delta]
    factor: float
    norms: tuple[float, ...]


def step(state: State | None, deltas: Mapping[str, Delta], weight: float, parameters: Parameters) -> State:
    """Take in one expert."""
    incoming = {name: _scaled(delta, weight) for name, delta in deltas.items()}
    norm = _norm(incoming)
    if state is None:
        return State(incoming, 1.0, (norm,))
    merged = {
        name: _add(state.deltas.get(name), incoming.get(name), factor=state.factor, alpha=parameters.alpha)
        for name in sorted({*state.deltas, *incoming})
    }
    norms = (*state.norms, norm)
    average, size = sum(norms) / len(norms), _norm(merged)
    if size == 0 or average == 0:
        return State(merged, 1.0, norms)
    return State({name: _scaled(delta, average / size) for name, delta in merged.items()}, size / average, norms)


def finish(state: State) -> Mapping[str, Delta]:
    """The merged deltas."""
    return state.deltas


def _add(merged: Delta | None, incoming: Delta | None, *, factor: float, alpha: float) -> Delta:
    if incoming is None:
        assert merged is not None
        return _scaled(merged, factor)
    if merged is None:
        return incoming
    if isinstance(merged, Factors) and isinstance(incoming, Factors):
        return _add_factors(merged, incoming, factor=factor, alpha=alpha)
    whole, new = _dense(merged), _dense(incoming)
    if whole.ndim != 2:
        return np.asarray(factor * whole + new)
    U, S, Vt = np.linalg.svd(whole, full_matrices=False)
    U, S, Vt = _support(U, S, Vt)
    return np.asarray(factor * whole + new - U @ _protected(U.T @ new @ Vt.T, S, alpha) @ Vt)


def _add_factors(merged: Factors, incoming: Factors, *, factor: float, alpha: float) -> Factors:
    """The same on factors; the rank grows by that of the new expert."""
    found = factors.truncate(merged, merged.rank)
    # Balanced factors are the singular directions times the roots of their values.
    S = np.sqrt(found.sizes[: found.factors.rank])
    kept = factors.count_above(S, _SUPPORT * S.max(initial=0.0))
    S = S[:kept]
    U, Vt = found.factors.B[:, :kept] / np.sqrt(S), found.factors.A[:kept] / np.sqrt(S)[:, None]
    taken = _protected((U.T @ incoming.B) @ (incoming.A @ Vt.T), S, alpha)
    return factors.stack([Factors(U @ (factor * np.diag(S) - taken), Vt), incoming], [1.0, 1.0])


def _support(U: Array, S: Array, Vt: Array) -> tuple[Array, Array, Array]:
    kept = factors.count_above(S, _SUPPORT * S.max(initial=0.0))
    return U[:, :kept], S[:kept], Vt[:kept]


def _protected(projected: Array, S: Array, alpha: float) -> Array:
    """What is taken out of a new expert in the bases of the merge: the leading block and the diagonal."""
    if not S.size:
        return projected
    past = np.flatnonzero(np.cumsum(S) / S.sum() > alpha)
    cut = int(past[0]) if past.size else S.size
    mask = np.eye(S.size, dtype=np.bool_)
    mask[:cut, :cut] = True
    return np.asarray(projected * mask)


def _scaled(delta: Delta, factor: float) -> Delta:
    if isinstance(delta, Factors):
        return Factors(delta.B.astype(np.float64) * factor, delta.A.astype(np.float64))
    return np.asarray(delta.astype(np.float64) * factor)


def _norm(deltas: Mapping[str, Delta]) -> float:
    total = 0.0
    for delta in deltas.values():
        total += factors.square_norm_of(delta) if isinstance(delta, Factors) else float(np.vdot(delta, delta))
    return float(np.sqrt(total))


def _dense(delta: Delta) -> Array:
    return delta.delta() if isinstance(delta, Factors) else delta
