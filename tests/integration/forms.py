"""Compressed forms for tests: an adapter that has something to compress, and its jobs carried out here."""

import numpy as np

from registry.models import Job, Revision, User
from tests import factories, tiny
from tests.unit.compression import reference
from workers import runner

FILES = tiny.lora(seed=3, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))


def published(owner: User, name: str = "tea", *, private: bool = False, files=None, **options) -> Revision:
    """A revision whose pipeline has passed, its own compressed form made by the worker's function."""
    expert = factories.expert(owner, name, private=private)
    made = factories.revision(owner, expert, FILES if files is None else files, **options)
    own(made)
    return factories.ready(made)


def own(made: Revision) -> Job:
    """The pipeline's own compress job, carried out."""
    Job.objects.filter(revision=made, kind="check").update(state=Job.State.DONE)
    return carried_out(Job.objects.get(key=f"compress:r{made.pk}").pk)


def carried_out(job_id: str) -> Job:
    runner.run(job_id)
    return Job.objects.get(pk=job_id)


def decoded(data: bytes) -> dict[str, np.ndarray]:
    """Ternary tensors by the plain decoder that shares no code with ours."""
    return {
        name: np.array(values, np.float32).reshape(shape) for name, (_, shape, values) in reference.decode(data).items()
    }
