"""Training with Lightning: module, data, schedules, checkpoints, and runs from a configuration.

Needs the extra ``train``; the settings (`Config`) do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowfactor.training.config import Config, DataConfig, TrainConfig, list_presets, load_config
from flowfactor.training.schedule import Schedule

if TYPE_CHECKING:
    from flowfactor.training.data import SequenceData
    from flowfactor.training.module import FlowModule
    from flowfactor.training.run import evaluate, load_run, prepare, train

__all__ = [
    "Config",
    "DataConfig",
    "FlowModule",
    "Schedule",
    "SequenceData",
    "TrainConfig",
    "evaluate",
    "list_presets",
    "load_config",
    "load_run",
    "prepare",
    "train",
]

_HOMES = {"FlowModule": "module", "SequenceData": "data"} | dict.fromkeys(
    ("evaluate", "load_run", "prepare", "train"), "run"
)


def __getattr__(name: str) -> Any:
    """Imports what needs Lightning when it is first asked for: Lightning takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flowfactor.errors import require

    require("lightning.pytorch", extra="train")
    return getattr(require(f"flowfactor.training.{_HOMES[name]}", extra="train"), name)
