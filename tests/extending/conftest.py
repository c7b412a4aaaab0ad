"""Files of users, which are imported anew in every test."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowfactor import _datasets, _methods, _plugins, registry

HERE = Path(__file__).parent
collect_ignore_glob = ["user_*.py"]  # they are imported by the tests alone


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Forgets after each test what has been registered and imported in it."""
    tables = [_methods.METHODS, _datasets.DATASETS, registry._KNOWN]
    before = [dict(table) for table in tables[:2]] + [{kind: dict(names) for kind, names in tables[2].items()}]
    modules, paths = set(sys.modules), list(sys.path)
    _plugins.load_plugins.cache_clear()
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    for name in set(sys.modules) - modules:
        if name.startswith(("user_", "my_", "their_")):
            del sys.modules[name]
    sys.path[:] = paths
    _plugins.load_plugins.cache_clear()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user works in, with files of theirs."""
    for path in HERE.glob("user_*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
