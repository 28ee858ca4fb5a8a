"""Stock PEFT loads a merge from the hub and makes the same of the folders of its two experts, which it adds itself:
prints how far the outputs differ, as JSON.

    python merge_client.py REPO FOLDER WEIGHT FOLDER WEIGHT

The base is a small seeded BERT with the layer names and widths of MiniLM; HF_ENDPOINT and HF_TOKEN say where and as whom.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import BertConfig, BertModel

REPO = sys.argv[1]
EXPERTS = {"first": (sys.argv[2], float(sys.argv[3])), "second": (sys.argv[4], float(sys.argv[5]))}
CONFIG = BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=64)
TOKENS = torch.arange(60).reshape(3, 20)


def base() -> BertModel:
    torch.manual_seed(1)
    return BertModel(CONFIG).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).last_hidden_state


merged = output(PeftModel.from_pretrained(base(), REPO))
own = PeftModel.from_pretrained(base(), EXPERTS["first"][0], adapter_name="first")
own.load_adapter(EXPERTS["second"][0], adapter_name="second")
own.add_weighted_adapter(list(EXPERTS), [weight for _, weight in EXPERTS.values()], "sum", combination_type="cat")
own.set_adapter("sum")
seen = {
    "effect": float((merged - output(base())).abs().max()),
    "difference": float((merged - output(own)).abs().max()),
}
print(json.dumps(seen))  # noqa: T201 - the answer to the test
