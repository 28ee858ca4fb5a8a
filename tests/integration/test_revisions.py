"""Commits on real PostgreSQL: trees, states, races, and nothing left behind by a refusal."""

import pytest

from registry.models import Blob, Job, Revision
from tests import factories, tiny

pytestmark = pytest.mark.django_db


def test_a_complete_tree_becomes_a_processing_revision_with_four_jobs_in_order():
    owner = factories.user()
    made = factories.revision(owner)
    assert made.state == Revision.State.PROCESSING
    assert [job.kind for job in Job.objects.filter(revision=made)] == ["check", "compress", "embed", "index"]
