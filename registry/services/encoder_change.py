"""The change from one text encoder to another while queries are answered.

Every card is embedded by the new one too, a snapshot of its index is built, and one transaction makes it the active
one. The vectors of the old one stay, so that the way back needs only what came since.
"""

from collections.abc import Iterator, Sequence

from django.db import transaction

from moerge.routing import cards
from registry import jobs
from registry.errors import Conflict, Fault, IndexNotReady
from registry.jobs import JobKind
from registry.models import Embedding, Encoder, Job, RoutingChange
from registry.services import audit, encoders, entries, routing


def begin(encoder_id: str) -> Job | None:
    """Have an encoder replace the active one as soon as it knows all cards; the last of the jobs that do it.

    Naming the active one calls off a change that is on its way: None. Raises Invalid for an unknown id and Conflict
    while another change is on its way.
    """
    encoders.register()
    with transaction.atomic():
        active = encoders.held()
        wanted = encoders.find(encoder_id)
        preparing = Encoder.objects.filter(state=Encoder.State.PREPARING).first()
        if wanted == active:
            if preparing is not None:
                _call_off(preparing)
            return None
        if preparing not in (None, wanted):
            fault = Fault("/id", encoder_id, preparing.pk, f"Call that change off: bin/manage change_encoder {active}")
            raise Conflict("Another encoder is being prepared.", faults=[fault])
        Encoder.objects.filter(pk=wanted.pk).update(state=Encoder.State.PREPARING)
        audit.record(None, "encoder.change", wanted.pk, before=active.pk)
        first, last = _jobs(wanted)
        for job in (first, last):
            jobs.renew(job, user=None, priority=jobs.ASKED_FOR)
        return last


def embed_missing(encoder: Encoder) -> Iterator[tuple[int, int]]:
    """Store the vectors by this encoder of all published cards that lack them; tells how many of how many are done.

    Raises IndexNotReady while the router cannot encode by it; what is stored then need not be made again.
    """
    puts = RoutingChange.objects.filter(operation=RoutingChange.Operation.PUT)
    done, total = 0, puts.count()
    for some, lacking in _pieces(encoder, after=0):
        done += len(some) - len(lacking)
        yield done, total
        for change in lacking:
            assert change.revision is not None
            routing.embed_by(encoder, change.revision, entries.card(change))
            done += 1
            yield done, total


def activate(encoder: Encoder, *, embedded_to: int) -> int:
    """Answer by this encoder from now on; the number of that change.

    `embedded_to` is a number up to which every published card is known to have its vectors. Raises Conflict when the
    change was called off, and IndexNotReady when a card after that number lacks vectors.
    """
    with transaction.atomic():
        active = encoders.held()  # From here to the commit nobody publishes.
        row = Encoder.objects.select_for_update().get(pk=encoder.pk)
        if row.state == Encoder.State.IDLE:
            raise Conflict("The change of encoder was called off.")
        if any(lacking for _, lacking in _pieces(row, after=embedded_to)):
            raise IndexNotReady("A card was published without vectors by the new encoder.", retry_after_seconds=1)
        seq = routing.tick()
        Encoder.objects.filter(pk=active.pk).update(state=Encoder.State.IDLE)
        Encoder.objects.filter(pk=row.pk).update(state=Encoder.State.ACTIVE)
        audit.record(None, "encoder.activate", row.pk, before=active.pk)
    return seq


def _pieces(encoder: Encoder, *, after: int) -> Iterator[tuple[Sequence[RoutingChange], list[RoutingChange]]]:
    """Published cards after a change, a few hundred at a time, and those of them that lack vectors by this encoder."""
    puts = RoutingChange.objects.filter(operation=RoutingChange.Operation.PUT).select_related("revision")
    while some := list(puts.filter(seq__gt=after).order_by("seq")[: entries.AT_ONCE]):
        stored = Embedding.objects.filter(
            revision_id__in=[change.revision_id for change in some],
            encoder=encoder.pk,
            kind=Embedding.Kind.DESCRIPTION,
        )
        digests = dict(stored.values_list("revision_id", "text_digest"))
        lacking = [
            change for change in some if digests.get(change.revision_id or 0) != cards.digest(entries.card(change))
        ]
        yield some, lacking
        after = some[-1].seq


def _jobs(encoder: Encoder) -> tuple[Job, Job]:
    """The jobs of a change to this encoder: embed, then build its snapshot and switch."""
    name, parameters = encoders.slug(encoder.pk), {"encoder": encoder.pk}
    first = jobs.enqueue(JobKind.REEMBED, key=f"{JobKind.REEMBED}:{name}", parameters=parameters)
    last = jobs.enqueue(
        JobKind.SNAPSHOT,
        key=f"{JobKind.SNAPSHOT}:{name}:activate",
        after=first,
        parameters={**parameters, "activate": True},
    )
    return first, last


def _call_off(encoder: Encoder) -> None:
    for job in _jobs(encoder):
        jobs.cancel(job)
    Encoder.objects.filter(pk=encoder.pk).update(state=Encoder.State.IDLE)
