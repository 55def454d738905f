"""Equations as MathML, made when the site is built: no script, no font from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S)


def with_mathml(page: str) -> str:
    """A page's HTML with what arithmatex marked, `\\(...\\)` and `\\[...\\]`, turned into MathML."""

    def replace(found: re.Match[str]) -> str:
        display = "inline" if found["kind"] == "(" else "block"
        return convert(html.unescape(found["latex"]).strip(), display=display)

    return EQUATION.sub(replace, page)
