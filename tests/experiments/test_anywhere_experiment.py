"""The rows of `experiments.anywhere`: every column from the figure that its title names."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import write_mnist

import flowfactor as ff

if not Path(__file__).parents[2].joinpath("experiments").is_dir():  # any other failure to import them is one
    pytest.skip("needs a checkout", allow_module_level=True)

from experiments.anywhere import HEADER, joined, measure, row


def test_a_row_holds_the_figures_of_its_columns(tmp_path: Path) -> None:
    sizes = {"encoder": {"widths": [4]}, "decoder": {"widths": [4]}, "hidden": (4, 4)}
    model = ff.models.build_vae((3, 28, 28), 3, 4, **sizes, solver={"method": "euler", "step_size": 1.0})
    found = measure(model, str(write_mnist(tmp_path, 6)), 2)
    data = ff.data.MNIST(str(tmp_path), "test", start="any")
    expected = ff.metrics.combining_errors(model, data, limit=2)
    assert {name: found[name] for name in expected} == expected
    titles = [title.strip() for title in HEADER.splitlines()[0].strip("| ").split("|")]
    cells = dict(zip(titles, row("some", found).strip("| ").split(" | "), strict=True))
    three = found["together"]["error"]["scaling+rotation+colouring"]
    single = sum(found["single"]["error"].values()) / 3
    assert cells["three at once"] == f"{three:.0f} ({three / single:.2f})"
    assert cells["backward"] == joined(found["backward"]["error"].values())
    assert cells["order"] == joined(found["order"]["mean"], 2) and len(found["order"]["mean"]) == 3
    assert found["together"]["over_singles"]["scaling+rotation+colouring"] == pytest.approx(three / single)
