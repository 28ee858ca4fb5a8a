"""Strict JSON: what Python's parser lets through and two readers could understand differently is refused here."""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

# A string that never ends is one token, so that the search is linear in the bytes.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_MINUS_ZERO = re.compile(rb"-0(?![.0-9eE])")


class Malformed(ValueError):
    """Bytes that are not strict JSON; the message says why, `pointer` names the member where it is known."""

    def __init__(self, detail: str, *, pointer: str = "") -> None:
        super().__init__(detail)
        self.pointer = pointer


def loads(data: bytes, *, max_keys: int, max_depth: int | None = None) -> Any:
    """UTF-8 JSON bytes to Python values.

    Refuses with Malformed: bytes that are not UTF-8, a byte order mark, duplicate keys, NaN and Infinity (also as a
    number too large for a float), `-0` (an integer for Python, a float for other readers), lone surrogates, more
    than `max_keys` members, more than `max_depth` levels (about a thousand where none is given), and integers of
    thousands of digits.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} is not UTF-8") from error
    if max_depth is not None:
        _check_depth(data, max_depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_pairs(max_keys),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            # Called for every integer, so only where there is something to find.
            parse_int=_integer if _MINUS_ZERO.search(data) else None,
        )
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except ValueError as error:
        raise Malformed(str(error)) from error
    # A surrogate can only come from an escape, because the bytes were valid UTF-8; so most texts need no walk.
    if b"\\u" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise Malformed("a string holds half of a surrogate pair") from error
    return value


def _check_depth(data: bytes, max_depth: int) -> None:
    depth = 0
    for token in _TOKEN.finditer(data):
        first = token[0][0]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise Malformed(f"nested more than {max_depth} levels deep")
        elif first in b"]}":
            depth -= 1


def _pairs(max_keys: int) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    seen = 0

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += len(pairs)
        if seen > max_keys:
            raise Malformed(f"more than {max_keys} members")
        members = dict(pairs)
        if len(members) != len(pairs):
            names = set()
            for name, _ in pairs:
                if name in names:
                    raise Malformed(f"the key {name[:200]!r} appears twice", pointer=name[:200])
                names.add(name)
        return members

    return build


def _refuse_constant(word: str) -> NoReturn:
    raise Malformed(f"{word} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Malformed(f"the number {digits[:40]} is too large")
    return value


def _integer(digits: str) -> int:
    if digits == "-0":
        raise Malformed("-0 is read as an integer by some and as a float by others")
    return int(digits)
