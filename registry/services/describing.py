"""Instructions for experts that have none, written by a language model that the operator configured."""

import unicodedata
from typing import Any

from django.conf import settings
from django.db import transaction

from registry import jobs
from registry.checks.cards import INSTRUCTION_CHARACTERS
from registry.errors import EgressFailed
from registry.models import Expert, Revision
from registry.services import egress, routing

_EXAMPLES = 5
_TEXT_CHARACTERS = 2_000
_TASK = (
    "You are given what a specialised language model does and some inputs it gets. Write the instruction that tells "
    "somebody to do this task: one or two plain sentences in the imperative, without examples, names or preface."
)


def enqueue(revision: Revision) -> None:
    """Ask for an instruction in the caller's transaction, where a model is configured and the expert has none."""
    if settings.HUB_DESCRIBE_URL and revision.expert is not None and not revision.expert.instruction:
        jobs.enqueue(jobs.JobKind.DESCRIBE, revision=revision)


def ask(expert: Expert) -> str:
    """The instruction that the model writes for an expert. Raises EgressRefused and EgressFailed."""
    key = {"Authorization": f"Bearer {settings.HUB_DESCRIBE_KEY}"} if settings.HUB_DESCRIBE_KEY else {}
    answer = egress.post_json(
        settings.HUB_DESCRIBE_URL.rstrip("/") + "/chat/completions",
        {
            "model": settings.HUB_DESCRIBE_MODEL,
            "messages": [{"role": "system", "content": _TASK}, {"role": "user", "content": _told(expert)}],
            "max_tokens": 200,
            "temperature": 0,
        },
        headers=key,
        allowed_hosts=settings.HUB_EGRESS_HOSTS,
    )
    text = clean(_content(answer))
    if not text:
        raise EgressFailed("The model wrote no instruction.")
    return text


def store(expert_id: int, text: str, *, told: tuple[str, list[str]]) -> bool:
    """Keep a written instruction, unless the expert has one by now or is described otherwise than by `told`."""
    with transaction.atomic():
        expert = Expert.objects.select_for_update(of=("self",)).select_related("namespace").get(pk=expert_id)
        if expert.instruction or (expert.description, expert.examples) != told:
            return False
        expert.instruction, expert.is_instruction_generated = text, True
        expert.save(update_fields=["instruction", "is_instruction_generated", "updated_at"])
        routing.changed(expert)
    return True


def clean(text: str) -> str:
    """One line without control and format characters, cut at a word to the length of an instruction."""
    visible = "".join(sign if unicodedata.category(sign)[0] != "C" else " " for sign in text)
    line = " ".join(visible.split())
    if len(line) <= INSTRUCTION_CHARACTERS:
        return line
    return line[: INSTRUCTION_CHARACTERS + 1].rpartition(" ")[0] or line[:INSTRUCTION_CHARACTERS]


def _told(expert: Expert) -> str:
    lines = [f"Name: {expert.name}", f"Description: {expert.description[:_TEXT_CHARACTERS]}"]
    lines += [f"Input {place}: {text[:_TEXT_CHARACTERS]}" for place, text in enumerate(expert.examples[:_EXAMPLES], 1)]
    return "\n".join(lines)


def _content(answer: Any) -> str:
    """The text of a chat completion; empty where the answer is none."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
