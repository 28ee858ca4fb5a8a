"""Which files an expert may hold: an allow-list in which the name and the content must agree.

A scanner of pickles is not a boundary, so no format that can run code is taken at all, under whatever name, and no
archive is ever unpacked.
"""

import re
import zlib
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from moerge.errors import MoergeError
from moerge.tensors import header, strict
from registry.checks import names
from registry.errors import Fault, TooLarge, UploadInvalid

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"


class Kind(StrEnum):
    CONFIG = "config"
    WEIGHTS = "weights"
    JSON = "json"
    CARD = "card"
    TEXT = "text"
    IMAGE = "image"
    TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Rule:
    """What a file of this name must be, and how large it may get."""

    kind: Kind
    limit_bytes: int

    @property
    def is_large(self) -> bool:
        """Whether stock clients address the file by SHA-256 rather than by git's id."""
        return self.kind in {Kind.WEIGHTS, Kind.IMAGE, Kind.TOKENIZER}


CONFIG_BYTES = 256_000
JSON_BYTES = 2**20
TEXT_BYTES = 2**20
IMAGE_BYTES = 8 * 2**20
TOKENIZER_BYTES = 64 * 2**20
CONFIG_KEYS, TOKENIZER_KEYS, DEPTH = 10_000, 4_000_000, 32

# Vocabularies are JSON and text of any size; every other JSON file is a small record.
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
TEXT_NAMES = frozenset({"license", "licence", "notice", "copying", ".gitattributes", ".gitignore"})
TEXT_ENDINGS = (".md", ".txt", ".jinja", ".yaml", ".yml", ".csv", ".toml")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp")
PICKLES = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".model.pt", ".h5", ".keras",
    ".pb", ".msgpack",
)  # fmt: skip
ARCHIVES = (".zip", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".whl", ".jar", ".nemo", ".mar")

# What training leaves beside an adapter: clients are told to leave it out instead of being refused.
LEFTOVERS = re.compile(
    r"(.*/)?(training_args\.bin|trainer_state\.json|optimizer[^/]*\.(pt|bin|pth)|scheduler[^/]*\.(pt|bin|pth)"
    r"|scaler[^/]*\.pt|rng_state[^/]*\.pth|events\.out\.tfevents[^/]*|\.DS_Store|Thumbs\.db)"
    r"|(.*/)?(runs|wandb|global_step\d+|checkpoint-\d+|__pycache__|\.git|\.cache|\.ipynb_checkpoints)/.*"
)

MAGICS = (
    (b"PK\x03\x04", "a zip archive, which is also how torch.save writes pickles"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"PK\x07\x08", "a split zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x93NUMPY", "a numpy file, which may hold pickled objects"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"#!", "a script"),
    (b"\xca\xfe\xba\xbe", "a program"),
)
PICKLE = re.compile(
    rb"\x80[\x02-\x05]|[(c]__builtin__|cos\nsystem|cposix\nsystem|cbuiltins\n|\(dp0\n|\(lp0\n|ccopy_reg\n"
)
SAVE_AS_SAFETENSORS = "Save the adapter with PeftModel.save_pretrained, which writes safetensors by default."


def pointer_of(path: str, *parts: str) -> str:
    """A JSON pointer to a place in a file of the upload: /README.md/moerge/examples."""
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in (path, *parts))


def leftover(path: str) -> str:
    """Why a file should not be uploaded at all although nobody meant harm by it; empty when it may come."""
    return f"{path} is left over from training and is not part of an adapter." if LEFTOVERS.fullmatch(path) else ""


def rule_for(path: str, *, pointer: str, limit_bytes: int) -> Rule:
    """The rule for a file of this name; `limit_bytes` holds for weights. Raises NameInvalid or UploadInvalid."""
    names.check_path(path, pointer=pointer)
    name = path.rsplit("/", 1)[-1].casefold()
    if path.casefold() in {CONFIG, WEIGHTS, CARD.casefold()} and path not in {CONFIG, WEIGHTS, CARD}:
        wanted = next(known for known in (CONFIG, WEIGHTS, CARD) if known.casefold() == path.casefold())
        raise _refused(path, pointer, met=path, wanted=wanted, remedy="Rename the file.", rule="U1")
    if name == CONFIG:
        return Rule(Kind.CONFIG, CONFIG_BYTES)
    if name == CARD.casefold():
        return Rule(Kind.CARD, TEXT_BYTES)
    if name.endswith(".safetensors"):
        return Rule(Kind.WEIGHTS, limit_bytes)
    if name in VOCABULARIES or name == "tokenizer.model":
        ending = name.rsplit(".", 1)[-1]
        return Rule({"json": Kind.JSON, "txt": Kind.TEXT}.get(ending, Kind.TOKENIZER), TOKENIZER_BYTES)
    if name.endswith(".json"):
        return Rule(Kind.JSON, JSON_BYTES)
    if name in TEXT_NAMES or name.endswith(TEXT_ENDINGS):
        return Rule(Kind.TEXT, TEXT_BYTES)
    if name.endswith(IMAGE_ENDINGS):
        return Rule(Kind.IMAGE, IMAGE_BYTES)
    raise _not_allowed(path, name, pointer)


