"""A real HTTP server on this machine whose answers a test writes, as far as to lie, stop halfway or say no."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Reply:
    """`cut_after` closes the connection after so many bytes of the body; `length` is what Content-Length claims."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    length: int | None = -1


@dataclass
class Asked:
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    method: str = "GET"
    body: bytes = b""


Route = Callable[[Asked], Reply]


class Server:
    """Routes by path; a list of replies is used up one by one, its last one stays."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[Asked] = []
        self.routes: dict[str, Route | list[Reply]] = {}

    def answer(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        found = self.routes.get(asked.path)
        if found is None:
            return problem(404, "not-found", "There is nothing at this address.")
        if callable(found):
            return found(asked)
        return found.pop(0) if len(found) > 1 else found[0]

    def of(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]


def problem(status: int, code: str, detail: str, **more: object) -> Reply:
    headers = {"Content-Type": "application/problem+json"}
    if "retry_after" in more:
        headers["Retry-After"] = str(more.pop("retry_after"))
    body = {"status": status, "code": code, "detail": detail, "title": "No", "request_id": "r-1", "errors": [], **more}
    return Reply(json.dumps(body).encode(), status, headers)


def as_json(value: object) -> Reply:
    return Reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def stored(data: bytes, etag: str, *, knows_ranges: bool = True, cuts: list[int] | None = None) -> Route:
    """A file as a careful server sends it (RFC 9110); each number in `cuts` ends one answer early."""
    cuts = cuts if cuts is not None else []

    def answer(asked: Asked) -> Reply:
        cut = cuts.pop(0) if cuts else None
        match = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        is_current = asked.headers.get("if-range", f'"{etag}"') == f'"{etag}"'
        if not match or not knows_ranges or not is_current:
            return Reply(data, 200, {"ETag": f'"{etag}"'}, cut)
        start = int(match[1])
        if start >= len(data):
            return Reply(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        told = {"ETag": f'"{etag}"', "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return Reply(data[start:], 206, told, cut)

    return answer


@contextmanager
def running() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            place = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            reply = server.answer(Asked(place.path, dict(parse_qsl(place.query)), headers, self.command, body))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.length is not None:
                self.send_header("Content-Length", str(len(reply.body) if reply.length == -1 else reply.length))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(reply.body if reply.cut_after is None else reply.body[: reply.cut_after])
            if reply.cut_after is not None or reply.length is None:
                self.close_connection = True

        do_POST = do_GET  # noqa: N815 - as http.server wants it

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, BrokenPipeError):
                # The client has had enough of an answer, which is what some tests are about.
                self.close_connection = True

    there = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.daemon_threads = True
    server = Server(f"http://127.0.0.1:{there.server_port}")
    thread = threading.Thread(target=there.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        there.shutdown()
        thread.join()
        there.server_close()
