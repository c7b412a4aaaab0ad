"""How flows compose, in the report of a benchmark: from figures that are known."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
from test_report import run

from flowfactor.comparison.composition import composition_summary
from flowfactor.comparison.report import markdown

FLOWS = ["turn", "grow", "paint"]
REASON = "Sequences cannot tell"


def combined(single: list[float], factor: float) -> dict[str, Any]:
    """Errors of flows backwards, which are twice those forward, and of pairs and threes: their mean times a factor."""
    alone = dict(zip(FLOWS, single, strict=True))

    def several(size: int, more: float) -> dict[str, Any]:
        over = {"+".join(names): factor + more * n for n, names in enumerate(combinations(FLOWS, size))}
        error = {name: value * sum(alone[k] for k in name.split("+")) / size for name, value in over.items()}
        return {"error": error, "doing_nothing": dict.fromkeys(over, 100.0 * size), "over_singles": over}

    made: dict[str, Any] = {"start": "any", "count": 40, "seed": 0}
    made["single"] = {"error": alone, "doing_nothing": dict.fromkeys(FLOWS, 90.0)}
    made["backward"] = {"error": {k: 2 * v for k, v in alone.items()}, "doing_nothing": dict.fromkeys(FLOWS, 95.0)}
    return made | {"superpose": several(2, 0.1), "switch": several(2, 0.0), "together": several(3, 0.0)}


def of(variant: str, seed: int, single: list[float], factor: float) -> dict[str, Any]:
    made = run(variant, seed, single, flows=FLOWS)
    made["figures"] = made["figures"] | {
        "equivariance": {"mean": single, "doing_nothing": [90.0] * 3, "count": 40},
        "latent_equivariance": {"mean": [0.2, 0.3, 0.7]},
        "combining": combined(single, factor),
        "commutator": {"pairs": [["turn", "grow"], ["turn", "paint"], ["grow", "paint"]], "mean": [0.1, 0.2, 0.6]},
        "group": {
            "addition": {"flows": FLOWS, "mean": [0.01, 0.02, 0.06]},
            "inverse": {"flows": FLOWS, "mean": [0.1, 0.1, 0.4]},
            "reconstruction": {"flows": FLOWS, "mean": [1.0, 1.0, 1.3]},
            "space": "latents",
        },
    }
    return made


RUNS = [of("ours", 0, [10.0, 20.0, 30.0], 1.1), of("ours", 1, [10.0, 20.0, 36.0], 1.3), of("free", 0, [40.0] * 3, 1.0)]


def rows(text: str, head: str) -> list[str]:
    """The rows of the table whose heading begins so."""
    return text.partition(f"\n{head}")[2].partition(":\n\n")[2].partition("\n\n")[0].splitlines()[2:]


def test_errors_stand_beside_e_k_with_that_of_doing_nothing() -> None:
    text = "\n" + composition_summary(RUNS)
    assert "| E forward | E backward | E two at once | E one after another | E three at once |" in text
    ours, free, still = rows(text, "E backwards and together")
    means = [of_seed["figures"]["combining"]["superpose"]["error"].values() for of_seed in RUNS[:2]]
    two = sum(sum(values) / 3 for values in means) / 2
    assert ours.startswith(f"| `ours` | 2 | **21.0 ± 1.4** | **42.0 ± 2.8** | **{two:.1f} ± ")
    assert free == "| `free` | 1 | 40.0 | 80.0 | 44.0 | 40.0 | 40.0 |"
    assert still == "| doing nothing | | 90.0 | 95.0 | 200.0 | 200.0 | 300.0 |"
    assert text.index("E backwards") < text.index("In proportion")
    whole = markdown(RUNS)
    assert whole.index("| E_k turn |") < whole.index("E backwards and together") < whole.index("### Other figures")


def test_what_is_relative_is_a_mean_over_flows_pairs_and_threes() -> None:
    ours, free = rows("\n" + composition_summary(RUNS), "In proportion")
    numbers = "2.00 | 1.10 | 1.00 | 1.00 | 0.300 | 0.030 | 0.200 | 1.100 |"
    assert free == f"| `free` | 1 | **0.400** | {numbers}"
    numbers = "2.00 ± 0.00 | 1.30 ± 0.14 | 1.20 ± 0.14 | 1.20 ± 0.14 | 0.300 ± 0.000 | 0.030 ± 0.000 | 0.200 ± 0.000 |"
    assert ours.startswith(f"| `ours` | 2 | **0.400 ± 0.000** | {numbers}")


def test_a_table_a_figure_a_column_a_flow_or_a_pair() -> None:
    text = markdown(RUNS)
    assert text.index("### Other figures") < text.index("### How flows compose")
    assert "Two at once over singles:\n\n| method | seeds | turn+grow | turn+paint | grow+paint |" in text
    assert rows(text, "Two at once over singles")[1] == "| `free` | 1 | 1.00 | 1.10 | 1.20 |"
    assert rows(text, "Order")[1] == "| `free` | 1 | 0.100 | 0.200 | 0.600 |"
    assert rows(text, "Half twice")[1] == "| `free` | 1 | 0.010 | 0.020 | 0.060 |"
    assert rows(text, "There and back")[1] == "| `free` | 1 | 0.100 | 0.100 | 0.400 |"
    assert rows(text, "The frame there and back")[1] == "| `free` | 1 | 1.000 | 1.000 | 1.300 |"
    assert rows(text, "Backward over forward")[1] == "| `free` | 1 | 2.00 | 2.00 | 2.00 |"
    assert "Three at once over singles:" not in text  # of the only three, in the summary
    assert "on up to 40 of them each" in text and "- Order: how far apart" in text


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_missing_is_shown_as_such(whole: bool) -> None:
    runs = copy.deepcopy(RUNS)
    figures, missing = runs[-1]["figures"], {"missing": REASON}
    figures |= {"commutator": missing, "group": missing}
    ways = ("superpose", "switch", "together")
    figures["combining"] = missing if whole else figures["combining"] | dict.fromkeys(ways, missing)
    text = markdown(runs)
    kept = "- | -" if whole else "40.0 | 80.0"
    assert rows(text, "E backwards and together")[1] == f"| `free` | 1 | {kept} | - | - | - |"
    assert rows(text, "Order")[1] == "| `free` | 1 | - | - | - |" == rows(text, "There and back")[1]
    some = "E forward, E backward, " if whole else ""
    said = f"commutator, group, {some}E two at once, E one after another, E three at once of `free`: {REASON}."
    assert f"- No {said}" in text


def test_runs_of_before_are_reported_without() -> None:
    text = markdown([run("ours", 0, [1.0, 2.0])])
    for part in ("How flows compose", "E backwards", "earlier release."):
        assert part not in text
    assert "| `ours` | 1 | **0.300** |" in text  # the latent error
    runs = copy.deepcopy(RUNS)
    old = runs[-1]["figures"]
    del old["commutator"], old["group"], old["combining"]["together"]  # as before there were these
    text = markdown(runs)
    assert rows(text, "E backwards and together")[1] == "| `free` | 1 | 40.0 | 80.0 | 44.0 | 40.0 | - |"
    assert "- No commutator, group, E three at once of `free`: measured by an earlier release." in text
    del old["combining"]
    assert "E forward, E backward, E two at once, E one after another, E three at once of `free`" in markdown(runs)


def test_what_is_not_finite_has_no_mean() -> None:
    runs = copy.deepcopy(RUNS)
    runs[-1]["figures"]["commutator"]["mean"][1] = None
    runs[-1]["figures"]["combining"]["backward"]["error"]["turn"] = None
    text = markdown(runs)
    assert rows(text, "Order")[1] == "| `free` | 1 | 0.100 | - | 0.600 |"
    assert rows(text, "E backwards and together")[1].startswith("| `free` | 1 | 40.0 | - | 44.0 |")
    assert "| `free` | 1 | **0.400** | - | 1.10 | 1.00 | 1.00 | - | 0.030 |" in text


def test_without_labels_order_and_group_are_of_the_models_flows() -> None:
    runs = copy.deepcopy(RUNS[-1:])
    figures, missing = runs[0]["figures"], {"missing": "no labels"}
    runs[0]["flows"] = []
    figures |= dict.fromkeys(("equivariance", "latent_equivariance", "combining"), missing)
    figures["commutator"]["pairs"] = [[0, 1], [0, 2], [1, 2]]
    text = markdown(runs)
    assert "| order | half twice | there and back | the frame there and back |" in text
    assert rows(text, "In proportion") == ["| `free` | 1 | 0.300 | 0.030 | 0.200 | 1.100 |"]
    assert "### How flows compose" not in text
