"""Which experts fit a query, and what makes an expert routable.

A query goes to the router process, which ranks by text alone; what it answers is checked against the database before
anybody sees it, so that hiding or deleting an expert counts from that moment on. What can be routed is told to the
routers by a log under one clock (RoutingChange, RoutingClock).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.db import connection, transaction
from django.db.models import Q
from numpy.typing import NDArray

from moerge.routing import cards
from registry import jobs, selectors
from registry.errors import Fault, IndexNotReady, QueryInvalid, TooLarge, Unavailable
from registry.models import BaseModel, Embedding, Encoder, Expert, Revision, RoutingChange, RoutingClock
from registry.selectors import Viewer
from registry.services import bases, encoders, router_link

log = logging.getLogger(__name__)

MAX_TEXTS = 32
MAX_CHARACTERS = 20_000
MAX_RESULTS = 50
MAX_NAMED = 64

# Of what the router answers some may be hidden from this caller; three times as many leave enough as a rule.
_SPARES = 3
_MAX_RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A query that keeps the rules. `allow` holds the experts that pass the filters, None without filters."""

    texts: tuple[str, ...]
    base: BaseModel | None
    top_k: int
    min_score: float | None
    min_seq: int
    strategy: str | None
    explain: bool
    allow: tuple[int, ...] | None
    vector: tuple[float, ...] | None = None
    embedding_model: str | None = None


def route(
    *,
    viewer: Viewer,
    text: str | None = None,
    texts: Sequence[str] | None = None,
    base_model: str | None = None,
    top_k: int = 10,
    filters: Mapping[str, Any] | None = None,
    min_score: float | None = None,
    min_seq: int | None = None,
    explain: bool = False,
    strategy: str | None = None,
) -> dict[str, Any]:
    """The experts for a text, or for each of several: what `POST /api/v1/route` answers.

    An answer is empty and `abstained` when its `best_score` is below `min_score`; by default that is the strategy's own
    threshold, .24 in a large catalogue and lower among few experts. `default_min_score` tells it in any case.
    `degraded` tells that words alone decided because the encoder is still loading; `embedding_model` is None then.
    Raises QueryInvalid, TooLarge, BaseUnknown, and IndexNotReady when the router is away or behind `min_seq`.
    """
    asked = _asked(
        viewer,
        texts=_texts(text, texts),
        base_model=base_model,
        top_k=top_k,
        filters=filters,
        min_score=min_score,
        min_seq=min_seq,
        explain=explain,
        strategy=strategy,
    )
    answers, about = _answers(viewer, asked)
    if texts is None:
        return {**answers[0], **about}
    return {"answers": answers, **about}


def route_vector(
    *,
    viewer: Viewer,
    vector: Sequence[float],
    embedding_model: str,
    base_model: str | None = None,
    top_k: int = 10,
    filters: Mapping[str, Any] | None = None,
    min_score: float | None = None,
    min_seq: int | None = None,
    explain: bool = False,
) -> dict[str, Any]:
    """The experts for a vector that the caller made: what `POST /api/v1/route/vector` answers, as `route` by `dense`.

    Raises QueryInvalid for a vector that the active encoder did not make or that is not of length 1; else as `route`.
    """
    if embedding_model != (active := encoders.active().pk):
        raise _invalid("The vector is of another encoder.", "/embedding_model", embedding_model, active)
    asked = _asked(
        viewer,
        texts=("",),
        base_model=base_model,
        top_k=top_k,
        filters=filters,
        min_score=min_score,
        min_seq=min_seq,
        explain=explain,
        vector=tuple(vector),
        embedding_model=embedding_model,
    )
    answers, about = _answers(viewer, asked)
    return {**answers[0], **about}


def router_health() -> dict[str, Any]:
    """What the router process says of itself: encoder and index, each ready or loading. Raises IndexNotReady."""
    return router_link.health()


# What makes an expert routable


