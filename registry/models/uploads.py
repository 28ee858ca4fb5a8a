"""Uploads under way: what was promised, how far each file is. Nothing here is visible to anybody else."""

from typing import ClassVar

from django.db import models

from registry.models.accounts import User
from registry.models.experts import Blob, Revision, new_id


class Upload(models.Model):
    """A set of files on its way to become one revision."""

    class State(models.TextChoices):
        OPEN = "open"
        COMPLETED = "completed"
        ABORTED = "aborted"

    id = models.CharField(primary_key=True, max_length=32, default=new_id, editable=False)
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="uploads")
    expert_name = models.CharField(max_length=200)  # owner/name; the expert is made when the upload completes
    is_private = models.BooleanField(default=False)
    message = models.CharField(max_length=300, blank=True)
    # Card fields given beside the files (description, examples, licence, base_model); they win over the card's.
    card = models.JSONField(default=dict, blank=True)
    parent_commit = models.CharField(max_length=40, blank=True)
    state = models.CharField(max_length=12, choices=State.choices, default=State.OPEN)
    revision = models.ForeignKey(Revision, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return self.id


class UploadFile(models.Model):
    """One promised file: how many bytes have arrived and, once verified, its blob."""

    upload = models.ForeignKey(Upload, on_delete=models.CASCADE, related_name="files")
    path = models.CharField(max_length=255)
    size_bytes = models.BigIntegerField()
    sha256 = models.CharField(max_length=64)
    offset = models.BigIntegerField(default=0)
    blob = models.ForeignKey(Blob, null=True, on_delete=models.PROTECT, related_name="+")

    class Meta:
        ordering: ClassVar = ["path"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["upload", "path"], name="upload_file_once")]

    def __str__(self) -> str:
        return self.path
