"""What owner/name at a revision means to a caller: an expert's tree, a reconstruction, a merge, or nothing."""

from dataclasses import dataclass
from functools import partial

from api.hf import waiting
from api.hf.door import header_text
from registry import selectors
from registry.checks.files import WEIGHTS
from registry.errors import FileNotFound, MergeNotFound, RevisionNotFound
from registry.models import Expert, File, Job, Merge, Ref, Revision, User
from registry.selectors import Repository, Viewer
from registry.services import merges, reconstructions
from registry.services.reconstructions import Reconstruction

MERGE_REVISION = "merge--"
# The commit of the empty tree: what `main` of a fresh expert is, before anything was uploaded.
EMPTY_COMMIT = "0" * 40


@dataclass(frozen=True)
class Pending:
    """A reconstruction whose weights a job makes."""

    found: Reconstruction
    job: Job

    def wait(self) -> Revision:
        """The revision as soon as it is there. Raises FormPending after a moment, FormFailed, RevisionNotFound."""
        made = partial(reconstructions.made_of, self.found.source, self.found.form)
        return waiting.wait(self.job, made=made, outcome=reconstructions.outcome)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit. Without a revision it is empty, or a merge or the weights of a reconstruction
    (`pending`) are not computed yet.
    """

    repository: Repository
    commit: str
    revision: Revision | None
    viewer: Viewer = None
    pending: Pending | None = None

    @property
    def is_private(self) -> bool:
        return self.repository.is_private

    @property
    def notice(self) -> dict[str, str]:
        """A header that clients show to people: that the expert, or an expert of the merge, was yanked, and why."""
        marks, merge, expert = self.repository.marks, self.repository.merge, self.repository.expert
        if merge is not None:
            yanked = selectors.yanked_parents(merge) if marks is not None and marks.is_yanked else []
        else:
            yanked = [expert] if expert is not None and expert.yanked_at is not None else []
        if not yanked:
            return {}
        told = ", ".join(f"{one.full_name} was yanked: {one.yank_reason or 'no reason'}" for one in yanked)
        return {"X-HF-Warning": header_text(f"yanked; {told}")}

    def own_revision(self) -> Revision | None:
        """The expert's revision; a branch can be made of neither merge nor reconstruction. Raises RevisionNotFound."""
        if self.repository.merge is not None:
            raise RevisionNotFound("A merge is no revision of the expert itself.")
        if self.pending is not None or (self.revision is not None and self.revision.derived_from_id is not None):
            raise RevisionNotFound("A reconstruction is no revision of the expert's own history.")
        return self.revision

    def content(self) -> Revision | None:
        """The revision whose files these are; one that is not there is asked for and waited for a moment.

        Raises MergePending, MergeFailed, FormPending, FormFailed, RateExceeded.
        """
        if self.revision is not None:
            return self.revision
        if self.pending is not None:
            return self.pending.wait()
        merge = self.repository.merge
        if merge is None:
            return None
        return waiting.wait(merges.touch(merge), made=self._made, outcome=partial(merges.outcome, merge))

    def _made(self) -> Revision | None:
        """The content of a merge once it is computed, unless a parent was hidden meanwhile. Raises MergeNotFound."""
        assert self.repository.merge is not None
        found = selectors.merge_repository(self.viewer, pk=self.repository.merge.pk)
        if found is None:
            raise MergeNotFound("A parent of this merge was hidden.")
        return revision_of(found.merge)

    def names(self) -> list[str]:
        """The paths of all files, which of a reconstruction are known before it is computed."""
        known = self.pending.found.source if self.pending is not None else self.content()
        return list(File.objects.filter(revision=known).order_by("path").values_list("path", flat=True))

    def files(self, *, folder: str = "") -> list[File]:
        """All files, sorted by path. Of what is not computed it raises as `content`, and FileNotFound for a folder that
        will not be there.
        """
        if folder and self._is_foreign(folder):
            raise FileNotFound(f"There is no folder {folder[:200]!r} in {self.repository.full_name}.")
        revision = self.content()
        if revision is None:
            return []
        return list(File.objects.filter(revision=revision).select_related("blob").order_by("path"))

    def file(self, path: str) -> File:
        """One file. Raises FileNotFound, and as `content` for what is not computed."""
        absent = FileNotFound(f"There is no file {path[:200]!r} in {self.repository.full_name}.")
        if "\0" in path:
            raise absent
        if self.pending is not None and path != WEIGHTS:
            # All but the weights are the files of the revision that it is made of.
            return selectors.file(self.pending.found.source, path)
        if self._is_foreign(path):
            raise absent
        if self.revision is None and (told := getattr(self.repository.merge, "revision", None)) is not None:
            # What tells of a merge stays when its weights are removed.
            kept = File.objects.filter(revision=told, path=path).select_related("blob").first()
            if kept is not None:
                return kept
        revision = self.content()
        if revision is None:
            raise absent
        found = selectors.file(revision, path)
        found.revision = revision
        return found

    def _is_foreign(self, path: str) -> bool:
        """Whether a merge that is not computed will have nothing at this path: no work is begun to find that out."""
        if self.repository.merge is None or self.revision is not None:
            return False
        names = merges.names(self.repository.merge)
        return names is not None and not any(name == path or name.startswith(f"{path}/") for name in names)


