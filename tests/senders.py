"""Uploads through the REST door, and what the hub holds before and after."""

from typing import Any

from django.apps import apps
from django.conf import settings
from django.test import Client

from tests import tiny

# Rows of an upload under way belong to its sender alone, and audit rows only grow.
UNCOUNTED = {"Upload", "UploadFile", "AuditEvent"}


def counts() -> dict[str, int]:
    """Rows of every model, and blob files."""
    models = apps.get_app_config("registry").get_models()
    rows = {model.__name__: model.objects.count() for model in models if model.__name__ not in UNCOUNTED}
    return rows | {"blob files": sum(1 for path in settings.HUB_BLOBS_DIR.rglob("*") if path.is_file())}


class Sender:
    """A caller with an API key."""

    def __init__(self, key: str) -> None:
        self.client = Client()
        self.headers = {"Authorization": f"Bearer {key}"}

    def start(self, expert: str, files: dict[str, bytes], **body: Any) -> Any:
        claims = [{"path": path, "size": len(data), "sha256": tiny.sha256(data)} for path, data in files.items()]
        return self.post("/api/v1/uploads", {"expert": expert, "files": claims, **body})

    def put(self, url: str, data: bytes, *, start: int | None = None, size: int | None = None) -> Any:
        headers = dict(self.headers)
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
        return self.client.put(url, data, content_type="application/octet-stream", headers=headers)

    def complete(self, upload_id: str, **body: Any) -> Any:
        return self.post(f"/api/v1/uploads/{upload_id}/complete", body)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client.post(path, body, content_type="application/json", headers=self.headers)

    def get(self, path: str) -> Any:
        return self.client.get(path, headers=self.headers)

    def send(self, expert: str, files: dict[str, bytes], **body: Any) -> Any:
        """The whole upload; the first answer that is a refusal, else that of `complete`."""
        started = self.start(expert, files, **body)
        if started.status_code != 201:
            return started
        for row in started.json()["files"]:
            if row["offset"] < row["size"] or not row["size"]:
                answer = self.put(row["url"], files[row["path"]])
                if answer.status_code != 200:
                    return answer
        return self.complete(started.json()["id"])
