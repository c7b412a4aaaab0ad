"""The report of a benchmark, from runs whose figures are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from flowfactor.comparison import report as module
from flowfactor.comparison import write_report
from flowfactor.comparison.report import markdown
from flowfactor.comparison.tables import Spread

EVALUATE = {"images": 100, "likelihood_images": 10, "likelihood_samples": 8, "latent_images": 10, "search_images": 5}
EVALUATE |= {"factor_samples": 0, "vp_images": 50, "resamples": 2}


def run(variant: str, seed: int, errors: list[float], bound: float | None = None, **more) -> dict:
    made = {
        "variant": variant,
        "method": variant,
        "title": f"what {variant} is",
        "seed": seed,
        "budget": {"steps": None, "minutes": 1.5},
        "config": {"data": {"name": "digits", "steps": 8, "root": f"/{seed}"}, "train": {"clock": "processor"}},
        "evaluate": EVALUATE,
        "command": f"flowfactor benchmark digits --seeds {seed}",
        "flows": ["turn", "grow"],
        "steps_made": 1000 + seed,
        "seconds": 90.0,
        "parameters": 12345,
        "figures": {
            "equivariance": {"mean": errors, "doing_nothing": [900.0, 800.0], "count": 100},
            "likelihood": {"missing": "it has none"}
            if bound is None
            else {"per_frame": bound, "samples": 8, "count": 20, "likelihood": "bernoulli", "objective": "path"},
            "latent_equivariance": {"mean": [0.2, 0.4]},
            "factor_accuracy": {"missing": "k is given"},
            "vp": {"value": 0.75},
            "mig": {"missing": "no labels"},
            "dci": {"missing": "no labels"},
            "sap": {"missing": "no labels"},
        },
        "versions": {"flowfactor": "1.2", "torch": "2.9", "machine": "Linux"},
        "machine": {"processor": "Abacus", "cores": 2, "threads": 1, "accelerator": None, "system": "Linux x86_64"},
    }
    return made | more


RUNS = [
    run("ours", 0, [100.0, 70.0], -120.0),
    run("ours", 1, [110.0, 72.0], -122.0),
    run("ours", 2, [120.0, 74.0], -124.0),
    run("free", 0, [105.0, 50.0], -119.0),
    run("free", 1, [125.0, 54.0], -121.0),
    run("vae", 0, [500.25, 400.0]),
]


def test_means_and_spreads_are_right() -> None:
    text = markdown(RUNS)
    assert "## digits, T = 8, 1.5 minutes of processor time a run" in text
    assert "| `ours` | 3 | **110.0 ± 10.0** | 72.0 ± 2.0 |" in text
    assert "| `free` | 2 | 115.0 ± 14.1 | **52.0 ± 2.8** |" in text
    assert "| `vae` | 1 | 500.2 | 400.0 |" in text
    assert "| doing nothing | | 900.0 | 800.0 |" in text
    assert "| `ours` | 3 | -122.00 ± 2.00 | **75.00% ± 0.00%** | 1,001 ± 1 | 90 | 12,345 |" in text
    assert "| `free` | 2 | **-120.00 ± 1.41** |" in text and "| `vae` | 1 | - |" in text
    assert "factor accuracy" not in text and "MIG" not in text  # columns without figures are left out
    assert Spread((1.0,)).deviation != Spread((1.0,)).deviation


def test_how_flows_move_is_told_by_flow() -> None:
    assert "How flows move" not in markdown(RUNS)  # of an earlier release
    runs = copy.deepcopy(RUNS)
    for number, made in enumerate(runs[:3]):
        made["figures"] |= {
            "gradient_share": {"mean": [0.5 + 0.1 * number, None]},  # what is not finite is None
            "solver_gap": {"mean": [0.1, -0.2], "path": [0.01, 0.02], "tolerance": 1.2e-6},
        }
    runs[-1]["figures"]["gradient_share"] = {"missing": "a VAE has no latent flow"}
    text = markdown(runs)
    assert "| method | seeds | turn |\n|---|---|---|\n| `ours` | 3 | 0.60 ± 0.10 |\n| `free` | 2 | - |" in text
    assert "| `ours` | 3 | +10.0% ± +0.0% | -20.0% ± +0.0% |" in text and "| 1.00% ± 0.00% | 2.00% ± 0.00% |" in text
    assert "- Solved accurately: E_k and paths of the same field by dopri5 at 1e-06" in text
    one_solver = copy.deepcopy(runs)
    for made in one_solver[:3]:
        made["figures"]["solver_gap"]["training"] = [0.1, -0.2]
    assert "solver of the training" not in text + markdown(one_solver)
    for made in (others := copy.deepcopy(one_solver))[:3]:
        made["figures"]["solver_gap"]["training"] = [0.4, -0.2]
    loose = markdown(others).partition("Change of E_k from the solver of the training to an accurate one:")[2]
    assert "| `ours` | 3 | +40.0% ± +0.0% | -20.0% ± +0.0% |" in loose
    assert "Arc over chord" not in text and "- No gradient share of `vae`: a VAE has no latent flow." in text


def test_it_says_who_is_best_who_lacks_what_and_how_it_was_made() -> None:
    text = markdown(RUNS, {"vae-seed1": "ValueError: too small"}, "a picture")
    assert "- turn: the lowest E_k is that of `ours` (110.0), followed by `free` (115.0)." in text
    assert (
        "- grow: the lowest E_k is that of `free` (52.0), followed by `ours` (72.0); `ours` comes 2nd, 38% above"
        in text
    )
    assert "- No likelihood of `vae`: it has none." in text and "- No mig, dci, sap of any method: no labels." in text
    assert "8 samples, 20 test sequences, bernoulli likelihood" in text and "(`ours`, `free`)" in text
    assert "searched on 5 training images" in text and "100 test images" in text
    commands = "\n".join(f"flowfactor benchmark digits --seeds {seed}" for seed in range(3))
    assert f"```console\n{commands}\n```" in text
    assert "Abacus, 2 cores, 1 threads a run, Linux x86_64; flowfactor 1.2, torch 2.9." in text
    assert "- `vae`: what vae is" in text and "- vae-seed1: ValueError: too small" in text and "a picture" in text


def test_only_what_can_be_compared_shares_a_table() -> None:
    longer = run("t-12", 0, [1.0, 1.0], flows=["turn", "grow"])
    longer["config"] = copy.deepcopy(longer["config"])
    longer["config"]["data"]["steps"] = 12
    text = markdown([*RUNS, longer])
    assert text.count("| doing nothing |") == 2 and "## digits, T = 12" in text
    assert "**110.0 ± 10.0**" in text  # still the best of its own table


def test_other_likelihoods_are_not_compared_unsaid() -> None:
    other = run("vae", 0, [1.0, 2.0], -5.0)
    assert "different likelihoods" not in markdown([*RUNS[:5], other])
    other["figures"]["likelihood"]["likelihood"] = "gaussian"
    assert "Bounds under different likelihoods cannot be compared" in markdown([*RUNS[:5], other])


def write(folder: Path) -> None:
    for made in RUNS:
        place = folder / f"{made['variant']}-seed{made['seed']}"
        place.mkdir(parents=True)
        (place / "settings.json").write_text("{}")
        (place / "benchmark.json").write_text(json.dumps(made))
    (folder / "sta-seed0").mkdir()
    (folder / "sta-seed0" / "settings.json").write_text("{}")


def test_report_and_figure_are_written(tmp_path: Path) -> None:
    write(tmp_path)
    report, figure = write_report(tmp_path)
    assert figure is not None and figure.read_bytes()[:4] == b"\x89PNG"
    text = report.read_text()
    assert "](report.png)" in text and "- sta-seed0: not finished" in text
    assert text.index("`ours`") < text.index("`free`") < text.index("`vae`")
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "flowfactor.json",
        "report.md",
        "report.png",
    }
    (tmp_path / "vae-seed0" / "benchmark.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae-seed0.*is damaged"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("figures", {}), ("config", {"data": None}), ("seed", "x"), ("machine", None), ("title", "\ud800")],
)
def test_figures_that_cannot_be_reported_are_told_by_name(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path)
    path = tmp_path / "vae-seed0" / "benchmark.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=r"vae-seed0.benchmark\.json is damaged"):
        write_report(tmp_path)


def test_without_matplotlib_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *, extra: str) -> None:
        raise ImportError(f"{name} is needed here: pip install 'flowfactor[{extra}]'")

    monkeypatch.setattr(module, "require", missing)
    write(tmp_path)
    report, figure = write_report(tmp_path)
    assert figure is None and "No figure: matplotlib is needed here" in report.read_text()
    assert "| `ours` | 3 |" in report.read_text() and not (tmp_path / "report.png").exists()


def test_a_benchmark_without_finished_runs_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "ours-seed0").mkdir()
    (tmp_path / "ours-seed0" / "settings.json").write_text("{}")
    (tmp_path / "ours-seed0" / "error.txt").write_text("ValueError: no\n")
    report, figure = write_report(tmp_path)
    assert figure is None and "- ours-seed0: ValueError: no" in report.read_text()
    with pytest.raises(FileNotFoundError, match="not the folder of a benchmark"):
        write_report(tmp_path / "ours-seed0")


def test_it_says_how_test_images_were_chosen() -> None:
    assert "by an earlier release, on the first of them" in markdown(RUNS)
    drawn = [one | {"evaluate": EVALUATE | {"seed": 3}} for one in RUNS]
    assert "drawn at random, the same for all runs (seed 3)" in markdown(drawn)
    assert "by an earlier release, on the first of them" in markdown([*drawn, RUNS[0]])


def test_latent_errors_stand_beside_the_errors_by_transformation() -> None:
    text = markdown(RUNS)
    head, rows = text.index("Latent errors, 1 for"), text.index("### Other figures")
    assert text.index("E_k turn") < head < rows
    assert (
        "| latent turn | latent grow |" in text[head:rows]
        and "| **0.200 ± 0.000** | **0.400 ± 0.000** |" in text[head:rows]
    )
    assert "Latent errors, 1 for" not in markdown([run("vae", 0, [5.0, 4.0]) | {"figures": _without_latents()}])


def _without_latents() -> dict:
    return RUNS[0]["figures"] | {"latent_equivariance": {"missing": "no latent flow"}}
