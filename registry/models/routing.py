"""What the routing index is built from, and the log by which every router process follows."""

from typing import ClassVar

from django.db import models

from registry.models.accounts import User
from registry.models.bases import BaseModel
from registry.models.experts import Blob, Expert, Revision


class Encoder(models.Model):
    """A text encoder that vectors are made with; queries are answered by the active one."""

    class State(models.TextChoices):
        IDLE = "idle"  # known, and not kept up
        PREPARING = "preparing"  # cards are embedded with it beside the active one, which it will replace
        ACTIVE = "active"

    id = models.CharField(primary_key=True, max_length=120)
    folder = models.CharField(max_length=400, blank=True)  # empty: the packaged encoder
    dimension = models.PositiveIntegerField()
    max_tokens = models.PositiveIntegerField()
    prefix = models.CharField(max_length=200, blank=True)  # put before queries, never before cards
    # Strategy name -> min_score, relief, medium, high, where they differ from those of the packaged encoder.
    thresholds = models.JSONField(default=dict, blank=True)
    state = models.CharField(max_length=12, choices=State.choices, default=State.IDLE)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["state"], name="encoder_in_use_once", condition=~models.Q(state="idle")),
        ]

    def __str__(self) -> str:
        return self.id


class Embedding(models.Model):
    """One unit vector of an expert's card, as little-endian float16 bytes."""

    class Kind(models.TextChoices):
        DESCRIPTION = "description"
        EXAMPLE = "example"
        CENTROID = "centroid"
        INSTRUCTION = "instruction"

    revision = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="embeddings")
    encoder = models.CharField(max_length=120)  # vectors of two encoders are never compared
    kind = models.CharField(max_length=12, choices=Kind.choices)
    position = models.PositiveSmallIntegerField(default=0)
    text_digest = models.CharField(max_length=64)
    vector = models.BinaryField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["revision", "encoder", "kind", "position"], name="embedding_once"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.position} of {self.revision_id}"


class RoutingClock(models.Model):
    """One row. Whoever changes what can be routed raises it inside the transaction, so commit order is number order."""

    seq = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return str(self.seq)


class RoutingChange(models.Model):
    """One expert became routable, changed, or left; readers replay these in order."""

    class Operation(models.TextChoices):
        PUT = "put"
        REMOVE = "remove"

    seq = models.BigIntegerField(primary_key=True)
    expert = models.ForeignKey(Expert, on_delete=models.CASCADE, related_name="routing_changes")
    revision = models.ForeignKey(Revision, null=True, on_delete=models.CASCADE, related_name="+")
    operation = models.CharField(max_length=8, choices=Operation.choices)
    # What the index reads of the expert as of this change: its id, name, description, examples, base model.
    card = models.JSONField(default=dict, blank=True)
    at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.seq} {self.operation} {self.expert_id}"


class RoutingSnapshot(models.Model):
    """A whole routing index as files, complete up to change number `seq`; readers add the changes after it."""

    encoder = models.CharField(max_length=120)
    seq = models.BigIntegerField()
    folder = models.CharField(max_length=400)  # below HUB_HOME
    digest = models.CharField(max_length=64)  # SHA-256 of its meta.json, which holds those of all other files
    counts = models.JSONField(default=dict)  # bases, experts, vectors, bytes
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["encoder", "seq"], name="snapshot_once")]

    def __str__(self) -> str:
        return f"{self.encoder} {self.seq}"


class Fingerprint(models.Model):
    """What routing knows of an adapter's weights alone: prototypes, spectrum, and a sketch to find neighbours by."""

    revision = models.OneToOneField(Revision, on_delete=models.CASCADE, related_name="fingerprint")
    source = models.CharField(max_length=64)  # SHA-256 of the weights it was computed from
    # Arrow prototypes, one row a module; none for kinds of adapter that have no matrix delta.
    blob = models.ForeignKey(Blob, null=True, on_delete=models.PROTECT, related_name="fingerprints")
    sketch = models.BinaryField()  # unit vector, little-endian float16
    facts = models.JSONField(default=dict)  # norm, effective rank and leading share by module
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"fingerprint of {self.revision_id}"


class Neighbour(models.Model):
    """Two revisions on one base model whose deltas point the same way; `first` has the smaller number."""

    first = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="+")
    second = models.ForeignKey(Revision, on_delete=models.CASCADE, related_name="+")
    cosine = models.FloatField()
    ratio = models.FloatField()  # norm of the first delta over that of the second

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["first", "second"], name="neighbour_once")]
        indexes: ClassVar = [models.Index(fields=["second"], name="neighbour_second")]

    def __str__(self) -> str:
        return f"{self.first_id} {self.second_id} {self.cosine:.3f}"


class RoutingEvaluation(models.Model):
    """What somebody measured with labelled queries against this hub's routing."""

    base_model = models.ForeignKey(BaseModel, null=True, on_delete=models.CASCADE, related_name="+")
    strategy = models.CharField(max_length=40)
    index_seq = models.BigIntegerField()
    figures = models.JSONField()
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.strategy} at {self.index_seq}"
