"""Base models: one canonical row per pre-trained checkpoint, and every other name it goes by."""

from typing import ClassVar

from django.db import models


class BaseModel(models.Model):
    """A pre-trained checkpoint that adapters were trained on."""

    name = models.CharField(max_length=200, unique=True)  # canonical owner/name
    revision = models.CharField(max_length=40, blank=True)
    # A quantised or repackaged copy points at what it was made from; experts belong to the origin.
    quantised_from = models.ForeignKey("self", null=True, blank=True, on_delete=models.PROTECT, related_name="copies")
    licence = models.CharField(max_length=64, blank=True)
    architecture = models.CharField(max_length=64, blank=True)
    parameter_count = models.BigIntegerField(null=True, blank=True)
    # Module name pattern -> [out, in]; fills as experts arrive and is compared with later ones.
    shapes = models.JSONField(default=dict, blank=True)
    # The weights that an operator has put into HUB_BASES_DIR: folder, digest, files with size and SHA-256.
    weights = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


class BaseAlias(models.Model):
    """Another name of a base model, case-folded: short names, mirrors, quantised repackagings."""

    key = models.CharField(max_length=200, unique=True)
    base = models.ForeignKey(BaseModel, on_delete=models.CASCADE, related_name="aliases")
    is_quantised = models.BooleanField(default=False)

    class Meta:
        ordering: ClassVar = ["key"]

    def __str__(self) -> str:
        return self.key
