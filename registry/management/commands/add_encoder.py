"""Try a text encoder and write it down, so that change_encoder can name it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from django.core.management.base import BaseCommand, CommandError, CommandParser

from moerge.errors import MoergeError
from registry.errors import HubError
from registry.services import encoders

# Unit length as float32 gives it.
_TOLERANCE = 1e-3


class Command(BaseCommand):
    help = "Load a sentence-transformers folder, try it, and write it down. Routers read it from the same place."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("id", help="a name of these weights alone, as model@revision")
        parser.add_argument("folder", type=Path, help="where model, tokenizer and their configuration lie")
        parser.add_argument("--prefix", default="", help="text put before queries and never before cards")
        parser.add_argument("--max-tokens", type=int, default=256, help="how much of a text is read")
        parser.add_argument(
            "--thresholds", default="{}", help='JSON, as {"hybrid": {"min_score": 0.3, "medium": 0.4, "high": 0.6}}'
        )

    def handle(self, *args: Any, **options: Any) -> None:
        folder = options["folder"].resolve()
        dimension = self._tried(folder, options)
        try:
            encoders.add(
                encoder_id=options["id"],
                folder=str(folder),
                dimension=dimension,
                max_tokens=options["max_tokens"],
                prefix=options["prefix"],
                thresholds=json.loads(options["thresholds"]),
            )
        except HubError as error:
            wanted = "; ".join(f"{fault.pointer}: {fault.wanted}" for fault in error.faults)
            raise CommandError(f"{error.detail} {wanted}") from error
        except json.JSONDecodeError as error:
            raise CommandError(f"--thresholds is not JSON: {error}") from error
        self.stdout.write(f"{options['id']}: vectors of {dimension} values")

    def _tried(self, folder: Path, options: dict[str, Any]) -> int:
        """The width of the encoder's vectors. CommandError when it does not load or its vectors are not of length 1."""
        from moerge.embedding import encoder  # noqa: PLC0415  # It takes 10 s, which other commands need not wait.

        try:
            made = encoder.load(folder=folder, encoder_id=options["id"], max_tokens=options["max_tokens"])
            vectors = made.encode(["book a flight", "Übersetze diesen Satz."])
        except (MoergeError, OSError) as error:
            raise CommandError(f"The encoder does not load: {error}") from error
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.all(np.abs(lengths - 1) <= _TOLERANCE):
            raise CommandError(f"Its vectors have lengths {lengths.tolist()}, wanted 1.")
        return int(vectors.shape[1])
