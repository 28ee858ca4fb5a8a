"""Whole calls of `/api/v1/route` in a large catalogue, beside a bare encode of the same texts by the same encoder.

Starts a hub of its own in a temporary folder by the command that users type, writes cards straight into its tables
(their vectors are real ones, mixed and jittered), publishes them as the hub does, and asks. Times are wall time on the
machine of the hub; call and bare encode take turns, so read the ratios.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks import hub
from local import homes

NAME = "routing-calls"
SUMMARY = "whole routing calls among many experts, alone and eight at once, beside a bare encode of the same texts"

BASE = "benchmark/base"
EXAMPLES = 5
CLIENTS = 8
TARGET_RATIO = 2.0
AT_ONCE = 500
# Noise per value: a text's cosine with what it was mixed of is about .86, and with another text of its card .74.
JITTER = 0.03
READY_SECONDS = 300
VERBS = "book cancel explain translate classify summarise count rank compare find correct describe".split()
THINGS = "flights invoices poems recipes laws proteins reviews tickets chess games maps songs tables emails".split()
FIELDS = "travel banking medicine history cooking sport physics music insurance farming shipping school".split()
WORDS = "which what if the next late old three please into English for my friend about price and how it works".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, default=10_000, help="cards in the catalogue (default: 10000)")
    parser.add_argument("--requests", type=int, default=300, help="calls of each kind (default: 300)")
    parser.add_argument("--queries", type=Path, help='texts to ask, JSON lines with "q"; else they are made up')


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    # The import takes seconds, which `bin/bench --list` should not cost.
    from moerge.embedding import encoder as encoder_module  # noqa: PLC0415

    encoder = encoder_module.load(cache_count=0)
    texts = _texts(arguments.queries, count=3 * arguments.requests)
    alone, crowd = texts[: arguments.requests], texts[arguments.requests :]
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as folder:
        home = homes.make(Path(folder) / "home")
        with hub.running(home.folder) as started:
            os.environ |= homes.environment(home, **json.loads(home.run_file.read_text())["doors"])
            _say(f"writing {arguments.experts} cards")
            seq = _fill(arguments.experts, encoder.encode)
            headers = {"Authorization": f"Bearer {started['api_key']}"}
            with httpx.Client(base_url=started["url"], headers=headers, timeout=120, trust_env=False) as client:
                _wait(seq)
                _say("one at a time")
                rows = list(_alone(client, encoder.encode, alone))
                _say(f"{CLIENTS} at once")
                rows += _crowd(client, crowd)
    return rows


def _texts(path: Path | None, *, count: int) -> list[str]:
    """Texts to ask, none twice. Those of a file are in a random order, with a number behind when they come again."""
    noise = np.random.default_rng(1)
    if path is None:
        # About as long as what people ask: 5 to 120 words.
        lengths = noise.integers(5, 120, size=count)
        return [
            " ".join(noise.choice(WORDS + VERBS + THINGS, size=length)) + f" {n}" for n, length in enumerate(lengths)
        ]
    with path.open() as lines:
        found = [json.loads(line)["q"] for line in lines]
    drawn = [found[place] for place in noise.permutation(len(found))]
    return [drawn[place % len(drawn)] + (f" ({place})" if place >= len(drawn) else "") for place in range(count)]


def _fill(count: int, encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> int:
    """Experts with ready heads, stored vectors and their changes in the log, and a snapshot; the last change."""
    import django  # noqa: PLC0415

    django.setup()
    from django.db import connection, transaction  # noqa: PLC0415

    from registry.errors import IndexNotReady  # noqa: PLC0415
    from registry.models import BaseAlias, BaseModel, Namespace, RoutingClock  # noqa: PLC0415
    from registry.services import encoders, routing, snapshots  # noqa: PLC0415

    noise = np.random.default_rng(0)
    anchors = encode([f"{verb} {thing} in {field}" for verb in VERBS for thing in THINGS for field in FIELDS[::3]])
    base = BaseModel.objects.create(name=BASE)
    BaseAlias.objects.create(key=BASE, base=base)
    owner = Namespace.objects.first()
    seq = 0
    for start in range(0, count, AT_ONCE):
        with transaction.atomic():
            # The clock is held until all of these changes are in, as by whoever publishes one.
            first = routing.tick()
            numbers = range(start, min(start + AT_ONCE, count))
            _write(numbers, seq=first, owner=owner, base=base, anchors=anchors, noise=noise)
            seq = first + len(numbers) - 1
            RoutingClock.objects.update(seq=seq)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    while True:
        try:
            snapshots.build(encoders.active())
        except IndexNotReady:
            # The hub has begun one by itself, of what was there then.
            time.sleep(1)
        else:
            return seq


def _write(
    numbers: range, *, seq: int, owner: Any, base: Any, anchors: NDArray[np.float32], noise: np.random.Generator
) -> None:
    """Rows as uploads, embed jobs and publishing leave them."""
    from moerge import embedding  # noqa: PLC0415
    from moerge.routing import cards  # noqa: PLC0415
    from registry.models import Embedding, Expert, Ref, Revision, RoutingChange  # noqa: PLC0415
    from registry.services import routing  # noqa: PLC0415

    def words(*lists: list[str]) -> str:
        return " ".join(one[noise.integers(len(one))] for one in lists)

    experts = Expert.objects.bulk_create(
        Expert(
            namespace=owner,
            name=f"expert-{number}",
            key=f"expert-{number}",
            base_model=base,
            description=words(VERBS, THINGS, WORDS, FIELDS, WORDS, VERBS, THINGS),
            examples=[words(VERBS, WORDS, THINGS, WORDS, FIELDS) + f" {place}" for place in range(EXAMPLES)],
            tags=[words(FIELDS)],
        )
        for number in numbers
    )
    revisions = Revision.objects.bulk_create(
        Revision(
            expert=expert,
            commit=f"{expert.pk:040x}",
            manifest_digest=f"{expert.pk:064x}",
            state=Revision.State.READY,
            base_model=base,
        )
        for expert in experts
    )
    Ref.objects.bulk_create(Ref(expert=one.expert, name="main", revision=one) for one in revisions)
    vectors, changes = [], []
    for place, (expert, revision) in enumerate(zip(experts, revisions, strict=True)):
        card = routing.card_of(expert, revision)
        digest = cards.digest(card)
        record = {name: value for name, value in asdict(card).items() if name not in {"number", "revision"}}
        changes.append(RoutingChange(seq=seq + place, expert=expert, revision=revision, operation="put", card=record))
        vectors += [
            Embedding(
                revision=revision,
                encoder=embedding.ENCODER_ID,
                kind=kind,
                position=position,
                text_digest=digest,
                vector=vector.astype("<f2").tobytes(),
            )
            for (kind, position), vector in _vectors(anchors, noise)
        ]
    Embedding.objects.bulk_create(vectors)
    RoutingChange.objects.bulk_create(changes)


def _vectors(anchors: NDArray[np.float32], noise: np.random.Generator) -> Iterator[tuple[tuple[str, int], Any]]:
    """The vectors of one card by kind and position: real ones, mixed and jittered."""
    mixed = anchors[noise.integers(len(anchors), size=3)].sum(axis=0)
    rows = mixed / np.linalg.norm(mixed) + JITTER * noise.standard_normal((1 + EXAMPLES, anchors.shape[1]))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroid = rows[1:].mean(axis=0)
    yield ("description", 0), rows[0]
    yield ("centroid", 0), centroid / np.linalg.norm(centroid)
    yield from ((("example", place), row) for place, row in enumerate(rows[1:]))


def _wait(seq: int) -> None:
    """Until the router has its encoder and all cards, those of the snapshot mapped."""
    from registry.services import routing  # noqa: PLC0415

    limit = time.monotonic() + READY_SECONDS
    while True:
        health = routing.router_health()
        if health["encoder"] == "ready" and min(health["index_seq"] or 0, health["snapshot_seq"] or 0) >= seq:
            return
        if time.monotonic() > limit:
            raise ValueError(f"the router did not come so far: {health}")
        time.sleep(0.2)


def _alone(
    client: httpx.Client, encode: Callable[[Sequence[str]], NDArray[np.float32]], texts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One call after the other, each beside a bare encode of its text; then the same texts, which the cache knows."""
    for text in ("warm up", "warm up again"):
        _asked(client, text).raise_for_status()
        encode([text])
    call = lambda text: _asked(client, text).raise_for_status()  # noqa: E731
    pairs = [(_ms(lambda text=text: encode([text])), _ms(lambda text=text: call(text))) for text in texts]
    bare, calls = zip(*pairs, strict=True)
    known = [_ms(lambda text=text: call(text)) for text in texts]
    for name, share in (("p50", 50), ("p95", 95)):
        value, peer = float(np.percentile(calls, share)), float(np.percentile(bare, share))
        target = {"target": TARGET_RATIO * peer, "met": value <= TARGET_RATIO * peer} if share == 95 else {}
        yield hub.row(f"a call, {name}", value, "ms", peer=("bare encode of the same texts", peer), **target)
    for name, share in (("p50", 50), ("p95", 95)):
        yield hub.row(f"a call with a text that was asked before, {name}", float(np.percentile(known, share)), "ms")


def _crowd(client: httpx.Client, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Eight clients at once, each one call after the other."""
    seen: Counter[str] = Counter()
    times: list[float] = []

    def ask(own: Sequence[str]) -> None:
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=120, trust_env=False) as mine:
            for text in own:
                started = time.perf_counter()
                answer = _asked(mine, text)
                times.append(1000 * (time.perf_counter() - started))
                seen[str(answer.status_code)] += 1

    threads = [threading.Thread(target=ask, args=(texts[place::CLIENTS],)) for place in range(CLIENTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    failed = len(texts) - seen["200"] - seen["503"]
    name = f"{CLIENTS} clients at once"
    yield hub.row(f"{name}: calls per second", len(texts) / seconds, "/s")
    yield hub.row(f"{name}: a call, p50", float(np.percentile(times, 50)), "ms")
    yield hub.row(f"{name}: a call, p95", float(np.percentile(times, 95)), "ms")
    yield hub.row(f"{name}: told to come again (503)", seen["503"], "answers")
    yield hub.row(f"{name}: errors and time-outs", failed, "", target=0, met=failed == 0)


def _asked(client: httpx.Client, text: str) -> httpx.Response:
    return client.post("/api/v1/route", json={"text": text, "base_model": BASE})


def _ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
