"""Damaged files: no code is run, nothing hangs, and every error names its file. The long run is benchmarks/mutations.py."""

from __future__ import annotations

import pytest

from benchmarks.mutations import KINDS, run


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("settings", "checkpoint")])
def test_damaged_files_are_refused_by_name(name: str) -> None:
    counts, failures = run(30, 1, [name])
    assert failures == []
    assert sum(counts.values()) == 30 and counts[name, "refused"] >= 5
