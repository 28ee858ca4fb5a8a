"""A base model with the adapters of all experts, loaded by stock transformers and PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from moerge.errors import ParameterInvalid
from moerge.runtime import experts as adapters
from moerge.runtime.errors import NotRoutable
from moerge.runtime.experts import Expert

# PEFT's task types, and the models of transformers that they are trained on.
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight", "qa_outputs.weight")
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_of(place: str | Path, experts: Sequence[Expert]) -> Any:
    """The base model from a folder or the name that transformers knows it by.

    Its class is that of the experts' task type, else of the architecture that the model's config names.
    """
    task_types = {expert.task_type for expert in experts} - {""}
    if len(task_types) > 1:
        raise NotRoutable(
            "The experts were trained on models of different heads.", pointer="task_type",
            met=", ".join(sorted(task_types)), wanted="one task type", remedy="Hand in the model itself.",
        )  # fmt: skip
    name = _CLASSES.get(next(iter(task_types), ""))
    if name is None:
        named = transformers.AutoConfig.from_pretrained(place).architectures or ["AutoModel"]
        name = named[0] if hasattr(transformers, named[0]) else "AutoModel"
    heads = {shape[0] for expert in experts for tensor, shape in expert.saved.items() if tensor.endswith(_HEADS)}
    # A base knows of two labels until it is told.
    options = {"num_labels": heads.pop()} if len(heads) == 1 else {}
    return getattr(transformers, name).from_pretrained(place, **options)


def with_experts(base: Any, experts: Sequence[Expert], *, head_of: str | None) -> tuple[Any, list[str]]:
    """A PeftModel that holds every expert as an adapter, none of them active, and the adapters' names.

    Raises NotRoutable for modules that cannot be routed, ParameterInvalid where it is not said whose head to use or the
    model has adapters already.
    """
    if any(isinstance(part, BaseTunerLayer) for part in base.modules()):
        raise ParameterInvalid(
            "The model has adapters already, perhaps of an earlier RoutedModel.", pointer="model",
            met=type(base).__name__, wanted="a base model as it was loaded", remedy="Load the base model anew.",
        )  # fmt: skip
    adapters.check_modules(experts, base)
    names = [f"expert_{number}" for number in range(len(experts))]
    model: Any = peft.PeftModel.from_pretrained(base, str(experts[0].folder), adapter_name=names[0])
    for name, expert in zip(names[1:], experts[1:], strict=True):
        model.load_adapter(str(expert.folder), adapter_name=name)
    model.eval()
    for layer in lora_layers(model, experts).values():
        layer.set_adapter([])
    _choose_head(model, experts, names, head_of)
    return model, names


def lora_layers(model: Any, experts: Sequence[Expert]) -> dict[str, Any]:
    """PEFT's layers by module. Raises NotRoutable for those that do other than add a delta to a linear layer."""
    base = model.get_base_model()
    found = {}
    for module in sorted({module for expert in experts for module in expert.facts.shapes}):
        layer = base.get_submodule(module)
        if not isinstance(layer, peft.tuners.lora.Linear):
            raise NotRoutable(
                f"PEFT adapts {module} by a {type(layer).__name__}, which is not routed per token.", pointer=module,
                met=type(layer).__name__, wanted="Linear", remedy="Leave out the experts that adapt it.",
            )  # fmt: skip
        found[module] = layer
    return found


def _choose_head(model: Any, experts: Sequence[Expert], names: Sequence[str], head_of: str | None) -> None:
    """Modules that experts saved whole cannot be mixed: those of one expert stand for all."""
    with_heads = [expert.name for expert in experts if expert.facts.saved]
    if head_of is None and not with_heads:
        return
    if head_of is None or head_of not in [expert.name for expert in experts]:
        raise ParameterInvalid(
            "Some experts bring modules of their own, such as a classifier, which cannot be chosen per token.",
            pointer="head_of", met=head_of or f"none, where {', '.join(with_heads)} have some", wanted="one expert",
            remedy=f"Say head_of={(with_heads or [experts[0].name])[0]!r}, whose modules then serve every input.",
        )  # fmt: skip
    name = names[[expert.name for expert in experts].index(head_of)]
    for part in model.modules():
        if isinstance(part, ModulesToSaveWrapper):
            # An expert that saved nothing goes with the base's own.
            part.set_adapter(name if name in part.modules_to_save else [])
            part.requires_grad_(requires_grad=False)
