"""The documentation tells the truth: its code runs, its commands parse, its pictures and numbers are current."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("packages/*/README.md"))]
BLOCK = re.compile(
    r"^(?P<mark><!-- no-run -->\n)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page that are not marked, joined parts of a page see one another."""
    text = page.read_text(encoding="utf-8")
    return [m["code"] for m in BLOCK.finditer(text) if m["language"] == language and not m["mark"]]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    # what the page on plugins tells the reader to install
    plugin, folder = ROOT / "verification" / "tests" / "plugins" / "power_of_two", tmp_path / "installed"
    if page.name == "plugins.md":
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder)]
        source = shutil.copytree(plugin, tmp_path / "source")
        subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ dpfa ")]


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands(page)}), ids=lambda command: command
)
def test_a_command_of_the_docs_is_one_that_dpfa_has(command: str) -> None:
    from typer.main import get_command

    from dp_flash_attention.cli import app

    found: Any = get_command(app)
    words = shlex.split(command.partition("#")[0])[1:]
    while hasattr(found, "commands"):
        assert words, f"{command}: a subcommand is missing"
        assert words[0] in found.commands, command
        found, words = found.commands[words[0]], words[1:]
    if "--help" not in words:
        found.make_context("dpfa", words)  # an unknown option or a missing argument raises


def test_the_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "figures" / "draw.py"), str(tmp_path)], check=True)
    for picture in tmp_path.iterdir():
        assert picture.read_text() == (DOCS / "assets" / picture.name).read_text(), "run docs/figures/draw.py"


def test_the_benchmark_page_shows_the_newest_records(tmp_path: Path) -> None:
    plot = pytest.importorskip("dpfa_benchmarks.plot")
    for file in plot.write_page(ROOT / "benchmarks" / "records", tmp_path):
        if file.suffix == ".md":  # a picture's bytes depend on the version of matplotlib
            assert file.read_text() == (DOCS / "benchmarks" / file.name).read_text(), "run dpfa_benchmarks plot"
        assert (DOCS / "benchmarks" / file.name).is_file()


def test_speed_and_memory_are_stated_by_records_only() -> None:
    figure = re.compile(r"\b\d+(\.\d+)?\s*(ms|MiB|GiB|× faster|x faster|times faster|TFLOP)\b")
    for page in PAGES:
        if page.parent != DOCS / "benchmarks":
            found = figure.search(page.read_text(encoding="utf-8"))
            assert found is None, f"{name(page)} says {found and found[0]!r}: figures belong into a record"
