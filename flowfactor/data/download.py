"""Checksummed downloads."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


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
        ConnectionError: If no address gave the file with this checksum; the message says why for each.

    Example:
        >>> urls = ["https://example.org/mnist/train-images-idx3-ubyte.gz"]
        >>> download_file("data/images.gz", urls, md5="f68b3c2dcbeaaa9fbdd348bbdeb94873")  # doctest: +SKIP
    """
    import urllib.request
    from http.client import HTTPException

    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        part = Path(name)
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with os.fdopen(descriptor, "wb") as file, urllib.request.urlopen(url, timeout=timeout) as response:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
            if digest.hexdigest() == md5:
                part.chmod(0o644)  # mkstemp makes files that only their owner can read
                part.replace(target)
                return
            failures.append(f"{url}: MD5 {digest.hexdigest()}, expected {md5} ({part.stat().st_size:,} bytes)")
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
            failures.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    tried = "\n  ".join(failures) or "no address was given"
    raise ConnectionError(f"could not download {target.name}:\n  {tried}\nPut the file into {target.parent} by hand.")
