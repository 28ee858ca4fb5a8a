"""Upload the demo experts to a running hub, through the same door as everybody."""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

CHUNK_BYTES = 4 * 2**20
# Beside the form that every upload gets, so that the pages of the demo show how size follows density.
MORE_DENSITIES = (0.05, 0.1, 0.5)
FOLDER = Path(__file__).resolve().parents[3] / "examples" / "experts"
PATIENCE_SECONDS = 120


class Command(BaseCommand):
    help = "Upload examples/experts to a hub over HTTP; what is there already is left alone."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", required=True, help="address of the hub")
        parser.add_argument("--key", default="", help="API key with scope write (default: HUB_SEED_KEY)")
        parser.add_argument("--owner", default="", help="namespace (default: the key's user)")
        parser.add_argument("--folder", type=Path, default=FOLDER, help="folder that holds one folder for each expert")
        parser.add_argument("--no-wait", action="store_true", help="do not wait until the experts are ready")
        parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for all to be ready")

    def handle(self, *args: Any, **options: Any) -> None:
        key = options["key"] or settings.HUB_SEED_KEY
        folders = sorted(path.parent for path in options["folder"].glob("*/adapter_config.json"))
        if not folders:
            raise CommandError(f"There are no experts in {options['folder']}.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=options["url"].rstrip("/"), headers=headers, timeout=60) as client:
            hub = Hub(client)
            try:
                owner = options["owner"] or hub.ask("GET", "/api/whoami-v2")["name"]
                names = [f"{owner}/{folder.name}" for folder in folders]
                for name, folder in zip(names, folders, strict=True):
                    self.stdout.write(f"{name}: {'uploaded' if hub.upload(name, folder) else 'there already'}")
                if not options["no_wait"]:
                    self._wait(hub, names, until=time.monotonic() + options["timeout"])
                    hub.ask_for_forms(names)
            except Refused as error:
                raise CommandError(str(error)) from error

    def _wait(self, hub: "Hub", names: list[str], *, until: float) -> None:
        waiting, told = list(names), ""
        while waiting:
            records = {name: hub.ask("GET", f"/api/v1/experts/{name}") for name in waiting}
            for name, record in records.items():
                if record["state"] == "failed":
                    errors = [job["error"]["detail"] for job in record["jobs"] if job["error"]]
                    raise CommandError(f"{name} failed: {' '.join(errors)}")
            waiting = [name for name in waiting if records[name]["state"] != "ready"]
            line = f"{len(names) - len(waiting)} of {len(names)} ready"
            if line != told:
                self.stdout.write(line)
                told = line
            if waiting and time.monotonic() > until:
                raise CommandError(f"Not ready in time: {', '.join(waiting)}.")
            if waiting:
                time.sleep(1)


class Refused(Exception):
    """The hub refused a request; the message is its own."""


class Hub:
    """A hub over HTTP that may restart while it is spoken to."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """One request's JSON answer. Raises Refused."""
        response = self._patiently(lambda: self._client.request(method, path, **request))
        if response.is_error:
            raise Refused(_problem(response))
        answer: dict[str, Any] = response.json()
        return answer

    def upload(self, name: str, folder: Path) -> bool:
        """Send a folder as an expert; False when it is there with the same bytes."""
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        digests = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items()}
        known = self._patiently(lambda: self._client.get(f"/api/v1/experts/{name}"))
        if known.status_code == httpx.codes.OK:
            there = {file["path"]: file["sha256"] for file in known.json()["files"]}
            if digests.items() <= there.items():
                return False
        claims = [{"path": path, "size": file.stat().st_size, "sha256": digests[path]} for path, file in files.items()]
        upload = self.ask("POST", "/api/v1/uploads", json={"expert": name, "private": False, "files": claims})
        for row in upload["files"]:
            self._send(row["url"], files[row["path"]], row["offset"])
        self.ask("POST", f"/api/v1/uploads/{upload['id']}/complete", json={"message": "Demo expert"})
        return True

    def ask_for_forms(self, names: list[str]) -> None:
        """Have more compressed forms made; they come when they come, and nobody waits for them here."""
        for name in names:
            for density in MORE_DENSITIES:
                try:
                    self._client.head(f"/api/v1/experts/{name}/compressed", params={"density": density})
                except httpx.TransportError:
                    return

    def _send(self, url: str, file: Path, offset: int) -> None:
        """Send a file from `offset` on; a chunk of which the hub has more or less goes on from where the hub stands."""
        data = file.read_bytes()
        while True:
            chunk = data[offset : offset + CHUNK_BYTES]
            place = f"bytes {offset}-{offset + len(chunk) - 1}/{len(data)}"
            headers = {"Content-Range": place} if chunk else {}
            response = self._patiently(partial(self._client.put, url, content=chunk, headers=headers))
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                offset = int(response.json()["offset"])
            elif response.is_error:
                raise Refused(_problem(response))
            else:
                offset = response.json()["offset"]
            if offset == len(data):
                return

    def _patiently(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                response = request()
                if response.status_code not in {429, 502, 503} or time.monotonic() > until:
                    return response
                wait = float(response.headers.get("Retry-After", 1))
            except httpx.TransportError as error:
                if time.monotonic() > until:
                    raise Refused(f"The hub does not answer: {error}") from error
                wait = 1.0
            time.sleep(min(wait, 5.0))


def _problem(response: httpx.Response) -> str:
    """What a refused request was told."""
    try:
        problem = response.json()
    except ValueError:
        return f"{response.status_code} {response.text[:300]}"
    faults = "; ".join(
        f"{fault['pointer']}: met {fault['met']}, wanted {fault['wanted']}" for fault in problem.get("errors", [])
    )
    return f"{response.status_code} {problem.get('detail', '')} {faults}".strip()
