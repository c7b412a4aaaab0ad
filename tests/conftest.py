"""Settings shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own for draws that a test controls."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Calls the command line with wrong arguments, and gives what it tells."""

    from flowfactor.cli import main

    def call(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next training interrupted, as by Ctrl-C, in the step after so many; those after it run on."""

    from flowfactor.training import FlowModule

    def plan(steps: int) -> None:
        original = FlowModule.training_step

        def step(self: Any, batch: dict, batch_idx: int) -> torch.Tensor:
            if self.global_step == steps:
                monkeypatch.setattr(FlowModule, "training_step", original)
                signal.raise_signal(signal.SIGINT)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(FlowModule, "training_step", step)

    return plan