def revision_of(merge: Merge | None) -> Revision | None:
    """The content of a merge that is computed: of one whose weights were removed only what tells of it is left."""
    return getattr(merge, "revision", None) if merge is not None and merge.state == Merge.State.READY else None


def present(full_name: str, revision: str, path: str, viewer: Viewer) -> tuple[Snapshot, File] | None:
    """A file that a merge has, in one query; None for all that must be looked at more closely."""
    owner, _, name = full_name.partition("/")
    if "\0" in path:
        return None
    if owner == selectors.MERGES:
        found = selectors.merge_file(viewer, path, pk=name)
    elif revision.startswith(MERGE_REVISION):
        merge_id = revision.removeprefix(MERGE_REVISION)
        found = selectors.merge_file(viewer, path, pk=merge_id, **selectors.by_parent(full_name))
    else:
        return None
    if found is None:
        return None
    repository, file = found
    commit = file.revision.commit
    if owner == selectors.MERGES and revision not in {"main", commit}:
        return None
    return Snapshot(repository, commit, file.revision, viewer), file


def find(full_name: str, revision: str, viewer: Viewer) -> Snapshot:
    """A repository at a branch, tag, commit, `merge--<id>` or `compeft-k<percent>`.

    Raises ExpertNotFound, RevisionNotFound.
    """
    return at(selectors.repository(full_name, viewer), revision, viewer)


def at(repository: Repository, revision: str, viewer: Viewer) -> Snapshot:
    """A repository that was found, at a revision. Raises RevisionNotFound."""
    if repository.merge is not None:
        if revision not in {"main", repository.merge.commit}:
            raise RevisionNotFound(f"{repository.full_name} has main and its commit alone.")
        return _of_merge(repository, viewer)
    expert = repository.expert
    assert expert is not None
    if revision.startswith(MERGE_REVISION):
        return _of_merge(_merge_with(expert, viewer, pk=revision.removeprefix(MERGE_REVISION)), viewer)
    if (named := reconstructions.named(expert, revision)) is not None:
        return _of_reconstruction(repository, named, viewer)
    try:
        found = selectors.revision(repository, revision)
    except RevisionNotFound:
        if revision == EMPTY_COMMIT or _is_empty(expert, revision):
            return Snapshot(repository, EMPTY_COMMIT, None, viewer)
        # A client that resolved `compeft-k10` or `merge--<id>` goes on with the commit it was given.
        promised = reconstructions.promised(expert, revision)
        if promised is not None:
            return _of_reconstruction(repository, promised, viewer)
        return _of_merge(_merge_with(expert, viewer, commit=revision), viewer)
    return Snapshot(repository, found.commit, found, viewer)


def _of_merge(repository: Repository, viewer: Viewer) -> Snapshot:
    assert repository.merge is not None
    return Snapshot(repository, repository.merge.commit, revision_of(repository.merge), viewer)


def _of_reconstruction(repository: Repository, found: Reconstruction, viewer: Viewer) -> Snapshot:
    """A reconstruction, asked for when it is not there. Raises FormFailed, RevisionNotFound, RateExceeded."""
    if found.revision is not None:
        return Snapshot(repository, found.commit, found.revision, viewer)
    job = reconstructions.ask(found, user=viewer if isinstance(viewer, User) else None)
    return Snapshot(repository, found.commit, None, viewer, Pending(found, job))


def _merge_with(expert: Expert, viewer: Viewer, **wanted: str) -> Repository:
    """A merge that the viewer may see and that has this expert as a parent. Raises RevisionNotFound."""
    found = selectors.merge_repository(viewer, parents__revision__expert=expert, **wanted)
    if found is None:
        raise RevisionNotFound(f"{expert.full_name} has no part in a merge {next(iter(wanted.values()))[:80]!r}.")
    return found


def _is_empty(expert: Expert, revision: str) -> bool:
    """Whether this names a branch that has no commit yet."""
    return Ref.objects.filter(expert=expert, name=revision, revision=None).exists()
