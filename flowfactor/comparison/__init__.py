"""Methods against methods: what a benchmark compares, its runs, and the tables and report that come of them.

Needs the extra ``train``; planning what is compared (`configure`, `choose_variants`) does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowfactor.comparison.variants import (
    ABLATION_GROUPS,
    ABLATIONS,
    BENCHMARKS,
    Variant,
    choose_variants,
    configure,
    get_variant,
)

if TYPE_CHECKING:
    from flowfactor.comparison.plan import Benchmark, plan_benchmark
    from flowfactor.comparison.report import write_report

__all__ = [
    "ABLATIONS",
    "ABLATION_GROUPS",
    "BENCHMARKS",
    "Benchmark",
    "Variant",
    "choose_variants",
    "configure",
    "get_variant",
    "plan_benchmark",
    "write_report",
]

_HOMES = {"Benchmark": "plan", "plan_benchmark": "plan", "write_report": "report"}


def __getattr__(name: str) -> Any:
    """Imports what needs Lightning when it is first asked for: Lightning takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flowfactor.errors import require

    require("lightning.pytorch", extra="train")
    return getattr(importlib.import_module(f"flowfactor.comparison.{_HOMES[name]}"), name)
