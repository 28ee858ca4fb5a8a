"""Config and weights of one tree against each other: headers first, values last."""

from dataclasses import dataclass
from pathlib import Path

from moerge.compression import reader
from moerge.errors import MoergeError
from moerge.tensors import adapters, header
from moerge.tensors import files as tensor_files
from moerge.tensors.adapters import AdapterConfig, AdapterFacts
from registry.checks import files


@dataclass(frozen=True)
class Examined:
    """What config and weights say together."""

    config: AdapterConfig
    facts: AdapterFacts
    saved_shapes: dict[str, list[int]]  # of the tensors that replace tensors of the base


def read_config(file: Path) -> AdapterConfig:
    """The adapter_config.json of a tree. Raises UploadInvalid."""
    try:
        return adapters.parse_config(file.read_bytes())
    except MoergeError as error:
        raise files.translated(error, files.CONFIG) from error


def examine(config: AdapterConfig, weights: Path, *, limits: header.Limits) -> Examined:
    """Whether config and weights fit together, by the header alone. Raises UploadInvalid."""
    found = files.read_header(files.WEIGHTS, weights, limits=limits)
    try:
        facts = adapters.check(config, found)
        shapes = {name: list(found.tensors[name].shape) for name in (*facts.saved, *facts.biases)}
        return Examined(config, facts, shapes)
    except MoergeError as error:
        # What the config says is wrong in the config, what a tensor is called or holds is wrong in the weights.
        where = files.CONFIG if error.pointer.startswith("/") else files.WEIGHTS
        raise files.translated(error, where) from error


def scan(path: str, weights: Path, *, limits: header.Limits) -> tuple[str, ...]:
    """Every value of a weights file for NaN and infinity, after a second reader has agreed on its header.

    An encoded file is held against the rules of its format instead.

    Returns warnings. Raises UploadInvalid.
    """
    found = files.read_header(path, weights, limits=limits)
    try:
        tensor_files.check_agreement(weights, found)
        if files.is_encoded(path):
            with reader.open_encoded(weights) as encoded:
                encoded.verify()
            return ()
        return tuple(adapters.scan_finite(weights, found))
    except MoergeError as error:
        raise files.translated(error, path) from error
