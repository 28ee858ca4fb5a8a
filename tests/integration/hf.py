"""A caller of the Hub protocol inside the test process, and people for it to be."""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.http import HttpResponse
from django.test import Client

from registry.models import BaseAlias, BaseModel, Expert, Revision, User
from registry.services import accounts, blobs, experts, keys, revisions
from tests import tiny


@dataclass
class Caller:
    """A client that sends one key, as raw as huggingface_hub does."""

    key: str = ""
    client: Client = field(default_factory=lambda: Client(enforce_csrf_checks=True))

    def send(self, method: str, path: str, *, data: bytes | str = b"", kind: str = "", **headers: str) -> HttpResponse:
        """One request; header names as Django's test client takes them, `_` for `-`."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            names["Authorization"] = f"Bearer {self.key}"
        response = self.client.generic(method, path, data, kind or "application/octet-stream", headers=names)
        # Read to the end here: closing an answer unread would close the connection of the test too.
        response.body = b"".join(response.streaming_content) if response.streaming else response.content
        return response

    def get(self, path: str, **headers: str) -> HttpResponse:
        return self.send("GET", path, **headers)

    def head(self, path: str, **headers: str) -> HttpResponse:
        return self.send("HEAD", path, **headers)

    def json(self, method: str, path: str, body: Any) -> HttpResponse:
        return self.send(method, path, data=json.dumps(body), kind="application/json")

    def commit(self, full_name: str, lines: Iterable[dict[str, Any]], *, branch: str = "main") -> HttpResponse:
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return self.send("POST", f"/api/models/{full_name}/commit/{branch}", data=data, kind="application/x-ndjson")


def header(summary: str = "Add files", **more: str) -> dict[str, Any]:
    return {"key": "header", "value": {"summary": summary, "description": "", **more}}


def added(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Lines that add files, in the order of fields that huggingface_hub writes."""
    return [
        {"key": "file", "value": {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"}}
        for path, data in files.items()
    ]


def git_id(data: bytes) -> str:
    """What `git hash-object` says."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def person(name: str, scopes: Iterable[str] = ("read", "write"), *, is_admin: bool = False) -> tuple[User, Caller]:
    """A user with a namespace, and a caller with their key."""
    user = accounts.create_user(name=name, password="correct horse battery", is_admin=is_admin)
    return user, Caller(keys.create(user=user, name="laptop", scopes=scopes)[1])


def base() -> BaseModel:
    """The one base that tiny adapters name; the whole list that comes with the hub takes many queries."""
    found, _ = BaseModel.objects.get_or_create(name=tiny.BASE)
    BaseAlias.objects.get_or_create(key=tiny.BASE.casefold(), base=found)
    return found


def expert(user: User, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Expert:
    """An expert of the user with one commit."""
    base()
    made = experts.create(user=user, full_name=f"{user.username}/{name}", private=private)
    put(user, made, tiny.lora() if files is None else files)
    return Expert.objects.select_related("namespace", "base_model").get(pk=made.pk)


def put(
    user: User, made: Expert, files: dict[str, bytes], message: str = "Add files", branch: str = "main"
) -> Revision:
    staged = {path: blobs.stage_bytes(data) for path, data in files.items()}
    return revisions.commit(user=user, expert=made, changes=revisions.Changes(staged), message=message, branch=branch)
