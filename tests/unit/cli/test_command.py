"""The command's manners: exit statuses, words on the right stream, one object with --json, never a traceback."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import moerge as library
from moerge import compression
from moerge.cli.command import COMMANDS
from tests import tiny

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "adapter_model.safetensors"
NAMES = [command.NAME for command in COMMANDS]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_are_these_commands_and_no_other():
    assert NAMES == ["compress", "decompress", "verify", "pull", "merge", "route", "eval-router", "train-gates"]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself_with_an_example(moerge, name):
    done = moerge(name, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"moerge {name} " in done.out.split("example:")[1]
    for option in ("--json", "--quiet", "--endpoint", "--token"):
        assert option in done.out


def test_the_version_is_that_of_the_library(moerge):
    assert moerge("--version").out == f"moerge {library.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["fetch"], ["--json"], ["compress"], ["compress", "in"], ["compress", "a", "b", "c"], ["decompress", "file"],
        ["verify"], ["pull", "ann/tea"], ["pull", "--out", "x"], ["compress", "a", "b", "--densit", "0.1"],
        *(["compress", "a", "b", "--density", text] for text in ("0", "1.01", "-0.1", "nan", "inf", "x", "")),
        ["compress", "a", "b", "--recipe", "best"], ["compress", "a", "b", "--include", "all"],
        ["compress", "a", "b", "--heads", "int8"], ["compress", "a", "b", "--alpha", "x"],
        *(["compress", "a", "b", "--base-parameters", text] for text in ("0", "-1", "7Q", "B", "1e9")),
        ["pull", "ann/tea", "--out", "x", "--timeout", "-1"], ["pull", "ann/tea", "--out", "x", "--timeout", "nan"],
        ["pull", "ann/tea", "--out", "x", "--endpoint", "http://h", "--density", "0.1"],
        ["pull", "ann/tea", "--out", "x", "--endpoint", "http://h", "--preset", "hq"],
        ["pull", "ann", "--out", "x", "--endpoint", "http://h"], ["pull", "ann/tea", "--out", "x"],
        ["pull", "ann/../x", "--out", "x", "--endpoint", "http://h"],
        ["pull", "ann/tea", "--out", "x", "--endpoint", "ftp://h"],
        ["pull", "ann/tea", "--out", "x", "--endpoint", "http://h", "--token", "two words"],
        ["merge"], ["merge", "recipe.json"], ["merge", "recipe.json", "--out", "x", "--check"],
        ["merge", "recipe.json", "--out"], ["merge", "recipe.json", "--out", "x", "--local", "yes"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_2_and_says_what_is_wrong(moerge, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = moerge(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--alpha", "2"], ["--scale-rule", "sigma"], ["--scale-rule", "best"], ["--recipe", "paper", "--scale-rule", "norm"],
        ["--recipe", "int4", "--density", "0.1"], ["--recipe", "int4", "--scale-rule", "norm"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_do_not_go_together_are_2(moerge, adapter, tmp_path, options):
    done = moerge("compress", adapter, tmp_path / "out", *options)
    assert done.status == 2
    assert "parameter-invalid" in done.err
    assert not (tmp_path / "out").exists()


def test_compress_tells_sizes_ratios_and_likeness(moerge, adapter, tmp_path):
    done = moerge("compress", adapter, tmp_path / "out", "--density", "0.1")
    report = compression.compress(adapter, tmp_path / "again", density=0.1)
    assert (done.status, done.err) == (0, "")
    for words in (f"{report.original_bytes:,} → {report.bytes:,} bytes, {report.ratio:.1f}x", f"{report.ternary_ratio:.1f}x",
                  f"{report.kept:,} of {report.size:,}", f"{report.cosine:.4f}", f"{report.product_cosine:.4f}",
                  report.sha256):  # fmt: skip
        assert words in done.out


def test_compress_prints_its_report_as_one_object(moerge, adapter, tmp_path):
    done = moerge("compress", adapter, tmp_path / "out", "--density", "0.1", "--json")
    report = compression.compress(adapter, tmp_path / "again", density=0.1).as_dict()
    assert done.err == ""
    plain = {
        name: value for name, value in json.loads(json.dumps(report)).items() if name not in {"tensors", "modules"}
    }
    assert done.json == {"out": str(tmp_path / "out"), **plain}
    detailed = moerge("compress", adapter, tmp_path / "out", "--density", "0.1", "--json", "--details").json
    assert len(detailed["tensors"]) == 4
    assert len(detailed["modules"]) == 2


def test_a_warning_of_the_report_is_said_and_kept(moerge, tmp_path):
    tiny.write(tiny.lora(rank=1, size=16), tmp_path / "small")
    done = moerge("compress", tmp_path / "small", tmp_path / "out", "--json")
    assert done.status == 0
    assert "warning: Nothing in this adapter is compressed" in done.err
    assert len(done.json["warnings"]) == 1
    assert moerge("compress", tmp_path / "small", tmp_path / "out", "--json", "--quiet").err == ""


def test_nothing_but_an_older_compressed_file_is_written_over(moerge, adapter, compressed):
    before = snapshot(adapter)
    for out in (adapter, adapter / WEIGHTS, adapter / "adapter_config.json"):
        done = moerge("compress", adapter, out)
        assert done.status == 2
        assert "would be lost" in done.err
    assert snapshot(adapter) == before
    assert moerge("compress", adapter, compressed, "--density", "0.5").status == 0


@pytest.mark.parametrize(
    ("path", "data"), [("adapter_config.json", b"{"), (WEIGHTS, b"\x80\x04 pickle"), (WEIGHTS, None)]
)
def test_an_adapter_that_is_not_one_is_refused_with_the_remedy(moerge, adapter, tmp_path, path, data):
    if data is None:
        (adapter / path).unlink()
    else:
        (adapter / path).write_bytes(data)
    done = moerge("compress", adapter, tmp_path / "out")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("moerge: ")
    assert len(done.err.splitlines()) >= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_file_that_is_not_there_is_named(moerge, tmp_path, command):
    done = moerge(command, tmp_path / "none", tmp_path / "out")
    assert done.status == 1
    assert "none" in done.err


def test_a_refusal_is_one_object_too(moerge, tmp_path):
    done = moerge("decompress", tmp_path / "none", tmp_path / "out", "--json")
    assert done.status == 1
    assert done.json["problem"]["exit_status"] == 1
    assert done.json["problem"]["code"] == "file-error"
    assert "none" in done.err


def test_decompress_uses_the_config_it_is_given(moerge, adapter, compressed, tmp_path):
    other = tmp_path / "other.json"
    other.write_bytes(tiny.config(r=8, lora_alpha=99))
    assert moerge("decompress", compressed, tmp_path / "out", "--config", other).status == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 99
    record = moerge("decompress", compressed, tmp_path / "out", "--json").json
    assert record["out"] == str(tmp_path / "out" / WEIGHTS)
    assert record["sha256"] == tiny.sha256((tmp_path / "out" / WEIGHTS).read_bytes())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_decompress_says_when_the_config_is_missing(moerge, compressed, tmp_path):
    alone = tmp_path / "alone" / "file"
    alone.parent.mkdir()
    alone.write_bytes(compressed.read_bytes())
    done = moerge("decompress", alone, tmp_path / "out")
    assert done.status == 0
    assert "adapter_config.json" in done.err


def test_a_damaged_file_is_3_with_its_rule_and_leaves_nothing(moerge, compressed, tmp_path):
    data = bytearray(compressed.read_bytes())
    start = data.index(b'"planes_sha256":"') + 17
    data[start : start + 64] = b"0" * 64
    compressed.write_bytes(data)
    for command in (["decompress", compressed, tmp_path / "out"], ["verify", compressed]):
        done = moerge(*command, "--json")
        assert done.status == 3
        assert "rule C7.hash" in done.err
        assert done.json["problem"]["errors"][0]["rule"] == "C7.hash"
        assert done.json["problem"]["exit_status"] == 3
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_verify_says_what_it_checked(moerge, adapter, compressed):
    done = moerge("verify", compressed)
    assert done.status == 0
    assert done.out.splitlines()[-1] == "verified"
    assert "ok: every rule of compeft/1" in done.out
    assert "adapter_config.json (LORA)" in done.out
    record = moerge("verify", adapter, "--json").json
    assert record["verified"] is True
    assert record["checks"][0]["facts"]["rank"] == 8


def test_verify_takes_a_checkpoint_with_integers_and_shards(moerge, tmp_path):
    for number in (1, 2):
        data = save({f"layer.{number}": np.ones((2, 3), np.float32), f"ids.{number}": np.arange(3)})
        (tmp_path / f"model-{number}.safetensors").write_bytes(data)
    places = {f"{kind}.{number}": f"model-{number}.safetensors" for kind in ("layer", "ids") for number in (1, 2)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "the index and its shards agree on 4 tensors" in moerge("verify", tmp_path).out
    index.write_text(json.dumps({"metadata": {}, "weight_map": places | {"layer.3": "model-3.safetensors"}}))
    assert moerge("verify", tmp_path).status == 3


def with_nan(data: bytes, folder: Path) -> bytes:
    (folder / "x").write_bytes(data)
    arrays = {name: values.copy() for name, values in load_file(folder / "x").items()}
    arrays[min(arrays)][0, 0] = np.nan
    return save(arrays, {"format": "pt"})


@pytest.mark.parametrize("what", ["nan", "cut", "pickle", "rank", "config", "empty", "index"])
def test_verify_finds_what_is_wrong_and_answers_3(moerge, adapter, tmp_path, what):
    weights = adapter / WEIGHTS
    data = weights.read_bytes()
    place = adapter
    match what:
        case "nan":
            weights.write_bytes(with_nan(data, tmp_path))
        case "cut":
            weights.write_bytes(data[:-1])
        case "pickle":
            weights.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00 pickle")
        case "rank":
            (adapter / "adapter_config.json").write_bytes(tiny.config(r=16))
        case "config":
            (adapter / "adapter_config.json").write_bytes(b'{"r": 8, "r": 9}')
        case "empty":
            place = tmp_path / "empty"
            place.mkdir()
        case "index":
            place = tmp_path / "sharded"
            place.mkdir()
            (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    done = moerge("verify", place)
    assert (done.status, done.out) == (3, "")
    assert done.err.startswith("moerge: ")


def test_what_is_neither_here_nor_a_reference_is_1(moerge, tmp_path):
    for what in ("none.compeft", f"{tmp_path}/none.compeft", "ann/tea"):
        done = moerge("verify", what)
        assert done.status == 1
        assert "no such file or folder" in done.err
    assert "--endpoint" in done.err or "No hub is named" in done.err


def test_an_encoded_file_that_does_not_fit_the_config_beside_it_is_found(moerge, compressed):
    compressed.with_name("tea.compeft.adapter_config.json").write_bytes(tiny.config(r=4))
    done = moerge("verify", compressed)
    assert done.status == 3
    assert "rank" in done.err


def test_being_stopped_is_130_without_a_traceback(moerge, adapter, tmp_path, monkeypatch):
    def stopped(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, "compress", stopped)
    done = moerge("compress", adapter, tmp_path / "out")
    assert (done.status, done.out, done.err) == (130, "", "Stopped.\n")


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moerge", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_progress_is_drawn_for_a_person_alone(adapter, tmp_path, options):
    ours, theirs = pty.openpty()
    done = run("compress", adapter, tmp_path / "out", *options, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    drawn = b""
    try:
        while block := os.read(ours, 65536):
            drawn += block
    except OSError:
        # Linux says EIO when the other end of a terminal is closed.
        pass
    os.close(ours)
    assert done.returncode == 0
    assert "compressing" not in done.stdout
    assert (b"compressing" in drawn) is (options == [])
    # The line is taken away at the end.
    assert drawn == b"" or drawn.endswith(b" \r")


def test_a_terminal_of_few_signs_is_no_reason_for_a_traceback(adapter, tmp_path):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    done = run("compress", adapter, tmp_path / "out", **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "? " in done.stdout


def test_a_reader_that_goes_away_is_no_reason_for_a_traceback(adapter):
    read, write = os.pipe()
    os.close(read)
    done = run("verify", adapter, "--json", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_the_module_runs_as_the_command_does():
    assert run("--version", stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout.startswith("moerge ")
