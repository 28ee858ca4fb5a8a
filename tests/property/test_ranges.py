"""The range that a header asks for, against slicing by hand."""

import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import RangeUnsatisfiable
from registry.services import downloads

DATA = bytes(range(97)) * 3


@settings(deadline=None)
@given(size=st.integers(0, len(DATA)), first=st.integers(0, 400), count=st.integers(1, 400))
def test_a_span_gives_the_slice_that_it_names(size, first, count):
    check(f"bytes={first}-{first + count - 1}", size, DATA[:size][first : first + count])


@settings(deadline=None)
@given(size=st.integers(0, len(DATA)), first=st.integers(0, 400))
def test_an_open_span_runs_to_the_end(size, first):
    check(f"bytes={first}-", size, DATA[:size][first:])


@settings(deadline=None)
@given(size=st.integers(0, len(DATA)), count=st.integers(0, 400))
def test_a_suffix_counts_from_the_end(size, count):
    check(f"bytes=-{count}", size, DATA[max(0, size - count) : size])


@settings(deadline=None)
@given(
    header=st.text("byts=0123456789-, \t", max_size=40) | st.text("0123456789, -", max_size=30).map("bytes={}".format)
)
def test_any_header_gives_a_part_of_the_file_the_whole_or_a_refusal(header):
    with contextlib.suppress(RangeUnsatisfiable):
        part = downloads.parse_range(header, 50)
        assert part is None or 0 <= part.start < part.stop <= 50


def check(header: str, size: int, wanted: bytes) -> None:
    if not wanted:
        with pytest.raises(RangeUnsatisfiable):
            downloads.parse_range(header, size)
        return
    part = downloads.parse_range(header, size)
    stream = io.BytesIO(DATA[:size])
    stream.seek(part.start)
    assert b"".join(downloads.Download(stream, part, size, True)) == wanted
    assert part.length == len(wanted)
