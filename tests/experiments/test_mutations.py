"""Damaged files: no code is run, nothing hangs, and every error names its file. The long run is experiments/mutations.py."""

from __future__ import annotations

import pytest

from experiments.mutations import KINDS, run

HARMLESS = ("checkpoint", "metrics.csv", "settings.json", "result.json")
"""Damage to these is mostly passed over, since there is another checkpoint, or they take longer, so that fewer are read."""


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_by_name(name: str) -> None:
    count = 8 if name in HARMLESS else 30
    counts, failures = run(count, 1, [name])
    assert failures == []
    assert sum(counts.values()) == count
    if name not in HARMLESS:
        assert counts[name, "refused"] >= 5


def test_a_damaged_checkpoint_or_weights_never_change_what_is_loaded() -> None:
    counts, failures = run(40, 2, ["checkpoint", "only checkpoint", "weights"])
    assert failures == []
    assert not [name for name, outcome in counts if outcome == "other"]
