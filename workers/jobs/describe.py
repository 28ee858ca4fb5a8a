"""describe: an instruction for an expert whose uploader wrote none, where the operator configured a language model."""

from typing import Any

from django.conf import settings

from registry.services import describing
from workers.jobs import embed
from workers.runner import NotApplicable, Work


def run(work: Work) -> dict[str, Any]:
    """Ask and store; the expert is routable before and after, whatever comes of it."""
    expert = embed.routable(work).expert
    assert expert is not None
    if not settings.HUB_DESCRIBE_URL:
        raise NotApplicable("No language model is configured.")
    if expert.instruction:
        raise NotApplicable("The expert has an instruction.")
    told = (expert.description, list(expert.examples))
    text = describing.ask(expert)
    if not describing.store(expert.pk, text, told=told):
        raise NotApplicable("The expert was described otherwise in the meantime.")
    return {"characters": len(text)}
