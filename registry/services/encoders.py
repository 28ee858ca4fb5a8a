"""Text encoders as rows: the one that answers queries, the one that is to replace it, and those nobody uses now."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from django.db import IntegrityError, transaction

from moerge import embedding, routing
from registry.errors import Fault, Invalid, NameTaken, RequestInvalid
from registry.models import Encoder

_ID_CHARACTERS = 120
_SLUG_CHARACTERS = 60
_THRESHOLDS = frozenset({"min_score", "relief", "medium", "high"})


def packaged() -> Encoder:
    """The encoder that comes with the hub."""
    return Encoder(
        id=embedding.ENCODER_ID,
        dimension=embedding.DIMENSION,
        max_tokens=embedding.MAX_TOKENS,
        state=Encoder.State.ACTIVE,
    )


def active() -> Encoder:
    """The encoder by which queries are answered; the packaged one while none is registered."""
    return Encoder.objects.filter(state=Encoder.State.ACTIVE).first() or packaged()


def held() -> Encoder:
    """The active encoder, which stays so until the caller's transaction ends. Take it before the clock."""
    rows = Encoder.objects.select_for_update().filter(state=Encoder.State.ACTIVE)
    # Who waited for a change of encoder finds that the row it waited for is not active any more, and looks again.
    return rows.first() or rows.first() or packaged()


def in_use() -> tuple[Encoder, Encoder | None]:
    """The active encoder, and the one that is being prepared if there is one."""
    rows = {row.state: row for row in Encoder.objects.exclude(state=Encoder.State.IDLE)}
    return rows.get(Encoder.State.ACTIVE) or packaged(), rows.get(Encoder.State.PREPARING)


def register() -> None:
    """Write down the packaged encoder; it is the active one unless another already is."""
    row = packaged()
    with transaction.atomic():
        if Encoder.objects.filter(state=Encoder.State.ACTIVE).exists():
            row.state = Encoder.State.IDLE
        Encoder.objects.bulk_create([row], ignore_conflicts=True)


def slug(encoder_id: str) -> str:
    """An encoder's name as part of paths and keys, another one for each id."""
    plain = re.sub(r"[^a-z0-9]+", "-", encoder_id.lower()).strip("-")[:_SLUG_CHARACTERS]
    return f"{plain}-{hashlib.sha256(encoder_id.encode()).hexdigest()[:8]}"


def add(
    *,
    encoder_id: str,
    folder: str,
    dimension: int,
    max_tokens: int,
    prefix: str = "",
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
) -> Encoder:
    """Write down an encoder that was tried; nothing uses it yet. Raises NameTaken and RequestInvalid."""
    if not encoder_id.isprintable() or not 1 <= len(encoder_id.strip()) == len(encoder_id) <= _ID_CHARACTERS:
        raise _invalid("/id", encoder_id, f"1 to {_ID_CHARACTERS} printable characters, none of them white at the ends")
    row = Encoder(
        id=encoder_id,
        folder=folder,
        dimension=dimension,
        max_tokens=max_tokens,
        prefix=prefix,
        thresholds=_thresholds(thresholds or {}),
    )
    try:
        with transaction.atomic():
            row.save(force_insert=True)
    except IntegrityError as error:
        fault = Fault("/id", encoder_id, "an id that is not taken", "Name other weights by another id.")
        raise NameTaken("There is an encoder of this id.", faults=[fault]) from error
    return row


def find(encoder_id: str) -> Encoder:
    """An encoder by its id. Raises Invalid."""
    row = Encoder.objects.filter(pk=encoder_id).first()
    if row is None and encoder_id == packaged().pk:
        return packaged()
    if row is None:
        known = sorted(Encoder.objects.values_list("pk", flat=True))
        fault = Fault("/id", encoder_id, known, "Name one of these, or add it first: bin/manage add_encoder.")
        raise Invalid("There is no encoder of this id.", faults=[fault])
    return row


def _thresholds(wanted: Any) -> dict[str, dict[str, float]]:
    known = routing.catalogue()
    if not isinstance(wanted, dict):
        raise _invalid("/thresholds", wanted, "thresholds by name of a strategy")
    for name, values in wanted.items():
        if name not in known or not isinstance(values, dict):
            raise _invalid(f"/thresholds/{name}", values, f"thresholds of one of {', '.join(sorted(known))}")
        for key, value in values.items():
            if key not in _THRESHOLDS or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise _invalid(f"/thresholds/{name}/{key}", value, f"{', '.join(sorted(_THRESHOLDS))}, each 0 to 1")
    return wanted


def _invalid(pointer: str, met: Any, wanted: Any) -> RequestInvalid:
    return RequestInvalid("The encoder cannot be added.", faults=[Fault(pointer, met, wanted, "Correct this value.")])
