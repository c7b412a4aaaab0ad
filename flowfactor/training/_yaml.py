"""Settings as YAML: numbers as people write them, keys once, and every mistake with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flowfactor.errors import require

yaml: Any = require("yaml", extra="train")

_LARGEST_FILE, _MOST_ENTRIES = 2**20, 100_000
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_OF_YAML_1_1 = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")

# Numbers of YAML 1.2. In YAML 1.1, 1e-3 is text, 010 is eight, and 1:30 is ninety.
_NUMBERS = (
    (_INT, re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)$")),
    (
        _FLOAT,
        re.compile(
            r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
        ),
    ),
)


class _Loader(yaml.SafeLoader):
    """Reads plain values."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what readers of either version would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _whole(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    return sign * int(digits if base == 10 else digits[2:], base)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _OF_YAML_1_1]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
_Loader.add_constructor(_INT, _whole)


def parse(text: str) -> Any:
    """Reads the value that text stands for, as on the command line; text that is no YAML stands for itself.

    Example:
        >>> parse("1e-3"), parse("[8, 8]"), parse("null"), parse("rotation+hue"), parse("a: [")
        (0.001, [8, 8], None, 'rotation+hue', 'a: [')
    """
    try:
        return _document(text)[0]
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def dump(values: dict[str, Any]) -> str:
    """Writes settings so that `read_yaml` gives the same values.

    Example:
        >>> print(dump({"output": "1e-3", "train": {"learning_rate": 1e-3}}), end="")
        output: '1e-3'
        train:
          learning_rate: 0.001
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """Reads a file of settings.

    Args:
        path: The file.

    Returns:
        What it holds, and the line of every key by its dotted name.

    Raises:
        ValueError: If it is not YAML, or a key stands in it twice; the message has the file, and the line if there is one.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path} is no file of settings: it has {path.stat().st_size:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: byte {error.start} cannot be read") from error
    try:
        return _document(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        cure = ": indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        context = f" {error.context}" if error.context else ""
        raise ValueError(f"{path}{line} is not YAML: {error.problem}{context}{cure}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no file of settings: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _document(text: str) -> tuple[Any, dict[str, int]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        _visit(node, "", lines, [0])
        return (None if node is None else loader.construct_document(node)), lines
    finally:
        loader.dispose()


def _visit(node: Any, name: str, lines: dict[str, int], seen: list[int]) -> None:
    """Notes the line of every key, and refuses keys that stand twice, and aliases that make a file endless."""
    seen[0] += 1
    if seen[0] > _MOST_ENTRIES:
        raise yaml.constructor.ConstructorError(None, None, "it has too many entries", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _visit(entry, name, lines, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    before: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in before:
                first = before[key.tag, key.value]
                problem = f"the key {key.value} stands twice, first in line {first}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            before[key.tag, key.value] = line
            inner = f"{name}.{key.value}".strip(".")
            lines.setdefault(inner, line)
            _visit(value, inner, lines, seen)
        else:
            _visit(value, name, lines, seen)
