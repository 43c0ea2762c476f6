"""Every chore of the repository: `nox -l` lists them.

Environments live in `.nox/` and are kept; a second run installs nothing unless a pyproject.toml changed.
To begin afresh, delete `.nox/`.

`DPFA_TORCH` chooses the torch: what pip should install (a requirement, the path of a wheel), or the path of a
Python that has torch already, whose packages then shine through as with `--system-site-packages`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import nox
from nox.project import load_toml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info < (3, 11):  # noqa: UP036 (pip looks at no version here: nox runs from any Python)
    sys.exit(f"Python 3.11 or newer is needed, got {sys.version.split()[0]}: make .venv-nox with a newer one.")

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "light", "docs", "build", "pip_check"]

# OpenMP threads that spin while they wait stand in each other's way wherever anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TORCH = os.environ.get("DPFA_TORCH") or "torch==2.13.0"
LIGHT = ("core", "mechanisms", "accounting")
BUILD_TOOLS = ("hatchling>=1.26", "editables>=0.5", "scikit-build-core>=0.11", "cmake>=3.26", "ninja")
COMPILERS = ("c++", "g++", "clang++", "cl")
RUFF = "ruff~=0.17.5"
LINTERS = (RUFF, "mypy~=2.4", "import-linter~=2.16", "numpy>=1.26")
DOCS = ("mkdocs<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=0.30", RUFF)  # ruff formats the signatures


class Room(NamedTuple):
    """One installable package, as its pyproject.toml describes it."""

    path: Path
    distribution: str
    requirements: dict[str, list[Requirement]]  # by extra; under "" those that are always needed
    scripts: list[str]

    @property
    def extras(self) -> set[str]:
        return set(self.requirements) - {""}

    def needs(self, extras: set[str]) -> list[Requirement]:
        return [need for extra in ("", *sorted(extras & self.extras)) for need in self.requirements[extra]]

    def editable(self, extras: set[str]) -> list[str]:
        wanted = ",".join(sorted(extras & self.extras))
        return ["-e", f"{self.path}[{wanted}]" if wanted else str(self.path)]


def read_room(pyproject: Path) -> Room:
    project = load_toml(pyproject)["project"]
    listed = {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
    needs = {extra: [Requirement(line) for line in lines] for extra, lines in listed.items()}
    return Room(pyproject.parent, project["name"], needs, list(project.get("scripts", {})))


def find_rooms() -> dict[str, Room]:
    """Every package by the name of its folder, lower floors first."""
    patterns = ("packages/*", "kernels-*", "verification", "benchmarks")
    files = sorted(file for pattern in patterns for file in ROOT.glob(f"{pattern}/pyproject.toml"))
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        print("No C++ compiler found: packages with native code are left out, torch does their work.")
        files = [file for file in files if not (file.parent / "CMakeLists.txt").is_file()]
    rooms = {room.distribution: room for room in map(read_room, files)}
    below = {name: [n.name for n in room.needs(set()) if n.name in rooms] for name, room in rooms.items()}
    return {rooms[name].path.name: rooms[name] for name in TopologicalSorter(below).static_order()}


ROOMS = find_rooms()
FOLDER = {room.distribution: folder for folder, room in ROOMS.items()}
Chosen = dict[str, set[str]]  # folder names of rooms, with the extras wanted of each


def with_siblings(wanted: Chosen) -> Chosen:
    """The rooms wanted and all rooms that these need."""
    chosen: Chosen = {}
    waiting = list(wanted.items())
    while waiting:
        folder, extras = waiting.pop()
        if folder in chosen and extras <= chosen[folder]:
            continue
        chosen[folder] = chosen.get(folder, set()) | extras
        needs = ROOMS[folder].needs(chosen[folder])
        waiting += [(FOLDER[need.name], set(need.extras)) for need in needs if need.name in FOLDER]
    return {folder: chosen[folder] for folder in ROOMS if folder in chosen}


def torch_requirements(rooms: Chosen) -> list[Requirement]:
    return [need for folder in rooms for need in ROOMS[folder].needs(rooms[folder]) if need.name == "torch"]


def python_of(home: Path) -> str:
    return str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def ask(session: nox.Session, python: str, code: str) -> str:
    return str(session.run(python, "-c", code, silent=True, log=False, external=True)).strip()


def pip_install(session: nox.Session, python: str, *arguments: str) -> None:
    session.run(python, "-m", "pip", "install", "--disable-pip-version-check", *arguments, external=True)


def new_venv(session: nox.Session, home: Path) -> None:
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(home), external=True)


def torch_layer(session: nox.Session, needed: list[Requirement]) -> str:
    """The folder of the one torch that all environments see; installed on first use."""
    python = TORCH
    if not Path(TORCH).is_file() or TORCH.endswith(".whl"):
        home = ROOT / ".nox" / f"torch-{PYTHON}"
        python, stamp = python_of(home), home / "installed"
        if not stamp.is_file() or stamp.read_text() != TORCH:
            shutil.rmtree(home, ignore_errors=True)
            new_venv(session, home)
            pip_install(session, python, TORCH)
            stamp.write_text(TORCH)
    found = (
        "import importlib.metadata as m, importlib.util as u, sys; spec = u.find_spec('torch');"
        "print(*sys.version_info[:2], sep='.');"
        "print(m.version('torch') if spec else '');"
        "print(spec.origin if spec else '')"
    )
    python_version, version, origin = (ask(session, python, found) + "\n\n").split("\n")[:3]
    if python_version != PYTHON:
        session.error(f"DPFA_TORCH is a Python {python_version}, nox runs on {PYTHON}: use the same version")
    if not version or not all(need.specifier.contains(version, prereleases=True) for need in needed):
        session.error(f"{needed[0]} is needed, got {version or 'none'} from {TORCH}: set DPFA_TORCH")
    return str(Path(origin).parents[1])


def refuse_strangers(session: nox.Session, python: str) -> None:
    """Stop if a package of ours came from anywhere but this checkout.

    Our names stand on no index that we own, so a stranger could publish one of them. pip is therefore always
    given files or folders of this checkout for all of them, and then asks no index for these names; this looks
    whether it was so.
    """
    listing = session.run(python, "-m", "pip", "inspect", "--local", silent=True, log=False, external=True)
    for found in json.loads(listing[listing.index("{") :])["installed"]:
        name, url = canonicalize_name(found["metadata"]["name"]), found.get("direct_url", {}).get("url", "")
        if name in FOLDER and not url.startswith(f"{ROOT.as_uri()}/"):
            session.error(f"{name} must come from {ROOT}, got {url or 'an index'}: delete .nox and report this")


def described_by(room: Room) -> list[Path]:
    """The files whose change asks for a new installation: settings and native code."""
    return [room.path / "pyproject.toml", *sorted(room.path.glob("CMakeLists.txt")), *sorted(room.path.glob("cpp/*"))]


def move_in(session: nox.Session, home: Path, rooms: Chosen) -> str:
    """Install rooms, editable, into an environment, unless that was done; return its Python."""
    python, stamp = python_of(home), home / "installed"
    arguments = [argument for folder, extras in rooms.items() for argument in ROOMS[folder].editable(extras)]
    described = [file.read_text() for folder in rooms for file in described_by(ROOMS[folder])]
    state = hashlib.sha256("\n".join([TORCH, *arguments, *described]).encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != state:
        stamp.unlink(missing_ok=True)
        pip_install(session, python, "--quiet", *BUILD_TOOLS, "pytest>=8")
        pip_install(session, python, "--quiet", "--no-build-isolation", *arguments)
        refuse_strangers(session, python)
        stamp.write_text(state)
    return python


def environment(session: nox.Session, name: str, rooms: Chosen) -> str:
    """A kept environment with these rooms; torch, where they need it, is the shared one."""
    home = ROOT / ".nox" / f"{name}-{PYTHON}"
    if not (home / "installed").is_file():
        new_venv(session, home)
    show_torch(session, python_of(home), rooms)
    return move_in(session, home, rooms)


def show_torch(session: nox.Session, python: str, rooms: Chosen) -> None:
    """Make the shared torch visible to an environment whose rooms need one."""
    if needed := torch_requirements(rooms):
        site_packages = ask(session, python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(site_packages, "shared-torch.pth").write_text(torch_layer(session, needed) + "\n")


def everything(session: nox.Session) -> str:
    """The environment with all rooms and all their extras."""
    return environment(session, "everything", {folder: room.extras for folder, room in ROOMS.items()})


def dpfa(session: nox.Session, *arguments: str) -> None:
    command = Path(everything(session)).with_name("dpfa")
    session.run(str(command), *arguments, external=True)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Set everything up and run the main job: `dpfa train`, with the arguments after `--`."""
    dpfa(session, "train", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests in one environment; `-- core training` tests each of these alone with what it depends on.

    Other arguments after `--` go to pytest.
    """
    alone = [argument for argument in session.posargs if argument in ROOMS]
    options = [argument for argument in session.posargs if argument not in ROOMS]
    for folder in alone:
        python = environment(session, f"alone-{folder}", with_siblings({folder: {"test"}}))
        session.run(python, "-m", "pytest", *options, str(ROOMS[folder].path / "tests"), external=True)
    if not alone:
        folders = [str(path) for path in (ROOT, *(room.path for room in ROOMS.values()))]
        found = [f"{folder}/tests" for folder in folders if Path(folder, "tests").is_dir()]
        session.run(everything(session), "-m", "pytest", *options, *found, external=True)


@nox.session
def light(session: nox.Session) -> None:
    """Tests of core, mechanisms and accounting where torch is not installed; another Python: `-P 3.13`."""
    home = Path(session.virtualenv.location)
    python = move_in(session, home, with_siblings({folder: {"test"} for folder in LIGHT}))
    session.run(python, "-c", "import importlib.util as u; assert u.find_spec('torch') is None, 'torch is here'")
    session.run(python, "-m", "pytest", *session.posargs, *(str(ROOMS[folder].path / "tests") for folder in LIGHT))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, mypy strict on core, mechanisms and accounting, and the import contracts."""
    session.install("--quiet", *LINTERS)
    sources = {folder: str(room.path / "src") for folder, room in ROOMS.items()}
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *(sources[folder] for folder in LIGHT))
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(sources.values())})


