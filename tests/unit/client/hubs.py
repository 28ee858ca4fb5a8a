"""The doors of a hub that the client uses, over a scripted server: honest where a test does not make them lie."""

import hashlib
from typing import Any
from urllib.parse import quote

from tests.unit.client.servers import Reply, Server, as_json, stored

COMMIT = "c0ffee" * 6 + "abcd"
NAME = "ann/tea"
ENCODED = f"/api/v1/experts/{NAME}/compressed"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def address(path: str) -> str:
    """Where a file of the expert is fetched."""
    return f"/{NAME}/resolve/{COMMIT}/{quote(path)}"


def publish(server: Server, tree: dict[str, bytes], *, encoded: bytes | None = None, **changes: Any) -> None:
    """Routes for an expert of these files; `changes` go into its record."""
    rows = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in tree.items()]
    record = {"expert": NAME, "revision": COMMIT, "base_model": "b", "state": "ready", "files": rows, **changes}
    server.routes[f"/api/v1/experts/{NAME}/revisions/main"] = [as_json(record)]
    for path, data in tree.items():
        server.routes[address(path)] = stored(data, f"git-of-{path}")
    if encoded is not None:
        server.routes[ENCODED] = [Reply(encoded, headers={"ETag": f'"{sha256(encoded)}"'})]
