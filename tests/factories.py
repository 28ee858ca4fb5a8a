"""Rows for tests, made by the services that make them in earnest."""

from itertools import count
from typing import Any

from django.utils import timezone

from registry.models import Expert, Job, Revision, User
from registry.services import accounts, bases, blobs, experts, keys, revisions
from tests import tiny

_numbers = count(1)
PASSWORD = "correct horse battery staple"


def user(name: str = "", *, is_admin: bool = False) -> User:
    """A user with a namespace of the same name."""
    return accounts.create_user(name=name or f"person{next(_numbers)}x", password=PASSWORD, is_admin=is_admin)


def key(owner: User, *scopes: str) -> str:
    """An API key; scopes read, write and merge when none is named."""
    return keys.create(user=owner, name="test", scopes=scopes or ("read", "write", "merge"))[1]


def expert(owner: User, name: str = "", *, private: bool = False) -> Expert:
    """An expert without content."""
    return experts.create(
        user=owner, full_name=f"{owner.username}/{name or f'expert-{next(_numbers)}'}", private=private
    )


def changes(
    files: dict[str, bytes], *, deleted: tuple[str, ...] = (), folders: tuple[str, ...] = ()
) -> revisions.Changes:
    """A change of these files, staged."""
    staged = {path: blobs.stage_bytes(data) for path, data in files.items()}
    return revisions.Changes(staged, deleted, folders)


def revision(
    owner: User, target: Expert | None = None, files: dict[str, bytes] | None = None, **options: Any
) -> Revision:
    """A committed revision of a complete tiny adapter, with its jobs queued."""
    bases.sync()
    target = target or expert(owner)
    tree = files if files is not None else tiny.adapter(seed=next(_numbers))
    return revisions.commit(user=owner, expert=target, changes=changes(tree), message="test", **options)


def ready(made: Revision) -> Revision:
    """The revision as if its jobs had passed."""
    Job.objects.filter(revision=made).update(state=Job.State.DONE, progress=1.0, finished_at=timezone.now())
    Revision.objects.filter(pk=made.pk).update(state=Revision.State.READY)
    made.refresh_from_db()
    return made
