"""An uploader as patient as a person: it speaks REST to a hub that may be down for a while."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from tests import tiny

PATIENCE_SECONDS = 240


class Uploader:
    """Uploads whole experts; whatever is lost on the way is asked for again."""

    def __init__(self, url: str, api_key: str) -> None:
        self.client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=20, trust_env=False
        )

    def upload(self, expert: str, files: Mapping[str, bytes]) -> str:
        """The commit under which the files are visible."""
        claims = [{"path": path, "size": len(data), "sha256": tiny.sha256(data)} for path, data in files.items()]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._once(expert, files, claims)
            except (httpx.TransportError, Unfit) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{expert} could not be uploaded: {error}") from error
                time.sleep(0.5)

    def _once(self, expert: str, files: Mapping[str, bytes], claims: list[dict[str, Any]]) -> str:
        upload = _fit(self.client.post("/api/v1/uploads", json={"expert": expert, "private": False, "files": claims}))
        for row in upload["files"]:
            data = files[row["path"]][row["offset"] :]
            if data:
                place = f"bytes {row['offset']}-{row['size'] - 1}/{row['size']}"
                _fit(self.client.put(row["url"], content=data, headers={"Content-Range": place}))
        return _fit(self.client.post(f"/api/v1/uploads/{upload['id']}/complete", json={}))["revision"]

    def until(self, path: str, holds: Callable[[dict[str, Any]], bool], *, seconds: float) -> dict[str, Any]:
        """The first answer for which `holds`; the last one is shown when it takes too long."""
        deadline = time.monotonic() + seconds
        answer: Any = None
        while time.monotonic() < deadline:
            try:
                response = self.client.get(path)
                answer = response.json()
                if holds(answer):
                    return answer
            except (httpx.TransportError, ValueError) as error:
                answer = error
            time.sleep(0.5)
        raise AssertionError(f"{path} did not come to be as wanted within {seconds} s: {answer}")

    def close(self) -> None:
        self.client.close()


class Unfit(Exception):
    """An answer that a hub in trouble may give; a refusal of the upload itself is a failure of the test."""


def _fit(response: httpx.Response) -> dict[str, Any]:
    # 404 and 409: the transaction of a request whose answer was lost may or may not have happened.
    if response.status_code in {404, 409, 429, 500, 502, 503}:
        raise Unfit(f"{response.request.method} {response.request.url}: {response.status_code} {response.text[:500]}")
    assert response.is_success, response.text
    return response.json()
