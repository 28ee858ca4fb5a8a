"""Who: users, the namespaces that own experts, API keys, and what was done when."""

from typing import ClassVar

from django.contrib.auth.models import AbstractUser
from django.contrib.postgres.fields import ArrayField
from django.db import models


class User(AbstractUser):
    """A person or a robot that signs in. `is_staff` administers the hub."""


class Namespace(models.Model):
    """The first part of owner/name. A user has one of the same name; an organisation has members."""

    class Kind(models.TextChoices):
        USER = "user"
        ORGANISATION = "organisation"

    name = models.CharField(max_length=96, unique=True)
    # Look-alike names share a key, so that nobody can pass for somebody else (registry.checks.names.strict_key).
    key = models.CharField(max_length=96, unique=True)
    kind = models.CharField(max_length=16, choices=Kind.choices, default=Kind.USER)
    members = models.ManyToManyField(User, through="Membership", related_name="namespaces")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    """A user in a namespace; a writer may publish there, an owner may also change members."""

    class Role(models.TextChoices):
        READER = "reader"
        WRITER = "writer"
        OWNER = "owner"

    namespace = models.ForeignKey(Namespace, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.READER)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["namespace", "user"], name="membership_once")]

    def __str__(self) -> str:
        return f"{self.user_id} {self.role} of {self.namespace_id}"


class ApiKey(models.Model):
    """A credential for scripts. Only its SHA-256 is stored; the key itself is shown once."""

    SCOPES = ("read", "write", "merge", "admin")

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=80)
    digest = models.CharField(max_length=64, unique=True)
    prefix = models.CharField(max_length=12)  # the first characters, to tell keys apart in a list
    scopes = ArrayField(models.CharField(max_length=16))
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.prefix}… ({self.name})"


class AuditEvent(models.Model):
    """One thing somebody did: append-only, never with secrets."""

    at = models.DateTimeField(auto_now_add=True, db_index=True)
    actor = models.ForeignKey(User, null=True, on_delete=models.SET_NULL)
    action = models.CharField(max_length=40)  # noun.verb: expert.create, key.revoke
    subject = models.CharField(max_length=200)
    detail = models.JSONField(default=dict)
    request_id = models.CharField(max_length=40, blank=True)

    def __str__(self) -> str:
        return f"{self.at} {self.action} {self.subject}"
