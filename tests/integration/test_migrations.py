"""A hub that was running before a migration: its rows mean the same afterwards."""

import pytest
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

BEFORE, AFTER = [("registry", "0001_initial")], [("registry", "0002_compressed_forms")]


def migrate(target):
    executor = MigrationExecutor(connection)
    executor.migrate(target)
    return executor.loader.project_state(target).apps


@pytest.fixture
def present(transactional_db):
    """Whatever a test does to the tables, those after it find the present ones."""
    yield
    migrate(MigrationExecutor(connection).loader.graph.leaf_nodes("registry"))


@pytest.mark.usefixtures("present")
def test_the_first_form_of_a_revision_becomes_its_own_one_and_figures_stay_those_of_the_original():
    apps = migrate(BEFORE)
    user = apps.get_model("registry", "User").objects.create(username="ann")
    space = apps.get_model("registry", "Namespace").objects.create(name="ann", key="ann")
    expert = apps.get_model("registry", "Expert").objects.create(
        namespace=space, name="tea", key="tea", created_by=user
    )
    revision = apps.get_model("registry", "Revision").objects.create(
        expert=expert, commit="a" * 40, manifest_digest="b" * 64
    )
    apps.get_model("registry", "Evaluation").objects.create(
        revision=revision, source="card", dataset="Teas", metric="accuracy", value=0.5
    )
    for density in (0.2, 0.05):
        blob = apps.get_model("registry", "Blob").objects.create(
            sha256=str(density) * 16, git_sha1="c" * 40, size_bytes=1
        )
        apps.get_model("registry", "Encoded").objects.create(
            revision=revision, preset="default", density=density, blob=blob, original_bytes=2
        )
    apps = migrate(AFTER)
    found = apps.get_model("registry", "Encoded").objects.order_by("pk").values_list("density", "is_own", "variant")
    assert list(found) == [(0.2, True, ""), (0.05, False, "")]
    figure = apps.get_model("registry", "Evaluation").objects.get()
    assert (figure.value, figure.preset, figure.density) == (0.5, None, None)
    kept = apps.get_model("registry", "Revision").objects.get()
    assert (kept.derived_from_id, kept.form) == (None, "")
