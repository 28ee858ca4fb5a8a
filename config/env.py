"""The only place that reads the environment: typed readers, each with the unit in the name of its setting."""

import os
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit


def text(name: str, default: str = "") -> str:
    return os.environ.get(name, default)


def number(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None or value == "":
        return default
    try:
        return int(value)
    except ValueError as error:
        raise SystemExit(f"{name}={value!r}: wanted a whole number") from error


def flag(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "").lower()
    if value == "":
        return default
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    raise SystemExit(f"{name}={value!r}: wanted on or off")


def listing(name: str, default: str = "") -> list[str]:
    return [part.strip() for part in os.environ.get(name, default).split(",") if part.strip()]


def path(name: str, default: Path) -> Path:
    return Path(os.environ.get(name) or default).resolve()


def database(name: str = "DATABASE_URL") -> dict[str, object]:
    """Django's database record from postgresql://user:password@host:port/name?option=value."""
    url = os.environ.get(name, "postgresql://127.0.0.1:5432/moerge")
    parts = urlsplit(url)
    if parts.scheme not in {"postgres", "postgresql"}:
        raise SystemExit(f"{name}: scheme {parts.scheme!r}, wanted postgresql://user:password@host:port/name")
    options = dict(parse_qsl(parts.query))
    host = options.pop("host", None) or parts.hostname or ""
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": host,
        "PORT": parts.port or "",
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": options,
    }
