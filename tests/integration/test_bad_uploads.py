"""Bad input at the upload door: each is answered with the field, what was met, what was wanted and what to do."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

from registry.models import Upload
from registry.services import bases
from tests import factories, tiny
from tests.senders import Sender, counts

pytestmark = pytest.mark.django_db

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A_KEY = f"base_model.model.{tiny.QUERY}.lora_A.weight"
SAVE = "Save the adapter with PeftModel.save_pretrained, which writes safetensors by default."


@pytest.fixture
def sender():
    bases.sync()
    return Sender(factories.key(factories.user("ada")))


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return stream.getvalue()


def with_values(value: float, dtype=np.float32) -> bytes:
    arrays = tiny.tensors()
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    arrays[A_KEY][1, 7] = value
    return tiny.dump(arrays)


def refused(sender, files, **body):
    """The problem that an upload meets; rows and blobs must be as before."""
    before = counts()
    answer = sender.send("ada/tea", files, **body)
    assert counts() == before
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["request_id"]
    return problem


CONTENT = [
    (WEIGHTS, pickle.dumps({"a": np.arange(9)}, protocol=4), "pickle", "a safetensors file"),
    (WEIGHTS, pickle.dumps({"a": 1}, protocol=2), "pickle", "a safetensors file"),
    (WEIGHTS, zipped(), "zip archive", "a safetensors file"),
    (WEIGHTS, b"7z\xbc\xaf\x27\x1c" + b"\0" * 40, "7z archive", "a safetensors file"),
    (WEIGHTS, b"\x1f\x8b\x08" + b"\0" * 40, "gzip", "a safetensors file"),
    ("tokenizer.json", pickle.dumps({"a": 1}, protocol=4), "pickle", "what the name tokenizer.json says"),
    ("README.md", zipped(), "zip archive", "what the name README.md says"),
    ("evaluation.json", pickle.dumps({"a": 1}, protocol=0), "", ""),
    ("picture.png", b"\x80\x04\x95" + b"\0" * 30, "pickle", "what the name picture.png says"),
]


@pytest.mark.parametrize(("path", "data", "met", "wanted"), CONTENT)
def test_content_that_is_not_what_the_name_says_is_refused(sender, path, data, met, wanted):
    problem = refused(sender, {**tiny.adapter(), path: data})
    assert problem["status"] == 422
    assert problem["code"] == "upload-invalid"
    fault = problem["errors"][0]
    assert fault["pointer"].startswith("/" + path)
    assert met in fault["met"]
    assert wanted in str(fault["wanted"])
    assert fault["remedy"]


def test_a_pickle_renamed_safetensors_is_told_apart_by_name_and_remedy(sender):
    problem = refused(sender, {**tiny.adapter(), WEIGHTS: pickle.dumps({"weight": np.ones(5)}, protocol=4)})
    fault = problem["errors"][0]
    assert fault["rule"] == "U6"
    assert fault["met"] == "a pickle, which can run code when it is opened"
    assert fault["wanted"] == "a safetensors file"
    assert "save_pretrained" in fault["remedy"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "x.pkl", "arrays.npz", "sub/weights.ckpt"])
def test_files_that_can_hold_pickles_are_refused_before_a_byte_is_sent(sender, name):
    problem = refused(sender, {**tiny.adapter(), name: b"\x80\x04"})
    position = list(tiny.adapter()).__len__()
    ending = name.rsplit(".", 1)[-1]
    assert problem["errors"] == [
        {
            "pointer": f"/files/{position}/path",
            "met": f"{ending} files can run code when they are opened",
            "wanted": "weights as .safetensors",
            "remedy": SAVE,
            "rule": "U6",
        }
    ]
    assert Upload.objects.count() == 0


@pytest.mark.parametrize(
    ("name", "rule"),
    [("all.zip", "U2"), ("all.tar", "U2"), ("modeling.py", "U1"), ("page.html", "U1"), ("logo.svg", "U1")],
)
def test_files_that_are_not_on_the_list_are_refused_before_a_byte_is_sent(sender, name, rule):
    problem = refused(sender, {**tiny.adapter(), name: b"x"})
    assert problem["status"] == 422
    assert problem["errors"][0]["pointer"] == "/files/3/path"
    assert problem["errors"][0]["rule"] == rule
    assert Upload.objects.count() == 0


@pytest.mark.parametrize(
    "name",
    ["../adapter_model.safetensors", "a/../../b.json", "/etc/passwd.txt", "a\\b.json", "C:/x.json", "a//b.json", "a\u202egpj.md",
     "a\nb.md", "e\u0301.md", ".", "x" * 300 + ".md"],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_or_looks_like_another_is_refused(sender, name):
    problem = refused(sender, {**tiny.adapter(), name: b"{}"})
    assert problem["code"] == "name-invalid"
    assert problem["errors"][0]["pointer"] == "/files/3/path"
    assert problem["errors"][0]["rule"] == "U3"
    assert problem["errors"][0]["remedy"] == "Rename the file and upload again."
    assert problem["errors"][0]["met"] == name[:120]


def test_a_truncated_file_is_refused(sender):
    data = tiny.weights()
    problem = refused(sender, {**tiny.adapter(), WEIGHTS: data[:-100]})
    fault = problem["errors"][0]
    assert problem["status"] == 422
    assert fault["pointer"].startswith("/" + WEIGHTS)
    assert fault["rule"] == "T1"
    bodies = int.from_bytes(data[:8], "little")
    total = len(data) - 8 - bodies
    assert fault["met"] == f"{total - 100} bytes of tensors"
    assert fault["wanted"] == f"{total} bytes"
    assert "Upload the file again" in fault["remedy"]


def test_a_header_that_claims_90_mb_is_refused_from_its_first_bytes(sender):
    claim = 90 * 2**20
    before = counts()
    started = sender.post(
        "/api/v1/uploads",
        {"expert": "ada/tea", "files": [{"path": WEIGHTS, "size": claim + 100, "sha256": "a" * 64}]},
    ).json()
    first = struct.pack("<Q", claim) + b'{"a":' + b" " * 1000
    answer = sender.put(started["files"][0]["url"], first, start=0, size=claim + 100)
    assert answer.status_code == 422
    fault = answer.json()["errors"][0]
    assert fault["pointer"].startswith("/" + WEIGHTS)
    assert fault["met"] == f"{claim} bytes"
    assert fault["wanted"] == f"at most {16 * 2**20} bytes"
    assert fault["remedy"]
    assert counts() == before
    assert sender.get(f"/api/v1/uploads/{started['id']}").json()["files"][0]["offset"] == 0


def test_a_bad_header_is_refused_while_the_tensors_are_still_to_come(sender):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}, "v\u00e9": {}}).encode()
    size = 8 + len(header) + 4000
    body = {"expert": "ada/tea", "files": [{"path": WEIGHTS, "size": size, "sha256": "a" * 64}]}
    url = sender.post("/api/v1/uploads", body).json()["files"][0]["url"]
    answer = sender.put(url, raw(header, b"\0" * 10), start=0, size=size)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["rule"] == "T2"


def test_duplicate_tensor_names_are_refused(sender):
    entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    problem = refused(sender, {**tiny.adapter(), WEIGHTS: raw(f"{{{entry},{entry}}}".encode(), b"\0" * 4)})
    fault = problem["errors"][0]
    assert fault["pointer"] == f"/{WEIGHTS}/w"
    assert "appears twice" in fault["met"]
    assert fault["wanted"] == "JSON without duplicate keys"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_refused_naming_the_tensor(sender, value, dtype):
    problem = refused(sender, {**tiny.adapter(), WEIGHTS: with_values(value, dtype)})
    fault = problem["errors"][0]
    assert problem["status"] == 422
    assert fault["pointer"].startswith(f"/{WEIGHTS}/{A_KEY}")
    assert fault["remedy"]


def test_weights_that_are_not_finite_are_refused_in_every_file_of_tensors(sender):
    bad = tiny.dump({"stats": np.array([1.0, np.nan], dtype=np.float32)})
    problem = refused(sender, {**tiny.adapter(), "stats.safetensors": bad})
    assert problem["errors"][0]["pointer"].startswith("/stats.safetensors/stats")


def test_a_config_whose_rank_is_not_that_of_the_weights_is_refused(sender):
    problem = refused(sender, {**tiny.adapter(), CONFIG: tiny.config(r=4)})
    fault = problem["errors"][0]
    assert problem["status"] == 422
    assert fault["pointer"] == f"/{WEIGHTS}/{A_KEY}"
    assert fault["met"] == 2
    assert str(fault["wanted"]).startswith("4")
    assert fault["rule"] == "T4"
    assert fault["remedy"]


def test_a_base_whose_layers_have_other_sizes_is_refused_naming_tensor_and_sizes(sender):
    shapes = {tiny.QUERY: (768, 768), tiny.VALUE: (768, 768)}
    problem = refused(sender, {**tiny.adapter(), WEIGHTS: tiny.weights(shapes=shapes)})
    assert problem["status"] == 422
    assert problem["errors"] == [
        {
            "pointer": f"/{WEIGHTS}/{tiny.QUERY}",
            "met": [768, 768],
            "wanted": [384, 384],
            "remedy": "Name the base that the adapter was trained on; if it is this one, train on its unchanged layers.",
            "rule": "T4",
        }
    ]
    assert "768 x 768" in problem["detail"]
    assert "384 x 384" in problem["detail"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "does not say"),
        ("", "does not say"),
        ("/home/ada/models/minilm", "path"),
        ("./minilm", "path"),
        ("..", "path"),
        ("C:\\models\\minilm", "path"),
        ("a/b/c", "path"),
        ("ada/never-heard-of", "not known"),
        ("never-heard-of", "not known"),
    ],
)
def test_a_base_that_is_null_a_path_or_unknown_is_asked_for(sender, name, words):
    files = tiny.adapter(**{CONFIG: tiny.config(base_model_name_or_path=name), "README.md": b"# Tea\n\nAbout tea.\n"})
    problem = refused(sender, files)
    assert problem["status"] == 422
    assert problem["code"] == "base-unknown"
    fault = problem["errors"][0]
    assert fault["pointer"] == "/adapter_config.json/base_model_name_or_path"
    assert fault["met"] == (name or None)
    assert fault["wanted"] == "the name of a base model that the hub knows, as owner/name"
    for answer in ("base_model_name_or_path", "README.md", "card.base_model", "POST /api/v1/bases"):
        assert answer in fault["remedy"]
    assert words in problem["detail"]


def test_the_path_of_a_download_cache_suggests_its_base(sender):
    path = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/abc"
    files = tiny.adapter(**{CONFIG: tiny.config(base_model_name_or_path=path), "README.md": b"# Tea\n"})
    assert refused(sender, files)["errors"][0]["remedy"].startswith("The path looks like meta-llama/Llama-3.1-8B.")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b'{"peft_type":"LORA","r":2,"r":4}', "/adapter_config.json"),
        (b'{"peft_type":"LORA","r":NaN}', "/adapter_config.json"),
        (b'{"peft_type":"LORA","lora_alpha":1e400}', "/adapter_config.json"),
        (b'{"peft_type":"LORA","x":"\\ud800"}', "/adapter_config.json"),
        (b"not json", "/adapter_config.json"),
        (b"[" * 40 + b"]" * 40, "/adapter_config.json"),
    ],
)
def test_a_config_that_is_not_strict_json_is_refused(sender, text, where):
    problem = refused(sender, {**tiny.adapter(), CONFIG: text})
    assert problem["status"] == 422
    assert problem["errors"][0]["pointer"].startswith(where)


def test_a_config_above_its_size_is_413_before_a_byte_is_sent(sender):
    text = tiny.config(note="x" * 256_000)
    problem = refused(sender, {**tiny.adapter(), CONFIG: text})
    assert problem["status"] == 413
    assert problem["errors"][0]["pointer"] == "/files/0/size"
    assert problem["errors"][0]["met"] == len(text)
    assert problem["errors"][0]["wanted"] == "at most 256000 bytes"


def test_sizes_and_counts_above_the_limits_are_413(sender, settings):
    settings.HUB_UPLOAD_MAX_BYTES = 2000
    assert refused(sender, tiny.adapter())["status"] == 413
    settings.HUB_UPLOAD_MAX_BYTES = 10**9
    settings.HUB_FILE_MAX_BYTES = 1000
    assert refused(sender, tiny.adapter())["errors"][0]["pointer"] == "/files/1/size"
    settings.HUB_FILE_MAX_BYTES = 10**9
    settings.HUB_UPLOAD_MAX_FILES = 2
    assert refused(sender, tiny.adapter())["errors"][0] == {
        "pointer": "/files",
        "met": 3,
        "wanted": "at most 2 files",
        "remedy": "Leave files out.",
        "rule": "U4",
    }


def test_a_namespace_that_is_full_is_told_so(sender, settings):
    settings.HUB_NAMESPACE_MAX_BYTES = 5000
    problem = refused(sender, tiny.adapter())
    assert problem["status"] == 403
    assert problem["code"] == "quota-exceeded"
    assert problem["errors"][0]["wanted"] == "at most 5000 bytes"


def test_two_names_that_differ_by_case_alone_are_refused(sender):
    problem = refused(sender, {**tiny.adapter(), "notes.md": b"a", "Notes.md": b"b"})
    assert problem["errors"][0]["pointer"] == "/files/4/path"
    assert problem["errors"][0]["rule"] == "U3"


def test_a_digest_that_is_none_is_refused(sender):
    body = {"expert": "ada/tea", "files": [{"path": "README.md", "size": 3, "sha256": "xyz"}]}
    answer = sender.post("/api/v1/uploads", body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/files/0/sha256"


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
        ("tea", "/expert"),
        ("ada/te--a", "/expert"),
        ("ada/tea.git", "/expert"),
        ("ada/tea/x", "/expert"),
        ("ada/.tea", "/expert"),
    ],
)
def test_a_name_that_breaks_a_rule_is_refused(sender, name, pointer):
    answer = sender.start(name, tiny.adapter())
    assert answer.status_code == 422
    assert answer.json()["code"] == "name-invalid"
    assert answer.json()["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("name", ["bob/tea", "merges/tea", "nobody-here/tea"])
def test_nobody_publishes_under_a_name_of_somebody_else(sender, name):
    factories.user("bob")
    answer = sender.start(name, tiny.adapter())
    assert answer.status_code == 403
    assert answer.json()["errors"][0]["wanted"] == "one of your namespaces: ada"


def test_an_unknown_field_is_named(sender):
    answer = sender.post("/api/v1/uploads", {"expert": "ada/tea", "files": [], "fils": []})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/fils"


def test_an_answer_about_the_base_that_contradicts_the_config_is_refused(sender):
    problem = refused(sender, tiny.adapter(), card={"base_model": "gpt2"})
    fault = problem["errors"][0]
    assert (fault["pointer"], fault["met"], fault["wanted"]) == ("/card/base_model", "gpt2", tiny.BASE)


@pytest.mark.parametrize(
    ("front", "pointer"),
    [
        ("a: &x 1\nb: *x", "/README.md"),
        ("a: 1\na: 2", "/README.md"),
        ("- a\n- b", "/README.md"),
        ("moerge: [1]", "/README.md/moerge"),
        ("moerge: {examples: [[1]]}", "/README.md/moerge/examples/0"),
        ("license: {a: b}", "/README.md/license/0"),
        ("x: !!python/object/apply:os.system [id]", "/README.md"),
        ("moerge: {examples: [" + "a, " * 33 + "]}", "/README.md/moerge/examples"),
    ],
)
def test_front_matter_that_breaks_a_rule_is_refused_with_its_place(sender, front, pointer):
    problem = refused(sender, {**tiny.adapter(), "README.md": f"---\n{front}\n---\n".encode()})
    assert problem["status"] == 422
    assert problem["errors"][0]["pointer"] == pointer


def test_an_encoded_file_is_taken_and_held_against_the_rules_of_its_format(sender, tmp_path):
    from moerge.compression.codecs import compeft

    data = compeft.encode(tiny.tensors(), {})
    name = "adapter_model.compeft.safetensors"
    assert sender.send("ada/tea", {**tiny.adapter(), name: data}).status_code == 200
    turned = bytearray(data)
    turned[-1] ^= 1
    problem = refused(sender, {name: bytes(turned)})
    assert problem["errors"][0]["pointer"].startswith(f"/{name}")
    assert problem["errors"][0]["rule"].startswith("C")
    assert refused(sender, {"adapter_model.safetensors": data})["errors"][0]["rule"] == "T2"
