"""How mkdocstrings reads this project's docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^(\s*)Example:[ ]*$", re.MULTILINE)
_CODE_OR_SHAPE = re.compile(
    r"(``.*?``|`.*?`|\$.*?\$|^\s*(?:>>>|\.\.\.).*?$)|(\[\*[\w*, +]*\])", re.MULTILINE | re.DOTALL
)


class Docstrings(griffe.Extension):
    """Puts docstrings into the words of griffe and Markdown.

    ``Example:`` becomes the section that griffe knows as ``Examples:``, and a bare shape such as [*batch, D] becomes
    code, since its star would be read as emphasis.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring:
            text = _HEADING.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _CODE_OR_SHAPE.sub(lambda m: m[1] or f"`{m[2]}`", text)