def embed(revision: Revision) -> dict[str, Any]:
    """Store the vectors of a revision's card; nothing is encoded again while card and encoder are the same.

    Raises IndexNotReady while the router cannot encode.
    """
    assert revision.expert is not None
    card = card_of(revision.expert, revision)
    active, preparing = encoders.in_use()
    made = embed_by(active, revision, card)
    if preparing is not None:
        try:
            embed_by(preparing, revision, card)
        except Unavailable as error:
            # Nobody need wait for an encoder that does not answer queries yet: its change embeds what is missing.
            log.warning("A card was not embedded by the next encoder.", extra={"error.detail": error.detail})
    return made


def embed_by(encoder: Encoder, revision: Revision, card: cards.Card) -> dict[str, Any]:
    """Store the vectors of a card by one encoder. Raises IndexNotReady while the router cannot encode by it."""
    if _is_embedded(revision, cards.digest(card), encoder):
        return {"encoder": encoder.pk, "vectors": len(cards.texts(card)) + 1, "reused": True}
    count = _store(encoder, revision, card, router_link.encode(list(cards.texts(card)), encoder_id=encoder.pk))
    return {"encoder": encoder.pk, "vectors": count, "reused": False}


def _store(encoder: Encoder, revision: Revision, card: cards.Card, vectors: NDArray[np.float32]) -> int:
    """Put the vectors of a card's texts in place of what was stored; how many rows that makes."""
    entry = cards.entry(card, vectors)
    kinds = [(Embedding.Kind.DESCRIPTION, 0), (Embedding.Kind.CENTROID, 0)]
    kinds += [(Embedding.Kind.EXAMPLE, position) for position in range(len(cards.used_examples(card)))]
    kinds += [(Embedding.Kind.INSTRUCTION, 0)] if cards.has_instruction(card) else []
    with transaction.atomic():
        # Two runs of the same job take turns here, and the later one finds nothing to complain about.
        Revision.objects.select_for_update().get(pk=revision.pk)
        Embedding.objects.filter(revision=revision, encoder=encoder.pk).delete()
        Embedding.objects.bulk_create(
            Embedding(
                revision=revision,
                encoder=encoder.pk,
                kind=kind,
                position=position,
                text_digest=cards.digest(card),
                vector=row.astype("<f2").tobytes(),
            )
            for (kind, position), row in zip(kinds, entry.vectors.astype(np.float16), strict=True)
        )
    return len(kinds)


def publish_to_index(revision: Revision) -> int | None:
    """Tell the routers that an expert is routable by this revision; returns the number of the change.

    None when the revision is not what `main` points at, or its expert may not be routed.
    Raises IndexNotReady when its vectors are not those of its card.
    """
    assert revision.expert_id is not None
    with transaction.atomic():
        # Whoever moves `main`, yanks or deletes locks the expert first; so what holds here holds until the commit.
        expert = Expert.objects.select_for_update(of=("self",)).select_related("namespace").get(pk=revision.expert_id)
        if selectors.head(expert) != revision or expert.deleted_at or expert.yanked_at:
            return None
        card = card_of(expert, revision)
        if not _is_embedded(revision, cards.digest(card), encoders.held()):
            raise IndexNotReady("The card changed after its vectors were made.")
        return _log(expert, revision=revision, card=_record(card))


def withdraw(expert: Expert) -> int | None:
    """Tell the routers that an expert left; None when they never heard of it."""
    with transaction.atomic():
        if not RoutingChange.objects.filter(expert=expert, operation=RoutingChange.Operation.PUT).exists():
            return None
        return _log(expert, revision=None, card={})


