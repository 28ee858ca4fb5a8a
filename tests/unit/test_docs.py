"""Documentation that cannot rot: what exists has its heading, and what has a heading exists."""

import ast
import inspect
import json
import re
from pathlib import Path

from django.urls import URLPattern, URLResolver, get_resolver

from moerge import errors as library_errors
from moerge import merging
from moerge.cli import command, problems
from moerge.client import errors as client_errors
from moerge.errors import MoergeError
from moerge.merging import recipe as recipes
from registry import errors

ROOT = Path(__file__).resolve().parents[2]


def headings(page: str, level: str) -> set[str]:
    return set(re.findall(rf"^{level} (.+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE))


def test_every_error_code_has_its_heading_and_no_other_has() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.HubError)]
    codes = {re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower() for cls in classes}
    assert headings("errors.md", "##") == codes


def test_every_setting_has_its_heading_and_no_other_has() -> None:
    read = set()
    for node in ast.walk(ast.parse((ROOT / "config" / "settings.py").read_text())):
        is_reader = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_reader and isinstance(node.func.value, ast.Name) and node.func.value.id == "env" and node.args:
            read.add(node.args[0].value)
    assert headings("settings.md", "###") == read | {"DATABASE_URL"}


def test_every_route_of_the_rest_api_is_described() -> None:
    def routes(patterns: list, before: str = "") -> set[str]:
        found = set()
        for pattern in patterns:
            here = before + str(pattern.pattern)
            if isinstance(pattern, URLResolver):
                found |= routes(pattern.url_patterns, here)
            elif isinstance(pattern, URLPattern) and here.startswith("api/v1/"):
                found.add(here)
        return found

    text = (ROOT / "docs" / "api.md").read_text()
    plain = {re.sub(r"<(?:\w+:)?(\w+)>", "{}", route) for route in routes(get_resolver().url_patterns)}
    described = {re.sub(r"\{\w+\}", "{}", route).lstrip("/") for route in re.findall(r"/?api/v1/[\w/{}.-]*", text)}
    missing = {route for route in plain if route not in described and "/files/" not in route}
    assert missing == set()


def sections(page: str) -> dict[str, str]:
    """Heading of the second level -> what stands below it."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_has_its_heading_and_every_option_a_word_below_it() -> None:
    found = sections("cli.md")
    shared = found["What all commands share"]
    commands = next(action for action in command.parser()._actions if hasattr(action, "choices") and action.choices)
    assert {name for name in found if name.startswith("moerge ")} == {f"moerge {name}" for name in commands.choices}
    missing = {
        f"{name} {option}"
        for name, parser in commands.choices.items()
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help" and f"`{option}" not in found[f"moerge {name}"] + shared
    }
    assert missing == set()


def test_every_problem_of_the_command_is_in_its_table_with_its_exit_status() -> None:
    by_hub = client_errors.HubRefused
    own = [cls for _, cls in inspect.getmembers(client_errors, inspect.isclass) if issubclass(cls, MoergeError)]
    own = [cls for cls in own if not issubclass(cls, by_hub) and cls not in {MoergeError, client_errors.ClientError}]
    own += [library_errors.EncodedInvalid, library_errors.BaseMismatch, library_errors.ParameterInvalid]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d) \|", sections("cli.md")["Codes of problems"], re.MULTILINE)
    made = {problem.code: str(problem.status) for cls in own for problem in [problems.of(cls("x"), command="pull")]}
    assert dict(rows) == made | {"file-error": "1", "out-of-memory": "1"}


def test_every_merge_method_has_its_page_and_a_recipe_that_is_accepted() -> None:
    overview = (ROOT / "docs" / "merge-methods.md").read_text()
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages.keys() == merging.catalogue().keys() == set(re.findall(r"\]\(methods/(\w+)\.md\)", overview))
    for name, text in pages.items():
        recipe = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
        known = {"revision": "0" * 40, "statistics": "0" * 64}
        experts = [{**row, **known, "digest": row["expert"]} for row in recipe["experts"]]
        assert recipes.parse({**recipe, "experts": experts}).method == name
        assert {f"`{item.name}`" for item in merging.catalogue()[name].parameters} <= set(re.findall(r"`\w+`", text))


def test_the_advice_names_methods_that_exist() -> None:
    text = (ROOT / "docs" / "which-method.md").read_text()
    named = set(re.findall(r"\]\(methods/(\w+)\.md\)", text))
    assert named <= merging.catalogue().keys()
    # A new method is two files; whoever adds one need not know yet when it is the one to take.
    assert len(named) > 30


def test_the_vendored_assets_are_what_they_say() -> None:
    import hashlib

    folder = ROOT / "frontend" / "static" / "vendor"
    rows = re.findall(r"^\| ([\w./]+) \| .+ \| ([0-9a-f]{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert {path for path, _ in rows} == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in {".js", ".css"}
    }
    for path, digest in rows:
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest
