"""Processes of the hub are killed while experts are uploaded; it heals itself and keeps nothing half."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from tests import hubs, tiny
from tests.hubs import Hub
from tests.uploader import Uploader

VICTIMS = ("postgres", "redis", "router", "web", "worker-heavy", "worker-light")
HEALING_SECONDS = 120
SHORT_EXPERTS = 4
LONG_EXPERTS = 20
LONG_KILLS = 25


def test_each_process_is_killed_once_while_experts_are_uploaded_and_nothing_is_lost_or_doubled(hub: Hub):
    victims = list(VICTIMS)
    random.Random(2).shuffle(victims)
    survive(hub, prefix="short", experts=SHORT_EXPERTS, victims=victims, pause=2.0)


@pytest.mark.chaos
def test_random_processes_are_killed_every_few_seconds_while_twenty_experts_are_uploaded(tmp_path: Path, request):
    hub = hubs.start(tmp_path / "home", "--no-demo")
    seed = random.SystemRandom().randrange(10**6)
    request.node.add_report_section("setup", "kills", f"seed {seed}")
    choice = random.Random(seed)
    try:
        victims = [*VICTIMS, *choice.choices(VICTIMS, k=LONG_KILLS - len(VICTIMS))]
        choice.shuffle(victims)
        survive(hub, prefix="long", experts=LONG_EXPERTS, victims=victims, pause=3.0)
    finally:
        hubs.stop(hub.home)


def survive(hub: Hub, *, prefix: str, experts: int, victims: list[str], pause: float) -> None:
    """Upload and kill at once; then the hub has to be whole again within HEALING_SECONDS of the last kill."""
    names = [f"{hub.username}/{prefix}-{number}" for number in range(experts)]
    trees = [
        tiny.lora(seed=1000 + number, rank=16, task=f"Sorts {prefix} parcels of kind {number}.")
        for number in range(experts)
    ]
    supervisor = hub.record()["supervisor"]
    with ThreadPoolExecutor(3) as pool:
        sending = [pool.submit(send, hub, name, tree) for name, tree in zip(names, trees, strict=True)]
        for victim in victims:
            time.sleep(pause)
            kill(hub, victim)
        last_kill = time.monotonic()
        commits = [future.result() for future in sending]
    uploader = Uploader(hub.url, hub.api_key)
    left = HEALING_SECONDS - (time.monotonic() - last_kill)
    uploader.until("/readyz", lambda answer: answer["ready"] is True, seconds=left)
    for name, commit in zip(names, commits, strict=True):
        left = HEALING_SECONDS - (time.monotonic() - last_kill)
        expert = uploader.until(
            f"/api/v1/experts/{name}", lambda answer: answer["state"] in {"ready", "failed"}, seconds=left
        )
        assert expert["state"] == "ready", expert
        assert expert["revision"] == commit
    uploader.close()
    assert hub.record()["supervisor"] == supervisor
    assert_sound(hub, prefix=prefix, experts=experts)


def send(hub: Hub, name: str, tree: dict[str, bytes]) -> str:
    uploader = Uploader(hub.url, hub.api_key)
    try:
        return uploader.upload(name, tree)
    finally:
        uploader.close()


def kill(hub: Hub, name: str) -> None:
    """SIGKILL to a process of the hub; one that was killed just before is waited for."""
    deadline = time.monotonic() + HEALING_SECONDS
    while (pid := hub.processes.get(name)) is None:
        assert time.monotonic() < deadline, f"{name} was not started again"
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def assert_sound(hub: Hub, *, prefix: str, experts: int) -> None:
    """One revision of each expert with one artefact, every job once, and neither blob nor row without the other.

    Ready means that the four jobs of the pipeline have passed; the two that look at its weights may still run.
    """
    with psycopg.connect(hub.doors["database_url"]) as database:
        rows = database.execute(
            """
            SELECT e.name, count(DISTINCT r.id), count(DISTINCT c.id), count(DISTINCT j.id),
                   count(DISTINCT j.id) FILTER (WHERE j.state IN ('done', 'not_applicable')
                                                AND j.kind IN ('check', 'compress', 'embed', 'index')),
                   count(DISTINCT (m.kind, m.position)), count(DISTINCT m.id)
            FROM registry_expert e
            JOIN registry_revision r ON r.expert_id = e.id AND EXISTS (SELECT 1 FROM registry_file WHERE revision_id = r.id)
            LEFT JOIN registry_encoded c ON c.revision_id = r.id
            LEFT JOIN registry_job j ON j.revision_id = r.id
            LEFT JOIN registry_embedding m ON m.revision_id = r.id
            WHERE e.name LIKE %s GROUP BY e.name
            """,
            [f"{prefix}-%"],
        ).fetchall()
        known = {sha256 for (sha256,) in database.execute("SELECT sha256 FROM registry_blob")}
    assert len(rows) == experts
    for name, revisions, artefacts, jobs, passed, vectors, rows_of_vectors in rows:
        assert (name, revisions, artefacts, jobs, passed) == (name, 1, 1, 6, 4)
        assert vectors == rows_of_vectors > 0
    lying = {path.name for path in (hub.home / "blobs").rglob("*") if path.is_file()}
    assert lying <= known, "a blob without a row"
    done = hubs.command("manage", "verify_blobs", "--home", str(hub.home))
    assert done.returncode == 0, done.stdout + done.stderr