def _not_allowed(path: str, name: str, pointer: str) -> UploadInvalid:
    wanted = "adapter_config.json, *.safetensors, README.md, tokenizer files, licence, *.json, *.md, *.txt or images"
    if name.endswith(PICKLES):
        met = f"{name.rsplit('.', 1)[-1]} files can run code when they are opened"
        return _refused(path, pointer, met=met, wanted="weights as .safetensors", remedy=SAVE_AS_SAFETENSORS, rule="U6")
    if name.endswith(ARCHIVES):
        return _refused(
            path, pointer, met="an archive", wanted=wanted, remedy="Upload the files themselves.", rule="U2"
        )
    return _refused(path, pointer, met=path[:120], wanted=wanted, remedy="Leave this file out.", rule="U1")


def is_weights(path: str) -> bool:
    """Whether a file holds tensors."""
    return path.casefold().endswith(".safetensors")


def is_encoded(path: str) -> bool:
    """Whether a file holds the compressed form of an adapter, which has rules of its own."""
    return path.casefold().endswith(".compeft.safetensors")


def limits_of(path: str, limits: header.Limits) -> header.Limits:
    """What the header of this file may claim: encoded files hold bytes and positions beside floats."""
    if not is_encoded(path):
        return limits
    return replace(header.COMPEFT, header_bytes=limits.header_bytes, tensor_count=limits.tensor_count)


def check_size(path: str, size_bytes: int, rule: Rule, *, pointer: str) -> None:
    """Raises TooLarge when a file of this kind may not have that size."""
    if size_bytes > rule.limit_bytes:
        raise TooLarge(
            f"{path} has {size_bytes} bytes; a {rule.kind} file may have {rule.limit_bytes}.",
            faults=[
                Fault(
                    pointer,
                    size_bytes,
                    f"at most {rule.limit_bytes} bytes",
                    "Make the file smaller or leave it out.",
                    "U4",
                )
            ],
        )


def check_start(path: str, first: bytes, size_bytes: int, rule: Rule, limits: header.Limits) -> int:
    """What can be said from the first eight bytes or more: how many bytes the whole verdict on the header needs.

    Raises UploadInvalid for content of another format. Returns 0 when nothing more is to be waited for.
    """
    _refuse_formats(path, first)
    if rule.kind is not Kind.WEIGHTS or len(first) < 8:
        return 0
    try:
        return header.claimed_bytes(first[:8], size_bytes, limits_of(path, limits))
    except MoergeError as error:
        raise translated(error, path) from error


def check_content(path: str, file: Path, rule: Rule, *, limits: header.Limits) -> None:
    """The whole content of one file against its rule; weights by their header. Raises UploadInvalid."""
    size_bytes = file.stat().st_size
    check_size(path, size_bytes, rule, pointer=pointer_of(path))
    with file.open("rb") as stream:
        _refuse_formats(path, stream.read(64))
    if rule.kind is Kind.WEIGHTS:
        read_header(path, file, limits=limits)
    elif rule.kind in {Kind.JSON, Kind.CONFIG}:
        read_json(path, file)
    elif rule.kind in {Kind.TEXT, Kind.CARD}:
        read_text(path, file)
    elif rule.kind is Kind.IMAGE:
        _check_image(path, file.read_bytes())
    else:
        _check_sentencepiece(path, file)


def read_header(path: str, file: Path, *, limits: header.Limits, size_bytes: int | None = None) -> header.Header:
    """The header of a weights file; `size_bytes` when the rest of it is still to come. Raises UploadInvalid."""
    limits = limits_of(path, limits)
    try:
        if size_bytes is None:
            return header.read(file, limits)
        with file.open("rb") as stream:
            first = stream.read(8)
            more = stream.read(header.claimed_bytes(first, size_bytes, limits) - 8)
        return header.parse(first + more, size_bytes, limits)
    except MoergeError as error:
        raise translated(error, path) from error


