"""LoRA and its variants: delta = scaling * B @ A (arXiv 2106.09685; rsLoRA scaling arXiv 2312.03732)."""

from collections.abc import Mapping
from math import prod, sqrt

from moerge.tensors import patterns
from moerge.tensors.files import SafetensorsFile
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.kind import AdapterConfig, Blocker, Kind, Layout, LowRank, Roles, invalid

_SAVE_AGAIN = "Save config and weights together with PeftModel.save_pretrained and upload both."


def rank_of(config: AdapterConfig, module: str) -> int:
    """The rank the config gives to a module: the first matching pattern, else r."""
    return config.rank_pattern.get(patterns.pattern_key(config.rank_pattern, module), config.r)


def scaling_of(config: AdapterConfig, module: str) -> float:
    """Alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and rank."""
    alpha = config.alpha_pattern.get(patterns.pattern_key(config.alpha_pattern, module), config.lora_alpha)
    rank = rank_of(config, module)
    return alpha / sqrt(rank) if config.use_rslora else alpha / rank


def blockers(config: AdapterConfig, header: Header) -> tuple[Blocker, ...]:
    """Every reason in config or file why B @ A alone is not what this adapter adds to the base."""
    del config, header
    return ()


def check(config: AdapterConfig, roles: Roles) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Ranks and delta shapes of all modules; raises AdapterInvalid where A, B and config disagree."""
    ranks, shapes = {}, {}
    for module, tensors in roles.items():
        a, b = _pair(module, tensors)
        wanted = rank_of(config, module)
        if a.shape[0] != b.shape[1]:
            raise invalid("A and B of one module have different ranks", pointer=module, met=f"A {list(a.shape)}, "
                          f"B {list(b.shape)}", wanted="A (rank, in) and B (out, rank)", remedy=_SAVE_AGAIN)  # fmt: skip
        if a.shape[0] != wanted:
            raise invalid("The rank in the config is not the rank of the weights", pointer=a.name, met=a.shape[0],
                          wanted=f"{wanted} (r or rank_pattern in adapter_config.json)", remedy=_SAVE_AGAIN)  # fmt: skip
        ranks[module] = a.shape[0]
        shapes[module] = (b.shape[0], prod(a.shape[1:]))
    return ranks, shapes


def low_rank(config: AdapterConfig, file: SafetensorsFile, module: str, tensors: Mapping[str, TensorInfo]) -> LowRank:
    """The factors of one module as matrices; a convolution's are flattened to (rank, in * kernel) and (out, rank)."""
    a, b = _pair(module, tensors)
    A, B = file.float32(a.name), file.float32(b.name)
    layout = Layout()
    if "embedding_A" in tensors:
        layout = Layout("embedding")
    elif len(a.shape) > 2:
        layout = Layout("conv", tuple(a.shape[1:]))
    return LowRank(A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1), scaling_of(config, module), layout)


def _pair(module: str, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    a, b = tensors.get("A") or tensors.get("embedding_A"), tensors.get("B") or tensors.get("embedding_B")
    if a is None or b is None:
        missing = "A" if a is None else "B"
        raise invalid(f"A module has no lora_{missing}", pointer=module, met=", ".join(sorted(tensors)),
                      wanted="lora_A and lora_B", remedy=_SAVE_AGAIN)  # fmt: skip
    if ("embedding_A" in tensors) != ("embedding_B" in tensors) or len(a.shape) != len(b.shape) or len(a.shape) < 2:
        raise invalid("A and B of one module do not fit together", pointer=module, met=f"{a.name.rsplit('.', 2)[-2:]} "
                      f"{list(a.shape)}, {b.name.rsplit('.', 2)[-2:]} {list(b.shape)}",
                      wanted="two matrices, or two kernels of a convolution", remedy=_SAVE_AGAIN)  # fmt: skip
    return a, b


SPEC = Kind(
    name="lora",
    peft_type="LORA",
    endings={
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "embedding_A",
        "lora_embedding_B": "embedding_B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_B.bias": "lora_bias",
    },
    blockers=blockers,
    check=check,
    low_rank=low_rank,
    zero_roles=frozenset({"B", "embedding_A"}),
)
