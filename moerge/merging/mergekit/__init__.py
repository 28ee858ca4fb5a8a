"""mergekit's recipes in our terms, so that both give the same formula; what cannot be said here is refused by name.

A model is either `base+adapter`, an adapter and the base it belongs to, or one name or folder alone. Slices are taken
where all sources have the same layers from the first on, which is how whole models are often written. Defaults are
those of mergekit 0.1.5 and are written out, since ours are others.
"""

from collections.abc import Mapping
from typing import Any

from moerge.merging.base import nearest, shown
from moerge.merging.mergekit import methods, models, parameters
from moerge.merging.mergekit.reading import listed, refused, scope

_FIELDS = ("merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters")
_DTYPES = ("float32", "bfloat16", "float16")
_REFUSED_FIELDS = {
    "modules": ("parts of a model cannot be merged apart from each other", "List the models under models."),
    "tokenizer_source": ("tokenizers and vocabularies are not changed here", "Leave it out: one base, one tokenizer."),
    "tokenizer": ("tokenizers and vocabularies are not changed here", "Leave it out: one base, one tokenizer."),
    "chat_template": ("tokenizers are not changed here", "Leave it out and write it into the tokenizer's folder."),
}


def is_meant(document: Mapping[str, Any]) -> bool:
    """Whether a recipe is written for mergekit."""
    return "merge_method" in document


def translate(document: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in our terms: base_model, method, parameters, experts with weights, output.

    Raises RecipeInvalid with a pointer to what is unknown, or cannot be said here.
    """
    method = methods.chosen(document.get("merge_method"))
    _check_fields(document)
    whole = scope(document.get("parameters"), "/parameters")
    given, between = models.read(document)
    scopes = (*between, ("/parameters", whole))
    parameters.check_known(method, given, scopes)
    base = models.read_base(document.get("base_model"))
    experts, base_model, also_counted = models.merged(method, given, base)
    if not method.counts[0] <= len(experts) <= method.counts[1]:
        wanted = "2 models" if method.counts == (2, 2) else f"at least {method.counts[0]} model beside the base"
        raise refused(
            "/models", f"{method.name} has {len(experts)} models to merge", len(experts), wanted, f"Give {wanted}."
        )
    settings = {**method.fixed, **parameters.shared(method, scopes), **parameters.each(method, experts, scopes)}
    weights = [models.weight(method, model, scopes) if method.has_weights else 1.0 for model in experts]
    if method.ours == "linear":
        counted = [models.weight(method, model, scopes) for model in also_counted]
        weights, settings = models.averaged(weights, counted, settings)
    return {
        **({} if base_model is None else {"base_model": base_model}),
        "method": method.ours,
        "parameters": parameters.adjusted(method, settings),
        "experts": [
            {
                "expert": model.name,
                **({} if model.revision is None else {"revision": model.revision}),
                "weight": weight,
            }
            for model, weight in zip(experts, weights, strict=True)
        ],
        **_output(document),
    }


def _check_fields(document: Mapping[str, Any]) -> None:
    """Refuse fields that are unknown, or that ask for what is not done here."""
    for key in document:
        if key in _REFUSED_FIELDS and document[key] is not None:
            reason, remedy = _REFUSED_FIELDS[key]
            raise refused(f"/{key}", f"{key} cannot be said here: {reason}", document[key], "no such field", remedy)
        if key not in _FIELDS and key not in _REFUSED_FIELDS:
            raise refused(
                f"/{key}", f"There is no field {shown(key)} here", key, listed(_FIELDS), nearest(key, _FIELDS)
            )


def _output(document: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype that is written; arithmetic is in float32 whatever `dtype` says."""
    for key in ("out_dtype", "dtype"):
        given = document.get(key)
        if given is not None:
            name = given.removeprefix("torch.") if isinstance(given, str) else given
            if name not in _DTYPES:
                raise refused(
                    f"/{key}", f"{key} is {shown(given)}", given, listed(_DTYPES), "Write bfloat16 or float32."
                )
            return {"output": {"dtype": name}}
    return {}
