"""How golden cases are found: a folder of families, one family, and everything that is neither."""

import json
from types import SimpleNamespace

import pytest

from tests.golden import conftest as finder


def config(folder):
    return SimpleNamespace(getoption=lambda name: folder if name == "--golden-dir" else None)


def index(folder, cases):
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"cases": cases}))


def test_a_folder_of_families_and_a_family_alone_are_both_found(tmp_path):
    index(tmp_path / "compeft", [{"name": "x", "k_percent": 5}])
    index(tmp_path / "merging", [{"id": "y", "method": "ties"}])
    found = {"compeft": tmp_path / "compeft", "merging": tmp_path / "merging"}
    assert finder._folders(config(tmp_path)) == found
    for family, folder in found.items():
        assert finder._folders(config(folder)) == {family: folder}


def test_a_family_that_is_not_there_is_not_collected(tmp_path):
    index(tmp_path / "merging", [{"id": "y", "method": "ties"}])
    ignored = {
        name: finder.pytest_ignore_collect(tmp_path / name, config(tmp_path))
        for name in ("test_compeft.py", "test_merging.py", "conftest.py")
    }
    assert ignored == {"test_compeft.py": True, "test_merging.py": None, "conftest.py": None}


@pytest.mark.parametrize("text", ["{}", '{"cases": []}', '{"cases": {}}', '{"cases": [7]}', "[]", "not JSON"])
def test_an_index_without_cases_is_an_error(tmp_path, text):
    for folder in (tmp_path, tmp_path / "compeft"):
        folder.mkdir(exist_ok=True)
        (folder / "index.json").write_text(text)
        with pytest.raises(pytest.UsageError):
            finder._folders(config(tmp_path))
        (folder / "index.json").unlink()


def test_no_index_is_an_error(tmp_path):
    with pytest.raises(pytest.UsageError):
        finder._folders(config(tmp_path))
    (tmp_path / "compeft").mkdir()
    with pytest.raises(pytest.UsageError):
        finder._folders(config(tmp_path))


def test_the_repository_has_cases_of_its_own():
    assert "compeft" in finder._folders(config(None))
