"""Experts as such: made, renamed, hidden, yanked, deleted. What is in them is the business of revisions."""

from django.db import IntegrityError, transaction
from django.db.models import Q
from django.utils import timezone

from registry import selectors
from registry.checks import names
from registry.errors import Conflict, ExpertNotFound, Fault, NameTaken, NotAllowed
from registry.models import Expert, Membership, MergeParent, Namespace, Ref, User
from registry.services import audit, routing


def create(*, user: User, full_name: str, private: bool = False) -> Expert:
    """Make an expert without content, with an empty `main`. Raises NameInvalid, NotAllowed, NameTaken."""
    namespace, name = claim(user=user, full_name=full_name)
    try:
        with transaction.atomic():
            expert = Expert.objects.create(
                namespace=namespace,
                name=name,
                key=name.casefold(),
                visibility=Expert.Visibility.PRIVATE if private else Expert.Visibility.PUBLIC,
                created_by=user,
            )
            Ref.objects.create(expert=expert, name="main")
            audit.record(user, "expert.create", expert.full_name, private=private)
    except IntegrityError as error:
        raise _taken(full_name) from error
    return expert


def claim(*, user: User, full_name: str, pointer: str = "/expert") -> tuple[Namespace, str]:
    """The namespace and the name under which a user wants to publish. Raises NameInvalid or NotAllowed."""
    owner, name = names.split(full_name, pointer=pointer)
    namespace = Namespace.objects.filter(name__iexact=owner).first()
    if namespace is None or not selectors.may_write(user, namespace.name):
        mine = Membership.objects.filter(user=user).select_related("namespace").order_by("namespace__name")
        wanted = ", ".join(row.namespace.name for row in mine if row.role != Membership.Role.READER) or "none yet"
        raise NotAllowed(
            f"You may not publish under {owner!r}.",
            faults=[
                Fault(pointer, owner, f"one of your namespaces: {wanted}", "Choose one of these as the first part.")
            ],
        )
    return namespace, name


def find(full_name: str) -> Expert | None:
    """The living expert of this name, whoever may see it."""
    owner, _, name = full_name.partition("/")
    alive = Expert.objects.select_related("namespace", "base_model").filter(deleted_at=None)
    return alive.filter(namespace__name__iexact=owner, key=name.casefold()).first()


def rename(*, user: User, expert: Expert, full_name: str) -> Expert:
    """Give an expert another name, or another owner that the user may write to as well."""
    require_write(user, expert)
    namespace, name = claim(user=user, full_name=full_name, pointer="/name")
    before = expert.full_name
    try:
        with transaction.atomic():
            Expert.objects.filter(pk=expert.pk).update(
                namespace=namespace, name=name, key=name.casefold(), updated_at=timezone.now()
            )
            audit.record(user, "expert.rename", before, to=f"{namespace.name}/{name}")
            expert = Expert.objects.select_related("namespace", "base_model").get(pk=expert.pk)
            routing.changed(expert)
    except IntegrityError as error:
        raise _taken(full_name) from error
    return expert


def change_visibility(*, user: User, expert: Expert, visibility: str) -> Expert:
    """Show an expert to everybody, or to its namespace alone."""
    require_write(user, expert)
    with transaction.atomic():
        row = _locked(expert)
        if row.visibility != visibility:
            row.visibility = Expert.Visibility(visibility)
            row.save(update_fields=["visibility", "updated_at"])
            audit.record(user, "expert.visibility", row.full_name, visibility=visibility)
            routing.changed(row)
    return row


def yank(*, user: User, expert: Expert, yanked: bool = True, reason: str = "") -> Expert:
    """Take an expert out of search, routing and new merges, or put it back; its files stay where they are."""
    require_write(user, expert)
    with transaction.atomic():
        row = _locked(expert)
        row.yanked_at = (row.yanked_at or timezone.now()) if yanked else None
        row.yank_reason = reason[:300] if yanked else ""
        row.save(update_fields=["yanked_at", "yank_reason", "updated_at"])
        audit.record(user, "expert.yank" if yanked else "expert.unyank", row.full_name, reason=reason[:300])
        routing.changed(row)
    return row


def delete(*, user: User, expert: Expert) -> None:
    """Remove an expert and free its name. Raises Conflict when a merge has it as parent."""
    require_write(user, expert)
    with transaction.atomic():
        row = _locked(expert)
        children = MergeParent.objects.filter(revision__expert=row).count()
        if children and not user.is_staff:
            raise Conflict(
                f"{row.full_name} is a parent of {children} merges.",
                faults=[
                    Fault(
                        "/expert",
                        f"{children} merges",
                        "no merges",
                        "Yank it instead: merges stay, new ones cannot be made.",
                    )
                ],
            )
        row.deleted_at = timezone.now()
        row.save(update_fields=["deleted_at", "updated_at"])
        audit.record(user, "expert.delete", row.full_name)
        routing.changed(row)


def require_write(user: User, expert: Expert) -> None:
    """Raises ExpertNotFound for who may not even see the expert, NotAllowed for who may only read it."""
    if selectors.may_write(user, expert.namespace.name):
        return
    if not Expert.objects.visible_to(user).filter(pk=expert.pk).exists():
        raise ExpertNotFound(f"There is no expert {expert.full_name!r} that you may see.")
    raise NotAllowed(
        f"You may not change {expert.full_name}.",
        faults=[
            Fault(
                "/expert",
                expert.full_name,
                "an expert of one of your namespaces",
                "Ask its owner for the role of a writer.",
            )
        ],
    )


def _locked(expert: Expert) -> Expert:
    """The row under a lock. Raises ExpertNotFound when it was deleted meanwhile."""
    alive = Q(pk=expert.pk, deleted_at=None)
    row = Expert.objects.select_for_update(of=("self",)).select_related("namespace", "base_model").filter(alive).first()
    if row is None:
        raise ExpertNotFound(f"There is no expert {expert.full_name!r} that you may see.")
    return row


def _taken(full_name: str) -> NameTaken:
    fault = Fault("/expert", full_name, "a name that no expert of this owner has", "Choose another name.", "N2")
    return NameTaken(f"{full_name!r} is taken.", faults=[fault])
