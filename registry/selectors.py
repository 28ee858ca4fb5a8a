"""Every read that is more than a .get(): what a viewer may see, which revision a name means, which file it holds."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from django.contrib.auth.models import AnonymousUser
from django.contrib.postgres.search import SearchQuery, SearchVector
from django.db.models import Count, Exists, OuterRef, Q, QuerySet, Sum
from django.http import QueryDict

from registry.checks.compression import RULES, Form
from registry.errors import (
    ExpertNotFound,
    Fault,
    FileNotFound,
    JobNotFound,
    MergeNotFound,
    RequestInvalid,
    RevisionNotFound,
)
from registry.models import Blob, Encoded, Expert, File, Job, Membership, Merge, MergeParent, Ref, Revision, User

Viewer = User | AnonymousUser | None
COMMIT = re.compile(r"[0-9a-f]{40}")
MERGES = "merges"  # the owner name under which every merge is a repository


@dataclass(frozen=True)
class Marks:
    """What the parents of a merge make of it: private when one of them is, marked when one was yanked."""

    is_private: bool
    is_yanked: bool

    @classmethod
    def of(cls, row: Merge | File) -> "Marks":
        """From a row that was asked for with `_marks`."""
        return cls(**{name: vars(row)[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Repository:
    """What owner/name means to a reader: an expert, or a merge that behaves like one."""

    expert: Expert | None
    merge: Merge | None
    marks: Marks | None = None  # of a merge

    @property
    def full_name(self) -> str:
        return (self.expert or self.merge).full_name  # type: ignore[union-attr]

    @property
    def is_private(self) -> bool:
        """Whether answers about it may be cached only by the caller."""
        if self.expert is not None:
            return self.expert.visibility == Expert.Visibility.PRIVATE
        assert self.marks is not None
        return self.marks.is_private


def expert(full_name: str, viewer: Viewer) -> Expert:
    """The expert called owner/name. Raises ExpertNotFound when there is none or the viewer may not see it, alike."""
    owner, _, name = full_name.partition("/")
    found = (
        Expert.objects.visible_to(viewer)
        .select_related("namespace", "base_model")
        .filter(namespace__name__iexact=owner, key=name.casefold())
        .first()
    )
    if found is None:
        raise ExpertNotFound(f"There is no expert {full_name[:200]!r} that you may see.")
    return found


def merge(merge_id: str, viewer: Viewer) -> Merge:
    """A merge by its id, when the viewer may see every parent."""
    found = Merge.objects.visible_to(viewer).select_related("recipe", "base_model").filter(pk=merge_id).first()
    if found is None:
        raise MergeNotFound(f"There is no merge {merge_id[:80]!r} that you may see.")
    return found


def repository(full_name: str, viewer: Viewer) -> Repository:
    """An expert or a merge by the name that download clients use. Raises ExpertNotFound."""
    owner, _, name = full_name.partition("/")
    if owner != MERGES:
        return Repository(expert(full_name, viewer), None)
    found = merge_repository(viewer, pk=name)
    if found is None:
        raise ExpertNotFound(f"There is no merge {name[:80]!r} that you may see.")
    return found


def merge_repository(viewer: Viewer, **wanted: object) -> Repository | None:
    """A merge as a repository, when the viewer may see every parent: with its revision and marks, in one query."""
    rows = Merge.objects.visible_to(viewer).filter(**wanted).select_related("recipe", "base_model", "revision")
    found = rows.annotate(**_marks("pk")).first()
    return None if found is None else Repository(None, found, Marks.of(found))


def merge_file(viewer: Viewer, path: str, **wanted: object) -> tuple[Repository, File] | None:
    """A file that a merge has, when the viewer may see every parent, with all that is told of it, in one query."""
    visible = Merge.objects.visible_to(viewer).filter(**wanted)
    rows = File.objects.filter(path=path, revision__merge__in=visible).select_related("blob", "revision__merge")
    found = rows.annotate(**_marks("revision__merge")).first()
    if found is None:
        return None
    return Repository(None, found.revision.merge, Marks.of(found)), found


def _marks(merge: str) -> dict[str, Exists]:
    """Marks as annotations; `merge` is how the row at hand leads to its merge."""
    parents = MergeParent.objects.filter(merge=OuterRef(merge))
    return {
        "is_private": Exists(parents.exclude(revision__expert__visibility=Expert.Visibility.PUBLIC)),
        "is_yanked": Exists(parents.exclude(revision__expert__yanked_at=None)),
    }


def by_parent(full_name: str) -> dict[str, str]:
    """The condition that an expert of this name is among the parents of a merge."""
    owner, _, name = full_name.partition("/")
    expert = "parents__revision__expert"
    return {f"{expert}__namespace__name__iexact": owner, f"{expert}__key": name.casefold()}


def yanked_parents(merge: Merge) -> list[Expert]:
    """The experts of a merge that were yanked since."""
    rows = Expert.objects.exclude(yanked_at=None).filter(revisions__merge_children__merge=merge)
    return list(rows.select_related("namespace").distinct().order_by("pk"))


def revision(repository: Repository, name: str = "main") -> Revision:
    """The revision that a branch, a tag or a full commit names. Raises RevisionNotFound.

    `merge--<id>` on an expert is not looked up here: services.merges knows whether the caller may have it.
    """
    found: Revision | None
    if repository.merge is not None:
        known = name in {"main", repository.merge.commit}
        found = Revision.objects.filter(merge=repository.merge).first() if known else None
    elif COMMIT.fullmatch(name):
        found = Revision.objects.filter(expert=repository.expert, commit=name).first()
    elif "\0" in name:
        found = None
    else:
        ref = Ref.objects.filter(expert=repository.expert, name=name).select_related("revision").first()
        found = ref.revision if ref else None
    if found is None:
        raise RevisionNotFound(f"{repository.full_name} has no revision {name[:80]!r}.")
    return found


def head(expert: Expert) -> Revision | None:
    """The revision that `main` points at; None before the first commit."""
    ref = Ref.objects.filter(expert=expert, name="main").select_related("revision").first()
    return ref.revision if ref else None


def file(revision: Revision, path: str) -> File:
    """A file of a revision. Raises FileNotFound."""
    found = File.objects.filter(revision=revision, path=path).select_related("blob").first()
    if found is None:
        raise FileNotFound(f"There is no file {path[:200]!r} in revision {revision.commit}.")
    return found


def encoded(revision: Revision) -> Encoded | None:
    """The compressed form that the pipeline made."""
    return Encoded.objects.filter(revision=revision, is_own=True).select_related("blob").first()


def forms(revision: Revision) -> list[Encoded]:
    """Every compressed form of a revision, by preset and density; those of the preset `default` come first."""
    rows = Encoded.objects.filter(revision=revision).select_related("blob")
    return sorted(rows, key=lambda row: (list(RULES).index(row.preset), row.variant, row.density))


def form_path(encoded: Encoded, full_name: str, commit: str) -> str:
    """Where a compressed form of a revision is downloaded; its own form needs no naming."""
    query = "" if encoded.is_own else f"&{Form(encoded.preset, encoded.density, encoded.variant).query}"
    return f"/api/v1/experts/{full_name}/compressed?revision={commit}{query}"


def history(expert: Expert) -> QuerySet[Revision]:
    """The revisions that were published, newest first; reconstructions are none of them."""
    return Revision.objects.filter(expert=expert, derived_from=None).select_related("parent", "author").order_by("-id")


ACCURACY = "accuracy"


def accuracies(revision: Revision) -> dict[tuple[str, float] | None, float]:
    """The accuracy of each form that was measured, by preset and density, the original's under None.

    Where several data sets were measured, it is that of the first, so that the figures can be compared.
    """
    rows = list(revision.evaluations.filter(metric__iexact=ACCURACY).order_by("pk"))
    same = [row for row in rows if row.dataset == rows[0].dataset]
    found: dict[tuple[str, float] | None, float] = {}
    for row in same:
        form = None if row.preset is None or row.density is None else (row.preset, row.density)
        found.setdefault(form, row.value)
    return found


def job(job_id: str, viewer: Viewer) -> Job:
    """A job whose subject the viewer may see. Raises JobNotFound."""
    found = Job.objects.filter(pk=job_id).select_related("revision__expert", "merge").first()
    if found is not None and job_is_visible(found, viewer):
        return found
    raise JobNotFound(f"There is no job {job_id[:80]!r} that you may see.")


def job_is_visible(job: Job, viewer: Viewer) -> bool:
    if job.merge_id:
        return Merge.objects.visible_to(viewer).filter(pk=job.merge_id).exists()
    if job.kind == "kinship":
        ids = set(job.parameters["revisions"].values())
        visible = Revision.objects.filter(pk__in=ids, expert__in=Expert.objects.visible_to(viewer))
        return visible.count() == len(ids)
    if job.revision is None:
        return bool(viewer and viewer.is_staff)
    if job.revision.merge_id:
        return Merge.objects.visible_to(viewer).filter(pk=job.revision.merge_id).exists()
    return Expert.objects.visible_to(viewer).filter(revisions=job.revision).exists()


def may_write(user: Viewer, namespace_name: str) -> bool:
    """Whether a user may publish under a namespace."""
    if user is None or not user.is_authenticated:
        return False
    if user.is_staff:
        return True
    roles = (Membership.Role.WRITER, Membership.Role.OWNER)
    return Membership.objects.filter(user_id=user.pk, namespace__name__iexact=namespace_name, role__in=roles).exists()


def may_read_blob(user: Viewer, sha256: str) -> bool:
    """Whether the caller can already read some file with this digest; nobody else is told that it exists."""
    return readable_files(user).filter(blob_id=sha256).exists()


def readable_files(viewer: Viewer) -> QuerySet[File]:
    """Files of experts and merges that the viewer may see."""
    of_expert = Q(revision__expert__in=Expert.objects.visible_to(viewer))
    of_merge = Q(revision__merge__in=Merge.objects.visible_to(viewer))
    return File.objects.filter(of_expert | of_merge)


def routable() -> QuerySet[Revision]:
    """Ready heads of `main` of experts neither yanked nor deleted: what may be routed, and merged by name."""
    heads = Ref.objects.filter(name="main", revision=OuterRef("pk"))
    return Revision.objects.filter(
        Exists(heads), state=Revision.State.READY, expert__deleted_at=None, expert__yanked_at=None
    )


def figures() -> Iterator[tuple[str, dict[str, str], float]]:
    """Figures of the hub for /metrics: name, labels, value."""
    yield "hub_experts_count", {}, Expert.objects.filter(deleted_at=None).count()
    for kind, state, count in Job.objects.values_list("kind", "state").annotate(count=Count("pk")).order_by("kind"):
        yield "hub_jobs_count", {"kind": kind, "state": state}, count
    for state, count in Merge.objects.values_list("state").annotate(count=Count("pk")).order_by("state"):
        yield "hub_merges_count", {"state": state}, count
    blobs = Blob.objects.aggregate(count=Count("pk"), size=Sum("size_bytes"))
    yield "hub_blobs_count", {}, blobs["count"]
    yield "hub_blobs_size_bytes", {}, blobs["size"] or 0


def files_with(sha256: str, viewer: Viewer) -> list[File]:
    """Files with these bytes that the viewer may read, a hundred at most."""
    rows = readable_files(viewer).filter(blob_id=sha256).order_by("revision_id", "path")
    return list(rows.select_related("blob", "revision__expert__namespace", "revision__merge")[:100])


def jobs_after(job: Job) -> list[Job]:
    """The chain of jobs that waits for this one."""
    found: list[Job] = []
    waiting = list(job.next_jobs.all())
    while waiting:
        found += waiting
        waiting = list(Job.objects.filter(after__in=waiting))
    return found


ORDERS = {
    "updated": ("-updated_at", "-id"),
    "created": ("-created_at", "-id"),
    "downloads": ("-downloads", "-id"),
    "name": ("namespace__name", "name", "id"),
}


@dataclass(frozen=True)
class Search:
    """What somebody looks for in the catalogue; empty fields do not filter."""

    text: str = ""
    base_model: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()
    licence: str = ""
    kind: str = ""
    sort: str = "updated"

    @classmethod
    def of(cls, query: QueryDict) -> "Search":
        """From the query string of the API and of the search page. Raises RequestInvalid for an unknown order."""
        sort = query.get("sort") or "updated"
        if sort not in ORDERS:
            raise RequestInvalid(
                "This order is not known.", faults=[Fault("?sort", sort[:40], sorted(ORDERS), "Choose one of these.")]
            )
        words = {name: (query.get(name) or "").replace("\0", "").strip()[:200] for name in cls.__dataclass_fields__}
        return cls(
            text=(query.get("search") or query.get("q") or "").replace("\0", "").strip()[:500],
            base_model=words["base_model"],
            owner=words["owner"],
            tags=tuple(tag.replace("\0", "")[:80] for tag in query.getlist("tag") if tag)[:16],
            licence=words["licence"],
            kind=words["kind"],
            sort=sort,
        )


def search(viewer: Viewer, wanted: Search) -> QuerySet[Expert]:
    """Experts that the viewer may see and that fit; yanked ones only by their owner's name."""
    rows = Expert.objects.visible_to(viewer).select_related("namespace", "base_model")
    if not wanted.owner:
        rows = rows.filter(yanked_at=None)
    if wanted.text:
        document = SearchVector("description", config="english") + SearchVector("name", "tags", config="simple")
        words = SearchQuery(wanted.text, config="english", search_type="websearch")
        plain = SearchQuery(wanted.text, config="simple", search_type="websearch")
        part = Q(name__icontains=wanted.text) | Q(namespace__name__iexact=wanted.text)
        rows = rows.annotate(document=document).filter(Q(document=words) | Q(document=plain) | part)
    if wanted.base_model:
        key = wanted.base_model.casefold()
        rows = rows.filter(Q(base_model__name__iexact=key) | Q(base_model__aliases__key=key)).distinct()
    if wanted.owner:
        rows = rows.filter(namespace__name__iexact=wanted.owner)
    if wanted.tags:
        rows = rows.filter(tags__contains=list(wanted.tags))
    if wanted.licence:
        rows = rows.filter(licence__iexact=wanted.licence)
    if wanted.kind:
        rows = rows.filter(adapter_kind__iexact=wanted.kind)
    return rows.order_by(*ORDERS[wanted.sort])


