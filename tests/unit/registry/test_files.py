"""Which files an expert may hold, by name and by content."""

import struct
import zlib

import pytest

from moerge.tensors.header import Limits
from registry.checks import files
from registry.checks.files import Kind
from registry.errors import TooLarge, UploadInvalid
from tests import tiny

LIMIT = 10_000


def rule(path):
    return files.rule_for(path, pointer="/x", limit_bytes=LIMIT)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("adapter_config.json", Kind.CONFIG),
        ("sub/adapter_config.json", Kind.CONFIG),
        ("adapter_model.safetensors", Kind.WEIGHTS),
        ("routing_gates.safetensors", Kind.WEIGHTS),
        ("README.md", Kind.CARD),
        ("LICENSE", Kind.TEXT),
        ("licence.txt", Kind.TEXT),
        (".gitattributes", Kind.TEXT),
        ("tokenizer.json", Kind.JSON),
        ("evaluations/may.json", Kind.JSON),
        ("merges.txt", Kind.TEXT),
        ("tokenizer.model", Kind.TOKENIZER),
        ("images/plot.PNG", Kind.IMAGE),
        ("chat_template.jinja", Kind.TEXT),
    ],
)
def test_files_on_the_list_have_their_kind(path, kind):
    assert rule(path).kind is kind


@pytest.mark.parametrize("path", ["Adapter_Config.json", "ADAPTER_MODEL.safetensors", "readme.md"])
def test_the_three_main_files_are_spelt_exactly(path):
    with pytest.raises(UploadInvalid) as error:
        rule(path)
    assert error.value.faults[0].remedy == "Rename the file."


def test_weights_have_the_limit_of_the_caller_and_texts_their_own():
    assert rule("adapter_model.safetensors").limit_bytes == LIMIT
    assert rule("README.md").limit_bytes == 2**20
    files.check_size("a.safetensors", LIMIT, rule("a.safetensors"), pointer="/x")
    with pytest.raises(TooLarge):
        files.check_size("a.safetensors", LIMIT + 1, rule("a.safetensors"), pointer="/x")


@pytest.mark.parametrize(
    "path",
    ["training_args.bin", "optimizer.pt", "optimizer_0.bin", "scheduler.pt", "rng_state.pth", "rng_state_3.pth", "runs/a/b",
     "checkpoint-500/adapter_model.safetensors", "trainer_state.json", "sub/training_args.bin", "global_step10/x.pt"],
)  # fmt: skip
def test_leftovers_of_training_are_known(path):
    assert path in files.leftover(path)


@pytest.mark.parametrize(
    "path", ["adapter_model.bin", "pytorch_model.pt", "README.md", "myruns/a", "runs", "my_optimizer.md"]
)
def test_other_files_are_not_leftovers(path):
    assert files.leftover(path) == ""


def check(tmp_path, path, data):
    place = tmp_path / "file"
    place.write_bytes(data)
    files.check_content(path, place, rule(path), limits=Limits())


def png(*, tail=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
        + tail
    )


def test_a_png_is_one_png_and_nothing_else(tmp_path):
    check(tmp_path, "a.png", png())
    for data in (
        png(tail=b"PK\x03\x04"),
        png()[:-1],
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a;",
        png().replace(b"IHDR", b"IHDX"),
    ):
        with pytest.raises(UploadInvalid):
            check(tmp_path, "a.png", data)


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("a.gif", b"GIF89a....;", b"GIF88a....;"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + b"\0" * 20 + b"\xff\xd9", b"\xff\xd8\xff\xe0" + b"\0" * 99),
        ("a.webp", b"RIFF\x04\0\0\0WEBP", b"RIFF\x05\0\0\0WEBP"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", b"\n\x0e\x00\x05<unk>"),
        ("a.json", b'{"a": [1, 2.5, null]}', b'{"a": 1, "a": 2}'),
        ("a.md", "naïve\n".encode(), b"na\xefve"),
        ("a.txt", b"tab\tline\r\n", b"nul\x00"),
        ("adapter_model.safetensors", tiny.weights()[:0] + tiny.dump(tiny.tensors(shapes={"q": (4, 4)})), b"{}"),
    ],
)
def test_content_must_agree_with_the_name(tmp_path, path, good, bad):
    check(tmp_path, path, good)
    with pytest.raises(UploadInvalid) as error:
        check(tmp_path, path, bad)
    assert error.value.faults[0].pointer.startswith("/" + path)


@pytest.mark.parametrize(
    "magic", [b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b\x08", b"BZh9", b"Rar!\x1a\x07", b"\x93NUMPY", b"\x7fELF", b"MZ\x90",
              b"#!/bin/sh\n", b"\x80\x04\x95", b"cos\nsystem\n", b"GGUF\x03"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["a.md", "a.json", "a.txt"])
def test_archives_pickles_and_programs_are_told_by_their_first_bytes(tmp_path, path, magic):
    with pytest.raises(UploadInvalid) as error:
        check(tmp_path, path, magic + b" and so on")
    assert error.value.faults[0].rule == "U6"


def test_a_short_header_that_starts_like_a_pickle_is_no_pickle(tmp_path):
    # 0x0280 = 640: a header of that length starts with the bytes of a pickle of protocol 2.
    header = b'{"__metadata__":{"a":"' + b"x" * 591 + b'"},"t":{}}'
    assert (
        files.check_start("a.safetensors", struct.pack("<Q", 640) + header, 5000, rule("a.safetensors"), Limits())
        == 648
    )


def test_a_pointer_escapes_slashes_and_tildes():
    assert files.pointer_of("sub/a~b.json", "x/y") == "/sub~1a~0b.json/x~1y"
