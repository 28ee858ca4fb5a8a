"""Merges: what was asked (recipe), what came of it, and from whom. The content belongs to nobody."""

from typing import TYPE_CHECKING, ClassVar

from django.db import models
from django.db.models import Exists, OuterRef

from registry.models.accounts import User
from registry.models.bases import BaseModel
from registry.models.experts import Expert, Revision

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser


class Method(models.Model):
    """What the catalogues of the library hold, so that web checks requests without loading the maths."""

    class Family(models.TextChoices):
        MERGE = "merge"
        CODEC = "codec"
        STRATEGY = "strategy"

    family = models.CharField(max_length=8, choices=Family.choices)
    name = models.CharField(max_length=40)
    version = models.CharField(max_length=16)
    spec = models.JSONField()  # summary, paper, form, needs, parameters with range, default and help

    class Meta:
        ordering: ClassVar = ["family", "name"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["family", "name"], name="method_once")]

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


class Recipe(models.Model):
    """What to merge and how, in canonical form; the digest is over those bytes."""

    digest = models.CharField(max_length=64, primary_key=True)
    canonical = models.TextField()
    method = models.CharField(max_length=40)
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.digest


class MergeQuerySet(models.QuerySet["Merge"]):
    def visible_to(self, viewer: "User | AnonymousUser | None") -> "MergeQuerySet":
        """Merges whose every parent the viewer can see now; one hidden parent hides the merge."""
        hidden = MergeParent.objects.filter(merge=OuterRef("pk")).exclude(
            revision__expert__in=Expert.objects.visible_to(viewer)
        )
        return self.filter(~Exists(hidden))


class Merge(models.Model):
    """One recipe carried out. Its id, repository name and commit are known before it is computed."""

    class State(models.TextChoices):
        # Known by its address; computed when somebody touches it: nobody has yet, or its bytes were collected.
        REGISTERED = "registered"
        QUEUED = "queued"
        RUNNING = "running"
        READY = "ready"
        FAILED = "failed"
        CANCELLED = "cancelled"

    id = models.CharField(primary_key=True, max_length=40)  # first characters of the recipe digest
    recipe = models.OneToOneField(Recipe, on_delete=models.PROTECT, related_name="merge")
    commit = models.CharField(max_length=40, unique=True)
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="merges")
    state = models.CharField(max_length=12, choices=State.choices, default=State.QUEUED)
    report = models.JSONField(default=dict)  # energy kept, ranks, missing modules, self-check, environment
    # What the licences of parents and base say together, and whether somebody took responsibility for unknown ones.
    licence = models.JSONField(default=dict)
    # Manifest digest of the first result: a merge that is computed again is served only when it gives the same bytes.
    result_digest = models.CharField(max_length=64, blank=True)
    read_at = models.DateTimeField(null=True, blank=True)  # last touched by a reader; bytes long unread are collected
    requested_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="merges")
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = MergeQuerySet.as_manager()

    def __str__(self) -> str:
        return self.full_name

    @property
    def full_name(self) -> str:
        return f"merges/{self.id}"


class MergeParent(models.Model):
    """One expert of a merge, pinned by revision."""

    merge = models.ForeignKey(Merge, on_delete=models.CASCADE, related_name="parents")
    revision = models.ForeignKey(Revision, on_delete=models.PROTECT, related_name="merge_children")
    weight = models.FloatField()
    position = models.PositiveSmallIntegerField()

    class Meta:
        ordering: ClassVar = ["position"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["merge", "position"], name="parent_once")]

    def __str__(self) -> str:
        return f"{self.weight} x {self.revision_id}"


class Kinship(models.Model):
    """How alike two adapters are, measured once for each pair of contents; `first` sorts before `second`."""

    first = models.CharField(max_length=64)
    second = models.CharField(max_length=64)
    figures = models.JSONField()  # cosine, pearson, distance, conflict
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["first", "second"], name="kinship_once")]

    def __str__(self) -> str:
        return f"{self.first[:12]} {self.second[:12]}"
