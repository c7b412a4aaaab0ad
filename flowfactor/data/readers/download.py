"""Checksummed downloads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from flowfactor._files import replacing


def download_file(target: str | Path, urls: Sequence[str], *, md5: str, timeout: float = 30.0) -> None:
    """Fetches a file from the first address that gives it with the right checksum.

    The file is written under a temporary name beside the target and then renamed, so that the target is never there
    in part, and two processes do not disturb each other.

    Args:
        target: Where the file goes; its folder is made if need be.
        urls: Addresses, tried in turn.
        md5: The expected MD5 checksum, in hexadecimal.
        timeout: Seconds to wait for an answer.

    Raises:
        FileExistsError: If there is such a file.
        ConnectionError: If no address gave the file with this checksum; the message says why for each.

    Example:
        >>> urls = ["https://example.org/mnist/train-images-idx3-ubyte.gz"]
        >>> download_file("data/images.gz", urls, md5="f68b3c2dcbeaaa9fbdd348bbdeb94873")  # doctest: +SKIP
    """
    import urllib.request
    from http.client import HTTPException

    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} is there already, and is not replaced: move it away to fetch it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with replacing(target) as part:
                with part.open("wb") as file, urllib.request.urlopen(url, timeout=timeout) as response:
                    while chunk := response.read(2**20):
                        file.write(chunk)
                        digest.update(chunk)
                if digest.hexdigest() != md5:
                    raise ValueError(f"MD5 {digest.hexdigest()}, expected {md5} ({part.stat().st_size:,} bytes)")
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError also for an address that is none
            failures.append(f"{url}: {error}")
    tried = "\n  ".join(failures) or "no address was given"
    raise ConnectionError(f"could not download {target.name}:\n  {tried}\nPut the file into {target.parent} by hand.")


def data_root(root: str | Path | None, name: str) -> Path:
    """Gives the folder of a data set.

    Args:
        root: What the user gave.
        name: Name of the data set, in lower case.

    Returns:
        `root`, or the environment variable ``FLOWFACTOR_<NAME>``, or ``~/.cache/flowfactor/<name>``.

    Example:
        >>> data_root("/data/mnist", "mnist").as_posix()
        '/data/mnist'
    """
    given = root if root is not None else os.environ.get(f"FLOWFACTOR_{name.upper()}")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "flowfactor" / name


def data_file(root: str | Path | None, name: str, file: str, *, urls: Sequence[str], md5: str, download: bool) -> Path:
    """Finds the one file of a data set, or fetches it.

    Args:
        root: The file itself, or its folder; None is `data_root`.
        name: Name of the data set, in lower case.
        file: Name of the file.
        urls: Where it can be had.
        md5: Its checksum, checked when it is fetched.
        download: Fetch it if it is missing.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is missing and `download` is False.
        ConnectionError: If it could not be fetched.
    """
    path = data_root(root, name)
    if not path.is_file():
        folder = path
        path = path if path.suffix == Path(file).suffix and not path.is_dir() else path / file
        inner = sorted(folder.glob(f"*/{file}")) if not path.is_file() and folder.is_dir() else []
        path = inner[0] if len(inner) == 1 else path
    if not path.is_file() and not download:
        raise FileNotFoundError(
            f"{path} is missing. Give root= the file or its folder, set FLOWFACTOR_{name.upper()} to it, or let "
            f"download=True fetch it from {', '.join(urls)}."
        )
    if not path.is_file():
        download_file(path, urls, md5=md5)
    return path
