"""Search at 10^5 and 10^6 vectors of one base model: time, recall, size of the files and of a process that serves them.

The vectors are those of real texts, mixed and jittered: expert by expert two cards are drawn, and every row of the
first is mixed with one of the second and moved by a random direction. Queries are real and take no part in that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks import routing
from moerge.embedding import DIMENSION, ENCODER_ID
from moerge.routing import cards, snapshots
from moerge.routing.base import Query
from moerge.routing.cards import Entry
from moerge.routing.segment import Segment
from moerge.routing.state import State

T = TypeVar("T")

NAME = "routing-scale"
SUMMARY = "Search among 100,000 and a million vectors: time, recall against exact search, file sizes and memory"

SEED = 5
# Share of the first card in a mixture, drawn evenly; length of the jitter beside a row of length 1.
SHARES = (0.5, 1.0)
JITTER = 0.3
# How many rows a query asks for before experts are made of them; recall is that of the ten nearest among them.
ROWS = 200
NEAREST = 10
BLOCK = 65_536
# (p50 of the search in ms of CPU, recall@10) by number of vectors.
TARGETS = {100_000: (1.0, 0.98), 1_000_000: (5.0, 0.96)}
# Opens a snapshot as a router does, ranks the queries, and tells its memory in KiB before and after.
SERVING = """
import json, sys
from pathlib import Path
from benchmarks import routing_scale
print(json.dumps(routing_scale.served(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experts", type=Path, required=True, help="cards whose texts the vectors are made of, JSON lines"
    )
    parser.add_argument("--queries", type=Path, required=True, help="real queries, JSON lines")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000], help="default: 100000")
    parser.add_argument("--count", type=int, default=300, help="queries drawn, default: 300")
    parser.add_argument("--vectors", type=Path, help="keep the encoded texts here and take them from here another time")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report."""
    entries, queries = encoded(arguments)
    drawn = np.random.default_rng(SEED).permutation(len(queries))[: arguments.count]
    rows = []
    for size in arguments.sizes:
        rows += measured(entries, [queries[place] for place in sorted(drawn)], size)
    return rows


def encoded(arguments: argparse.Namespace) -> tuple[list[Entry], list[Query]]:
    """Entries of the cards and the queries, by the packaged encoder."""
    known = [routing.card_of(record) for record in routing.lines(arguments.experts, needed=("id", "name"))]
    asked = [record["q"] for record in routing.lines(arguments.queries, needed=("q",))]
    texts = [*(text for card in known for text in cards.texts(card)), *asked]
    kept = arguments.vectors
    if kept and kept.exists():
        vectors = np.load(kept)
        if len(vectors) != len(texts):
            raise ValueError(f"{kept} holds the vectors of other texts")
    else:
        # The import takes 10 s, which `bin/bench --list` should not cost.
        from moerge.embedding import encoder  # noqa: PLC0415

        say(f"encoding {len(texts)} texts")
        vectors = encoder.load(cache_count=0).encode(texts)
        if kept:
            np.save(kept, vectors)
    ready = iter(vectors)
    entries = routing.entries(known, lambda some: np.stack([next(ready) for _ in some]))
    return entries, [Query(text=text, vector=next(ready)) for text in asked]


def measured(entries: Sequence[Entry], queries: Sequence[Query], size: int) -> list[dict[str, Any]]:
    """All rows of the report on one number of vectors."""
    label = f"{size:,} vectors"
    slow, recall_wanted = TARGETS.get(size, (None, None))
    crowd = Crowd(entries, size)
    say(f"{label}: making and indexing them")
    started = time.process_time()
    segment = Segment.build(crowd, dimension=DIMENSION)
    build = time.process_time() - started - crowd.seconds
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as name:
        folder = Path(name) / "1"
        digest = snapshots.write(folder, {routing.BASE: segment}, seq=1, encoder_id=ENCODER_ID, dimension=DIMENSION)
        del segment
        opened, open_seconds = timed(lambda: snapshots.open(folder, digest, encoder_id=ENCODER_ID))
        segment = opened.segments[routing.BASE]
        say(f"{label}: searching")
        exact = nearest(segment.vectors.rows, np.stack([query.vector for query in queries if query.vector is not None]))
        search_ms, shares = [], []
        for query, wanted in zip(queries, exact, strict=True):
            assert query.vector is not None
            (_, found), seconds = timed(lambda vector=query.vector: segment.vectors.search(vector, ROWS))
            search_ms.append(1000 * seconds)
            shares.append(len(set(found[:NEAREST].tolist()) & set(wanted.tolist())) / NEAREST)
        state = State.based_on(opened.segments, seq=1, encoder_id=ENCODER_ID, dimension=DIMENSION)
        rank_ms = [
            1000 * timed(lambda query=query: state.rank(query, base_model=routing.BASE, limit=NEAREST))[1]
            for query in queries
        ]
        sizes = {path.suffix: path.stat().st_size / 2**20 for path in folder.iterdir()}
        experts = len(segment)
        memory = memory_of(folder, digest, queries, Path(name))
    recall = float(np.mean(shares))
    p50 = float(np.median(search_ms))
    return [
        row(f"{label}, experts", experts, "experts"),
        row(f"{label}, build", build, "s of CPU"),
        row(f"{label}, file of the vector index", sizes[".vectors"], "MiB"),
        row(f"{label}, file of rows, words and cards", sizes[".columns"], "MiB"),
        row(f"{label}, check and open the snapshot", open_seconds, "s of CPU"),
        row(f"{label}, search, p50", p50, "ms of CPU", target=slow, met=None if slow is None else p50 < slow),
        row(f"{label}, search, p99", float(np.percentile(search_ms, 99)), "ms of CPU"),
        row(
            f"{label}, recall@10 against exact",
            recall,
            "share",
            target=recall_wanted,
            met=None if recall_wanted is None else recall >= recall_wanted,
        ),
        row(f"{label}, whole ranking with words, p50", float(np.median(rank_ms)), "ms of CPU"),
        row(f"{label}, whole ranking with words, p99", float(np.percentile(rank_ms, 99)), "ms of CPU"),
        *(row(f"{label}, memory of a serving process, {part}", value, "MiB") for part, value in memory.items()),
    ]


class Crowd:
    """Entries made one by one until there are `size` rows; `seconds` tells the CPU time that making them took."""

    def __init__(self, entries: Sequence[Entry], size: int) -> None:
        self._entries = entries
        self._size = size
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Entry]:
        rng = np.random.default_rng(SEED)
        count = number = 0
        while count < self._size:
            number += 1
            first, second = (self._entries[place] for place in rng.integers(0, len(self._entries), 2))
            made, seconds = timed(lambda: mixed(first, second, rng, number))  # noqa: B023  # Called at once.
            self.seconds += seconds
            count += len(made.vectors)
            yield made


def mixed(first: Entry, second: Entry, rng: np.random.Generator, number: int) -> Entry:
    """An expert between two others: the rows of the first mixed with rows of the second, and the words of both."""
    share = rng.uniform(*SHARES)
    rows = (
        share * first.vectors + (1 - share) * second.vectors[rng.integers(0, len(second.vectors), len(first.vectors))]
    )
    rows = unit(unit(rows) + JITTER * unit(rng.standard_normal(rows.shape, dtype=np.float32)))
    examples = (*first.card.examples[1:], second.card.description)[: len(first.card.examples)]
    card = replace(first.card, expert=f"bench/{number:07d}", number=number, revision=number, examples=examples)
    counts = Counter(first.counts)
    counts.update(cards.tokens(second.card.description))
    return Entry(card=card, vectors=rows, counts=counts)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest(rows: NDArray[np.float16], asked: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ten nearest rows of each query by plain multiplication: (n, d), (q, d) -> (q, 10)."""
    best = np.zeros((len(asked), 0), dtype=np.float32)
    places = np.zeros((len(asked), 0), dtype=np.int64)
    for start in range(0, len(rows), BLOCK):
        scores = asked @ rows[start : start + BLOCK].astype(np.float32).T
        top = np.argpartition(-scores, min(NEAREST, scores.shape[1]) - 1, axis=1)[:, :NEAREST]
        best = np.concatenate([best, np.take_along_axis(scores, top, axis=1)], axis=1)
        places = np.concatenate([places, start + top], axis=1)
    return np.take_along_axis(places, np.argsort(-best, axis=1)[:, :NEAREST], axis=1)