def changed(expert: Expert) -> int | None:
    """Bring the routers in line after an expert was renamed, hidden, yanked, deleted, put back or re-worded.

    Call it in the transaction of that change, last: it holds the clock, for which every other change waits.
    Returns the number of the change, None where nothing changes for the routers.
    """
    if expert.deleted_at or expert.yanked_at:
        return withdraw(expert)
    head = selectors.head(expert)
    stored = RoutingChange.objects.filter(expert=expert, operation=RoutingChange.Operation.PUT).first()
    encoder = encoders.held()
    if head is not None and Embedding.objects.filter(revision=head, encoder=encoder.pk).exists():
        card = card_of(expert, head)
        if _is_embedded(head, cards.digest(card), encoder):
            record = _record(card)
            is_same = stored is not None and (stored.revision_id, stored.card) == (head.pk, record)
            return None if is_same else _log(expert, revision=head, card=record)
        _embed_again(head, cards.digest(card))
    if stored is None or stored.card["expert"] == expert.full_name:
        return None
    # Until the new words have vectors, the old ones stand under the new name.
    return _log(expert, revision=stored.revision, card={**stored.card, "expert": expert.full_name})


def rebuild() -> Iterator[str]:
    """Embed what has no vectors by the present encoder, publish all that can be routed, withdraw all that cannot.

    Gives the name of each expert when it is done. Raises IndexNotReady while the router cannot encode.
    """
    alive = selectors.routable().select_related("expert__namespace", "base_model")
    for revision in alive.exclude(base_model=None).order_by("pk"):
        embed(revision)
        publish_to_index(revision)
        yield str(revision.expert)
    gone = Q(expert__deleted_at__isnull=False) | Q(expert__yanked_at__isnull=False)
    for change in RoutingChange.objects.filter(gone, operation=RoutingChange.Operation.PUT).select_related("expert"):
        withdraw(change.expert)


def card_of(expert: Expert, revision: Revision) -> cards.Card:
    """The card of an expert as routing reads it."""
    return cards.Card(
        expert=expert.full_name,
        base_model=revision.base_model.name if revision.base_model else "",
        name=expert.name,
        description=expert.description,
        examples=tuple(expert.examples),
        tags=tuple(expert.tags),
        instruction=expert.instruction,
        number=expert.pk,
        revision=revision.pk,
    )


def _embed_again(revision: Revision, digest: str) -> None:
    """Ask for the vectors of a card whose words changed without a new revision."""
    key = f"r{revision.pk}:{digest[:32]}"
    first = jobs.enqueue(jobs.JobKind.EMBED, revision=revision, key=f"{jobs.JobKind.EMBED}:{key}")
    jobs.enqueue(jobs.JobKind.INDEX, revision=revision, after=first, key=f"{jobs.JobKind.INDEX}:{key}")


def _is_embedded(revision: Revision, digest: str, encoder: Encoder) -> bool:
    return Embedding.objects.filter(revision=revision, encoder=encoder.pk, text_digest=digest).exists()


def _record(card: cards.Card) -> dict[str, Any]:
    return {
        "expert": card.expert,
        "base_model": card.base_model,
        "name": card.name,
        "description": card.description,
        "examples": list(card.examples),
        "tags": list(card.tags),
        "instruction": card.instruction,
    }


def tick() -> int:
    """The next number of the clock, in the caller's transaction.

    The clock's row stays locked until the commit. So numbers are given in the order of commits and none is skipped:
    whoever has read number n has seen all changes up to n. (A sequence would hand out n + 1 to a transaction that
    commits before n does, and a reader would pass n by.)
    """
    table = connection.ops.quote_name(RoutingClock._meta.db_table)  # noqa: SLF001  # Django's documented name.
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} AS clock (id, seq) VALUES (1, 1) "  # noqa: S608  # The name is our own.
            "ON CONFLICT (id) DO UPDATE SET seq = clock.seq + 1 RETURNING seq"
        )
        return int(cursor.fetchone()[0])


def _log(expert: Expert, *, revision: Revision | None, card: dict[str, Any]) -> int:
    """Write a change under the next number of the clock, in the caller's transaction."""
    seq = tick()
    # Each change replaces all that was known of its expert, so the log needs the last one only.
    RoutingChange.objects.filter(expert=expert).delete()
    operation = RoutingChange.Operation.PUT if revision else RoutingChange.Operation.REMOVE
    RoutingChange.objects.create(seq=seq, expert=expert, revision=revision, operation=operation, card=card)
    return seq


