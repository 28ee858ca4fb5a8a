"""Branches and tags of an expert: names for revisions."""

from django.db import IntegrityError, transaction

from registry.checks import names
from registry.errors import Fault, NameInvalid, NameTaken, RevisionNotFound
from registry.models import Expert, Ref, Revision, User
from registry.services import audit, experts


def create(*, user: User, expert: Expert, name: str, kind: str, revision: Revision | None) -> Ref:
    """Name a revision. Raises NotAllowed, NameInvalid, NameTaken."""
    experts.require_write(user, expert)
    names.check_branch(name)
    try:
        with transaction.atomic():
            ref = Ref.objects.create(expert=expert, name=name, kind=kind, revision=revision)
            commit = revision.commit if revision else ""
            audit.record(user, f"{kind}.create", f"{expert.full_name}@{name}", commit=commit)
    except IntegrityError as error:
        fault = Fault("/name", name, "a name that this expert does not use yet", "Choose another name.")
        raise NameTaken(f"{expert.full_name} has a branch or tag {name!r} already.", faults=[fault]) from error
    return ref


def delete(*, user: User, expert: Expert, name: str, kind: str) -> None:
    """Forget a name; the revision stays. Raises NotAllowed, NameInvalid for main, RevisionNotFound."""
    experts.require_write(user, expert)
    if name == "main":
        raise NameInvalid("main cannot be deleted.", faults=[Fault("/name", name, "another branch", "", "N3")])
    with transaction.atomic():
        count, _ = Ref.objects.filter(expert=expert, name=name, kind=kind).delete()
        if count == 0:
            raise RevisionNotFound(f"{expert.full_name} has no {kind} {name[:80]!r}.")
        audit.record(user, f"{kind}.delete", f"{expert.full_name}@{name}")