def memory_of(folder: Path, digest: str, queries: Sequence[Query], scratch: Path) -> dict[str, float]:
    """MiB of a process of its own that opens the snapshot and ranks the queries."""
    file = scratch / "queries.npz"
    vectors = np.stack([query.vector for query in queries if query.vector is not None])
    np.savez(file, texts=np.array([query.text for query in queries]), vectors=vectors)
    command = [sys.executable, "-c", SERVING, str(folder), digest, str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(told.stdout)


def served(folder: Path, digest: str, file: Path) -> dict[str, float]:
    """Open, rank and tell: what a process holds before, and after, and how much of that others share."""
    before = memory()
    opened = snapshots.open(folder, digest, encoder_id=ENCODER_ID)
    state = State.based_on(opened.segments, seq=1, encoder_id=ENCODER_ID, dimension=DIMENSION)
    with np.load(file) as asked:
        for text, vector in zip(asked["texts"], asked["vectors"], strict=True):
            state.rank(Query(text=str(text), vector=vector), base_model=routing.BASE, limit=NEAREST)
    after = memory()
    return {
        "before opening": before["VmRSS"],
        "after the queries": after["VmRSS"],
        "of that mapped files, which processes share": after["RssFile"],
        "of that its own": after["RssAnon"],
    }


def memory() -> dict[str, float]:
    """The lines of /proc/self/status that tell resident memory, in MiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = [line.split() for line in lines if line.startswith(("VmRSS", "Rss"))]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in pairs}


def timed(action: Callable[[], T]) -> tuple[T, float]:
    started = time.process_time()
    result = action()
    return result, time.process_time() - started


def row(name: str, value: float, unit: str, *, target: float | None = None, met: bool | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "value": value if isinstance(value, int) else round(value, 4),
        "unit": unit,
        "peer": None,
        "peer_value": None,
        "ratio": None,
        "target": target,
        "met": met,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
