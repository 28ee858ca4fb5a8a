"""What the change log and the stored vectors say of experts, as entries of an index by one encoder."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid
from moerge.routing import cards
from registry.models import Embedding, Encoder, RoutingChange

log = logging.getLogger(__name__)

AT_ONCE = 500

# In the order of the rows of an entry.
_ROW_KINDS = ("description", "centroid", "example", "instruction")


def of(changes: Iterable[RoutingChange], encoder: Encoder) -> Iterator[cards.Entry]:
    """The entries of changes that put an expert in, in their order, read piece by piece.

    An expert without fitting vectors by this encoder is left out: its embed job will store them and publish again.
    """
    for some in pieces(changes):
        rows: dict[int, dict[str, list[bytes]]] = {}
        stored = Embedding.objects.filter(
            revision_id__in=[change.revision_id for change in some], encoder=encoder.pk
        ).order_by("position")
        for revision_id, kind, vector in stored.values_list("revision_id", "kind", "vector"):
            rows.setdefault(revision_id, {}).setdefault(kind, []).append(bytes(vector))
        for change in some:
            own = rows.get(change.revision_id or 0, {})
            ordered = [vector for kind in _ROW_KINDS for vector in own.get(kind, ())]
            try:
                yield cards.restored(card(change), _matrix(ordered, encoder.dimension))
            except IndexInvalid as error:
                log.warning("An expert has no fitting vectors.", extra={"error.detail": str(error)})


def card(change: RoutingChange) -> cards.Card:
    """The card of an expert as a change tells it."""
    known = change.card
    return cards.Card(
        expert=known["expert"],
        base_model=known["base_model"],
        name=known["name"],
        description=known["description"],
        examples=tuple(known["examples"]),
        # A change of an older version has neither.
        tags=tuple(known.get("tags", ())),
        instruction=known.get("instruction", ""),
        number=change.expert_id,
        revision=change.revision_id or 0,
    )


def pieces(changes: Iterable[RoutingChange]) -> Iterator[Sequence[RoutingChange]]:
    """Changes in lists of a few hundred."""
    rest = iter(changes)
    while some := list(islice(rest, AT_ONCE)):
        yield some


def _matrix(rows: Sequence[bytes], dimension: int) -> NDArray[np.float16]:
    if any(len(row) != 2 * dimension for row in rows):
        raise IndexInvalid("a stored vector has another width than the encoder's", wanted=dimension)
    return np.frombuffer(b"".join(rows), dtype="<f2").reshape(len(rows), dimension)
