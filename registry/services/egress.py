"""The one door through which the hub speaks to addresses that are not its own: JSON out, JSON in, little of it.

The host is resolved once and that address is connected to, so a name that answers differently the second time changes
nothing. Only addresses of the open internet by https pass, unless the operator allows a host by name; no redirect is
followed; size, time and type of the answer are bounded, and nothing of it is ever told in an error.
"""

import http.client
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from registry.errors import EgressFailed, EgressRefused, Fault

MAX_ANSWER_BYTES = 2**20
TIMEOUT_SECONDS = 60.0

Resolver = Callable[[str, int], Collection[str]]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a request goes: the URL and the one address that its host was found to have."""

    url: SplitResult
    port: int
    address: str


def resolved(host: str, port: int) -> list[str]:
    """All addresses of a host, by the system's resolver. Raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str],
    allowed_hosts: Collection[str] = (),
    resolve: Resolver = resolved,
    max_bytes: int = MAX_ANSWER_BYTES,
    seconds: float = TIMEOUT_SECONDS,
) -> Any:
    """The JSON that a URL answers to JSON.

    `allowed_hosts` holds host or host:port, for which the rules on scheme and address do not hold. `seconds` bound the
    whole exchange. Raises EgressRefused before a byte is sent, EgressFailed for what comes back.
    """
    target = checked(url, allowed_hosts=allowed_hosts, resolve=resolve)
    data = json.dumps(body).encode("ascii")
    kind = _Tls if target.url.scheme == "https" else _Plain
    path = target.url.path or "/"
    with closing(kind(target, seconds)) as connection:
        late = threading.Event()
        timer = threading.Timer(seconds, _cut, (connection, late))
        timer.daemon = True
        timer.start()
        try:
            sent = {**headers, "Content-Type": "application/json", "Accept": "application/json"}
            connection.request("POST", f"{path}?{target.url.query}" if target.url.query else path, data, sent)
            answer = _read(connection.getresponse(), max_bytes)
        except (OSError, http.client.HTTPException) as error:
            known = str(error) if isinstance(error, _Unfit) else type(error).__name__
            raise _failed(target, _too_late(seconds) if late.is_set() else known) from None
        finally:
            timer.cancel()
    if late.is_set():
        raise _failed(target, _too_late(seconds))
    try:
        return json.loads(answer)
    except ValueError:
        raise _failed(target, "a body that is no JSON") from None


def checked(url: str, *, allowed_hosts: Collection[str] = (), resolve: Resolver = resolved) -> Target:
    """The target of a URL that may be asked. Raises EgressRefused."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        raise _refused("not a URL", "https://host/path") from None
    host = parts.hostname or ""
    if parts.scheme not in _PORTS or not host or parts.username is not None or any(ord(sign) < 33 for sign in url):
        raise _refused("not a URL", "https://host/path, without user and password")
    is_allowed = not {host, f"{host}:{port}"}.isdisjoint(name.lower() for name in allowed_hosts)
    if parts.scheme != "https" and not is_allowed:
        raise _refused("http", "https, or a host that HUB_EGRESS_HOSTS allows")
    try:
        addresses = list(resolve(host, port))
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise _refused(f"{host} has no address", "a host that can be found")
    if not is_allowed and not all(map(is_public, addresses)):
        raise _refused(f"{host} is at an address that is not public", "a public host, or HUB_EGRESS_HOSTS allows it")
    return Target(url=parts, port=port, address=addresses[0])


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, also when it is an IPv4 address in the dress of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is None and (found in _NAT64 or int(found) < 2**32):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


class _Plain(http.client.HTTPConnection):
    """A connection to the address that was resolved, whatever the name would say now."""

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__(target.url.hostname or "", target.port, timeout=seconds)
        self._target = target
        # `sock` is let go when the answer begins, and that is still to be cut.
        self.opened: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self.opened = socket.create_connection((self._target.address, self._target.port), self.timeout)


class _Tls(_Plain):
    def connect(self) -> None:
        super().connect()
        # The certificate is that of the name, not of the address.
        self.sock = self.opened = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _cut(connection: _Plain, late: threading.Event) -> None:
    late.set()
    if connection.opened is not None:
        with suppress(OSError):
            connection.opened.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != http.HTTPStatus.OK:
        raise _Unfit(f"status {response.status}")
    if response.headers.get_content_type() != "application/json":
        raise _Unfit("another content type than application/json")
    answer = response.read(max_bytes + 1)
    if len(answer) > max_bytes:
        raise _Unfit(f"more than {max_bytes} bytes")
    return answer


class _Unfit(http.client.HTTPException):
    """An answer that is not taken."""


def _refused(met: str, wanted: str) -> EgressRefused:
    return EgressRefused(f"{met}, wanted {wanted}.", faults=[Fault("url", met, wanted, "Correct the address.")])


def _too_late(seconds: float) -> str:
    return f"not within {seconds:g} s"


def _failed(target: Target, met: str) -> EgressFailed:
    host = target.url.hostname
    fault = Fault("url", met, "JSON over HTTP with status 200, in time", f"Look at what runs at {host}.")
    return EgressFailed(f"{host} answered: {met}.", faults=[fault])
