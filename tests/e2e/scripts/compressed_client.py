"""Stock huggingface_hub and PEFT load the compressed expert: the loaded tensors go into a file, the rest is printed.

    python compressed_client.py REPO REVISION OUT.safetensors

The first thing that touches the revision is PEFT, as in an application; then the whole snapshot is fetched.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

REPO, REVISION, OUT = sys.argv[1:]
CONFIG = BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=64)

torch.manual_seed(1)
model = PeftModel.from_pretrained(BertModel(CONFIG), REPO, revision=REVISION)
tensors = {name: values.contiguous() for name, values in get_peft_model_state_dict(model).items()}
save_file(tensors, OUT)
folder = Path(snapshot_download(REPO, revision=REVISION))
files = sorted(path.name for path in folder.iterdir())
print(json.dumps({"commit": folder.name, "files": files, "folder": str(folder)}))  # noqa: T201 - the answer to the test
