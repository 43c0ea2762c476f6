"""The example on real text: how texts are read, that encoder and release agree, and that a small run has all parts."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from dpfa_benchmarks.real_text import __main__ as command
from dpfa_benchmarks.real_text import docstrings, page, tasks
from dpfa_benchmarks.real_text.public_encoder import DIM, PublicEncoder

SOURCE = '''
"""The first words of a module."""
x = """No docstring:
begins in the middle of a line
"""

def f():
    r\'\'\'One of "three" single quotes.\'\'\'

class C:
    """
    Several
    lines.
    """
'''


@pytest.fixture(scope="module")
def texts() -> list[docstrings.Text]:
    return docstrings.read("networkx", 600)


@pytest.fixture(scope="module")
def encoder(texts: list[docstrings.Text]) -> PublicEncoder:
    return PublicEncoder(texts)


def test_docstrings_are_strings_in_three_quotes_that_begin_a_line() -> None:
    found = [" ".join(text.split()) for text in docstrings._docstrings(SOURCE)]
    assert found == ["The first words of a module.", 'One of "three" single quotes.', "Several lines."]


def test_texts_name_no_package_and_are_no_copies(texts: list[docstrings.Text]) -> None:
    assert len(texts) == 600
    assert not [word for text in texts for word in text if word in docstrings.NAMES]
    assert len({text[: docstrings.COPY] for text in texts}) == 600
    assert max(map(len, texts)) == docstrings.WORDS
    assert texts[:50] == docstrings.read("networkx", 50)
    with pytest.raises(ValueError, match="'no_such_package' must be installed"):
        docstrings.read("no_such_package")


def test_a_text_alone_decides_where_it_goes(texts: list[docstrings.Text]) -> None:
    parts = {seed: [docstrings.in_test(text, seed) for text in texts] for seed in (0, 1)}
    assert parts[0] != parts[1]
    assert all(abs(sum(part) - 120) < 60 for part in parts.values())  # six standard deviations
    assert [docstrings.in_test(text, 0) for text in texts[::-1]] == parts[0][::-1]


def test_what_the_attention_releases_is_the_pooled_row_of_the_text_alone(
    encoder: PublicEncoder, texts: list[docstrings.Text]
) -> None:
    ids = encoder.ids(texts[:40])
    released = tasks._released(encoder, ids, math.inf, None).features[:, 0]
    by_hand = tasks.clipped(encoder.pool(ids))
    assert torch.allclose(released, by_hand, atol=1e-4)
    assert torch.allclose(encoder.pool(ids[3:4])[0], encoder.pool(ids)[3], atol=1e-5)
    assert 0.6 < (encoder.pool(encoder.ids(texts)).norm(dim=1) >= 1).float().mean() < 0.8
    # the length is part of the row: padding has no weight
    assert encoder(ids)[:, :, DIM][ids == 0].exp().max() < 1e-12


def test_the_discriminant_finds_the_nearest_mean_in_the_metric_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    away = x[:, None] - means
    nearest = torch.einsum("nci,ij,ncj->nc", away, covariance.inverse(), away).argmin(1)
    assert torch.equal(tasks.discriminant(means, covariance)(x).argmax(1), nearest)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A run with few texts of small packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "PRIVATE", ("fontTools", "matplotlib"))
        patch.setattr(docstrings, "PUBLIC", ("networkx",))
        patch.setattr(tasks, "EPSILONS", (4.0, math.inf))
        patch.setattr(tasks, "QUERIES", 50)
        return command.measured(1, 400, ["--seeds", "1"])


def test_a_small_run_has_every_task_and_says_what_it_covers(record: dict[str, Any]) -> None:
    line = json.loads(json.dumps(record, allow_nan=False))
    tasks_of = {run["task"] for run in line["runs"] if run["epsilon"] == 4.0}
    assert tasks_of == {"memory", "features", "features, sent", "features and labels", "bag of words"}
    for run in line["runs"]:
        assert 0.0 <= run["accuracy"] <= 1.0
        if run["epsilon"] is not None and run["task"] != "bag of words":
            assert 0.0 < run["epsilon_spent"] <= 4.0
            assert run["noise_std"] > 0.0
    covers = {(run["task"], run["epsilon"]): run.get("covers") for run in line["runs"]}
    assert covers["features", 4.0] == "features only"
    assert covers["features and labels", 4.0] == "features and labels"
    assert covers["features", None] == "nothing"
    assert line["private"] == {"fontTools": 400, "matplotlib": 400}
    # without noise, word vectors tell two libraries apart
    exact = next(run for run in line["runs"] if (run["task"], run["epsilon"]) == ("features", None))
    assert exact["accuracy"] > 0.6


def test_the_page_says_what_the_record_holds(record: dict[str, Any], tmp_path: Path) -> None:
    file, out = tmp_path / "records.jsonl", tmp_path / "page.md"
    with pytest.raises(ValueError, match="run with --record"):
        page.newest(file)
    file.write_text(json.dumps(record) + "\n")
    assert command.main(["--page", str(out), "--of", str(file)]) == 0
    text = out.read_text(encoding="utf-8")
    for part in ("labels not covered", f"{record['seconds']:.0f} s", "| ∞ |", record["command"]):
        assert part in text
    assert "<svg" in out.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_page_in_the_docs_shows_the_newest_record() -> None:
    root = Path(__file__).resolve().parents[2]
    record, shown = page.newest(root / page.RECORD), root / "docs" / "benchmarks" / "real-text.md"
    assert shown.read_text(encoding="utf-8") == page.page(record, "real-text.svg"), (
        "run dpfa_benchmarks.real_text --page"
    )
    # a picture's bytes depend on the version of matplotlib
    carried = re.search(r"<dc:description>(.*?)</dc:description>", shown.with_suffix(".svg").read_text(), re.DOTALL)
    assert carried is not None
    assert unescape(carried[1]) == page.description(record)
    assert record["seconds"] < 120
    assert record["dirty"] is False


def test_intervals_are_students() -> None:
    mean, half = page.mean_and_half_width([0.5, 0.6, 0.7])
    assert (mean, half) == pytest.approx((0.6, 4.302653 * 0.1 / math.sqrt(3)), rel=1e-5)
    assert math.isnan(page.mean_and_half_width([0.5])[1])


def test_too_few_texts_or_seeds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--seeds", "0"], ["--texts", "10"]):
        with pytest.raises(SystemExit):
            command.main(wrong)
        assert "--seeds must be at least 1 and --texts at least 500" in capsys.readouterr().err