def read_json(path: str, file: Path) -> object:
    """The value in a JSON file, read strictly. Raises UploadInvalid."""
    is_vocabulary = path.rsplit("/", 1)[-1].casefold() in VOCABULARIES
    try:
        return strict.loads(
            file.read_bytes(), max_keys=TOKENIZER_KEYS if is_vocabulary else CONFIG_KEYS, max_depth=DEPTH
        )
    except strict.Malformed as error:
        pointer = pointer_of(path, error.pointer) if error.pointer else pointer_of(path)
        raise _refused(
            path, pointer, met=str(error), wanted="strict JSON", remedy="Write the file with a JSON library.", rule="J1"
        ) from error


def read_text(path: str, file: Path) -> str:
    """The text of a text file: UTF-8 without control characters. Raises UploadInvalid."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        met = f"byte {error.start} is not UTF-8"
        raise _refused(
            path, pointer_of(path), met=met, wanted="text in UTF-8", remedy="Save the file as UTF-8.", rule="U1"
        ) from error
    control = re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", text)
    if control:
        met = f"control character {ord(control[0]):#04x} at {control.start()}"
        raise _refused(
            path, pointer_of(path), met=met, wanted="plain text", remedy="Save the file as plain text.", rule="U1"
        )
    return text


def translated(error: MoergeError, path: str) -> UploadInvalid:
    """An error of the library as one of the upload: its pointer goes below the file."""
    inside = error.pointer if error.pointer.startswith("/") else pointer_of(error.pointer) if error.pointer else ""
    fault = Fault(pointer_of(path) + inside, error.met, error.wanted, error.remedy, error.rule)
    return UploadInvalid(f"{path}: {error.detail}", faults=[fault])


def _refuse_formats(path: str, first: bytes) -> None:
    """Name archives, pickles and programs whatever they are called."""
    found = next((what for magic, what in MAGICS if first.startswith(magic)), "")
    is_header = is_weights(path)
    # A safetensors file starts with its header's length, whose low bytes may look like a pickle's; header.py tells.
    if not found and not is_header and PICKLE.match(first):
        found = "a pickle, which can run code when it is opened"
    if found:
        wanted = "a safetensors file" if is_header else f"what the name {path} says"
        raise _refused(path, pointer_of(path), met=found, wanted=wanted, remedy=SAVE_AS_SAFETENSORS, rule="U6")


def _check_image(path: str, data: bytes) -> None:
    ending = path.rsplit(".", 1)[-1].casefold()
    is_right = {
        "png": lambda: _is_png(data),
        "jpg": lambda: data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in data[-64:],
        "jpeg": lambda: data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in data[-64:],
        "gif": lambda: data.startswith((b"GIF87a", b"GIF89a")) and data.endswith(b";"),
        "webp": lambda: (
            data.startswith(b"RIFF") and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 == len(data)
        ),
    }[ending]()
    if not is_right:
        met = f"content that is not {ending}, or more than one file in it"
        raise _refused(
            path, pointer_of(path), met=met, wanted=f"a {ending} image", remedy="Export the image again.", rule="U1"
        )


def _is_png(data: bytes) -> bool:
    """Whether the bytes are exactly one PNG: signature, sound chunks, IEND at the very end."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data) or zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return end == len(data)
        position = end
    return False


def _check_sentencepiece(path: str, file: Path) -> None:
    """A sentencepiece model is a protobuf whose first field is a piece: tag 0x0a, a length, tag 0x0a again."""
    with file.open("rb") as stream:
        first = stream.read(3)
    if len(first) < 3 or first[0] != 0x0A or first[2] != 0x0A:
        met = "content that is not a sentencepiece model"
        raise _refused(
            path,
            pointer_of(path),
            met=met,
            wanted="a sentencepiece model",
            remedy="Upload tokenizer.json instead.",
            rule="U1",
        )


def _refused(path: str, pointer: str, *, met: object, wanted: object, remedy: str, rule: str) -> UploadInvalid:
    return UploadInvalid(
        f"{path[:120]} cannot be taken: met {met}; wanted {wanted}. {remedy}",
        faults=[Fault(pointer, met, wanted, remedy, rule)],
    )
