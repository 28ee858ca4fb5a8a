"""The embedded Redis: password, loopback, and nothing lost by a kill."""

import os
import signal
import stat

import psutil
import pytest
import redis as client

from local import processes, redis


def test_a_server_wants_its_password_and_keeps_it_out_of_its_arguments(tmp_path):
    with redis.running(tmp_path / "redis", password="s3cret", log=tmp_path / "log") as url:
        assert client.Redis.from_url(url).ping()
        with pytest.raises(client.AuthenticationError):
            client.Redis.from_url(url.replace(":s3cret@", "")).ping()
        assert not redis.accepts(url.replace("s3cret", "other"))
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        server = next(
            process for process in psutil.process_iter() if "redis" in process.name() and _listens(process, port)
        )
        assert {connection.laddr.ip for connection in server.net_connections()} == {"127.0.0.1"}
        assert "s3cret" not in " ".join(server.cmdline())
        assert stat.S_IMODE((tmp_path / "redis" / "redis.conf").stat().st_mode) == 0o600
    assert not processes.alive(server.pid)
    assert not redis.accepts(url)


def _listens(process, port):
    try:
        return any(connection.laddr.port == port for connection in process.net_connections())
    except psutil.Error:
        return False


def test_what_was_answered_survives_a_kill(tmp_path):
    server = redis.prepare(tmp_path / "redis", password="s3cret")
    log = (tmp_path / "log").open("ab")
    port = processes.free_port()
    url = redis.url(server, port=port)
    for round_number in range(2):
        child = processes.start(redis.serve(server, port=port), output=log)
        try:
            while not redis.accepts(url):
                assert child.poll() is None
            with client.Redis.from_url(url) as connection:
                if round_number == 0:
                    connection.rpush("queue", *range(100))
                assert connection.llen("queue") == 100
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
    log.close()
