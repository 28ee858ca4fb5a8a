"""What is swept and what is spared; blobs read back."""

import io
import os
import time
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from registry import storage
from registry.models import Blob, File, Upload, UploadFile
from registry.services import bases, blobs, cleaning, experts, uploads
from registry.services.uploads import Claim
from tests import factories, tiny

pytestmark = pytest.mark.django_db


def kept(data: bytes, *, age_seconds: float = 0) -> str:
    blob = blobs.keep(blobs.stage_bytes(data))
    Blob.objects.filter(pk=blob.pk).update(touched_at=timezone.now() - timedelta(seconds=age_seconds))
    return blob.pk


def stored() -> set[str]:
    return set(storage.current().digests())


def test_an_unreferenced_blob_goes_only_after_its_grace_time_row_and_bytes():
    old, young = kept(b"old", age_seconds=100), kept(b"young", age_seconds=10)
    assert cleaning.collect_garbage(grace_seconds=50) == 1
    assert set(Blob.objects.values_list("pk", flat=True)) == {young} == stored()
    assert old not in stored()


def test_the_grace_time_is_the_setting_unless_another_is_given(settings):
    settings.HUB_GARBAGE_GRACE_SECONDS = 1000
    kept(b"old", age_seconds=900)
    assert cleaning.collect_garbage() == 0
    settings.HUB_GARBAGE_GRACE_SECONDS = 800
    assert cleaning.collect_garbage() == 1


def test_a_referenced_blob_stays_however_old_it_is():
    made = factories.revision(factories.user())
    Blob.objects.update(touched_at=timezone.now() - timedelta(days=1000))
    assert cleaning.collect_garbage(grace_seconds=0) == 0
    assert stored() == set(File.objects.filter(revision=made).values_list("blob", flat=True))


def test_keeping_the_same_bytes_again_restarts_the_grace_time():
    digest = kept(b"again", age_seconds=1000)
    assert blobs.keep(blobs.stage_bytes(b"again")).pk == digest
    assert cleaning.collect_garbage(grace_seconds=500) == 0
    assert cleaning.collect_garbage(grace_seconds=0) == 1


def test_touching_restarts_the_grace_time():
    digest = kept(b"touched", age_seconds=1000)
    blobs.touch([digest])
    assert cleaning.collect_garbage(grace_seconds=500) == 0


def test_referring_to_an_old_blob_touches_it():
    owner = factories.user()
    bases.sync()
    files = tiny.adapter()
    for data in files.values():
        kept(data, age_seconds=1000)
    started = timezone.now()
    factories.revision(owner, files=files)
    assert Blob.objects.filter(touched_at__lt=started).count() == 0


def test_a_row_whose_bytes_were_lost_is_healed_by_the_same_bytes():
    digest = kept(b"lost")
    storage.current().delete(digest)
    blobs.keep(blobs.stage_bytes(b"lost"))
    assert stored() == {digest}


def test_an_upload_holds_its_blobs_until_its_time_is_over():
    owner = factories.user("ada")
    made = factories.revision(owner)
    row = made.files.get(path="README.md")
    claim = Claim("README.md", row.blob.size_bytes, row.blob_id)
    upload = uploads.start(user=owner, expert="ada/other", claims=[claim]).upload
    experts.delete(user=owner, expert=made.expert)
    File.objects.all().delete()
    Blob.objects.update(touched_at=timezone.now() - timedelta(days=30))
    cleaning.collect_garbage(grace_seconds=0)
    assert set(Blob.objects.values_list("pk", flat=True)) == {row.blob_id}
    Upload.objects.filter(pk=upload.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert cleaning.close_stale_uploads() == 1
    assert cleaning.close_stale_uploads() == 0
    assert Upload.objects.get().state == "aborted"
    assert cleaning.collect_garbage(grace_seconds=0) == 1


def test_a_completed_upload_holds_nothing():
    owner = factories.user("ada")
    made = factories.revision(owner)
    row = made.files.get(path="README.md")
    claim = Claim("README.md", row.blob.size_bytes, row.blob_id)
    upload = uploads.start(user=owner, expert="ada/other", claims=[claim]).upload
    uploads.complete(user=owner, upload_id=upload.pk)
    assert UploadFile.objects.exclude(blob=None).count() == 0
    assert uploads.offsets(uploads.find(user=owner, upload_id=upload.pk))[0][1] == claim.size_bytes


def test_only_staging_files_that_no_upload_can_want_are_removed(settings):
    settings.HUB_UPLOAD_SESSION_HOURS = 1
    old, young = settings.HUB_STAGING_DIR / "old", settings.HUB_STAGING_DIR / "young"
    for path, hours in ((old, 2.1), (young, 1.9)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - hours * 3600,) * 2)
    assert cleaning.clear_staging() == 1
    assert young.exists()
    assert not old.exists()


def verify() -> tuple[str, bool]:
    out = io.StringIO()
    try:
        call_command("verify_blobs", stdout=out)
    except CommandError:
        return out.getvalue(), False
    return out.getvalue(), True


def test_sound_blobs_pass_and_every_kind_of_damage_is_listed():
    made = factories.revision(factories.user())
    assert verify() == ("3 blobs are sound\n", True)
    by_path = {row.path: row.blob_id for row in made.files.all()}
    place = {path: storage.current().place(digest) for path, digest in by_path.items()}
    for path in place.values():
        path.chmod(0o600)
    data = place["README.md"].read_bytes()
    place["README.md"].write_bytes(data[:-1] + b"!")
    place["adapter_config.json"].write_bytes(b"short")
    place["adapter_model.safetensors"].unlink()
    stranger = storage.current().place("f" * 64)
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"x")
    text, is_sound = verify()
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    assert not is_sound
    assert set(lines) == {*by_path.values(), "f" * 64}
    assert lines[by_path["README.md"]].startswith("damaged: its digest is")
    assert lines[by_path["adapter_config.json"]].startswith("damaged: 5 bytes instead of")
    assert lines[by_path["adapter_model.safetensors"]] == "missing"
    assert lines["f" * 64] == "without a row"