# Asking, checking, answering


def _asked(
    viewer: Viewer,
    *,
    texts: tuple[str, ...],
    base_model: str | None,
    top_k: int,
    filters: Mapping[str, Any] | None,
    min_score: float | None,
    min_seq: int | None,
    explain: bool,
    strategy: str | None = None,
    vector: tuple[float, ...] | None = None,
    embedding_model: str | None = None,
) -> Asked:
    return Asked(
        texts=texts,
        base=bases.resolve(base_model, pointer="/base_model") if base_model is not None else None,
        top_k=_number("/top_k", top_k, low=1, high=MAX_RESULTS),
        min_score=min_score,
        min_seq=_published(min_seq),
        strategy=strategy,
        explain=explain,
        allow=_allowed(viewer, filters) if filters else None,
        vector=vector,
        embedding_model=embedding_model,
    )


def _answers(viewer: Viewer, asked: Asked) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answer for each text, and what is true of all: how far the index was, and whose vectors were compared."""
    found = _ranked(viewer, asked)
    answers = [_answer(asked, ranking, found["strategy"]) for ranking in found["rankings"]]
    return answers, {"index_seq": found["seq"], "embedding_model": found["embedding_model"]}


def _texts(text: str | None, texts: Sequence[str] | None) -> tuple[str, ...]:
    if (text is None) == (texts is None):
        met = "neither" if text is None else "both"
        raise _invalid("Give either one text or a list of texts.", "/text", met, "text or texts")
    wanted = (
        [("/text", text)] if text is not None else [(f"/texts/{place}", one) for place, one in enumerate(texts or ())]
    )
    if not 1 <= len(wanted) <= MAX_TEXTS:
        raise _invalid("Too few or too many texts.", "/texts", len(wanted), f"1 to {MAX_TEXTS} texts")
    for pointer, one in wanted:
        if not one or not one.strip():
            raise _invalid("A text is empty.", pointer, "", "a text with a visible character")
        if len(one) > MAX_CHARACTERS:
            fault = Fault(
                pointer, len(one), f"at most {MAX_CHARACTERS} characters", "Send the part that says the task."
            )
            raise TooLarge("A text is too long.", faults=[fault])
    return tuple(one for _, one in wanted if one)


def _number(pointer: str, value: int, *, low: int, high: int) -> int:
    if not low <= value <= high:
        raise _invalid(f"{pointer[1:]} is out of range.", pointer, value, f"{low} to {high}")
    return value


def _published(seq: int | None) -> int:
    """`min_seq` as a number that some change has. Raises IndexNotReady for one that none has yet."""
    if not seq:
        return 0
    clock = RoutingClock.objects.values_list("seq", flat=True).first() or 0
    if seq > clock:
        raise IndexNotReady(f"No change has number {seq} yet; the last one is {clock}.", retry_after_seconds=1)
    return seq


def _allowed(viewer: Viewer, filters: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the experts that pass the filters, as the router knows them."""
    passing = Q()
    if owner := filters.get("owner"):
        passing &= Q(namespace__name__iexact=owner)
    if tags := filters.get("tags"):
        passing &= Q(tags__contains=list(tags))
    if licence := filters.get("licence"):
        passing &= Q(licence__iexact=licence)
    if (named := filters.get("experts")) is not None:
        if len(named) > MAX_NAMED:
            raise _invalid("Too many experts.", "/filters/experts", len(named), f"at most {MAX_NAMED} names")
        for place, name in enumerate(named):
            if name.count("/") != 1:
                raise _invalid("This is no expert's name.", f"/filters/experts/{place}", name, "owner/name")
        # A hidden expert and one that does not exist are passed over alike.
        passing &= Q(pk__in=[row.pk for row in selectors.experts_named(list(named), viewer)])
    rows = Expert.objects.visible_to(viewer).filter(passing, yanked_at=None)
    return tuple(rows.values_list("pk", flat=True))


