"""Training with Lightning: module, data, schedules, checkpoints, and runs from a configuration.

Needs the extra ``train``; the settings (`Config`) do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowfactor.errors import renamed, require
from flowfactor.training.config import Config, DataConfig, TrainConfig, list_presets, load_config
from flowfactor.training.process import prepare_process
from flowfactor.training.schedule import LearningRateSchedule

if TYPE_CHECKING:
    from flowfactor.training.data import SequenceData
    from flowfactor.training.evaluation import EvaluationConfig, evaluate, measure
    from flowfactor.training.module import FlowModule
    from flowfactor.training.run import load_run, prepare, train

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowModule",
    "LearningRateSchedule",
    "SequenceData",
    "TrainConfig",
    "evaluate",
    "list_presets",
    "load_config",
    "load_run",
    "measure",
    "prepare",
    "prepare_process",
    "train",
]

_HOMES = {
    "EvaluationConfig": "evaluation",
    "FlowModule": "module",
    "SequenceData": "data",
    "evaluate": "evaluation",
    "load_run": "run",
    "measure": "evaluation",
    "prepare": "run",
    "train": "run",
}
# Names that moved to `flowfactor.comparison`, and still work here for this release.
_MOVED = {
    *("ABLATIONS", "ABLATION_GROUPS", "BENCHMARKS", "Benchmark", "Variant"),
    *("choose_variants", "configure", "get_variant", "plan_benchmark", "write_report"),
}
_renamed = renamed(__name__, {"Schedule": "LearningRateSchedule"}, stacklevel=3)


def __getattr__(name: str) -> Any:
    """Imports what needs Lightning when it is first asked for: Lightning takes seconds to import."""
    if name in _MOVED:
        return getattr(importlib.import_module("flowfactor.comparison"), name)
    if name not in _HOMES:
        return _renamed(name)
    require("lightning.pytorch", extra="train")
    return getattr(require(f"flowfactor.training.{_HOMES[name]}", extra="train"), name)
