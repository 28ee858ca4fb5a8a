"""Text classification tasks in CSV files with the columns text and label: banking77, clinc150, sst2."""

import csv
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NAMES = ("banking77", "clinc150", "sst2")


@dataclass(frozen=True)
class Rows:
    """Texts, and for each the number of its label."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def sha256(self) -> str:
        """Digest of texts and labels: results of other rows are never taken for results of these."""
        return hashlib.sha256(repr((self.texts, self.labels)).encode()).hexdigest()


@dataclass(frozen=True)
class Task:
    """A data set: its label names in order, the rows to learn from, and every row of its test split."""

    name: str
    label_names: tuple[str, ...]
    train: Rows
    test: Rows


def read(folder: Path, name: str) -> Task:
    """`NAME_train.csv` and `NAME_test.csv` of a folder. Raises ValueError for a file without rows or columns."""
    train, test = (read_rows(folder / f"{name}_{split}.csv") for split in ("train", "test"))
    label_names = tuple(sorted({label for _, label in train}))
    unknown = {label for _, label in test} - set(label_names)
    if unknown:
        raise ValueError(f"{name}_test.csv has labels that {name}_train.csv lacks: {', '.join(sorted(unknown)[:5])}")
    return Task(name, label_names, numbered(train, label_names), numbered(test, label_names))


def numbered(rows: list[tuple[str, str]], label_names: tuple[str, ...]) -> Rows:
    """The rows whose label is named, with the label's number in place of its name."""
    numbers = {label: number for number, label in enumerate(label_names)}
    kept = [(text, numbers[label]) for text, label in rows if label in numbers]
    return Rows(tuple(text for text, _ in kept), tuple(label for _, label in kept))


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Text and label of every row of a CSV file. Raises ValueError."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path.name} has the columns {reader.fieldnames}, wanted text and label")
        rows = [(row["text"], row["label"]) for row in reader]
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    return rows
