"""Walls that import-linter cannot see, read from the syntax tree and from a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITES = {"save", "create", "delete", "update", "bulk_create", "get_or_create", "update_or_create", "bulk_update"}
# These hold no rows: request.session, caches and dictionaries are written to by other names than .objects.
ROW_SOURCES = {"objects"}


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "migrations" not in path.parts:
                yield path


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def reaches_rows(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr in ROW_SOURCES for part in ast.walk(node))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_doors_write_no_rows() -> None:
    found = [
        where(path, call)
        for path in files("api", "frontend", "config")
        for call in calls(path)
        if isinstance(call.func, ast.Attribute)
        and (call.func.attr == "save" or (call.func.attr in WRITES and reaches_rows(call.func.value)))
    ]
    assert found == []


def test_only_two_doors_and_the_runner_catch_everything() -> None:
    allowed = {"api/hf/door.py", "workers/runner.py"}
    found = [
        where(path, node)
        for path in files("moerge", "registry", "workers", "api", "frontend", "config")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
        and str(path.relative_to(ROOT)) not in allowed
    ]
    assert found == []


def test_one_file_of_the_hub_and_one_of_the_client_read_the_environment() -> None:
    allowed = {Path("config/env.py"), Path("moerge/client/environment.py")}
    found = [
        where(path, node)
        for path in files("moerge", "registry", "workers", "api", "frontend", "config")
        if path.relative_to(ROOT) not in allowed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in {"environ", "getenv"}
        # Naming the settings module is how Django and Celery processes start.
        and "DJANGO_SETTINGS_MODULE" not in ast.get_source_segment(path.read_text(), parent_of(path, node))
    ]
    assert found == []


def parent_of(path: Path, wanted: ast.AST) -> ast.AST:
    tree = ast.parse(path.read_text())
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt) and statement.lineno <= wanted.lineno <= (statement.end_lineno or 0):
            best = statement
    return best


def heavy_after(*modules: str) -> str:
    """Which heavy libraries a fresh process holds after importing these modules."""
    script = (
        "import importlib, os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'config.settings'\n"
        "import django; django.setup()\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'faiss', 'sentence_transformers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_web_process_loads_no_heavy_library() -> None:
    assert heavy_after("config.wsgi", "config.urls") == "[]"


def test_the_parent_of_forking_workers_loads_no_heavy_library() -> None:
    jobs = [f"workers.jobs.{path.stem}" for path in (ROOT / "workers" / "jobs").glob("[a-z]*.py")]
    assert len(jobs) >= 5
    assert heavy_after("workers.celery", "workers.tasks", *jobs) == "[]"
