"""Every tensor of a file gets a place: a role in a module, or one of the few things that lie beside modules."""

from dataclasses import dataclass

from moerge.errors import AdapterInvalid
from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.kind import PREFIX, Blocker, Kind, invalid
from moerge.tensors.targets import Targets

# What base models call their input and output embeddings. PEFT stores a copy of those layers, without any prefix of
# its own, when they were resized or are targets.
_EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "word_embeddings", "tok_embeddings", "embed_in", "embed_out", "embedding", "shared",
     "wte", "output"}
)  # fmt: skip
_SAVE_AGAIN = "Save config and weights together with PeftModel.save_pretrained and upload both."

# Where PEFT saves all biases it finds those of saved modules twice more: as the base had them, and by the names they
# have in memory.
_COPIES = (".original_module.", ".modules_to_save.")


@dataclass(frozen=True)
class Places:
    """Where each tensor of a file belongs: module -> role -> tensor, and what belongs to no module.

    `loose` are tensors of a kind that is only kept, those that modules share, and copies of tensors of the base;
    `saved` replace tensors of the base.
    """

    roles: dict[str, dict[str, TensorInfo]]
    loose: list[str]
    saved: list[str]
    biases: list[str]
    blockers: list[Blocker]
    warnings: list[str]


def sort(kind: Kind, config: AdapterConfig, targets: Targets, header: Header) -> Places:
    """Give every tensor its place. Raises AdapterInvalid for a tensor without one."""
    places = Places({}, [], [], [], [], [])
    has_tokens = bool(config.raw.get("trainable_token_indices"))
    for name, info in header.tensors.items():
        path = name.removeprefix(PREFIX)
        module, role = _role(kind, name)
        if role:
            tensors = places.roles.setdefault(module, {})
            if role in tensors:
                raise invalid("A module has the same tensor twice", pointer=name, met=tensors[role].name, wanted="one",
                              remedy=_SAVE_AGAIN)  # fmt: skip
            tensors[role] = info
        elif _is_marked(kind, name) or (kind.extras is not None and kind.extras(config, name)):
            places.loose.append(name)
        elif not name.startswith(PREFIX):
            raise _homeless(kind, name, f"a name that starts with {PREFIX}")
        elif any(part in path for part in _COPIES) and targets.is_saved(path):
            places.loose.append(name)
        elif targets.is_saved(path) or _embedding(path) or (has_tokens and ".trainable_tokens_" in name):
            places.saved.append(name)
        elif (config.bias == "all" or config.bias.endswith("_only")) and path.endswith(".bias"):
            places.biases.append(name)
        else:
            raise _homeless(kind, name, "a tensor of a module the config names")
    _judge_embeddings(places, targets)
    return places


def of_base_tensor(name: str) -> str:
    """What the base calls the tensor that is saved under `name`."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _role(kind: Kind, name: str) -> tuple[str, str]:
    """(module, role) of a tensor by the end of its name, of one part or two, or two empty strings."""
    if name.startswith(PREFIX):
        head, _, last = name[len(PREFIX) :].rpartition(".")
        module, _, first = head.rpartition(".")
        if module and (role := kind.endings.get(f"{first}.{last}")):
            return module, role
        if head and (role := kind.endings.get(last)):
            return head, role
    return "", ""


def _is_marked(kind: Kind, name: str) -> bool:
    return any(f".{marker}" in f".{name}" for marker in kind.markers)


def _embedding(path: str) -> str:
    """The module of an embedding whose own weight lies at `path`, or an empty string."""
    module, _, parameter = path.rpartition(".")
    module = module.removesuffix(".base_layer")
    return module if parameter in {"weight", "bias"} and module.rsplit(".", 1)[-1] in _EMBEDDINGS else ""


def _judge_embeddings(places: Places, targets: Targets) -> None:
    """A stored embedding is a copy of the base's when it is itself a target, else probably one of a new size."""
    for name in tuple(places.saved):
        path = name.removeprefix(PREFIX)
        module = _embedding(path)
        if not module or targets.is_saved(path):
            continue
        if module in places.roles:
            places.saved.remove(name)
            places.loose.append(name)
            places.warnings.append(f"{name} is a copy of the base's embedding; merges leave it out.")
        else:
            places.blockers.append(
                Blocker(name, "a stored embedding", "The adapter replaces an embedding of the base, so its vocabulary "
                        "may differ", "Save again with save_embedding_layers=False if no token was added.")
            )  # fmt: skip


def _homeless(kind: Kind, name: str, wanted: str) -> AdapterInvalid:
    endings = ", ".join(sorted(kind.endings) or kind.markers)
    return invalid(f"A tensor has no place in a {kind.name} adapter", pointer=name, met=name,
                   wanted=f"{wanted}, with an ending such as {endings}",
                   remedy="Upload the weights and the config of one and the same adapter. " + _SAVE_AGAIN)  # fmt: skip
