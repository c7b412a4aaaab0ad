"""Code of the user's that registers methods, data sets and parts: modules that are named, and plugins that are installed.

A file never has code imported on its own: whoever starts a command or calls a function says what may be.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "flowfactor.plugins"
"""The group of entry points by which installed distributions register what they have."""


def module_name(entry: str) -> str:
    """The name of the module that an entry of ``imports`` means: a module's name, or the path of a ``.py`` file.

    Example:
        >>> module_name("package.methods"), module_name("code/mymethod.py")
        ('package.methods', 'mymethod')
    """
    return Path(entry).stem if entry.endswith(".py") else entry


def is_imported(entry: str) -> bool:
    """Whether what an entry of ``imports`` means has been imported in this process."""
    return module_name(entry) in sys.modules


def import_modules(entries: Iterable[str]) -> list[str]:
    """Imports modules of the user's, each once.

    Args:
        entries: Names of modules, which may lie in the working directory, or paths of ``.py`` files.

    Returns:
        The entries, paths as absolute ones; of two that mean the same module, the last.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If there is no such module, its own code fails, or its name is that of another one.

    Example:
        >>> import_modules(["json"])
        ['json']
    """
    made = {}
    for entry in entries:
        path = Path(entry).expanduser().absolute() if entry.endswith(".py") else None
        made[module_name(entry)] = entry if path is None else str(path)
        _import(entry, path)
    return list(made.values())


def _import(entry: str, path: Path | None) -> None:
    name = module_name(entry)
    file = Path.cwd() / f"{name.partition('.')[0]}.py" if path is None else path
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"--import {entry}: there is no file {path}")
    if path is not None and not name.isidentifier():
        raise ImportError(f"--import {entry}: a module's name is made of letters, digits and '_': rename the file")
    # At the end: what lies beside the user's module hides nothing that is installed.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        module = sys.modules.get(name)
        if module is None:
            module = importlib.import_module(name) if path is None else _from_file(name, path)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0] or error.name == name:
            raise ImportError(
                f"--import {entry}: there is no module {error.name}, neither installed nor in {Path.cwd()}"
            ) from error
        raise ImportError(_failed(entry, error)) from error
    except Exception as error:
        raise ImportError(_failed(entry, error)) from error
    found = getattr(sys.modules[name.partition(".")[0]], "__file__", None)
    if file.is_file() and (found is None or not file.samefile(found)):
        raise ImportError(f"--import {entry}: the name {name} is that of {found or module!r}: rename {file}")


def _from_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(entry: str, error: Exception) -> str:
    """What went wrong in the user's code, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"--import {entry} failed in {frame.filename}, line {frame.lineno}: {type(error).__name__}: {error}"


@cache
def load_plugins() -> None:
    """Imports, once, what installed distributions offer as entry points in the group ``flowfactor.plugins``.

    Warns:
        UserWarning: If one of them fails, with its name; the others are imported all the same.
    """
    from importlib.metadata import entry_points  # takes a while, and is for names that are not flowfactor's

    found: Any = entry_points(group=GROUP)
    for entry in found:
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"the plugin {entry.name} ({entry.value}) of {entry.dist.name} cannot be imported: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
