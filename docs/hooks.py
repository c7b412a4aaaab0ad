"""Hooks of the build of the documentation: formulas become MathML, which needs no script and no network."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.math")

_MARKDOWN = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
_LITERAL = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)", re.DOTALL)
_NOTEBOOK = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$<>]+?)(?<!\s)\$", re.DOTALL)
_REMOTE = re.compile(r"<script\b[^>]*>(?:(?!</script>).)*cdnjs(?:(?!</script>).)*</script>", re.DOTALL)

# What the converter leaves to browsers, which space and slant it otherwise than TeX does.
_BAR = '<mo stretchy="false">&#x0007C;</mo>'
_NAMED = re.compile(r"<mi>(ln|det)</mi>(?!<mo stretchy=\"false\">&#x00028;)")
_UPRIGHT = re.compile(r"<mi>(&#x0039[0-9A-F];|&#x003A[0-9];)</mi>")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turns the formulas of a page into MathML."""
    source = page.file.src_uri
    if source.endswith(".ipynb"):
        parts = _LITERAL.split(_REMOTE.sub("", content))
        # The split gives text, literal block, its tag, text, ...: formulas stand in the text alone.
        return "".join(
            _NOTEBOOK.sub(lambda m: _mathml(m[1] or m[2], bool(m[1]), source), text) + "".join(parts[i + 1 : i + 2])
            for i, text in enumerate(parts)
            if i % 3 == 0
        )
    return _MARKDOWN.sub(lambda m: _mathml(m[3], m[2] == "[", source), content)


def _mathml(latex: str, display: bool, source: str) -> str:
    latex = html.unescape(latex).strip()
    mathml = convert(latex, display="block" if display else "inline")
    unknown = re.findall(r"\\[A-Za-z]+", mathml)
    if unknown:  # a warning fails the strict build
        log.warning("%s: no MathML for %s in %s", source, ", ".join(sorted(set(unknown))), latex)
    mathml = mathml.replace(_BAR, _BAR.replace("<mo", '<mo lspace="0" rspace="0"'))
    mathml = _NAMED.sub(r'<mi>\1</mi><mspace width="0.167em"/>', mathml)
    mathml = _UPRIGHT.sub(r'<mi mathvariant="normal">\1</mi>', mathml)
    return f'<div class="formula">{mathml}</div>' if display else mathml
