"""Experts with cards in the database, and a router on a local port: what the routing tests stand on."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import numpy as np
from django.db import connection

from config.router_views import Application
from moerge.routing import cards
from registry.checks import names
from registry.models import BaseAlias, BaseModel, Encoder, Expert, Membership, Namespace, Ref, Revision, User
from registry.services import encoders, routing
from registry.services.router import Router


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


@contextmanager
def serving(router: Router, port: int = 0) -> Iterator[str]:
    """The router's doors on a local port; gives the URL."""
    server = make_server("127.0.0.1", port, Application(router), server_class=Server, handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def database_url() -> str:
    """The address of this run's database, for a process of its own."""
    known = connection.settings_dict
    return f"postgresql://{known['USER']}:{known['PASSWORD']}@{known['HOST']}:{known['PORT']}/{known['NAME']}"


@contextmanager
def router_process(log: Path, home: Path | str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A router as the process it is, on a socket of this test: gunicorn with its own connection to the database."""
    door = socket.create_server(("127.0.0.1", 0))
    gunicorn = ["-m", "gunicorn", "config.router:application", "--workers=1", "--threads=4"]
    gunicorn += ["--graceful-timeout=1", "--no-control-socket"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, *gunicorn, f"--bind=fd://{door.fileno()}"],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "DATABASE_URL": database_url(), "HUB_HOME": str(home)},
            pass_fds=[door.fileno()],
            stdout=output,
            stderr=output,
        )
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}", child
        finally:
            child.terminate()
            child.wait(timeout=60)
            door.close()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something to come about."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.02)


def still_loading() -> Router:
    """A router whose encoder never comes."""
    return Router(load=lambda _: threading.Event().wait())


def person(name: str, *, staff: bool = False) -> User:
    user = User.objects.create(username=name, is_staff=staff)
    namespace = Namespace.objects.create(name=name, key=names.strict_key(name))
    Membership.objects.create(namespace=namespace, user=user, role=Membership.Role.OWNER)
    return user


def base_model(name: str, *aliases: str) -> BaseModel:
    base, is_new = BaseModel.objects.get_or_create(name=name)
    if is_new:
        BaseAlias.objects.bulk_create(BaseAlias(key=key.casefold(), base=base) for key in (name, *aliases))
    return base


def expert(
    full_name: str,
    description: str = "",
    *examples: str,
    base: str = "base/one",
    private: bool = False,
    tags: tuple[str, ...] = (),
    licence: str = "",
) -> Revision:
    """An expert whose head is ready but neither embedded nor published."""
    owner, _, name = full_name.partition("/")
    namespace = Namespace.objects.filter(name=owner).first()
    if namespace is None:
        person(owner)
        namespace = Namespace.objects.get(name=owner)
    row = Expert.objects.create(
        namespace=namespace,
        name=name,
        key=name.casefold(),
        base_model=base_model(base),
        description=description,
        examples=list(examples),
        tags=list(tags),
        licence=licence,
        visibility=Expert.Visibility.PRIVATE if private else Expert.Visibility.PUBLIC,
    )
    Ref.objects.create(expert=row, name="main")
    return next_head(row)


def next_head(row: Expert, state: str = Revision.State.READY) -> Revision:
    """A new revision of an expert, to which `main` moves."""
    number = Revision.objects.count() + 1
    revision = Revision.objects.create(
        expert=row, commit=f"{number:040x}", manifest_digest=f"{number:064x}", state=state, base_model=row.base_model
    )
    Ref.objects.filter(expert=row, name="main").update(revision=revision)
    return revision


def published(*arguments: str, **options: object) -> Revision:
    """An expert that was embedded and published."""
    revision = expert(*arguments, **options)
    routing.embed(revision)
    routing.publish_to_index(revision)
    return revision


def stored(revision: Revision, encoder: Encoder | None = None) -> Revision:
    """A revision with unit vectors of chance, another one for each text, and no encoder to wait for."""
    row = encoder or encoders.packaged()
    card = routing.card_of(revision.expert, revision)
    vectors = [chance(text, row.dimension) for text in cards.texts(card)]
    routing._store(row, revision, card, np.array(vectors))
    return revision


def chance(text: str, dimension: int = 384) -> np.ndarray:
    """A unit vector that depends on nothing but the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def put(*arguments: str, **options: object) -> Revision:
    """An expert that was published with vectors of chance."""
    revision = stored(expert(*arguments, **options))
    routing.publish_to_index(revision)
    return revision


def reworded(revision: Revision, description: str, *examples: str) -> Revision:
    """The same revision, published again with other words."""
    Expert.objects.filter(pk=revision.expert_id).update(description=description, examples=list(examples))
    fresh = Revision.objects.select_related("expert__namespace", "base_model").get(pk=revision.pk)
    routing.publish_to_index(stored(fresh))
    return fresh
