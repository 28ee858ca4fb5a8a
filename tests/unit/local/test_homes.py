"""The home folder: secrets made once, files for their owner alone, the environment of the hub's processes."""

import json
import os
import stat
from pathlib import Path

import pytest

from local import homes
from local.processes import LocalError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path):
    home = homes.make(tmp_path / "home")
    first = homes.secrets_of(home)
    assert homes.secrets_of(home) == first
    assert mode(home.folder / "secrets.json") == 0o600
    other = homes.secrets_of(homes.make(tmp_path / "other"))
    for name in ("secret_key", "router_secret", "postgres_password", "redis_password", "password"):
        assert len(getattr(first, name)) >= 16
        assert getattr(first, name) != getattr(other, name)


def test_the_api_key_is_kept_beside_the_secrets_that_were_there(tmp_path):
    home = homes.make(tmp_path)
    before = homes.secrets_of(home)
    homes.keep_api_key(home, "key-1")
    after = homes.secrets_of(home)
    assert after.api_key == "key-1"
    assert (after.secret_key, after.password) == (before.secret_key, before.password)
    assert mode(home.folder / "secrets.json") == 0o600


def test_damaged_secrets_are_refused_and_not_made_anew(tmp_path):
    home = homes.make(tmp_path)
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(LocalError, match="damaged"):
        homes.secrets_of(home)
    assert (tmp_path / "secrets.json").read_text() == "{"


def test_a_private_file_is_replaced_whole_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    path.chmod(0o644)
    homes.write_private(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert mode(path) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_file_that_is_no_record_reads_as_empty(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert homes.read(tmp_path / "run.json") == {}
    assert homes.read(tmp_path / "absent.json") == {}


def test_a_new_home_is_closed_to_others_but_for_passing_through_as_root(tmp_path):
    home = homes.make(tmp_path / "a" / "b")
    assert mode(home.folder) == (0o711 if os.geteuid() == 0 else 0o700)
    assert mode(home.logs) == 0o700


def test_a_home_that_cannot_be_made_names_the_folder_and_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match=r"file/home.*--home"):
        homes.make(tmp_path / "file" / "home")


def test_processes_of_a_hub_get_its_own_addresses_whatever_the_terminal_has_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/x")
    monkeypatch.setenv("HUB_HOME", "/elsewhere")
    monkeypatch.setenv("HUB_RATE_LIMITS", "off")
    home = homes.make(tmp_path)
    made = homes.environment(home, database_url="postgresql://a/b", broker_url="redis://c", router_url="http://d")
    assert made["DATABASE_URL"] == "postgresql://a/b"
    assert made["BROKER_URL"] == "redis://c"
    assert made["HUB_ROUTER_URL"] == "http://d"
    assert made["HUB_HOME"] == str(home.folder)
    assert made["HUB_SECRET_KEY"] == homes.secrets_of(home).secret_key
    assert made["HUB_ROUTER_SECRET"] == homes.secrets_of(home).router_secret
    assert made["HUB_RATE_LIMITS"] == "off"
