"""`moerge` in a process where everything heavy is refused at import, as where nothing of it is installed.

python light_command.py ARGUMENTS...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
REFUSED = {"torch", "django", "celery", "transformers", "peft", "huggingface_hub", "registry", "config", "faiss"}


class Refuse:
    """Stands before every other finder."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is refused here", name=name)


sys.meta_path.insert(0, Refuse())
from moerge.cli import main  # noqa: E402 - after the refusal

sys.exit(main(sys.argv[1:]))
