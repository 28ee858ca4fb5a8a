"""Module names against the patterns of an adapter config, with the same answers as PEFT."""

import re
from collections.abc import Iterable


def pattern_key(keys: Iterable[str], module: str) -> str:
    """The first key that matches the module's name or its last parts, else the name itself (PEFT's own rule)."""
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module
