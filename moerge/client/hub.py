"""A hub over HTTP: what it holds of an expert, and streams of its files. The only importer of an HTTP library."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

import moerge
from moerge.client import environment, records
from moerge.client.errors import (
    AddressInvalid,
    AnswerInvalid,
    BrokenOff,
    ClientError,
    Conflict,
    HubRefused,
    HubUnreachable,
    JobFailed,
    NotFound,
    of_problem,
)
from moerge.client.patience import Patience, Progress, silent
from moerge.client.records import Job, Snapshot
from moerge.client.references import Reference
from moerge.tensors import strict

JSON_BYTES = 32 * 2**20
FILE_BYTES = 2**30
PROBLEM_BYTES = 2**20
_JSON_KEYS, _JSON_DEPTH = 1_000_000, 64
WAIT_SECONDS = 600.0
# Pauses after a connection that failed; an address where nobody listens is told after the last.
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
POLL_SECONDS = 1.0
SETTLE_SECONDS = 0.25
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_GATEWAY = frozenset({502, 504})
# A proxy of the environment cannot reach this machine's own hub.
_LOCAL = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}
Params = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """The head of an answer, and its bytes as they come; reading them raises BrokenOff."""

    status: int
    headers: Mapping[str, str]
    blocks: Iterator[bytes]


@dataclass(frozen=True)
class _Asked:
    """A request that may be sent again and again, until it is answered."""

    path: str
    method: str = "GET"
    params: Params = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


class Hub:
    """A hub at `endpoint` (else HF_ENDPOINT), asked with `key` (else HF_TOKEN, else as anybody). A context manager.

    Everything that one call waits for, from "try again later" to jobs of the hub, takes `wait_seconds` at most, and
    `progress` hears of it. Raises AddressInvalid; every call raises children of ClientError.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        key: str | None = None,
        *,
        wait_seconds: float = WAIT_SECONDS,
        progress: Progress = silent,
        patience: Callable[[float], Patience] = Patience,
    ) -> None:
        self.endpoint = environment.endpoint(endpoint)
        self.progress = progress
        self._wait_seconds = wait_seconds
        self._patience = patience
        found = environment.key(key)
        headers = {"User-Agent": f"moerge/{moerge.__version__}"}
        if found:
            headers["Authorization"] = f"Bearer {found}"
        # httpx takes the key off when a redirect leads to another origin.
        self._http = httpx.Client(
            headers=headers, timeout=_TIMEOUT, follow_redirects=True, max_redirects=5, mounts=_LOCAL
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def patience(self) -> Patience:
        """A fresh stretch of the caller's time."""
        return self._patience(self._wait_seconds)

    def snapshot(self, reference: Reference, *, patience: Patience | None = None) -> Snapshot:
        """The files of an expert or a merge at the commit that the reference means now."""
        patience = patience or self.patience()
        if reference.owner == "merges":
            return self._merge(reference, patience)
        revision = quote(reference.revision, safe="")
        try:
            body = self.json(f"/api/v1/experts/{reference.full_name}/revisions/{revision}", patience=patience)
        except NotFound as error:
            if error.code != "revision-not-found":
                raise
            # What the hub derives (compeft-k10, merge--<id>) has no record of its own; the Hub protocol knows it.
            return self._derived(reference, error, patience)
        return records.snapshot(body, full_name=reference.full_name, commit_field="revision")

    def json(self, path: str, *, params: Params | None = None, patience: Patience | None = None) -> Any:
        """The JSON at a path of the API. Raises HubRefused and what waiting raises."""
        return self._answered(_Asked(path, params=params or {}), (200,), patience)[1]

    def post(self, path: str, body: Any = None, *, patience: Patience | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer to a body. It is sent again when no answer came, so it must mean the same twice.

        Raises as `json` does.
        """
        return self._answered(_posted(path, body), (200, 201, 202), patience)

    def post_for_file(self, path: str, body: Any, *, patience: Patience | None = None) -> bytes:
        """The file that answers a body, of at most 1 GiB. Raises as `json` does."""
        return self._whole(_posted(path, body), (200,), patience or self.patience(), FILE_BYTES)[1]

    def cancel(self, job_id: str) -> Job | None:
        """Ask once that a job be stopped; the job as it stands then, or None where the hub did not do so."""
        return self._try_job(job_id, "POST", "/cancel")

    def _answered(self, asked: _Asked, accept: Collection[int], patience: Patience | None) -> tuple[int, Any]:
        status, data = self._whole(asked, accept, patience or self.patience(), JSON_BYTES)
        try:
            return status, _parsed(data)
        except strict.Malformed as error:
            raise AnswerInvalid(
                f"The answer of {self.endpoint}{asked.path} is not JSON.", pointer=asked.path, met=ascii(data[:60]),
                wanted="JSON", remedy="Check that --endpoint or HF_ENDPOINT is the address of a hub.",
            ) from error  # fmt: skip

    def _whole(self, asked: _Asked, accept: Collection[int], patience: Patience, limit_bytes: int) -> tuple[int, bytes]:
        """Status and all bytes of an answer; one that breaks off is asked for again."""
        failures = 0
        while True:
            try:
                with self._stream(asked, accept, patience) as answer:
                    return answer.status, _limited(answer.blocks, limit_bytes)
            except BrokenOff as error:
                failures = self._pause(failures, error, patience)

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        params: Params | None = None,
        headers: Mapping[str, str] | None = None,
        accept: Collection[int] = (200,),
        patience: Patience | None = None,
    ) -> Iterator[Answer]:
        """An answer of one of the statuses in `accept`, its bytes yet to come, exactly as they are stored."""
        asked = _Asked(path, params=params or {}, headers=headers or {})
        with self._stream(asked, accept, patience or self.patience()) as answer:
            yield answer

    @contextmanager
    def _stream(self, asked: _Asked, accept: Collection[int], patience: Patience) -> Iterator[Answer]:
        response = self._open(asked, accept, patience)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise AnswerInvalid(
                    "The hub, or something before it, changed the bytes on their way.", pointer=asked.path,
                    met=f"Content-Encoding {response.headers['Content-Encoding'][:40]}", wanted="the bytes as stored",
                    remedy="Turn off compression in the proxy before the hub.",
                )  # fmt: skip
            yield Answer(response.status_code, response.headers, self._blocks(response))
        finally:
            response.close()

    def _blocks(self, response: httpx.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_raw()
        except httpx.TransportError as error:
            raise BrokenOff(
                f"An answer of {self.endpoint} broke off.", pointer=self.endpoint, met=str(error)[:200],
                wanted="the whole answer", remedy="Try again; a download goes on where it stopped.",
            ) from error  # fmt: skip

    def _open(self, asked: _Asked, accept: Collection[int], patience: Patience) -> httpx.Response:
        """Send until the answer is final: a status in `accept`, or a refusal that waiting does not help."""
        failures = 0
        ended: set[str] = set()
        while True:
            try:
                request = self._http.build_request(
                    asked.method, self.endpoint + asked.path, params=asked.params, content=asked.content,
                    headers={"Accept-Encoding": "identity", **asked.headers},
                )  # fmt: skip
                response = self._http.send(request, stream=True)
            except httpx.TransportError as error:
                reason: ClientError = self._unreachable(error)
                failures = self._pause(failures, reason, patience)
                continue
            except httpx.TooManyRedirects as error:
                raise AnswerInvalid(
                    "The hub redirects without end.", pointer=asked.path, met="more than 5 redirects",
                    wanted="an answer", remedy="Check the endpoint.",
                ) from error  # fmt: skip
            except httpx.InvalidURL as error:
                raise AddressInvalid(
                    f"{self.endpoint} is not the address of a hub.", pointer="--endpoint", met=str(error),
                    wanted="http://HOST[:PORT]", remedy="Correct the endpoint.",
                ) from error  # fmt: skip
            if response.status_code in accept:
                return response
            refusal = self._refusal(response)
            if response.status_code in _GATEWAY:
                failures = self._pause(failures, refusal, patience)
            elif _is_temporary(refusal, response):
                self._wait_for(refusal, _retry_after(response), patience, ended)
            else:
                raise refusal

    def _pause(self, failures: int, reason: ClientError, patience: Patience) -> int:
        """Wait after a failed connection; raises the reason when it has failed too often."""
        if failures >= len(PAUSES_SECONDS):
            raise reason
        self.progress(reason.detail, None)
        patience.wait(PAUSES_SECONDS[failures], reason)
        return failures + 1

    def _refusal(self, response: httpx.Response) -> HubRefused:
        """The problem in an answer, whatever it is made of; the answer is closed."""
        try:
            body = _parsed(_limited(self._blocks(response), PROBLEM_BYTES))
        except (strict.Malformed, ClientError):
            # A proxy's page, or an answer cut off: the status alone tells.
            body = None
        finally:
            response.close()
        return of_problem(response.status_code, body)

    def _wait_for(self, refusal: HubRefused, retry_after_seconds: float, patience: Patience, ended: set[str]) -> None:
        """Until it is worth to ask again: the job that makes what is missing has ended, or the hub's time is over.

        `ended` collects jobs whose end did not help: of those, only Retry-After is left.
        """
        while refusal.job_id and refusal.job_id not in ended:
            job = self._try_job(refusal.job_id)
            if job is None:
                break
            if job.is_over:
                job.raise_if_failed()
                ended.add(refusal.job_id)
                # What a job has made can be seen a moment after its end.
                patience.wait(SETTLE_SECONDS, refusal)
                return
            self.progress(job.message or refusal.detail, job.progress)
            patience.wait(POLL_SECONDS, refusal)
        self.progress(refusal.detail, None)
        patience.wait(retry_after_seconds, refusal)

    def _try_job(self, job_id: str, method: str = "GET", command: str = "") -> Job | None:
        """A job as it stands; None when it cannot be read, for then Retry-After has to do."""
        try:
            with self._http.stream(method, f"{self.endpoint}/api/v1/jobs/{job_id}{command}") as response:
                data = _limited(response.iter_bytes(), PROBLEM_BYTES)
            return records.job(_parsed(data)) if response.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, strict.Malformed, AnswerInvalid):
            return None

    def _derived(self, reference: Reference, absent: NotFound, patience: Patience) -> Snapshot:
        model = f"/api/models/{reference.full_name}"
        try:
            body = self.json(f"{model}/revision/{quote(reference.revision, safe='')}", patience=patience)
        except NotFound:
            raise absent from None
        commit = records.commit(body)
        nodes = self.json(
            f"{model}/tree/{commit}", params={"recursive": "true", "limit": str(records.PAGE)}, patience=patience
        )
        return records.derived(nodes, full_name=reference.full_name, commit=commit)

    def _merge(self, reference: Reference, patience: Patience) -> Snapshot:
        while True:
            body = self.json(f"/api/v1/merges/{reference.name}", patience=patience)
            state, job = records.merge_state(body)
            if state == "registered":
                # Whoever reads its files has it computed, and is told of the job; its record alone does nothing.
                tree = f"/api/models/{reference.full_name}/tree/main"
                self.json(tree, params={"recursive": "true", "limit": str(records.PAGE)}, patience=patience)
            elif state == "failed" or (job is not None and job.is_over):
                _raise_of_merge(reference, state, job)
            if state == "ready":
                break
            self.progress((job.message if job else "") or "The merge is computed.", job.progress if job else None)
            reason = ClientError(f"{reference.full_name} is still computed.", pointer=reference.full_name, met=state)
            patience.wait(POLL_SECONDS if state != "registered" else SETTLE_SECONDS, reason)
        found = records.snapshot(body, full_name=reference.full_name, commit_field="commit")
        if reference.revision not in {"main", found.commit}:
            raise AddressInvalid(
                "A merge has one revision.", pointer="REF", met=reference.revision[:80],
                wanted=f"main or {found.commit}", remedy="Leave the revision out.",
            )  # fmt: skip
        return found

    def _unreachable(self, error: httpx.TransportError) -> HubUnreachable:
        return HubUnreachable(
            f"{self.endpoint} does not answer: {str(error)[:200] or type(error).__name__}.", pointer=self.endpoint,
            met=type(error).__name__, wanted="an answer", remedy="Check the address and that the hub is running.",
        )  # fmt: skip


def _posted(path: str, body: Any) -> _Asked:
    headers = {} if body is None else {"Content-Type": "application/json"}
    return _Asked(
        path, "POST", headers=headers, content=None if body is None else json.dumps(body, allow_nan=False).encode()
    )


def _raise_of_merge(reference: Reference, state: str, job: Job | None) -> None:
    if job is not None:
        job.raise_if_failed()
    if state == "failed":
        raise JobFailed(
            f"{reference.full_name} could not be computed.", pointer=reference.full_name, met=state, wanted="ready",
            remedy="Look at the merge's page.",
        )  # fmt: skip


def _is_temporary(refusal: HubRefused, response: httpx.Response) -> bool:
    """Whether the hub says that waiting helps."""
    says_when = "Retry-After" in response.headers
    is_unready = isinstance(refusal, Conflict) and refusal.code == "not-ready"
    return refusal.status in {429, 503} or (is_unready and says_when)


def _retry_after(response: httpx.Response) -> float:
    """Seconds of Retry-After, a number or a date; 2 where there is none, and never less than a tenth."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return max(0.1, float(text[:9]))
    try:
        when = parsedate_to_datetime(text)
        return max(0.1, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 2.0


def _parsed(data: bytes) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice. Raises Malformed."""
    return strict.loads(data, max_keys=_JSON_KEYS, max_depth=_JSON_DEPTH)


def _limited(blocks: Iterator[bytes], limit_bytes: int) -> bytes:
    """All bytes of a small answer. Raises AnswerInvalid for a large one."""
    parts, count = [], 0
    for block in blocks:
        count += len(block)
        if count > limit_bytes:
            raise AnswerInvalid(
                "The answer is larger than any of its kind.", met=f"more than {limit_bytes} bytes",
                wanted=f"at most {limit_bytes}", remedy="Check that the endpoint is the address of a hub.",
            )  # fmt: skip
        parts.append(block)
    return b"".join(parts)
