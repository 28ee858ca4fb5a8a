"""What the routing index is built from, and the log by which every router process follows."""

from typing import ClassVar

from django.db import models

from registry.models.experts import Expert, Revision


class Embedding(models.Model):
    """One unit vector of an expert's card, as little-endian float16 bytes."""

    class Kind(models.TextChoices):
        DESCRIPTION = "description"
        EXAMPLE = "example"
        CENTROID = "centroid"

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
