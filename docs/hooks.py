"""Hooks of the build of the documentation: formulas become MathML, and links between notebooks those of their pages.

MathML needs no script and no network.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.math")

_MARKDOWN = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
_LITERAL = re.compile(r"(<(pre|code|script|style|div(?= class=\"clipboard-copy-txt\"))\b.*?</\2>)", re.DOTALL)
_NOTEBOOK = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$<>]+?)(?<!\s)\$", re.DOTALL)
_REMOTE = re.compile(r"<script\b[^>]*>(?:(?!</script>).)*cdnjs(?:(?!</script>).)*</script>", re.DOTALL)

_NOTEBOOK_LINK = re.compile(r'(?<=href=")([^":#?]+\.ipynb)(?=["#])')

# What the converter does not know, or leaves to browsers, which space and slant it otherwise than TeX does.
_BAR = '<mo stretchy="false">&#x0007C;</mo>'
_DOT = "<mo>&#x0002E;</mo>"
_NAMED = re.compile(
    r"(?P<before></m(?!o)\w+>)?(?<!<msup>)(?<!<msub>)"  # an exponent's base stays one element
    r"<m[io](?: movablelimits=\"true\")?>\\?(?P<name>arg|det|exp|ln|tanh)</m[io]>"
    r"(?P<bracket><mo stretchy=\"false\">&#x00028;)?"
)
_THIN = '<mspace width="0.167em"/>'
_UPRIGHT = re.compile(r"<mi>(&#x0039[0-9A-F];|&#x003A[0-9];)</mi>")


def on_page_content(content: str, page: Any, files: Any, **_: Any) -> str:
    """Turns the formulas of a page into MathML, and mends a notebook's links."""
    source = page.file.src_uri
    if source.endswith(".ipynb"):
        parts = _LITERAL.split(_links(_REMOTE.sub("", content), page, files))
        # The split gives text, literal block, its tag, text, ...: formulas stand in the text alone.
        return "".join(
            _NOTEBOOK.sub(lambda m: _mathml(m[1] or m[2], bool(m[1]), source), text) + "".join(parts[i + 1 : i + 2])
            for i, text in enumerate(parts)
            if i % 3 == 0
        )
    return _MARKDOWN.sub(lambda m: _mathml(m[3], m[2] == "[", source), content)


def _spaced(function: re.Match[str]) -> str:
    """The name of a function with TeX's thin spaces: after a factor, and before an argument without brackets."""
    before, name, bracket = function["before"], function["name"], function["bracket"]
    return f"{before + _THIN if before else ''}<mi>{name}</mi>{bracket or _THIN}"


def _links(content: str, page: Any, files: Any) -> str:
    """Links of a notebook to other notebooks, which are files there and pages here."""

    def page_of(link: re.Match[str]) -> str:
        path = posixpath.join(posixpath.dirname(page.file.src_uri), link[1])
        target = files.get_file_from_path(posixpath.normpath(path))
        return target.url_relative_to(page.file) if target else link[1]

    return _NOTEBOOK_LINK.sub(page_of, content)


def _mathml(latex: str, display: bool, source: str) -> str:
    latex = html.unescape(latex).strip()
    mathml = _NAMED.sub(_spaced, convert(latex, display="block" if display else "inline"))
    unknown = re.findall(r"\\[A-Za-z]+", mathml)
    if unknown:  # a warning fails the strict build
        log.warning("%s: no MathML for %s in %s", source, ", ".join(sorted(set(unknown))), latex)
    for tight in (_BAR, _DOT):
        mathml = mathml.replace(tight, tight.replace("<mo", '<mo lspace="0" rspace="0"'))
    mathml = _UPRIGHT.sub(r'<mi mathvariant="normal">\1</mi>', mathml)
    return f'<div class="formula">{mathml}</div>' if display else mathml
