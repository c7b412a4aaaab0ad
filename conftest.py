"""What tests and the examples of docstrings share: jobs without extras (`make test-plain`)."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

_EXTRA = re.compile(
    r"It comes with an extra: pip install '\S+'"
    r"|No module named '(av|h5py|lightning|matplotlib|PIL|safetensors|sklearn|tensorboard|torchmetrics|yaml)\b[^']*'"
)


def _excused(report: Any) -> None:
    """Without extras (`make test-plain`), what fails for want of one is skipped, and says of which."""
    told = _EXTRA.search(str(report.longrepr)) if report.failed and "FLOWFACTOR_TEST_PLAIN" in os.environ else None
    if told:
        report.outcome, report.longrepr = "skipped", (str(report.fspath), 0, f"Skipped: {told[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Reports of tests."""
    report = yield
    _excused(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Reports of files that are collected."""
    report = yield
    _excused(report)
    return report
