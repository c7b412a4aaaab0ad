"""Folders of sequences: finding the films in them, with their classes and groups."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowfactor.data.order import natural_order
from flowfactor.data.readers.films import ARRAYS, VIDEOS, Film, Folder, is_film, open_film
from flowfactor.data.readers.pictures import PICTURES

_BY_DEPTH = {1: ("sequence",), 2: ("class", "sequence"), 3: ("class", "group", "sequence")}
_HELD = f"pictures ({', '.join(PICTURES)}) nor files of frames ({', '.join((*ARRAYS, *VIDEOS))})"


@dataclass(frozen=True)
class Found:
    """The films found, in order.

    Attributes:
        films: The films.
        names: Their paths from the folder on, such as ``left/clip3``.
        classes: The class of each, or None.
        class_names: Names of the classes.
        groups: The group of each; None where neither a folder nor a pattern tells.
    """

    films: list[Film]
    names: list[str]
    classes: list[int] | None
    class_names: tuple[str, ...]
    groups: list[str] | None


def find_films(
    root: str | Path,
    levels: str | None = None,
    group: str | None = None,
    *,
    axes: tuple[str, ...] | None = None,
    is_cut: bool = False,
) -> Found:
    """Finds the films in a folder.

    Args:
        root: The folder; see `flowfactor.data.Sequences`.
        levels: What its levels are, such as ``"class/group/sequence"``; None goes by their number.
        group: A regular expression, whose match in a film's path is its group.
        axes: The layout of arrays.
        is_cut: Whether sequences are cut into windows.

    Returns:
        The films.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it does not look like that.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    meant = _parse_levels(levels)
    found = _search(root, (), axes, is_cut)
    depths = sorted({len(parts) for _, parts in found})
    if len(depths) > 1:
        one, other = (next(parts for _, parts in found if len(parts) == depth) for depth in (depths[0], depths[-1]))
        raise ValueError(
            f"{root / Path(*one)} holds the frames of a sequence, and so does {root / Path(*other)}, further down: all "
            "sub-folders must be of one kind, with all sequences on one level"
        )
    meant = _BY_DEPTH[depths[0]] if meant is None else meant
    if len(meant) != depths[0]:
        raise ValueError(
            f"levels={levels!r} names {len(meant)} levels, but the sequences in {root} lie {depths[0]} down, such as "
            f"{'/'.join(found[0][1])}"
        )
    films, names = [film for film, _ in found], ["/".join(parts) for _, parts in found]
    classes, class_names = None, ()
    if "class" in meant:
        told = [parts[meant.index("class")] for _, parts in found]
        class_names = tuple(path.name for path in natural_order({Path(name) for name in told}))
        classes = [class_names.index(name) for name in told]
    groups = [parts[meant.index("group")] for _, parts in found] if "group" in meant else None
    return Found(films, names, classes, class_names, groups if group is None else _matches(names, group))


def list_folder(folder: str | Path, *, axes: tuple[str, ...] | None = None, is_cut: bool = False) -> Film:
    """Gives the film that a folder of pictures, or a file of frames, is.

    Args:
        folder: The folder or file.
        axes: The layout of arrays.
        is_cut: Whether sequences are cut into windows.

    Returns:
        The film.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no pictures.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        return open_film(folder, axes=axes, is_cut=is_cut)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    stills, films, _ = _held(folder)
    if films:
        raise ValueError(f"{films[0]} is a sequence of its own, where {folder} should be one: list the file instead")
    if not stills:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return Folder(folder, stills)


def _search(
    folder: Path, parts: tuple[str, ...], axes: tuple[str, ...] | None, is_cut: bool
) -> list[tuple[Film, tuple[str, ...]]]:
    stills, films, folders = _held(folder)
    if parts and stills and (films or folders):
        raise ValueError(
            f"{folder} holds pictures, such as {stills[0].name}, and {(*films, *folders)[0].name}: it must be one "
            "sequence of single pictures, or hold sequences (folders of pictures, and files of frames)"
        )
    if parts and stills:
        return [(Folder(folder, stills), parts)]
    if not films and not folders:
        if not parts:
            held = "pictures, but no folders" if stills else "no folders"
            raise ValueError(f"{folder} holds {held}: expected a sub-folder of pictures, or a film, for each sequence")
        raise ValueError(f"{folder} holds neither {_HELD} nor folders of them: fill it, or remove it")
    if len(parts) == max(_BY_DEPTH):
        raise ValueError(
            f"{folder} holds {(*films, *folders)[0].name} too far down: expected <sequence>, <class>/<sequence> or "
            "<class>/<group>/<sequence> below the root"
        )
    found: list[tuple[Film, tuple[str, ...]]] = []
    for path in natural_order([*films, *folders]):
        if path.is_dir():
            found += _search(path, (*parts, path.name), axes, is_cut)
        else:
            found.append((open_film(path, axes=axes, is_cut=is_cut), (*parts, path.name)))
    return found


def _held(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """What a folder holds: single pictures, files of frames, and folders, each in order."""
    stills, films, folders = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(path)
            elif path.suffix.lower() in (*PICTURES, *ARRAYS, *VIDEOS):
                (films if is_film(path) else stills).append(path)
    return natural_order(stills), natural_order(films), natural_order(folders)


def _parse_levels(levels: Any) -> tuple[str, ...] | None:
    if levels is None:
        return None
    names = tuple(str(levels).strip("/").split("/"))
    if names[-1] != "sequence" or len(set(names)) < len(names) or not set(names) <= {"class", "group", "sequence"}:
        raise ValueError(
            "levels names the folders from the root down, ending in 'sequence', each once: 'class/sequence', "
            f"'group/sequence', 'class/group/sequence' or 'group/class/sequence'; got {levels!r}"
        )
    return names


def _matches(names: Sequence[str], pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group={pattern!r} is not a regular expression: {error}") from error
    groups = []
    for name in names:
        match = expression.search(name)
        if match is None:
            raise ValueError(
                f"group={pattern!r} matches nothing in {name!r}: every sequence's path must hold the name of its group"
            )
        groups.append(match.group(1) if expression.groups and match.group(1) is not None else match.group(0))
    return groups
