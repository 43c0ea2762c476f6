"""What the README tells a newcomer to type is what exists, and what is checked."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOX = "python3 -m venv .venv-nox && .venv-nox/bin/pip install -q nox && .venv-nox/bin/nox -s"
SESSIONS = {"demo", "tests", "light", "lint", "verify", "bench", "docs", "build", "pip_check"}


def lines(name: str) -> list[str]:
    return [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


def nox_sessions() -> set[str]:
    """Names of the functions that noxfile.py decorates as sessions; nox itself lives in another environment."""
    noxfile = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in noxfile.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any(ast.unparse(d).startswith("nox.session") for d in f.decorator_list)}


def test_readme_sets_up_nox_in_exactly_two_commands() -> None:
    commands = [line for line in lines("README.md") if "-m venv .venv-nox" in line]
    assert commands == [f"{NOX} demo", f"{NOX} tests"]


def test_ci_runs_the_tests_command_of_the_readme() -> None:
    assert lines(".ci/run").count(f"{NOX} tests") == 1


def test_ci_is_executable() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 == 0o111


def test_nox_lists_the_promised_sessions() -> None:
    assert nox_sessions() == SESSIONS
