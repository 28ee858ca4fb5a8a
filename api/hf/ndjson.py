"""The body of a commit, read as it arrives: one JSON object a line, in which the bytes of a file are one base64 string.

A line can hold hundreds of megabytes. Any string longer than `SPILL_BYTES` is decoded straight into the staging folder
and stands in the parsed line as a `Staged`; the rest of a line has to fit `limits.line_bytes`. So memory stays bounded
whatever arrives.
"""

import binascii
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from api.hf.door import no_constant
from registry.errors import Fault, RequestMalformed, TooLarge
from registry.services import blobs

SPILL_BYTES = 1 << 16
READ_BYTES = 1 << 18
OUTSIDE = re.compile(rb'["\n]')
INSIDE = re.compile(rb'["\\\n]')


class Stream(Protocol):
    """Where the body comes from."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Limits:
    """How much one body may hold."""

    line_bytes: int  # of JSON, the long strings not counted
    file_bytes: int  # of one decoded string
    total_bytes: int  # of all decoded strings
    lines: int


class Reader:
    """Lines of one body. Each is a parsed JSON object; see `discard` for what it leaves behind."""

    def __init__(self, stream: Stream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._chunk = b""
        self._place = 0
        self._mark = secrets.token_hex(16)  # nobody can write a string that looks like a place holder
        self._staged: dict[str, blobs.Staged] = {}
        self._staged_bytes = 0

    def discard(self) -> None:
        """Remove what was staged and has not been kept."""
        for staged in self._staged.values():
            staged.discard()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self._limits.lines + 1):
            line = self._line()
            if line is None:
                return
            if number == self._limits.lines:
                raise TooLarge(
                    f"More than {self._limits.lines} lines arrived.",
                    faults=[Fault(f"/{number}", "a further line", f"at most {self._limits.lines} lines")],
                )
            if line.strip():
                yield self._parse(line, number)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            raise malformed(f"/{number}", "a line that is not JSON", "one JSON object a line") from error
        if not isinstance(record, dict):
            raise malformed(f"/{number}", type(record).__name__, "one JSON object a line")
        found: dict[str, Any] = self._put_back(record)
        return found

    def _put_back(self, value: Any) -> Any:
        """The place holders of a line replaced by what they stand for."""
        if isinstance(value, dict):
            return {key: self._put_back(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._put_back(inner) for inner in value]
        return self._staged.get(value, value) if isinstance(value, str) else value

    def _line(self) -> bytes | None:
        """The next line with place holders for its long strings; None after the last one."""
        line = bytearray()
        has_begun = False
        while self._more():
            has_begun = True
            found = OUTSIDE.search(self._chunk, self._place)
            end = found.end() if found else len(self._chunk)
            line += self._chunk[self._place : end]
            self._place = end
            if found is not None and found.group() == b"\n":
                return bytes(line)
            if found is not None:
                line += self._string()
            if len(line) > self._limits.line_bytes:
                raise TooLarge(
                    f"A line holds more than {self._limits.line_bytes} bytes beside its files.",
                    faults=[Fault("", "a longer line", f"at most {self._limits.line_bytes} bytes")],
                )
        return bytes(line) if has_begun else None

    def _string(self) -> bytes:
        """What follows an opening quote up to and with the closing one; a long string as its place holder."""
        pieces = self._string_pieces()
        head: list[bytes] = []
        size = 0
        for piece in pieces:
            head.append(piece)
            size += len(piece)
            if size > SPILL_BYTES:
                name = f"{self._mark}-{len(self._staged)}"
                self._staged[name] = self._spill(chain(head, pieces))
                return name.encode() + b'"'
        return b"".join(head) + b'"'

    def _string_pieces(self) -> Iterator[bytes]:
        """The raw content of a string, escapes left as they are, up to its closing quote, which is taken."""
        while self._more():
            found = INSIDE.search(self._chunk, self._place)
            end = found.start() if found else len(self._chunk)
            if end > self._place:
                yield self._chunk[self._place : end]
            self._place = end
            if found is None:
                continue
            self._place += 1
            if found.group() == b'"':
                return
            if found.group() == b"\n" or not self._more():
                break
            yield b"\\" + self._chunk[self._place : self._place + 1]
            self._place += 1
        raise malformed("", "a string that does not end", "one JSON object a line")

    def _more(self) -> bool:
        """Whether a byte is left, reading on when the last chunk is used up."""
        if self._place >= len(self._chunk):
            self._chunk, self._place = self._stream.read(READ_BYTES), 0
        return bool(self._chunk)

    def _spill(self, pieces: Iterable[bytes]) -> blobs.Staged:
        room = self._limits.total_bytes - self._staged_bytes
        staged = blobs.stage(decoded(pieces), limit_bytes=min(self._limits.file_bytes, room), pointer="/value/content")
        self._staged_bytes += staged.size_bytes
        return staged


def decoded(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Bytes of a base64 string that arrives in pieces of any length; strict, padding at the end alone."""
    rest = b""
    is_over = False
    for piece in pieces:
        # JSON may write a slash as \/; nothing else in base64 has an escape.
        text = rest + (b"/" if piece == rb"\/" else piece)
        whole = len(text) - len(text) % 4
        rest = text[whole:]
        if whole:
            if is_over:
                raise not_base64()
            is_over = text[whole - 1 : whole] == b"="
            yield _decode(text[:whole])
    if rest:
        raise not_base64()


def _decode(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise not_base64() from error


def not_base64() -> RequestMalformed:
    return malformed("/value/content", "other characters or a wrong length", "base64 with padding, RFC 4648 section 4")


def malformed(pointer: str, met: str, wanted: str) -> RequestMalformed:
    return RequestMalformed(f"The body of the commit: {met}; wanted {wanted}.", faults=[Fault(pointer, met, wanted)])
