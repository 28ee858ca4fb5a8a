"""Have another text encoder answer queries, without a moment in which none does."""

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from registry.errors import HubError
from registry.models import Job
from registry.services import encoder_change

LOOK_EVERY_SECONDS = 1.0


class Command(BaseCommand):
    help = (
        "Embed all cards by another encoder in the background, build its index, then switch to it. "
        "Naming the active encoder calls off a change that is on its way."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("id", help="id of an encoder that add_encoder wrote down")
        parser.add_argument("--wait", action="store_true", help="return when the change is over")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            job = encoder_change.begin(options["id"])
        except HubError as error:
            wanted = "; ".join(f"{fault.wanted}. {fault.remedy}" for fault in error.faults)
            raise CommandError(f"{error.detail} {wanted}") from error
        if job is None:
            self.stdout.write(f"{options['id']} is the active encoder")
            return
        if not options["wait"]:
            self.stdout.write(f"on its way; the last of its jobs is {job.pk}")
            return
        self._wait(job)
        self.stdout.write(f"{options['id']} is the active encoder")

    def _wait(self, job: Job) -> None:
        told = ""
        while job.state not in Job.FINISHED:
            time.sleep(LOOK_EVERY_SECONDS)
            job = Job.objects.select_related("after").get(pk=job.pk)
            now = job if job.after is None or job.after.state in Job.PASSED else job.after
            if (line := f"{now.kind}: {now.state} {now.message}".strip()) != told:
                self.stdout.write(line)
                told = line
        if job.state != Job.State.DONE:
            trouble = job.error or (job.after.error if job.after else None) or {}
            raise CommandError(trouble.get("detail") or job.message or f"The change was {job.state}.")
