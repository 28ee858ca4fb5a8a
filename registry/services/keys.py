"""API keys: made once, shown once, stored as a digest, bounded by scopes."""

import hashlib
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db.models import Q
from django.utils import timezone

from registry.errors import Fault, NotAllowed, RequestInvalid
from registry.models import ApiKey, User
from registry.services import audit

# A fixed start lets leak scanners find keys. Hub clients expect tokens to look like theirs only on their own site.
PREFIX = "moe_"
USED_EVERY = timedelta(minutes=5)


def create(*, user: User, name: str, scopes: Iterable[str], expires_at: datetime | None = None) -> tuple[ApiKey, str]:
    """Make a key; the second value is the key itself, which is not kept. Raises RequestInvalid for an unknown scope."""
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in ApiKey.SCOPES]
    if unknown or not wanted:
        raise RequestInvalid(
            "The scopes of the key are not valid.",
            faults=[Fault("/scopes", wanted, list(ApiKey.SCOPES), "Give one or more of these.")],
        )
    if "admin" in wanted and not user.is_staff:
        raise NotAllowed("Only an administrator may make a key with scope admin.")
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey.objects.create(
        user=user,
        name=name.replace("\0", "")[:80],
        digest=digest(secret),
        prefix=secret[:10],
        scopes=wanted,
        expires_at=expires_at,
    )
    audit.record(user, "key.create", key.prefix, scopes=wanted)
    return key, secret


def check(secret: str) -> ApiKey | None:
    """The key that a caller presented, when it is known, alive and its user active."""
    now = timezone.now()
    key = (
        ApiKey.objects.select_related("user")
        .filter(digest=digest(secret), revoked_at=None, user__is_active=True)
        .filter(Q(expires_at=None) | Q(expires_at__gt=now))
        .first()
    )
    if key is not None and (key.last_used_at is None or now - key.last_used_at > USED_EVERY):
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=now)
    return key


def revoke(*, user: User, key: ApiKey) -> None:
    """End a key at once. Only its user or an administrator may."""
    if key.user_id != user.pk and not user.is_staff:
        raise NotAllowed("This key belongs to somebody else.")
    ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now())
    audit.record(user, "key.revoke", key.prefix)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