def experts_named(full_names: list[str], viewer: Viewer) -> list[Expert]:
    """The experts of a list of names that the viewer may see."""
    names = [tuple(full_name.partition("/")[::2]) for full_name in full_names]
    wanted = Q(pk__in=[])
    for owner, name in names:
        wanted |= Q(namespace__name__iexact=owner, key=name.casefold())
    return list(Expert.objects.visible_to(viewer).filter(wanted).select_related("namespace", "base_model"))


def merges_of(expert: Expert, viewer: Viewer) -> QuerySet[Merge]:
    """Merges that have some revision of this expert as a parent, newest first."""
    return (
        Merge.objects.visible_to(viewer)
        .filter(parents__revision__expert=expert)
        .select_related("recipe")
        .distinct()
        .order_by("-created_at")
    )


def heads(experts: Iterable[Expert]) -> dict[int, Revision]:
    """Head of `main` of each expert that has one, by the expert's id; one query for a whole page."""
    rows = Ref.objects.filter(expert__in=list(experts), name="main").exclude(revision=None)
    return {row.expert_id: row.revision for row in rows.select_related("revision__base_model") if row.revision}


def files_by_revision(revisions: Iterable[Revision]) -> dict[int, list[File]]:
    """Files of several revisions, sorted by path, by the revision's id; one query."""
    found: dict[int, list[File]] = {}
    for row in File.objects.filter(revision__in=list(revisions)).select_related("blob").order_by("path"):
        found.setdefault(row.revision_id, []).append(row)
    return found


def ancestry(revision: Revision) -> list[int]:
    """Ids of a revision and its ancestors, newest first."""
    parents = dict(Revision.objects.filter(expert=revision.expert).values_list("pk", "parent_id"))
    line: list[int] = []
    at: int | None = revision.pk
    while at is not None:
        line.append(at)
        at = parents.get(at)
    return line


def last_changes(revision: Revision) -> dict[str, Revision]:
    """For each path of a revision the newest commit that changed its bytes."""
    line = ancestry(revision)
    trees: dict[int, dict[str, str]] = {pk: {} for pk in line}
    for pk, path, blob in File.objects.filter(revision__in=line).values_list("revision_id", "path", "blob_id"):
        trees[pk][path] = blob
    rows = Revision.objects.in_bulk(line)
    changes: dict[str, Revision] = {}
    for path, blob in trees[line[0]].items():
        place = 0
        while place + 1 < len(line) and trees[line[place + 1]].get(path) == blob:
            place += 1
        changes[path] = rows[line[place]]
    return changes


def job_of_merge(merge: Merge) -> Job | None:
    """The job that computes a merge, the newest one when it was asked for again."""
    return Job.objects.filter(merge=merge, kind="merge").order_by("-created_at").first()
