"""The line that tells how far a training is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from flowfactor.training.callbacks import describe


def test_terms_that_are_left_out_are_not_told_and_those_of_the_bound_are() -> None:
    latest = {"loss": 12.0, "kl": 0.0, "hj": 0.0, "bending": 0.25, "bound": 0.0, "steps_per_second": 3.0}
    module = cast(Any, SimpleNamespace(progress=1.0, elapsed=2.0, global_step=40, latest=latest))
    assert describe(module) == "100% | step 40 | 3.0 steps/s | loss 12 | kl 0 | bending 0.25 | bound 0"
