"""The commands of bin/: help, wrong usage, and the arguments they understand."""

import subprocess
import sys
from pathlib import Path

import pytest

from local.commands import manage, run
from local.install import ROOT


def bin_(name, *arguments):
    return subprocess.run(
        [str(ROOT / "bin" / name), *arguments], capture_output=True, text=True, check=False, cwd="/", timeout=60
    )


@pytest.mark.parametrize("name", ["run", "test", "check", "docs", "manage", "lock"])
def test_every_command_helps_from_any_folder(name):
    done = bin_(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"bin/{name}" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ["--bogus"]),
        ("run", ["--port", "70000"]),
        ("run", ["--port", "x"]),
        ("run", ["--routers", "0"]),
        ("run", ["--timeout", "0"]),
        ("run", ["--detach", "--stop"]),
        ("run", ["extra"]),
        ("check", ["nonsense"]),
        ("docs", ["--bogus"]),
        ("lock", ["--bogus"]),
        ("manage", []),
        ("manage", ["--home"]),
    ],
)
def test_wrong_usage_exits_2_and_says_so_on_stderr(name, arguments):
    done = bin_(name, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert f"bin/{name}" in done.stderr


def test_the_options_of_run_have_the_values_that_its_help_names():
    plain = run.parser().parse_args([])
    assert (plain.home, plain.port, plain.no_demo, plain.routers, plain.workers) == (None, None, False, 1, 1)
    given = run.parser().parse_args(
        ["--home", "x", "--port", "0", "--no-demo", "--routers", "2", "--workers", "3", "--detach", "--timeout", "9.5"]
    )
    assert (given.home, given.port, given.no_demo) == (Path("x"), 0, True)
    assert (given.routers, given.workers, given.detach, given.timeout) == (2, 3, True, 9.5)
    assert run.options_of(plain).port == 8000
    assert run.options_of(given).port == 0


@pytest.mark.parametrize(
    ("arguments", "rest", "home"),
    [
        (["migrate"], ["migrate"], None),
        (["--home", "x", "migrate", "--plan"], ["migrate", "--plan"], Path("x")),
        (["migrate", "--plan", "--home=x"], ["migrate", "--plan"], Path("x")),
        (["create_user", "ann", "--home", "a", "--home", "b"], ["create_user", "ann"], Path("b")),
    ],
)
def test_the_home_of_manage_may_stand_before_or_after_the_command(arguments, rest, home):
    assert manage.take_home(arguments) == (rest, home)


PLUGIN_CASES = """
import pytest
def test_plain(): pass
def test_skipped(): pytest.skip("no such thing here")
@pytest.mark.gpu
def test_gpu(): pytest.skip("no GPU")
@pytest.mark.chaos
def test_long(): pass
@pytest.mark.browser
def test_page(): pass
"""


def pytest_run(folder, *arguments):
    (folder / "test_cases.py").write_text(PLUGIN_CASES)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    chaos\n    browser\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.suites", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, "-c", str(folder / "pytest.ini"), str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )


def test_a_plain_run_leaves_the_long_suites_out_and_allows_skips(tmp_path):
    done = pytest_run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 2 skipped, 1 deselected" in done.stdout.splitlines()[-1]


def test_a_suite_runs_its_own_tests_alone(tmp_path):
    done = pytest_run(tmp_path, "--suite", "chaos")
    assert "1 passed, 4 deselected" in done.stdout.splitlines()[-1]


def test_no_skips_fails_every_skip_but_that_for_want_of_a_gpu(tmp_path):
    done = pytest_run(tmp_path, "--no-skips")
    assert done.returncode == 1
    assert "1 failed, 2 passed, 1 skipped, 1 deselected" in done.stdout.splitlines()[-1]
    assert "no such thing here" in done.stdout


def test_an_unknown_suite_is_wrong_usage(tmp_path):
    assert pytest_run(tmp_path, "--suite", "nonsense").returncode == 4