@nox.session(venv_backend="none")
def verify(session: nox.Session) -> None:
    """Check every installed mechanism, accountant and backend: `dpfa verify`, with the arguments after `--`."""
    dpfa(session, "verify", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Benchmarks: the arguments after `--` go to `python -m dpfa_benchmarks`; without any, all cases run."""
    session.run(everything(session), "-m", "dpfa_benchmarks", *(session.posargs or ["run"]), external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, strict: a broken link or an unknown name is an error."""
    session.install("--quiet", *DOCS)
    # mkdocs-material prints an advertisement-like warning on every build, which hides real ones.
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """Wheels of all rooms into dist/, then each installed alone, outside the checkout, and imported whole.

    dist/constraints.txt ties our names to these files: `pip install -c dist/constraints.txt dpfa-core` can take
    them from nowhere else.
    """
    session.install("--quiet", *BUILD_TOOLS)
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    folders = [str(room.path) for room in ROOMS.values()]
    session.run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={dist}", *folders)
    wheels = {room.distribution: next(dist.glob(f"{wheel_prefix(room)}-*.whl")) for room in ROOMS.values()}
    lines = [f"{distribution} @ {wheel.as_uri()}\n" for distribution, wheel in wheels.items()]
    (dist / "constraints.txt").write_text("".join(lines))
    if len({wheel.name.split("-")[1] for wheel in wheels.values()}) != 1:
        session.error(f"All packages share one version number, got {sorted(w.name for w in wheels.values())}")
    for room in ROOMS.values():
        check_contents(session, room, wheels[room.distribution])
        with tempfile.TemporaryDirectory() as elsewhere:
            install_alone(session, room, Path(elsewhere))


def wheel_prefix(room: Room) -> str:
    return room.distribution.replace("-", "_")


def check_contents(session: nox.Session, room: Room, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        licence = next((name for name in files if name.endswith(".dist-info/licenses/LICENSE")), None)
        if licence is None or archive.read(licence) != (ROOT / "LICENSE").read_bytes():
            session.error(f"{wheel.name} must carry the LICENSE of the repository")
        if f"{wheel_prefix(room)}/py.typed" not in files:
            session.error(f"{wheel.name} must carry {wheel_prefix(room)}/py.typed")


def install_alone(session: nox.Session, room: Room, elsewhere: Path) -> None:
    """What a user does with one wheel; every module must import without any extra."""
    home = elsewhere / "venv"
    new_venv(session, home)
    python = python_of(home)
    show_torch(session, python, with_siblings({room.path.name: set()}))
    with session.chdir(elsewhere):
        # Not compiled: most of what comes along is never imported here.
        options = ("--quiet", "--no-compile", f"--constraint={ROOT}/dist/constraints.txt")
        pip_install(session, python, *options, room.distribution)
        refuse_strangers(session, python)
        session.run(python, "-m", "pip", "check", external=True)
        session.run(python, "-I", f"{ROOT}/.ci/import_everything.py", wheel_prefix(room), external=True)
        for script in room.scripts:
            session.run(str(Path(python).with_name(script)), "--help", silent=True, external=True)


@nox.session(venv_backend="none")
def pip_check(session: nox.Session) -> None:
    """No two packages of the full environment contradict each other."""
    session.run(everything(session), "-m", "pip", "check", external=True)
