"""Which hub, with which key, and where what was fetched is kept. Nothing else here reads the environment.

An argument wins over HF_ENDPOINT and HF_TOKEN.
"""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from moerge.client.errors import AddressInvalid

_PLAIN = re.compile(r"[!-~]{1,512}")


def endpoint(given: str | None = None) -> str:
    """The address of the hub, from the argument or from HF_ENDPOINT. Raises AddressInvalid."""
    found = (given or os.environ.get("HF_ENDPOINT", "")).strip().rstrip("/")
    if not found:
        raise AddressInvalid(
            "No hub is named.", pointer="--endpoint", met="no endpoint", wanted="the address of a hub",
            remedy="Pass --endpoint http://HOST:PORT or set HF_ENDPOINT.",
        )  # fmt: skip
    try:
        address = urlsplit(found)
        is_web = address.scheme in {"http", "https"} and bool(address.hostname) and address.port != 0
    except ValueError:
        is_web = False
    if not is_web or address.username is not None or address.query or address.fragment or not _PLAIN.fullmatch(found):
        raise AddressInvalid(
            f"{found[:200]!r} is not the address of a hub.", pointer="--endpoint", met=found[:200],
            wanted="http://HOST[:PORT] or https://HOST[:PORT]", remedy="Pass --endpoint, or correct HF_ENDPOINT.",
        )  # fmt: skip
    return found


def key(given: str | None = None) -> str | None:
    """The API key, from the argument or from HF_TOKEN; None when there is none. Raises AddressInvalid."""
    found = (given or os.environ.get("HF_TOKEN", "")).strip()
    if found and not _PLAIN.fullmatch(found):
        # The key itself stays out of the message: messages end in logs.
        raise AddressInvalid(
            "The API key has characters that no key has.", pointer="--token", met="a space or a character beyond ASCII",
            wanted="a key as the hub showed it", remedy="Copy the key again; make one under Settings on the hub.",
        )  # fmt: skip
    return found or None


def cache() -> Path:
    """Where fetched experts are kept for the next merge: MOERGE_CACHE, else `moerge` in the user's folder of caches."""
    own = os.environ.get("MOERGE_CACHE", "")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moerge"
