"""A way to the hub that breaks: it passes requests on and cuts one answer off in the middle."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass
class Record:
    """What came through: method, path and Range of each request."""

    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    is_cut: bool = False

    @property
    def ranges(self) -> list[str | None]:
        return [asked for method, _, asked in self.requests if method == "GET"]


@contextmanager
def way_to(url: str, *, cut_after_bytes: int) -> Iterator[tuple[str, Record]]:
    """Another address of the hub, whose first long answer ends after so many bytes."""
    target, record = urlsplit(url), Record()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            record.requests.append((self.command, self.path, self.headers.get("Range")))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            there = HTTPConnection(target.hostname or "", target.port, timeout=30)
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP | {"date", "server"}:
                    self.send_header(name, value)
            self.end_headers()
            data = answer.read()
            there.close()
            if len(data) > cut_after_bytes and not record.is_cut:
                record.is_cut = True
                self.wfile.write(data[:cut_after_bytes])
                self.close_connection = True
            else:
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = pass_on  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", record
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
