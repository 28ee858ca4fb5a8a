"""A PEFT model whose experts are chosen per token and module, in the caller's process. Needs moerge[runtime]."""

from moerge.errors import ExtraMissing

try:
    from moerge.runtime.model import RoutedModel
except ModuleNotFoundError as error:
    if error.name not in {"torch", "transformers", "peft"}:
        raise
    raise ExtraMissing(
        f"{error.name} is not installed, which moerge.runtime needs.", pointer=error.name, met="not installed",
        wanted="torch, transformers and peft", remedy="pip install 'moerge[runtime]'",
    ) from error  # fmt: skip

__all__ = ["RoutedModel"]
