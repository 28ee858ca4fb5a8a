"""What the environment is filled with, seen from outside: a stand-in for uv writes down what it is asked to install.

Each test has a small checkout of its own with a real, empty environment.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from local.install import ROOT

UV = """#!/bin/sh
echo "$*" >> "{notes}"
case "$*" in
{refusals}
esac
"""
DRY = "--dry-run --no-deps"


class Checkout:
    """A folder with the installer, two requirement files and an environment whose uv only takes notes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "local").mkdir(parents=True)
        for name in ("__init__.py", "install.py"):
            shutil.copy(ROOT / "local" / name, root / "local" / name)
        (root / "requirements.txt").write_text("alpha==1\ntorch==2.13.0\n")
        (root / "requirements-dev.txt").write_text("alpha==1\npytest==9\ntorch==2.13.0\n")
        venv.create(root / ".venv", with_pip=False, symlinks=True)
        self.bin = root / "bin"
        self.bin.mkdir()
        self.refuse()

    def refuse(self, *patterns: str) -> None:
        """From now on uv fails when its arguments match one of these patterns of the shell."""
        text = UV.format(notes=self.root / "notes", refusals="\n".join(f"*{p}*) exit 1 ;;" for p in patterns))
        program = self.root / ".venv" / "bin" / "uv"
        program.write_text(text)
        program.chmod(0o755)

    def ensure(self, need: str = "run", **environment: str) -> subprocess.CompletedProcess[str]:
        code = f"from local import install; install.enter('json.tool', ['--help'], need={need!r}); print('here')"
        return subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={"PATH": f"{self.bin}:{os.defpath}", "PYTHONPATH": str(self.root), "HOME": str(self.root), **environment},
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What was asked of uv, without what is the same each time."""
        path = self.root / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        same = f"pip install --python {self.root / '.venv' / 'bin' / 'python'} "
        return [line.removeprefix(same) for line in lines]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_without_a_gpu_torch_comes_first_and_as_the_cpu_build_from_where_pip_was_told_to_look(checkout):
    done = checkout.ensure(PIP_FIND_LINKS="/wheels /more")
    assert done.returncode == 0, done.stderr
    links = "--find-links /wheels --find-links /more"
    assert checkout.notes() == [
        f"{links} torch==2.13.0+cpu {DRY}",
        f"{links} torch==2.13.0+cpu",
        f"{links} -r {checkout.root / 'requirements.txt'}",
    ]
    # The process went on in the environment with the module it was given.
    assert "json.tool" in done.stdout


def test_where_no_folder_has_the_cpu_build_the_project_of_torch_is_asked(checkout):
    checkout.refuse("+cpu")
    assert checkout.ensure().returncode == 0
    assert checkout.notes()[1:3] == [f"--torch-backend cpu torch==2.13.0 {DRY}", "--torch-backend cpu torch==2.13.0"]


def test_the_plain_release_is_the_last_resort_and_is_said(checkout):
    checkout.refuse("+cpu", "torch-backend")
    done = checkout.ensure()
    assert done.returncode == 0
    assert checkout.notes()[2] == "torch==2.13.0"
    assert "gigabytes" in done.stderr


def test_a_driver_of_a_gpu_asks_for_the_plain_release(checkout):
    (checkout.bin / "nvidia-smi").write_text("#!/bin/sh\n")
    (checkout.bin / "nvidia-smi").chmod(0o755)
    assert checkout.ensure(PIP_FIND_LINKS="/wheels").returncode == 0
    assert checkout.notes()[0] == "torch==2.13.0"


def test_a_second_start_installs_nothing_until_the_requirements_change(checkout):
    assert checkout.ensure().returncode == 0
    count = len(checkout.notes())
    assert checkout.ensure().returncode == 0
    assert len(checkout.notes()) == count
    assert checkout.ensure("develop").returncode == 0
    assert checkout.notes()[-1].endswith("requirements-dev.txt")
    # What tests need holds what a hub needs.
    count = len(checkout.notes())
    assert checkout.ensure().returncode == 0
    assert len(checkout.notes()) == count
    (checkout.root / "requirements.txt").write_text("alpha==2\ntorch==2.13.0\n")
    assert checkout.ensure().returncode == 0
    assert len(checkout.notes()) > count


def test_a_failed_installation_says_what_failed_and_is_tried_again_at_the_next_start(checkout):
    checkout.refuse("requirements.txt")
    done = checkout.ensure()
    assert done.returncode == 1
    assert "requirements.txt could not be installed" in done.stderr
    assert not (checkout.root / ".venv" / "installed").exists()
    checkout.refuse()
    assert checkout.ensure().returncode == 0


def test_an_environment_whose_interpreter_is_gone_is_made_again(checkout):
    python = checkout.root / ".venv" / "bin" / "python"
    assert checkout.ensure().returncode == 0
    python.unlink()
    python.symlink_to("/no/such/python3.11")
    done = checkout.ensure(PIP_NO_INDEX="1")
    assert "making" in done.stderr
    assert python.resolve().exists()


def test_another_python_is_refused_with_what_is_wanted(tmp_path):
    root = tmp_path / "checkout"
    (root / "bin").mkdir(parents=True)
    for name in ("run", "python.sh"):
        shutil.copy(ROOT / "bin" / name, root / "bin" / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho "Python 3.9.2"\n')
    (tools / "python3").chmod(0o755)
    for name in ("dirname", "basename", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [str(root / "bin" / "run")], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or 3.12 (met: Python 3.9.2)" in done.stderr
