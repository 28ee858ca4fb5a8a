"""Merge methods: several experts of one base model become one, without data and without the base's weights.

`catalogue()` lists the methods, `recipe` says what to merge and how, `run` carries a recipe out on adapters,
`arrays` does the same on plain arrays.
"""

from functools import cache

from moerge import table
from moerge.merging import methods
from moerge.merging.base import Spec


@cache
def catalogue() -> dict[str, Spec]:
    """Every merge method found in `methods/`, by name."""
    return {name: module.SPEC for name, module in table.load(methods).items()}
