"""Stock PEFT loads an adapter from the hub and from a folder: prints how far the outputs differ, as JSON.

    python peft_client.py REPO FOLDER REVISION...

The base is a small seeded BERT with the layer names and widths of MiniLM; HF_ENDPOINT and HF_TOKEN say where and as whom.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import BertConfig, BertModel

REPO, FOLDER, REVISIONS = sys.argv[1], sys.argv[2], sys.argv[3:]
CONFIG = BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=64)
TOKENS = torch.arange(60).reshape(3, 20)


def output(place: str, **named: str) -> torch.Tensor:
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(BertModel(CONFIG), place, **named).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).last_hidden_state


torch.manual_seed(1)
with torch.no_grad():
    untouched = BertModel(CONFIG).eval()(input_ids=TOKENS).last_hidden_state
local = output(FOLDER)
seen = {
    "effect": float((local - untouched).abs().max()),
    "difference": {name: float((output(REPO, revision=name) - local).abs().max()) for name in REVISIONS},
}
print(json.dumps(seen))  # noqa: T201 - the answer to the test
