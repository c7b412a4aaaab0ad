"""Training with Lightning: module, data, schedules, checkpoints, and runs from a configuration.

Needs the extra ``train``; the settings (`Config`) do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowfactor.training._process import prepare_process
from flowfactor.training.config import Config, DataConfig, TrainConfig, list_presets, load_config
from flowfactor.training.schedule import Schedule
from flowfactor.training.variants import (
    ABLATION_GROUPS,
    ABLATIONS,
    BENCHMARKS,
    Variant,
    choose_variants,
    configure,
    get_variant,
)

if TYPE_CHECKING:
    from flowfactor.training.benchmark import Benchmark, plan_benchmark
    from flowfactor.training.data import SequenceData
    from flowfactor.training.evaluation import EvaluationConfig, evaluate, measure
    from flowfactor.training.module import FlowModule
    from flowfactor.training.report import write_report
    from flowfactor.training.run import load_run, prepare, train

__all__ = [
    "ABLATIONS",
    "ABLATION_GROUPS",
    "BENCHMARKS",
    "Benchmark",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowModule",
    "Schedule",
    "SequenceData",
    "TrainConfig",
    "Variant",
    "choose_variants",
    "configure",
    "evaluate",
    "get_variant",
    "list_presets",
    "load_config",
    "load_run",
    "measure",
    "plan_benchmark",
    "prepare",
    "prepare_process",
    "train",
    "write_report",
]

_HOMES = {
    "Benchmark": "benchmark",
    "EvaluationConfig": "evaluation",
    "FlowModule": "module",
    "SequenceData": "data",
    "evaluate": "evaluation",
    "load_run": "run",
    "measure": "evaluation",
    "plan_benchmark": "benchmark",
    "prepare": "run",
    "train": "run",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Imports what needs Lightning when it is first asked for: Lightning takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flowfactor.errors import require

    require("lightning.pytorch", extra="train")
    return getattr(require(f"flowfactor.training.{_HOMES[name]}", extra="train"), name)
