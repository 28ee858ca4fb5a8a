"""The environment of a checkout: `.venv` at its root, filled once and again when the requirements change.

Runs on the interpreter that a script found, before anything is installed, so it uses the standard library alone.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
SUPPORTED = ((3, 11), (3, 12))
PROBE_SECONDS = 30

# The router and the workers live in what `requirements.txt` lists; tests and checks need the second file too, which
# contains the first.
FILES = {"run": "requirements.txt", "develop": "requirements-dev.txt"}


class InstallError(Exception):
    """The environment cannot be made; the message says what to do."""


def enter(module: str, arguments: Sequence[str], *, need: str) -> None:
    """Go on in the environment: returns when this process runs in it, else replaces the process by `module` there.

    `need` is `run` or `develop`. A failure ends the process with a message and exit status 1.
    """
    try:
        ensure(need=need)
    except InstallError as error:
        raise SystemExit(f"{error}") from error
    if not _is_inside():
        _replace_process(module, arguments)


def _replace_process(module: str, arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    os.execve(PYTHON, [str(PYTHON), "-P", "-m", module, *arguments], environment)  # noqa: S606


def ensure(*, need: str) -> None:
    """Make `.venv` and install what is wanted, unless the stamp says that it was done. One process at a time."""
    if _is_done(need):
        return
    with _alone():
        if _is_done(need):
            return
        _check_version()
        if not _is_usable():
            _make_venv()
        uv = _uv()
        _install_torch(uv)
        _tell(f"installing {FILES[need]}")
        _call([*uv, *_find_links(), "-r", str(ROOT / FILES[need])], what=FILES[need])
        done = {need, "run"} | {line.split()[0] for line in _stamp_lines() if line in _wanted_lines()}
        STAMP.write_text("".join(line + "\n" for line in _wanted_lines() if line.split()[0] in done))


def _is_done(need: str) -> bool:
    has_it = any(line.split()[0] == need for line in _stamp_lines() if line in _wanted_lines())
    return has_it and _is_usable()


def _is_inside() -> bool:
    """Whether this process runs in the environment itself."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def _is_usable() -> bool:
    """Whether the environment's interpreter starts: it may be gone, or be closed to this user."""
    return _is_inside() or _works([str(PYTHON), "-c", ""])


def _stamp_lines() -> list[str]:
    try:
        return STAMP.read_text().splitlines()
    except FileNotFoundError:
        return []


def _wanted_lines() -> list[str]:
    """One line per need, with the digest of its file: the stamp of an environment that has all."""
    return [f"{need} {hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}" for need, name in FILES.items()]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A lock on the checkout's folder itself, so that no file is left behind."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_version() -> None:
    if sys.version_info[:2] in SUPPORTED:
        return
    met = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise InstallError(
        f"Python {met} at {sys.executable}: wanted 3.11 or 3.12, for which every package has a ready-made file.\n"
        "Install one of them and name it, such as: PYTHON=/usr/bin/python3.11 bin/run"
    )


def _make_venv() -> None:
    """`.venv` by the standard library, else by whatever this machine has for the purpose."""
    _tell(f"making {VENV} with {sys.executable}")
    shutil.rmtree(VENV, ignore_errors=True)
    ways = [[sys.executable, "-m", "venv", str(VENV)], [sys.executable, "-m", "virtualenv", "-q", str(VENV)]]
    if uv := shutil.which("uv"):
        ways.insert(1, [uv, "venv", "--seed", "--python", sys.executable, str(VENV)])
    if any(_works(way) for way in ways) or _venv_by_fetched_virtualenv():
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise InstallError(
        f"{sys.executable} can make no environment: it has neither venv with pip nor virtualenv, and pip could not get "
        f"one.\nOn Debian or Ubuntu: apt-get install python{version}-venv"
    )


def _venv_by_fetched_virtualenv() -> bool:
    """Debian ships pip without venv to some; `--target` leaves the system's packages alone."""
    with tempfile.TemporaryDirectory() as folder:
        if not _works([sys.executable, "-m", "pip", "install", "-q", "--target", folder, "virtualenv"]):
            return False
        return _works([sys.executable, "-m", "virtualenv", "-q", str(VENV)], {"PYTHONPATH": folder})


