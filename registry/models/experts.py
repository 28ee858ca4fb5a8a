"""What: experts, their immutable revisions, the files in them and what was derived from them."""

import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models import Q

from registry.models.accounts import Membership, Namespace, User
from registry.models.bases import BaseModel

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser


class ExpertQuerySet(models.QuerySet["Expert"]):
    """Reads that must never forget visibility."""

    def visible_to(self, viewer: "User | AnonymousUser | None") -> "ExpertQuerySet":
        """Public experts, and private ones of the viewer's namespaces; deleted ones for nobody."""
        alive = self.filter(deleted_at=None)
        if viewer is None or not viewer.is_authenticated:
            return alive.filter(visibility=Expert.Visibility.PUBLIC)
        if viewer.is_staff:
            return alive
        mine = Membership.objects.filter(user_id=viewer.pk).values("namespace_id")
        return alive.filter(Q(visibility=Expert.Visibility.PUBLIC) | Q(namespace_id__in=mine))


class Expert(models.Model):
    """The contributed thing: owner/name, what it is good at, the base model it runs on."""

    class Visibility(models.TextChoices):
        PUBLIC = "public"
        PRIVATE = "private"

    namespace = models.ForeignKey(Namespace, on_delete=models.PROTECT, related_name="experts")
    name = models.CharField(max_length=96)
    key = models.CharField(max_length=96)  # case-folded name
    visibility = models.CharField(max_length=8, choices=Visibility.choices, default=Visibility.PUBLIC)
    # Facts of the head of `main`, kept here for listing and search; the revision is the truth.
    base_model = models.ForeignKey(BaseModel, null=True, blank=True, on_delete=models.PROTECT, related_name="experts")
    description = models.TextField(blank=True)
    examples = ArrayField(models.TextField(), default=list, blank=True)
    # What the expert does, as an order to somebody; written by the uploader, or by the describe job.
    instruction = models.TextField(blank=True)
    is_instruction_generated = models.BooleanField(default=False)
    licence = models.CharField(max_length=64, blank=True)
    tags = ArrayField(models.CharField(max_length=80), default=list, blank=True)
    adapter_kind = models.CharField(max_length=24, blank=True)
    rank = models.PositiveIntegerField(null=True, blank=True)
    downloads = models.PositiveBigIntegerField(default=0)
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    yanked_at = models.DateTimeField(null=True, blank=True)
    yank_reason = models.CharField(max_length=300, blank=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = ExpertQuerySet.as_manager()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["namespace", "key"], name="expert_name_once", condition=Q(deleted_at=None)),
        ]
        indexes: ClassVar = [
            GinIndex(fields=["tags"], name="expert_tags"),
            models.Index(fields=["-updated_at"], name="expert_updated"),
        ]

    def __str__(self) -> str:
        return self.full_name

    @property
    def full_name(self) -> str:
        return f"{self.namespace.name}/{self.name}"


class Blob(models.Model):
    """Bytes in storage, named by their SHA-256. Swept only when unreferenced and older than the grace time."""

    sha256 = models.CharField(max_length=64, primary_key=True)
    git_sha1 = models.CharField(max_length=40)  # git's blob id of the same bytes; Hub clients use it as ETag
    size_bytes = models.BigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)
    # Set again whenever something new refers to the blob, in that same transaction.
    touched_at = models.DateTimeField(auto_now_add=True, db_index=True)

    def __str__(self) -> str:
        return self.sha256


