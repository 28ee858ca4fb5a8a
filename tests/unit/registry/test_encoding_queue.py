"""The line before the encoders, before real encoders whose model counts letters and stops where a test wants."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moerge.embedding.encoder import Encoder
from moerge.errors import QueryInvalid
from registry.errors import RouterBusy
from registry.services.encoding_queue import EncodingQueue

SECONDS = 30


class Letters:
    """A text's vector counts its letters. `gate` holds a step back, `steps` are the texts of each."""

    dimension = 27

    def __init__(self):
        self.steps = []
        self.gate = threading.Event()
        self.gate.set()
        self.now = 0.0

    def vectors(self, texts):
        self.steps.append(list(texts))
        assert self.gate.wait(SECONDS)
        self.now += len(texts)
        if any("poison" in text for text in texts):
            raise RuntimeError("the model broke")
        return np.array([counted(text) for text in texts], dtype=np.float32)


def counted(text):
    return [1, *(text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")]


def expected(texts):
    rows = np.array([counted(text) for text in texts], dtype=np.float64)
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


class Hall:
    """A queue, an encoder without a memory, and threads for callers."""

    def __init__(self, pool, *, cap=1000, cache_count=0):
        self.model = Letters()
        self.encoder = Encoder(self.model, encoder_id="letters", cache_count=cache_count)
        self.queue = EncodingQueue(max_waiting_texts=cap, clock=lambda: self.model.now)
        self.pool = pool

    def encode(self, texts, *, query=True, seconds=SECONDS, encoder=None):
        return self.queue.encode(encoder or self.encoder, texts, query=query, seconds=seconds)

    def come(self, texts, *, query=True, **options):
        """A caller who stands in the line when this returns."""
        line = self.queue._queries if query else self.queue._cards
        before = line.count()
        caller = self.pool.submit(self.encode, texts, query=query, **options)
        until(lambda: line.count() == before + len(texts) or caller.done())
        return caller

    def hold(self):
        """A caller whose step is at work and stays so until the gate opens."""
        self.model.gate.clear()
        caller = self.pool.submit(self.encode, ["at work"])
        until(lambda: self.model.steps[-1:] == [["at work"]])
        return caller


def until(condition):
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.001)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(max_workers=16) as made:
        yield made


@pytest.fixture
def hall(pool):
    made = Hall(pool)
    yield made
    made.model.gate.set()
    made.queue.close()


def test_many_callers_at_once_each_get_their_own_rows_in_their_order(hall, pool):
    noise = random.Random(5)
    wanted = [
        ["".join(noise.choices("abcdefg hij", k=noise.randint(0, 9))) + str(noise.random()) for _ in range(count)]
        for count in [noise.randint(1, 37) for _ in range(60)]
    ]
    hall.queue._max_waiting_texts = 10_000
    met = list(pool.map(lambda texts: hall.encode(texts, query=len(texts) % 3 > 0, seconds=10_000), wanted))
    for texts, rows in zip(wanted, met, strict=True):
        assert rows == pytest.approx(expected(texts), abs=1e-6)


def test_what_waits_is_encoded_in_one_step(hall):
    first = hall.hold()
    callers = [hall.come(texts) for texts in (["a"], ["b", "c"], ["d"])]
    hall.model.gate.set()
    assert [len(caller.result()) for caller in (first, *callers)] == [1, 1, 2, 1]
    assert hall.model.steps == [["at work"], ["a", "b", "c", "d"]]


def test_a_step_has_16_queries_at_most_and_the_rest_comes_next(hall):
    hall.hold()
    many = [f"text {number}" for number in range(20)]
    callers = [hall.come(many), hall.come(["last"])]
    hall.model.gate.set()
    assert callers[0].result() == pytest.approx(expected(many), abs=1e-6)
    assert callers[1].result() == pytest.approx(expected(["last"]), abs=1e-6)
    assert hall.model.steps[1:] == [many[:16], [*many[16:], "last"]]


def test_queries_go_before_cards_and_a_card_takes_four_texts_at_a_time(hall):
    hall.hold()
    card = [f"example {number}" for number in range(9)]
    callers = [hall.come(card, query=False), hall.come(["later query"])]
    hall.model.gate.set()
    assert callers[0].result() == pytest.approx(expected(card), abs=1e-6)
    callers[1].result()
    assert hall.model.steps[1:] == [["later query"], card[:4], card[4:8], card[8:]]


def test_a_prefix_goes_before_queries_and_not_before_cards(hall):
    asking = Encoder(hall.model, encoder_id="asking", prefix="find: ", cache_count=0)
    hall.encode(["a trip"], encoder=asking)
    hall.encode(["a trip"], encoder=asking, query=False)
    assert hall.model.steps == [["find: a trip"], ["a trip"]]


def test_texts_of_two_encoders_never_share_a_step(hall):
    other = Encoder(hall.model, encoder_id="other", prefix="other: ", cache_count=0)
    hall.hold()
    callers = [hall.come(["a"]), hall.come(["b"], encoder=other), hall.come(["c"])]
    hall.model.gate.set()
    met = np.concatenate([caller.result() for caller in callers])
    assert met == pytest.approx(expected(["a", "other: b", "c"]), abs=1e-6)
    assert hall.model.steps[1:] == [["a"], ["other: b"], ["c"]]


def test_known_texts_do_not_stand_in_the_line(pool):
    hall = Hall(pool, cache_count=8)
    known = hall.encode(["known"])
    hall.hold()
    assert np.array_equal(hall.encode(["known"]), known)
    hall.model.gate.set()
    assert hall.model.steps == [["known"], ["at work"]]


def test_beyond_the_cap_callers_are_refused_at_once_and_those_before_them_served(pool):
    hall = Hall(pool, cap=3)
    hall.hold()
    callers = [hall.come(["a", "b"]), hall.come(["c"])]
    with pytest.raises(RouterBusy) as caught:
        hall.encode(["d"])
    assert (caught.value.status, caught.value.code, caught.value.retry_after_seconds) == (503, "router-busy", 1)
    # Cards have a line of their own.
    card = hall.come(["e"], query=False)
    hall.model.gate.set()
    assert [len(caller.result()) for caller in (*callers, card)] == [2, 1, 1]
    assert hall.encode(["d"]) == pytest.approx(expected(["d"]), abs=1e-6)


def test_a_lone_caller_may_bring_more_than_the_cap(pool):
    assert len(Hall(pool, cap=3).encode(list("abcdefgh"))) == 8


def test_callers_are_refused_when_the_measured_rate_is_too_slow_for_them(hall):
    # A step of one text takes the clock of the model one second.
    hall.encode(["measured"])
    hall.hold()
    waiting = hall.come([f"text {number}" for number in range(7)])
    with pytest.raises(RouterBusy) as caught:
        hall.encode(["too late"], seconds=7.5)
    assert caught.value.retry_after_seconds == 7
    patient = hall.come(["in time"], seconds=8.5)
    hall.model.gate.set()
    assert [len(caller.result()) for caller in (waiting, patient)] == [7, 1]


def test_nobody_waits_for_longer_than_they_said(hall):
    hall.hold()
    with pytest.raises(RouterBusy):
        hall.encode(["given up"], seconds=0.01)
    assert hall.queue._queries.count() == 0
    hall.model.gate.set()
    hall.encode(["next"])
    assert hall.model.steps == [["at work"], ["next"]]


def test_a_failure_reaches_those_who_caused_it_and_nobody_else(hall):
    hall.hold()
    long = [f"fine {number}" for number in range(14)] + ["poison", "more", "and more"]
    callers = [hall.come(["a"]), hall.come(long), hall.come(["b"])]
    hall.model.gate.set()
    assert callers[0].result() == pytest.approx(expected(["a"]), abs=1e-6)
    with pytest.raises(RuntimeError, match="the model broke"):
        callers[1].result()
    assert callers[2].result() == pytest.approx(expected(["b"]), abs=1e-6)
    # What was left of the broken request did not go on.
    assert ["b"] in hall.model.steps
    assert hall.encode(["after it"]) == pytest.approx(expected(["after it"]), abs=1e-6)


def test_an_empty_text_is_refused_by_its_place_among_its_callers_texts(hall):
    with pytest.raises(QueryInvalid) as caught:
        hall.encode(["fine", " "])
    assert caught.value.pointer == "/texts/1"
    assert hall.model.steps == []


def test_no_texts_give_no_rows(hall):
    assert hall.encode([]).shape == (0, 27)


def test_who_waits_when_the_queue_closes_is_told_so(hall, pool):
    first = hall.hold()
    waiting = [hall.come(["a"]), hall.come(["b"], query=False)]
    closing = pool.submit(hall.queue.close)
    for caller in waiting:
        with pytest.raises(RouterBusy):
            caller.result(timeout=SECONDS)
    with pytest.raises(RouterBusy):
        hall.encode(["too late"])
    hall.model.gate.set()
    assert len(first.result()) == 1
    closing.result(timeout=SECONDS)
