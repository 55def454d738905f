"""Links of pages that are read in the repository as well: what they lead to there, and on the site."""

from __future__ import annotations

import posixpath
import re

GUESTS = {"README.md": "readme.md"}
"""Files from above `docs/` that are pages of the site -> their names there."""

LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(?ms)^```.*?^```$|`[^`\n]+`")


def relink(markdown: str, folder: str) -> str:
    """A page with links that hold on the site.

    Parameters
    ----------
    markdown
        The page's text.
    folder
        Where it stands in the repository: "docs", or "" for a guest.

    Links into `docs/` and to guests lead to their pages. A file that the site does not hold is named instead: the site
    may be read without the repository beside it.
    """

    def replace(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        here = GUESTS.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if here is not None:
            return f"{link['image']}[{link['text']}]({here}{link['anchor'] or ''})"
        return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"

    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(replace, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(replace, markdown[end:])])