class Revision(models.Model):
    """An immutable tree of files: of an expert, or the content of a merge, which nobody owns."""

    class State(models.TextChoices):
        INCOMPLETE = "incomplete"  # config or weights are missing: downloadable, never routed or merged
        PROCESSING = "processing"
        READY = "ready"
        FAILED = "failed"

    expert = models.ForeignKey(Expert, null=True, blank=True, on_delete=models.CASCADE, related_name="revisions")
    merge = models.OneToOneField(
        "registry.Merge", null=True, blank=True, on_delete=models.CASCADE, related_name="revision"
    )
    commit = models.CharField(max_length=40)
    parent = models.ForeignKey("self", null=True, blank=True, on_delete=models.PROTECT, related_name="children")
    # A reconstruction: the files of another revision with the weights that its compressed form decodes to. It is found
    # by its commit and by its form's name, and is no part of the history.
    derived_from = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.CASCADE, related_name="reconstructions"
    )
    form = models.CharField(max_length=16, blank=True)  # compeft-k10
    manifest_digest = models.CharField(max_length=64)  # SHA-256 over the sorted (path, sha256, size) list
    message = models.TextField(blank=True)
    author = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    state = models.CharField(max_length=12, choices=State.choices, default=State.PROCESSING)
    base_model = models.ForeignKey(BaseModel, null=True, blank=True, on_delete=models.PROTECT, related_name="+")
    adapter_kind = models.CharField(max_length=24, blank=True)
    rank = models.PositiveIntegerField(null=True, blank=True)
    parameter_count = models.BigIntegerField(null=True, blank=True)
    # What the header checks found: modules, ranks, shapes, warnings (moerge.tensors.adapters.AdapterFacts).
    facts = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-id"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["expert", "commit"], name="revision_commit_once"),
            models.UniqueConstraint(fields=["derived_from", "form"], name="reconstruction_once"),
            models.CheckConstraint(
                condition=Q(expert__isnull=False, merge__isnull=True) | Q(expert__isnull=True, merge__isnull=False),
                name="revision_of_one_thing",
            ),
        ]
        indexes: ClassVar = [models.Index(fields=["commit"], name="revision_commit")]

    def __str__(self) -> str:
        return self.commit


class Ref(models.Model):
    """A moving name for a revision: `main`, other branches and tags."""

    class Kind(models.TextChoices):
        BRANCH = "branch"
        TAG = "tag"

    expert = models.ForeignKey(Expert, on_delete=models.CASCADE, related_name="refs")
    name = models.CharField(max_length=200)
    kind = models.CharField(max_length=8, choices=Kind.choices, default=Kind.BRANCH)
    # Empty until the first commit: a fresh repository has a branch without content.
    revision = models.ForeignKey(Revision, null=True, blank=True, on_delete=models.PROTECT, related_name="refs")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["expert", "name"], name="ref_once")]

    def __str__(self) -> str:
        return self.name


class File(models.Model):
    """A named path in a revision."""

    revision = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="files")
    path = models.CharField(max_length=255)
    blob = models.ForeignKey(Blob, on_delete=models.PROTECT, related_name="files")
    # Large or binary files are addressed by SHA-256 on the Hub protocol, small text by git's id.
    is_large = models.BooleanField(default=False)

    class Meta:
        ordering: ClassVar = ["path"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["revision", "path"], name="file_once")]

    def __str__(self) -> str:
        return self.path

    @property
    def etag(self) -> str:
        return self.blob_id if self.is_large else self.blob.git_sha1


class Encoded(models.Model):
    """A compressed form of a revision at one preset and density: derived, can be rebuilt."""

    revision = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="encoded")
    preset = models.CharField(max_length=16)
    density = models.FloatField()
    # What differs from the preset's own scale rule: another rule, or an alpha.
    variant = models.CharField(max_length=24, blank=True, default="")
    # The one that the pipeline made: what a revision has when no form is named.
    is_own = models.BooleanField(default=False)
    blob = models.ForeignKey(Blob, on_delete=models.PROTECT, related_name="encoded")
    original_bytes = models.BigIntegerField()  # of the same tensors at two bytes a value
    report = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["revision", "preset", "density", "variant"], name="encoded_once"),
            models.UniqueConstraint(fields=["revision"], condition=Q(is_own=True), name="encoded_own_once"),
        ]

    def __str__(self) -> str:
        return f"{self.revision_id} {self.preset} {self.density}"


class Evaluation(models.Model):
    """A measured figure of a revision: from its card, or from a job."""

    class Source(models.TextChoices):
        CARD = "card"
        JOB = "job"

    revision = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="evaluations")
    source = models.CharField(max_length=8, choices=Source.choices)
    dataset = models.CharField(max_length=200)
    metric = models.CharField(max_length=80)
    value = models.FloatField()
    base_value = models.FloatField(null=True, blank=True)  # the untouched base on the same rows
    row_count = models.PositiveIntegerField(null=True, blank=True)
    # The compressed form that was measured; both null when it was the original.
    preset = models.CharField(max_length=16, null=True, blank=True)  # noqa: DJ001 - null says "the original"
    density = models.FloatField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g} on {self.dataset}"


def new_id() -> str:
    """A random 32-hex id for rows that outsiders name."""
    return uuid.uuid4().hex


JSONRecord = dict[str, Any]
