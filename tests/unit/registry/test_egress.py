"""What the hub may speak to: public addresses by https, each resolved once; and what it takes of an answer."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from registry.errors import EgressFailed, EgressRefused
from registry.services import egress

PRIVATE = (
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.127.255.255", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::",
    "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "no address", "",
)  # fmt: skip
PUBLIC = ("8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_of_a_private_network_is_not_public_in_any_dress(address):
    assert not egress.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_open_internet_is_public(address):
    assert egress.is_public(address)


@pytest.mark.parametrize(
    "host", ["2130706433", "0177.0.0.1", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "[::1]", "localhost"]
)
def test_a_host_that_the_system_takes_for_its_own_is_refused_in_every_form(host):
    with pytest.raises(EgressRefused):
        egress.checked(f"https://{host}/v1")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "ftp://example.org/", "file:///etc/passwd", "example.org", "https://", "https://u@example.org/",
        "https://u:p@example.org/", "https://example.org:0x50/", "https://example.org/a b", "https://exa\nmple.org/", "",
    ],
)  # fmt: skip
def test_what_is_no_https_address_is_refused_before_anything_is_resolved(url):
    def resolve(*_):
        pytest.fail("nobody should look")

    with pytest.raises(EgressRefused) as caught:
        egress.checked(url, resolve=resolve)
    assert caught.value.faults[0].wanted


def test_one_private_address_among_several_is_enough_to_refuse():
    with pytest.raises(EgressRefused):
        egress.checked("https://example.org/", resolve=lambda *_: ["8.8.8.8", "10.0.0.1"])
    assert egress.checked("https://example.org/", resolve=lambda *_: ["8.8.8.8"]).address == "8.8.8.8"


def test_a_host_without_address_is_refused():
    def unknown(*_):
        raise socket.gaierror("no such name")

    for resolve in (unknown, lambda *_: []):
        with pytest.raises(EgressRefused):
            egress.checked("https://example.org/", resolve=resolve)


def test_an_allowed_host_may_be_private_and_plain_but_only_by_its_own_name_and_port():
    def check(url, *allowed):
        return egress.checked(url, allowed_hosts=allowed, resolve=lambda *_: ["10.0.0.1"])

    assert check("http://llm:8000/v1", "LLM:8000").port == 8000
    assert check("http://llm/v1", "llm").port == 80
    assert check("https://llm/v1", "llm").port == 443
    for url in ("http://llm:8001/v1", "http://llm.evil.org:8000/v1", "http://other/v1"):
        with pytest.raises(EgressRefused):
            check(url, "llm:8000")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers), json.loads(body)))
        self.server.answer(self)

    def log_message(self, *_):
        pass


def answering(status=200, content_type="application/json", body=b'{"ok": true}', **headers):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@contextmanager
def server(answer):
    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.answer, made.seen = answer, []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def post(made, *, host="llm.example", resolve=None, **options):
    place = f"{host}:{made.server_port}"
    return egress.post_json(
        f"http://{place}/v1/x?y=1",
        {"question": "ü"},
        headers={"Authorization": "Bearer k"},
        allowed_hosts=[place],
        resolve=resolve or (lambda *_: ["127.0.0.1"]),
        **options,
    )


def test_json_goes_out_and_json_comes_back():
    with server(answering()) as made:
        assert post(made) == {"ok": True}
    ((path, headers, body),) = made.seen
    assert (path, body) == ("/v1/x?y=1", {"question": "ü"})
    assert headers["Host"] == f"llm.example:{made.server_port}"
    assert (headers["Authorization"], headers["Content-Type"]) == ("Bearer k", "application/json")


def test_a_name_that_changes_its_answer_is_asked_once_and_that_address_is_used():
    answers = [["127.0.0.1"], ["127.0.0.2"], ["10.0.0.1"]]
    with server(answering()) as made:
        assert post(made, resolve=lambda *_: answers.pop(0)) == {"ok": True}
    assert len(answers) == 2


def test_a_proxy_that_the_environment_names_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with server(answering()) as made:
        assert post(made) == {"ok": True}


def test_a_redirect_is_not_followed():
    with (
        server(answering()) as inner,
        server(answering(302, Location=f"http://127.0.0.1:{inner.server_port}/")) as made,
    ):
        with pytest.raises(EgressFailed, match="status 302"):
            post(made)
        assert (len(made.seen), inner.seen) == (1, [])


SECRET = "the answer of an inner server"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (answering(500, body=SECRET.encode()), "status 500"),
        (answering(content_type="text/html", body=SECRET.encode()), "content type"),
        (answering(body=SECRET.encode()), "no JSON"),
        (answering(body=b'"' + b"x" * 2000 + b'"'), "more than 1000 bytes"),
        (answering(body=b"\xff\xfe"), "no JSON"),
        (answering(200, "application/json", b"{}", **{"X-Long": "x" * 70_000}), "LineTooLong"),
    ],
)
def test_an_answer_that_is_not_taken_is_refused_and_never_told(answer, told):
    with server(answer) as made, pytest.raises(EgressFailed, match=told) as caught:
        post(made, max_bytes=1000)
    assert SECRET not in json.dumps(caught.value.as_dict())
    assert "llm.example" in caught.value.detail


def test_an_answer_of_exactly_the_largest_size_is_taken():
    body = b'"' + b"x" * 998 + b'"'
    with server(answering(body=body)) as made:
        assert post(made, max_bytes=1000) == "x" * 998


@pytest.mark.parametrize("where", ["head", "body"])
def test_an_answer_that_drips_is_cut_off_though_every_piece_is_in_time(where):
    over = threading.Event()

    def dripping(handler):
        if where == "body":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
        piece = b" " if where == "body" else b"HTTP/1.1 100 Continue\r\n\r\n"
        while not over.wait(0.02):
            try:
                handler.wfile.write(piece)
            except OSError:
                return

    with server(dripping) as made:
        with pytest.raises(EgressFailed, match=r"not within 0\.2 s"):
            post(made, seconds=0.2)
        over.set()


def test_a_server_that_is_not_there_is_told_by_its_name_alone():
    with server(answering()) as made:
        pass
    with pytest.raises(EgressFailed) as caught:
        post(made)
    assert "127.0.0.1" not in json.dumps(caught.value.as_dict())
