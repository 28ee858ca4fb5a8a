"""What owner/name at a revision means to a caller: an expert's tree, a reconstruction, a merge, or nothing."""

from dataclasses import dataclass

from api.hf.door import header_text
from api.hf.waiting import Pending
from registry import selectors
from registry.checks.files import WEIGHTS
from registry.errors import FileNotFound, NotReady, RevisionNotFound, Unavailable
from registry.models import Expert, File, Merge, MergeParent, Ref, Revision, User
from registry.selectors import Repository, Viewer
from registry.services import reconstructions
from registry.services.reconstructions import Reconstruction

MERGE_REVISION = "merge--"
# The commit of the empty tree: what `main` of a fresh expert is, before anything was uploaded.
EMPTY_COMMIT = "0" * 40
# What a merge will hold is known before it is computed.
MERGE_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit. Without a revision it is empty, or a merge or the weights of a reconstruction
    (`pending`) are not computed yet.
    """

    repository: Repository
    commit: str
    revision: Revision | None
    pending: Pending | None = None

    @property
    def is_private(self) -> bool:
        return self.repository.is_private

    @property
    def notice(self) -> dict[str, str]:
        """A header that clients show to people: that the expert was yanked, and why."""
        expert = self.repository.expert
        if expert is None or expert.yanked_at is None:
            return {}
        return {
            "X-HF-Warning": header_text(f"yanked; {expert.full_name} was yanked: {expert.yank_reason or 'no reason'}")
        }

    def check_computed(self) -> None:
        """Raise Unavailable while a merge is computed, NotReady when that failed."""
        merge = self.repository.merge
        if merge is None or self.revision is not None:
            return
        job = selectors.job_of_merge(merge)
        name = f"job {job.pk}" if job else "no job"
        if merge.state in {Merge.State.FAILED, Merge.State.CANCELLED}:
            raise NotReady(f"{merge.full_name} was {merge.state} ({name}); ask for the merge again.")
        raise Unavailable(f"{merge.full_name} is being computed ({name}, {merge.state}).", retry_after_seconds=2)

    def own_revision(self) -> Revision | None:
        """The expert's revision; a branch can be made of neither merge nor reconstruction. Raises RevisionNotFound."""
        if self.repository.merge is not None:
            raise RevisionNotFound("A merge is no revision of the expert itself.")
        if self.pending is not None or (self.revision is not None and self.revision.derived_from_id is not None):
            raise RevisionNotFound("A reconstruction is no revision of the expert's own history.")
        return self.revision

    def content(self) -> Revision | None:
        """The revision whose files these are, waited for a moment. Raises Unavailable while it is computed."""
        self.check_computed()
        return self.pending.wait() if self.pending is not None else self.revision

    def names(self) -> list[str]:
        """The paths of all files, which of a reconstruction are known before it is computed."""
        known = self.pending.found.source if self.pending is not None else self.content()
        return list(File.objects.filter(revision=known).order_by("path").values_list("path", flat=True))

    def files(self) -> list[File]:
        """All files, sorted by path; of what is not computed it raises Unavailable."""
        revision = self.content()
        if revision is None:
            return []
        return list(File.objects.filter(revision=revision).select_related("blob").order_by("path"))

    def file(self, path: str) -> File:
        """One file. Raises FileNotFound, Unavailable."""
        if self.pending is not None and path != WEIGHTS and "\0" not in path:
            # All but the weights are the files of the revision that it is made of.
            return selectors.file(self.pending.found.source, path)
        revision = self.content()
        if revision is None or "\0" in path:
            raise FileNotFound(f"There is no file {path[:200]!r} in {self.repository.full_name}.")
        found = selectors.file(revision, path)
        found.revision = revision
        return found


def find(full_name: str, revision: str, viewer: Viewer) -> Snapshot:
    """A repository at a branch, tag, commit, `merge--<id>` or `compeft-k<percent>`.

    Raises ExpertNotFound, RevisionNotFound.
    """
    return at(selectors.repository(full_name, viewer), revision, viewer)


def at(repository: Repository, revision: str, viewer: Viewer) -> Snapshot:
    """A repository that was found, at a revision. Raises RevisionNotFound."""
    if repository.merge is not None:
        return _of_merge(repository.merge, revision)
    expert = repository.expert
    assert expert is not None
    if revision.startswith(MERGE_REVISION):
        return _of_merge(_merge_with(expert, revision.removeprefix(MERGE_REVISION), viewer), "main")
    if (named := reconstructions.named(expert, revision)) is not None:
        return _of_reconstruction(repository, named, viewer)
    try:
        found = selectors.revision(repository, revision)
    except RevisionNotFound:
        if revision == EMPTY_COMMIT or _is_empty(expert, revision):
            return Snapshot(repository, EMPTY_COMMIT, None)
        # A client that resolved `compeft-k10` or `merge--<id>` goes on with the commit it was given.
        promised = reconstructions.promised(expert, revision)
        if promised is not None:
            return _of_reconstruction(repository, promised, viewer)
        merge = _merge_with(expert, revision, viewer, is_commit=True)
        return _of_merge(merge, "main")
    return Snapshot(repository, found.commit, found)


def _of_merge(merge: Merge, revision: str) -> Snapshot:
    if revision not in {"main", merge.commit}:
        raise RevisionNotFound(f"{merge.full_name} has main and its commit alone.")
    return Snapshot(Repository(None, merge), merge.commit, Revision.objects.filter(merge=merge).first())


def _of_reconstruction(repository: Repository, found: Reconstruction, viewer: Viewer) -> Snapshot:
    """A reconstruction, asked for when it is not there. Raises FormFailed, RevisionNotFound, RateExceeded."""
    if found.revision is not None:
        return Snapshot(repository, found.commit, found.revision)
    job = reconstructions.ask(found, user=viewer if isinstance(viewer, User) else None)
    return Snapshot(repository, found.commit, None, Pending(found, job))


def _merge_with(expert: Expert, name: str, viewer: Viewer, *, is_commit: bool = False) -> Merge:
    """A merge that the viewer may see and that has this expert as a parent. Raises RevisionNotFound."""
    visible = Merge.objects.visible_to(viewer).select_related("base_model", "recipe")
    found = (visible.filter(commit=name) if is_commit else visible.filter(pk=name)).first()
    if found is None or not MergeParent.objects.filter(merge=found, revision__expert=expert).exists():
        raise RevisionNotFound(f"{expert.full_name} has no part in a merge {name[:80]!r}.")
    return found


def _is_empty(expert: Expert, revision: str) -> bool:
    """Whether this names a branch that has no commit yet."""
    return Ref.objects.filter(expert=expert, name=revision, revision=None).exists()
