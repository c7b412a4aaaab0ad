"""Reading films: all their frames, of one size, number of channels and type, into one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.data.checks import to_unit
from flowfactor.data.fitting import Look, with_channels
from flowfactor.data.readers.films import Film, Header


def read_films(films: Sequence[Film], look: Look, *, is_cut: bool) -> tuple[Tensor, list[int]]:
    """Reads films.

    What headers tell is checked before any frame is decoded.

    Args:
        films: The films.
        look: What frames are to look like.
        is_cut: Whether sequences are cut into windows, so that films may differ in length.

    Returns:
        The frames of all films [F, C, H, W], one film after another: uint8, or float32 where one of them is no bytes;
        and the number of frames of each film.

    Raises:
        ImportError: If Pillow or PyAV is needed and not installed.
        OSError: If a file is missing or may not be read.
        ValueError: If sizes, numbers of channels or lengths differ, or a file is damaged.
    """
    headers = [film.header(look) for film in films]
    _check_sizes(headers, look)
    known = [header.frames for header in headers]
    lengths = [count for count in known if count is not None]
    if not is_cut and len(lengths) == len(known):
        _check_lengths(films, lengths)
    channels = look.channels or max(header.channels or 1 for header in headers)
    dtype = torch.float32 if any(header.is_deep for header in headers) else torch.uint8
    size = look.size or headers[0].size
    if len(lengths) == len(known) and size is not None:
        frames = torch.empty(sum(lengths), channels, *size, dtype=dtype)
        place = 0
        for film, count in zip(films, lengths, strict=True):
            place = _fill(frames[place : place + count], film, look, channels) + place
    else:  # only reading tells how many frames a video has
        parts = [_read(film, look, channels, dtype) for film in films]
        lengths = [len(part) for part in parts]
        if not is_cut:
            _check_lengths(films, lengths)
        frames = torch.cat(parts)
    return frames, lengths


def _fill(frames: Tensor, film: Film, look: Look, channels: int) -> int:
    place = 0
    for chunk in film.chunks(look, channels):
        frames[place : place + len(chunk)] = _made(chunk, film, look, channels, frames.dtype)
        place += len(chunk)
    return place


def _read(film: Film, look: Look, channels: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([_made(chunk, film, look, channels, dtype) for chunk in film.chunks(look, channels)])


def _made(chunk: Tensor, film: Film, look: Look, channels: int, dtype: torch.dtype) -> Tensor:
    chunk = look.fitted(with_channels(chunk, channels, str(film.path)), str(film.path))
    return to_unit(chunk) if dtype == torch.float32 else chunk


def _check_sizes(headers: Sequence[Header], look: Look) -> None:
    first = headers[0]
    for header in headers:
        if look.size is not None or header.size is None or first.size is None or header.size == first.size:
            continue
        raise ValueError(
            f"{header.first} has {header.size[1]} x {header.size[0]} pixels, but {first.first} {first.size[1]} x "
            f"{first.size[0]}: bring all to one size by size=, with fit='pad', 'crop' or 'resize'"
        )


def _check_lengths(films: Sequence[Film], lengths: Sequence[int]) -> None:
    each = [count // film.sequences for film, count in zip(films, lengths, strict=True)]
    for film, count in zip(films, each, strict=True):
        if count != each[0]:
            raise ValueError(
                f"{film.path} holds {count} frames, but {films[0].path} {each[0]}: all sequences must be equally long; "
                f"window= cuts longer ones, for example window={min(each)}"
            )
