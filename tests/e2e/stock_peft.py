"""What an application does with a merge: stock transformers and PEFT, given only HF_ENDPOINT. Run as a program.

Arguments: folder of the base, repository, JSON file with texts, file for the outputs (.npy).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertModel


def pooled(model: torch.nn.Module, folder: str, texts: list[str]) -> np.ndarray:
    """Last hidden states of the words of each text, averaged: (texts, 384)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return ((states * mask).sum(1) / mask.sum(1)).numpy()


def main(folder: str, repository: str, texts_file: str, out: str) -> None:
    texts = json.loads(Path(texts_file).read_text())
    base = BertModel.from_pretrained(folder).eval()
    model = PeftModel.from_pretrained(base, repository).eval()
    np.save(out, pooled(model, folder, texts))


if __name__ == "__main__":
    main(*sys.argv[1:])
