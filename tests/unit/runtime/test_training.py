"""Gates trained by `moerge train-gates` on tiny models."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from moerge.cli import main
from moerge.errors import ParameterInvalid
from moerge.routing import gates
from moerge.runtime import training
from moerge.runtime.errors import NotRoutable
from moerge.runtime.training import Schedule
from tests import tiny_peft
from tests.unit.runtime import reference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(38))]


def saved_base(folder, model):
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def data(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def places(tmp_path):
    """An expert of two kinds of modules, its base, and data."""
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
    tiny_peft.saved(tmp_path / "expert", config, base=reference.llama)
    rows = [{"input": f"w{n} w{n + 1}", "output": f"w{n + 2} w{n}"} for n in range(12)]
    return tmp_path / "expert", saved_base(tmp_path / "base", reference.llama()), data(tmp_path / "d.jsonl", rows)


def test_one_step_is_adam_on_the_loss_of_the_outputs_with_gates_of_one_half(places):
    """v = 0 lets half of the delta through; the gradient is that of autograd on a model written out here."""
    expert, base, lines = places
    parts = reference.parts(expert)
    model = reference.llama()
    vectors = {}

    def gated(module, part):
        vector = vectors[module] = torch.zeros(part.A.shape[1], requires_grad=True)
        model.get_submodule(module).register_forward_hook(
            lambda _, given, output: output + torch.sigmoid(given[0] @ vector)[..., None] * (given[0] @ part.delta.T)
        )

    for module, part in parts.items():
        gated(module, part)
    # w{n} w{n+1} w{n+2} w{n} <eos>, of which the last three are learnt.
    ids = torch.tensor([[n + 2, n + 3, n + 4, n + 2, 1] for n in range(12)])
    logits = model(ids).logits[:, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 40), ids[:, 2:].reshape(-1))
    loss.backward()
    done = training.train(expert, base, lines, Schedule(steps=1, batch=12, rate=0.05))
    assert done.losses == pytest.approx([loss.item()], abs=1e-5)
    assert done.gates.keys() == parts.keys()
    for module, vector in vectors.items():
        # Adam's first step is the rate against the sign of the gradient, where that is no rounding error.
        clear = vector.grad.abs() > 1e-6
        assert clear.sum() >= 12
        wanted = -0.05 * vector.grad.sign()
        torch.testing.assert_close(torch.from_numpy(done.gates[module])[clear], wanted[clear], rtol=0, atol=1e-3)


def test_the_command_writes_gates_that_help_and_tells_how(places, tmp_path, capsys):
    expert, base, lines = places
    out = tmp_path / "routing_gates.safetensors"
    command = ["train-gates", expert, "--base", base, "--data", lines, "--out", out, "--steps", "25", "--lr", "0.1",
               "--batch", "12", "--json", "--quiet"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loss_last"] < told["loss_first"] - 0.05
    assert (told["modules"], told["steps"], told["without_gate"]) == (4, 25, [])
    shapes = {module: tuple(part.delta.shape) for module, part in reference.parts(expert).items()}
    found, about = gates.load(out, shapes=shapes)
    assert found.keys() == shapes.keys()
    assert found["model.layers.0.mlp.down_proj"].shape == (24,)
    assert (about.method, about.steps, about.lr, about.dataset) == ("phatgoose", 25, 0.1, "d.jsonl")
    # The same seed gives the same gates, and an older file of gates may be replaced.
    before = out.read_bytes()
    assert main([str(word) for word in command]) == 0
    assert out.read_bytes() == before


def test_base_and_adapter_stay_as_they_were(places):
    expert, base, lines = places
    before = {path.name: path.read_bytes() for path in (*expert.iterdir(), *base.iterdir())}
    training.train(expert, base, lines, Schedule(steps=3, batch=4))
    assert {path.name: path.read_bytes() for path in (*expert.iterdir(), *base.iterdir())} == before


def test_a_model_that_reads_and_one_that_classifies_are_trained_too(tmp_path):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q", "wo"], task_type=TaskType.SEQ_2_SEQ_LM)
    tiny_peft.saved(tmp_path / "t5", config, base=reference.t5)
    rows = [{"input": f"w{n} w3", "output": f"w{n}"} for n in range(4)]
    done = training.train(tmp_path / "t5", saved_base(tmp_path / "t5-base", reference.t5()),
                          data(tmp_path / "pairs.jsonl", rows), Schedule(steps=5, rate=0.1, batch=4))  # fmt: skip
    assert done.losses[-1] < done.losses[0]

    def bert():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
        )).eval()  # fmt: skip

    config = LoraConfig(r=2, lora_alpha=8, target_modules=["query"], task_type=TaskType.SEQ_CLS)
    tiny_peft.saved(tmp_path / "cls", config, base=bert)
    base = saved_base(tmp_path / "cls-base", bert())
    rows = [{"text": "w1 w2", "label": "yes"}, {"text": "w3 w4 w5", "label": 0}]
    done = training.train(tmp_path / "cls", base, data(tmp_path / "labels.jsonl", rows), Schedule(steps=5, batch=2))
    assert done.gates.keys() == {"bert.encoder.layer.0.attention.self.query"}
    with pytest.raises(ParameterInvalid, match=r"Line 1 .*0 to 1"):
        training.train(tmp_path / "cls", base, data(tmp_path / "bad.jsonl", [{"text": "w1", "label": 2}]), Schedule())


def test_text_alone_is_learnt_from_its_first_token_on(places, tmp_path):
    _, base, _ = places
    tokens = PreTrainedTokenizerFast.from_pretrained(base)
    rows = [{"text": "w0 w1 w2", "": 1}, {"input": "w0 w1", "output": "w2", "": 2}, {"text": "w5", "": 3}]
    made = training._of_prompts(rows, tokens, 4)
    assert made["input_ids"].tolist() == [[2, 3, 4, 1], [2, 3, 4, 1], [7, 1, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert made["labels"].tolist() == [[2, 3, 4, 1], [-100, -100, 4, 1], [7, 1, -100, -100]]
    cut = training._of_prompts([{"input": "w0 w1 w2 w3", "output": "w4", "": 1}], tokens, 4)
    assert cut["input_ids"].tolist() == [[4, 5, 6, 1]]


def test_every_line_comes_once_before_any_comes_again():
    lines = [{"": number} for number in range(5)]
    drawn = [line[""] for batch in training._drawn(lines, Schedule(steps=5, batch=3)) for line in batch]
    assert len(drawn) == 15
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))


def test_a_module_whose_delta_is_zero_gets_no_gate(places, tmp_path):
    expert, base, lines = places
    tensors = load_file(expert / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    tensors[f"{reference.PREFIX}{module}.lora_B.weight"].zero_()
    save_file(tensors, expert / "adapter_model.safetensors", {"format": "pt"})
    done = training.train(expert, base, lines, Schedule(steps=2, batch=4))
    assert done.still == (module,)
    assert module not in done.gates


def test_an_encoder_without_a_loss_is_refused(tmp_path):
    tiny_peft.saved(tmp_path / "expert", tiny_peft.lora(task_type=TaskType.FEATURE_EXTRACTION))
    base = saved_base(tmp_path / "base", tiny_peft.bert())
    with pytest.raises(NotRoutable, match="BertModel gives no loss"):
        training.train(tmp_path / "expert", base, data(tmp_path / "d.jsonl", [{"text": "w1"}]), Schedule())


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "holds no line"), ("[1]", "Line 1 .*list"), ('{"input": "a"}\n{"input": }', "Line 2"),
     ('\n\n{"text": 1, "text": 2}', "Line 3")],
    ids=["empty", "no object", "no JSON", "a key twice"],
)  # fmt: skip
def test_data_that_is_none_is_refused_with_its_line(tmp_path, text, words):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(ParameterInvalid, match=words):
        training.read_lines(tmp_path / "d.jsonl")


def test_the_command_says_what_to_install_where_torch_is_missing():
    words = ["train-gates", "x", "--base", "b", "--data", "d", "--out", "o"]
    script = f"import sys; sys.modules['torch'] = None; from moerge.cli import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "extra-missing: torch is not installed" in done.stderr
    assert "pip install 'moerge[runtime]'" in done.stderr


def test_wrong_use_of_the_command_is_told(places, tmp_path, capsys):
    expert, base, lines = places
    command = ["train-gates", str(expert), "--base", str(base), "--data", str(lines), "--quiet", "--out"]
    weights = expert / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert main([*command, str(weights)]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert main([*command, str(tmp_path / "new"), "--lr", "-1"]) == 2
    assert main([*command, str(tmp_path / "new"), "--data", str(tmp_path / "none.jsonl")]) == 1
    data(lines, [{"input": "w1"}])
    assert main([*command, str(tmp_path / "new")]) == 2
    assert "Line 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
