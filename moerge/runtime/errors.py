"""Errors of routing in a model.

MoergeError
 ├─ NotRoutable   an expert, or a module of it, does what cannot be chosen per token
 └─ GatesMissing  a strategy needs a vector per expert and module that some experts do not have
"""

from moerge.errors import MoergeError


class NotRoutable(MoergeError):
    """An expert is of a kind, or adapts a module, whose effect cannot be weighed per token."""


class GatesMissing(MoergeError):
    """Experts without trained gates were asked to take part in routing by gates."""
