"""Write down who did what; called inside the transaction of the deed."""

from typing import Any

from registry import telemetry
from registry.models import AuditEvent, User


def record(actor: User | None, action: str, subject: str, **detail: Any) -> None:
    """Add one event. Never pass secrets."""
    AuditEvent.objects.create(
        actor=actor, action=action, subject=subject[:200], detail=detail, request_id=telemetry.request_id.get()[:40]
    )