def _ranked(viewer: Viewer, asked: Asked) -> dict[str, Any]:
    """The router's answer with what the caller may see, going deeper where too few of the hits are left."""
    limit = _SPARES * asked.top_k
    kept: dict[int, dict[str, Any]] = {}
    open_places = list(range(len(asked.texts)))
    by, restarts = None, 0
    while True:
        found = router_link.route(
            {
                "texts": [asked.texts[place] for place in open_places],
                "base_model": asked.base.name if asked.base else None,
                "strategy": asked.strategy,
                "limit": limit,
                "allow": asked.allow,
                "min_seq": asked.min_seq,
                "explain": asked.explain,
                **({} if asked.vector is None else {"vector": asked.vector, "embedding_model": asked.embedding_model}),
            }
        )
        if kept and found["embedding_model"] != by:
            # The encoder changed between two rounds, and no answer holds scores of two.
            restarts += 1
            if restarts > _MAX_RESTARTS:
                raise IndexNotReady("The encoder is being changed.", retry_after_seconds=router_link.RETRY_SECONDS)
            kept, open_places = {}, list(range(len(asked.texts)))
            continue
        by = found["embedding_model"]
        rankings = found["rankings"]
        rows = visible(viewer, asked.base, (hit["revision"] for ranking in rankings for hit in ranking["hits"]))
        for place, ranking in zip(open_places, rankings, strict=True):
            hits = [(hit, rows[hit["revision"]]) for hit in ranking["hits"] if hit["revision"] in rows]
            kept[place] = {**ranking, "hits": hits[: asked.top_k]}
        open_places = [
            place
            for place, ranking in zip(open_places, rankings, strict=True)
            if len(kept[place]["hits"]) < asked.top_k and not ranking["exhausted"]
        ]
        if not open_places:
            return {**found, "rankings": [kept[place] for place in range(len(asked.texts))]}
        limit *= 8


def visible(viewer: Viewer, base: BaseModel | None, revision_ids: Iterable[int]) -> dict[int, Revision]:
    """Of these revisions the ready ones, on this base, of experts that the caller may see and that are not yanked.

    The rows hold what names an expert, a revision and a base; anything else is a query more.
    """
    rows = Revision.objects.filter(
        pk__in=set(revision_ids),
        state=Revision.State.READY,
        expert__in=Expert.objects.visible_to(viewer).filter(yanked_at=None),
    )
    if base is not None:
        rows = rows.filter(base_model=base)
    # Whole rows of experts and bases, with their texts and shapes, took most of the time of a call.
    rows = rows.select_related("expert__namespace", "base_model").only(
        "commit", "expert__name", "expert__namespace__name", "base_model__name"
    )
    return {row.pk: row for row in rows}


def _answer(asked: Asked, ranking: dict[str, Any], wanted: str) -> dict[str, Any]:
    hits = ranking["hits"]
    threshold = ranking["min_score"] if asked.min_score is None else asked.min_score
    abstained = not hits or hits[0][0]["score"] < threshold
    return {
        "results": [] if abstained else [_result(hit, row) for hit, row in hits],
        "abstained": abstained,
        "best_score": hits[0][0]["score"] if hits else None,
        "min_score": threshold,
        "default_min_score": ranking["min_score"],
        "strategy": ranking["strategy"],
        "degraded": ranking["strategy"] != wanted,
    }


def _result(hit: dict[str, Any], row: Revision) -> dict[str, Any]:
    assert row.expert is not None
    assert row.base_model is not None
    return {
        **hit,
        "expert": row.expert.full_name,
        "revision": row.commit,
        "base_model": row.base_model.name,
    }


def _invalid(detail: str, pointer: str, met: object, wanted: object) -> QueryInvalid:
    return QueryInvalid(detail, faults=[Fault(pointer, met, wanted, "Correct this field.")])
