"""Commands of the operator."""

import io
import sys

import httpx
import pytest
from django.contrib.auth import authenticate
from django.core.management import CommandError, call_command

from registry.models import ApiKey, BaseModel, Expert, Method, Revision, User
from registry.services import bases, keys
from tests import factories, tiny

pytestmark = pytest.mark.django_db


def call(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def test_a_user_is_made_with_the_password_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a rather long password\n"))
    call("create_user", "ada", "--admin", "--password-stdin")
    user = authenticate(username="ada", password="a rather long password")
    assert user is not None
    assert user.is_staff
    assert user.namespaces.get().name == "ada"


def test_without_a_terminal_a_password_is_made_and_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    name, password = call("create_user", "ada").split()
    assert authenticate(username=name, password=password) is not None
    assert not User.objects.get().is_staff


def test_a_taken_name_or_a_weak_password_is_refused_unless_existing_is_fine(monkeypatch):
    factories.user("ada")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a rather long password\n" * 2 + "12345678\n"))
    with pytest.raises(CommandError, match="taken"):
        call("create_user", "ADA", "--password-stdin")
    call("create_user", "ada", "--password-stdin", "--exist-ok")
    assert authenticate(username="ada", password="a rather long password") is not None
    with pytest.raises(CommandError, match="common"):
        call("create_user", "bob", "--password-stdin")


def test_a_key_is_printed_alone_and_works():
    factories.user("ada")
    secret = call("create_key", "ada", "--scopes", "read,write").strip()
    assert keys.check(secret).scopes == ["read", "write"]
    with pytest.raises(CommandError, match="read"):
        call("create_key", "ada", "--scopes", "everything")
    with pytest.raises(CommandError, match="nobody"):
        call("create_key", "nobody")
    assert ApiKey.objects.count() == 1


def test_the_catalogue_is_written_and_what_is_gone_is_forgotten():
    Method.objects.create(family="merge", name="gone", version="1", spec={})
    call("sync_catalogue")
    first = call("sync_catalogue")
    names = set(Method.objects.values_list("family", "name"))
    assert {("merge", "linear"), ("merge", "ties"), ("codec", "compeft"), ("strategy", "hybrid")} <= names
    assert ("merge", "gone") not in names
    density = next(p for p in Method.objects.get(name="ties").spec["parameters"] if p["name"] == "density")
    assert density["help"]
    assert BaseModel.objects.filter(name=tiny.BASE).exists()
    assert first == f"{len(names)} methods, {BaseModel.objects.count()} base models\n"


@pytest.mark.django_db(transaction=True)
def test_the_demo_is_uploaded_over_http_once(live_server, tmp_path, monkeypatch):
    bases.sync()
    owner = factories.user("ada")
    for name in ("tea", "coffee"):
        folder = tmp_path / name
        folder.mkdir()
        for path, data in tiny.adapter(seed=len(name)).items():
            (folder / path).write_bytes(data)
    monkeypatch.setattr("registry.management.commands.seed_demo.CHUNK_BYTES", 5000)
    arguments = (
        "seed_demo",
        "--url",
        live_server.url,
        "--key",
        factories.key(owner),
        "--folder",
        str(tmp_path),
        "--no-wait",
    )
    assert call(*arguments) == "ada/coffee: uploaded\nada/tea: uploaded\n"
    assert call(*arguments) == "ada/coffee: there already\nada/tea: there already\n"
    assert Revision.objects.count() == 2
    assert {file.blob_id for file in Expert.objects.get(name="tea").revisions.get().files.all()} == {
        tiny.sha256(data) for data in tiny.adapter(seed=3).values()
    }


@pytest.mark.django_db(transaction=True)
def test_a_refused_demo_expert_is_told_with_its_reason(live_server, tmp_path):
    bases.sync()
    folder = tmp_path / "tea"
    folder.mkdir()
    for path, data in tiny.adapter(**{"adapter_config.json": tiny.config(r=5)}).items():
        (folder / path).write_bytes(data)
    with pytest.raises(CommandError, match=r"422 .*lora_A.*met 2, wanted 5"):
        call("seed_demo", "--url", live_server.url, "--key", factories.key(factories.user()), "--folder", str(tmp_path))


@pytest.mark.django_db(transaction=True)
def test_more_forms_of_the_demo_experts_are_asked_for_and_not_waited_for(live_server):
    from registry.management.commands.seed_demo import Hub
    from registry.models import Job

    owner = factories.user("ada")
    made = factories.revision(owner, factories.expert(owner, "tea"), tiny.lora(rank=8))
    with httpx.Client(base_url=live_server.url) as client:
        for _ in range(2):
            Hub(client).ask_for_forms(["ada/tea", "ada/gone"])
    asked = Job.objects.filter(kind="compress", after=None)
    assert sorted(job.parameters["density"] for job in asked) == [0.05, 0.1, 0.5]
    assert {job.revision for job in asked} == {made}
