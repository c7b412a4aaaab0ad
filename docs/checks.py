"""Hook of the build of the documentation: reads the pages once they are built, and warns of what a reader would miss.

mkdocs looks at the links of Markdown alone, not at those of notebooks, docstrings and HTML; and a formula that nothing
recognises stays as it was written. A warning fails the strict build.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

log = logging.getLogger("mkdocs.hooks.checks")

_LITERAL = {"pre", "code", "script", "style", "math"}
_SNIPPET = re.compile(r"-{1,2}8 ?&lt; ?-{1,2}[^\n<]{0,60}")  # as it stands in HTML
_TEX = re.compile(r".{0,30}(?:\$|\\[A-Za-z()\[\]]).{0,30}")


@dataclass
class _Page(HTMLParser):
    """The anchors, the links and the readable text of a page."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)  # (tag, address)
    text: list[str] = field(default_factory=list)
    literal: list[str] = field(default_factory=list)  # the open tags that hold no prose

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [(tag, given[name]) for name in ("href", "src") if name in given]
        # A notebook's page holds its code once more, for its button that copies.
        if tag in _LITERAL or "clipboard-copy-txt" in given.get("class", ""):
            self.literal.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.literal and self.literal[-1] == tag:
            self.literal.pop()

    def handle_data(self, data: str) -> None:
        if not self.literal:
            self.text.append(data)


def on_post_build(config: Any, **_: Any) -> None:
    """Warns of links that lead nowhere, of what would be loaded from elsewhere, of formulas and files left as text."""
    site = Path(config["site_dir"]).resolve()
    pages = {path: _Page() for path in sorted(site.rglob("*.html"))}
    sources = {path: path.read_text(encoding="utf-8") for path in pages}
    for path, page in pages.items():
        page.feed(sources[path])
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for left in _SNIPPET.findall(re.sub(r"</?span[^>]*>", "", sources[path])):
            log.warning("%s: a file is not shown: %s", name, left)
        for tag, address in page.links:
            if fault := _fault(tag, address, path, site, pages):
                log.warning("%s: %s: %s", name, fault, address)
        for left in _TEX.findall("".join(page.text)):
            log.warning("%s: a formula is left as it was written: %s", name, left.strip())


def _fault(tag: str, address: str, path: Path, site: Path, pages: dict[Path, _Page]) -> str | None:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        remote = tag != "a" and parts.scheme != "data"
        return "is loaded from elsewhere" if remote else None
    base = site if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return "leads nowhere"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "leads to no such place of its page"
    return None
