"""The commands that the pages show are ones that the program takes."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from flowfactor import cli
from flowfactor.cli.benchmark import benchmark_parser
from flowfactor.cli.train import parse_train
from flowfactor.training import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def console_commands() -> list[tuple[str, list[str]]]:
    """Each command of the pages' console blocks, less its comment, with the page it stands on."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.relative_to(ROOT).as_posix(), shlex.split(line, comments=True)) for line in lines]
    # Three dots stand for the options of the command before.
    return [(page, [word for word in words if word != "..."]) for page, words in found if words]


COMMANDS = console_commands()
OURS = [
    pytest.param(words[1:], id=f"{page}: {shlex.join(words)}") for page, words in COMMANDS if words[0] == "flowfactor"
]


def setting_exists(key: str) -> bool:
    """Whether a dotted key leads to a field of the configuration; a dict of options takes any."""
    part: type = Config
    for name in key.split("."):
        if not is_dataclass(part):
            return part is not str
        if name not in {entry.name for entry in fields(part)}:
            return False
        part = get_type_hints(part)[name]
    return True


def test_pages_show_commands_of_every_kind() -> None:
    assert {words.values[0][0] for words in OURS} == {"demo", "train", "benchmark", "evaluate", "traverse"}


@pytest.mark.parametrize("arguments", OURS)
def test_a_documented_command_is_one_that_the_program_takes(arguments: list[str]) -> None:
    command, *rest = arguments
    if command == "train":
        # A run's own configuration, which is not there, stands for the preset that it began with.
        parse_train(["mnist-small" if word.endswith("config.yaml") else word for word in rest])
    elif command == "benchmark":
        _, others = benchmark_parser().parse_known_args(rest)
        options = [word[2:].partition("=")[0] for word in others if word.startswith("--")]
        assert [option for option in options if not setting_exists(option)] == []
    else:
        cli._COMMANDS[command][1]().parse_args(rest)


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert {"demo", "test", "docs"} <= named <= targets


def test_a_wrong_option_would_be_noticed() -> None:
    assert setting_exists("train.steps") and not setting_exists("train.stepz") and not setting_exists("nothing")
    with pytest.raises(SystemExit):
        parse_train(["mnist-small", "--train.stepz", "3"])