def _works(argv: Sequence[str], extra: dict[str, str] | None = None, *, seconds: float | None = None) -> bool:
    """Whether the command ends well; what it says is kept from the terminal."""
    environment = {**os.environ, **(extra or {})}
    try:
        done = subprocess.run(list(argv), env=environment, capture_output=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _uv() -> list[str]:
    """The command that installs into `.venv`: uv, fetched by pip, or pip itself where uv is not to be had."""
    program = VENV / "bin" / "uv"
    if not program.exists():
        _works([str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv"])
    if not program.exists():
        return [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    return [str(program), "pip", "install", "--python", str(PYTHON)]


def _uses_uv(install: Sequence[str]) -> bool:
    return Path(install[0]).name == "uv"


def _install_torch(install: Sequence[str]) -> None:
    """Install torch first, because its plain release brings gigabytes of CUDA to machines that cannot use them.

    The order is: what is there already; the plain release where a GPU or macOS is; the CPU build from the folders that
    pip was told of; the CPU build from the PyTorch project; the plain release.
    """
    pin = next(line for line in (ROOT / FILES["run"]).read_text().splitlines() if line.startswith("torch=="))
    if _works(
        [str(PYTHON), "-c", f"import importlib.metadata as m; m.version('torch').startswith('{pin[7:]}') or 1/0"]
    ):
        return
    plain = [*install, pin]
    if sys.platform == "darwin" or _works(["nvidia-smi"], seconds=PROBE_SECONDS):
        _tell("installing torch")
        _call(plain, what=pin)
        return
    # The local version names the CPU build, so that a folder without it is passed over.
    ways = [[*install, *_find_links(), f"{pin}+cpu"]]
    if _uses_uv(install):
        ways.append([*install, "--torch-backend", "cpu", pin])
    # A closed network is given up quickly here; the later installation has the usual patience.
    hurry = _network() | {
        "UV_HTTP_TIMEOUT": "5",
        "UV_HTTP_CONNECT_TIMEOUT": "5",
        "UV_HTTP_RETRIES": "0",
        "PIP_RETRIES": "0",
    }
    for way in ways:
        if _works([*way, "--dry-run", "--no-deps"], hurry, seconds=PROBE_SECONDS):
            _tell("installing torch for the CPU")
            _call(way, what=pin)
            return
    _tell("the CPU build of torch is out of reach: taking the plain release, which may be several gigabytes")
    _call(plain, what=pin)


def _find_links() -> list[str]:
    """Where pip was told to look for files; uv reads neither pip's settings nor its environment."""
    configured = os.environ.get("PIP_FIND_LINKS") or _pip_setting("find-links")
    return [part for place in configured.split() for part in ("--find-links", place)]


def _pip_setting(name: str) -> str:
    """A setting of pip for installing or for all commands, in whichever of its files; empty when there is none."""
    for section in ("install", "global"):
        command = [str(PYTHON), "-m", "pip", "config", "get", f"{section}.{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


@functools.cache
def _network() -> dict[str, str]:
    """What uv must be told: it reads neither pip's settings nor, unless asked, the system's certificates."""
    told = {"UV_SYSTEM_CERTS": "1"}
    certificate = os.environ.get("PIP_CERT") or _pip_setting("cert")
    if certificate and "SSL_CERT_FILE" not in os.environ:
        told["SSL_CERT_FILE"] = certificate
    index = os.environ.get("PIP_INDEX_URL") or _pip_setting("index-url")
    if index and "UV_DEFAULT_INDEX" not in os.environ:
        told["UV_DEFAULT_INDEX"] = index
    return told


def _call(argv: Sequence[str], *, what: str) -> None:
    """Run an installation, its output on stderr; a failure names the requirement and keeps the tool's own words."""
    environment = {**os.environ, **_network()}
    if subprocess.run(list(argv), env=environment, stdout=sys.stderr, check=False).returncode:
        raise InstallError(f"{what} could not be installed; the reason stands above. Run the same command again.")


def _tell(text: str) -> None:
    sys.stderr.write(f"moerge: {text}\n")
    sys.stderr.flush()
