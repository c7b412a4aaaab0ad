"""Settings shared by all tests."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from constructors import DEVICE, DTYPE, setting
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

torch.set_num_threads(1)

# The same cases in every run, whatever the machine's pace; `make test-all` draws more of them.
_STEADY = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
for _name, _count in (("few", 15), ("many", 100)):
    settings.register_profile(_name, max_examples=_count, **_STEADY)
settings.load_profile(setting("FLOWFACTOR_TEST_CASES", {"few": "few", "many": "many"}))
_home = tempfile.TemporaryDirectory(prefix="hypothesis")  # what it notes is not left in the tree
set_hypothesis_home_dir(_home.name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest, _seed: None) -> Iterator[None]:
    """Contract tests make their parts and numbers in the precision and on the device that the environment names."""
    if request.node.get_closest_marker("contract") is None:
        yield
        return
    torch.set_default_dtype(DTYPE)
    torch.set_default_device(DEVICE if DEVICE.type != "cpu" else None)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


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
