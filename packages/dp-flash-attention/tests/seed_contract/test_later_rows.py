"""What is promised and not there yet, and the page that says where every promised name is.

A later name fails here as long as it is later; when it comes, it gets a test of its own.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs" / "reference" / "names.md"

FRONT = "packages/dp-flash-attention"

LATER = (
    # what is promised, the room that will hold it, where it is looked for
    ("make_model_differentially_private", FRONT, "dp_flash_attention:make_model_differentially_private"),
    ("the loss of a converted model", FRONT, "dp_flash_attention:make_model_differentially_private"),
    ("finetune.DPLoRA", FRONT, "dp_flash_attention.finetune:DPLoRA"),
    (
        "comparative_research_framework.ComparativeResearchFramework",
        FRONT,
        "dp_flash_attention.comparative_research_framework:ComparativeResearchFramework",
    ),
    (
        "comparative_research_framework.BenchmarkType",
        FRONT,
        "dp_flash_attention.comparative_research_framework:BenchmarkType",
    ),
    (
        "comparative_research_framework.create_standard_baselines",
        FRONT,
        "dp_flash_attention.comparative_research_framework:create_standard_baselines",
    ),
    ("production_config.ProductionDPConfig", FRONT, "dp_flash_attention.production_config:ProductionDPConfig"),
    ("server", FRONT, "dp_flash_attention.server:main"),
    ("CUDA kernels", "kernels-cuda", "kernels-cuda/pyproject.toml"),
    ("Triton kernels", "kernels-triton", "kernels-triton/pyproject.toml"),
    ("benchmarks/speed_benchmark.py", "benchmarks", "benchmarks/speed_benchmark.py"),
    ("benchmarks/memory_benchmark.py", "benchmarks", "benchmarks/memory_benchmark.py"),
    ("benchmarks/benchmark_enhanced_dp.py", "benchmarks", "benchmarks/benchmark_enhanced_dp.py"),
    ("tests/privacy_tests.py", "verification", "tests/privacy_tests.py"),
    ("tests/formal_verification.py", "verification", "tests/formal_verification.py"),
    ("examples/enhanced_training.py", "examples", "examples/enhanced_training.py"),
    (
        "examples/research_breakthrough_validation.py",
        "examples",
        "examples/research_breakthrough_validation.py",
    ),
    ("quality_gates.py", "verification", "quality_gates.py"),
    ("deployment/Dockerfile", "deployment", "deployment/Dockerfile"),
    ("deployment/deployment.yaml", "deployment", "deployment/deployment.yaml"),
    ("deployment/prometheus.yml", "deployment", "deployment/prometheus.yml"),
    ("deployment/deployment_config.py", "deployment", "deployment/deployment_config.py"),
    ("docs/cuda-kernels.md", "docs", "docs/cuda-kernels.md"),
    ("docs/privacy-analysis.md", "docs", "docs/privacy-analysis.md"),
    ("docs/performance-tuning.md", "docs", "docs/performance-tuning.md"),
    ("notebooks", "notebooks", "notebooks/README.md"),
)


def find(where: str) -> None:
    """Import "module:name", or see that a file exists; raises where it is not there."""
    module, colon, name = where.partition(":")
    if colon:
        getattr(import_module(module), name)
    elif not (ROOT / where).exists():
        raise FileNotFoundError(where)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, id=row, marks=pytest.mark.xfail(reason=f"{row} belongs to {room}", strict=True))
        for row, room, where in LATER
    ],
)
def test_later(where: str) -> None:
    find(where)


def test_what_is_there_is_found() -> None:
    find("dp_flash_attention:DPFlashAttention")
    find("packages/dp-flash-attention/pyproject.toml")


def rows(title: str) -> list[list[str]]:
    """Cells of the table under a heading of the page."""
    part = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


@pytest.mark.parametrize("row", rows("There"), ids=lambda row: row[0])
def test_a_name_is_where_the_page_says(row: list[str]) -> None:
    names, where, room = row
    found = re.findall(r"`([^`]+)`", names)
    assert found
    for name in found:
        value = import_module(where.strip("`"))
        for part in name.split("."):
            value = getattr(value, part)
    assert (ROOT / room.strip("`")).is_dir()


def test_the_page_lists_exactly_what_is_later() -> None:
    assert [(name.strip("`"), room.strip("`")) for name, room in rows("Not there yet")] == [x[:2] for x in LATER]
