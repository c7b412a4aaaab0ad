"""What tests of trainings and of the command line share."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import torch

from flowfactor.cli import main
from flowfactor.training import FlowModule


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Calls the command line with wrong arguments, and gives what it tells."""

    def call(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next training interrupted, as by Ctrl-C, in the step behind so many; those after it run on."""

    def plan(steps: int) -> None:
        original = FlowModule.training_step

        def step(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
            if self.global_step == steps:
                monkeypatch.setattr(FlowModule, "training_step", original)
                signal.raise_signal(signal.SIGINT)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(FlowModule, "training_step", step)

    return plan
