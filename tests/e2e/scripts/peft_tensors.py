"""Stock PEFT loads an adapter of the hub onto MiniLM and saves the tensors it then holds.

    python peft_tensors.py REPO REVISION FOLDER_OF_BASE OUT

HF_ENDPOINT and HF_TOKEN say where and as whom.
"""

import sys

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import BertModel

REPO, REVISION, BASE, OUT = sys.argv[1:]

model = PeftModel.from_pretrained(BertModel.from_pretrained(BASE), REPO, revision=REVISION)
held = {name: values.contiguous() for name, values in get_peft_model_state_dict(model).items()}
save_file(held, OUT)
