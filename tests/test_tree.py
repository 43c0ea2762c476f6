"""The shape of the repository: which rooms there are, and what every one of them carries."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("packages/*", "kernels-*", "verification", "benchmarks")
ROOMS = sorted(file.parent for place in PLACES for file in ROOT.glob(f"{place}/pyproject.toml"))
each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)

# Joined here, so that this file names none of them either.
REGISTRIES = [".".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
NOT_OURS = {"__pycache__", "build", "dist", "runs", "site"}


def project(room: Path) -> dict[str, Any]:
    return dict(tomllib.loads((room / "pyproject.toml").read_text())["project"])


def module(room: Path) -> Path:
    return room / "src" / project(room)["name"].replace("-", "_")


def files_of_the_repository() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or not (name.startswith(".") or name in NOT_OURS)]
        yield from (Path(folder, name) for name in files)


def test_the_floors_of_the_house_exist() -> None:
    floors = {"core", "mechanisms", "accounting", "kernels-torch", "attention", "training", "dp-flash-attention"}
    assert floors | {"verification", "benchmarks"} <= {room.name for room in ROOMS}
    for name in ("README.md", "noxfile.py", "mkdocs.yml", "docs", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"):
        assert (ROOT / name).exists(), name


def test_all_packages_share_one_version() -> None:
    assert len({project(room)["version"] for room in ROOMS}) == 1


@each_room
def test_siblings_are_pinned_to_the_same_minor(room: Path) -> None:
    names = {project(other)["name"] for other in ROOMS}
    wanted = f"~={'.'.join(project(room)['version'].split('.')[:2])}.0"
    groups = [project(room)["dependencies"], *project(room).get("optional-dependencies", {}).values()]
    lines = [line.replace(" ", "") for group in groups for line in group]
    siblings = [line for line in lines if line.split("~")[0].split("[")[0] in names]
    assert [line for line in siblings if not line.endswith(wanted)] == []


@each_room
def test_each_package_carries_its_licence(room: Path) -> None:
    assert project(room)["license"] == "Apache-2.0"
    assert (room / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_room
def test_each_package_is_typed_and_tested(room: Path) -> None:
    assert (module(room) / "py.typed").is_file()
    assert list((room / "tests").rglob("test_*.py"))


@each_room
def test_torch_is_never_a_build_requirement(room: Path) -> None:
    requires = tomllib.loads((room / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [line for line in requires if line.startswith("torch")]


def test_no_file_names_a_package_registry() -> None:
    found = [
        (str(path.relative_to(ROOT)), host)
        for path in files_of_the_repository()
        for host in REGISTRIES
        if host.encode() in path.read_bytes()
    ]
    assert found == []
