"""Background work: the row is the outbox, the lease and the record of what happened."""

from typing import ClassVar

from django.db import models

from registry.models.accounts import User
from registry.models.experts import Revision, new_id
from registry.models.merges import Merge


class Job(models.Model):
    """One piece of background work on one subject (a revision or a merge)."""

    class State(models.TextChoices):
        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        NOT_APPLICABLE = "not_applicable"
        FAILED = "failed"
        CANCELLED = "cancelled"

    FINISHED = (State.DONE, State.NOT_APPLICABLE, State.FAILED, State.CANCELLED)
    PASSED = (State.DONE, State.NOT_APPLICABLE)

    id = models.CharField(primary_key=True, max_length=32, default=new_id, editable=False)
    kind = models.CharField(max_length=16)  # registry.jobs.JobKind
    revision = models.ForeignKey(Revision, null=True, blank=True, on_delete=models.CASCADE, related_name="jobs")
    merge = models.ForeignKey(Merge, null=True, blank=True, on_delete=models.CASCADE, related_name="jobs")
    # The job that must have passed before this one may start.
    after = models.ForeignKey("self", null=True, blank=True, on_delete=models.CASCADE, related_name="next_jobs")
    # Two requests for the same work meet here.
    key = models.CharField(max_length=120, unique=True)
    parameters = models.JSONField(default=dict, blank=True)
    requested_by = models.ForeignKey(User, null=True, blank=True, on_delete=models.SET_NULL, related_name="jobs")
    # Smaller numbers go first: 0 somebody waits for it, 3 somebody asked for it, 6 nobody is waiting.
    priority = models.PositiveSmallIntegerField(default=6)
    state = models.CharField(max_length=16, choices=State.choices, default=State.QUEUED)
    progress = models.FloatField(default=0.0)  # share done, 0..1
    message = models.CharField(max_length=300, blank=True)
    result = models.JSONField(null=True, blank=True)
    error = models.JSONField(null=True, blank=True)  # HubError.as_dict()
    attempt = models.PositiveSmallIntegerField(default=0)
    owner = models.CharField(max_length=32, blank=True)  # token of the worker that holds the lease
    lease_until = models.DateTimeField(null=True, blank=True)
    cancel_requested = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)
    sent_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["created_at", "id"]
        indexes: ClassVar = [models.Index(fields=["state", "lease_until"], name="job_open")]

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"
