"""Where pages stand in the repository and on the site, and links that hold in both."""

from __future__ import annotations

import posixpath
import re

NOTEBOOKS = "demos/notebooks/"
"""Where the notebooks stand; each is a page in `notebooks/`."""

GUESTS = {"README.md": "readme.md", f"{NOTEBOOKS}README.md": "notebooks/index.md"}
"""Files from outside `docs/` that are pages of the site -> their names there."""

LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(?ms)^(?P<fence>```+).*?^(?P=fence)$|`[^`\n]+`")


def page_of(path: str) -> str | None:
    """The site's name of a file of the repository; None if the site does not hold it."""
    if path.startswith(NOTEBOOKS) and path.endswith(".ipynb"):
        return f"notebooks/{posixpath.basename(path).removesuffix('.ipynb')}.md"
    if path.startswith("docs/") and not path.endswith((".py", ".sh", ".yml")):
        return path.removeprefix("docs/")
    return GUESTS.get(path)


def file_of(name: str) -> str:
    """The inverse of `page_of`."""
    guests = {page: path for path, page in GUESTS.items()}
    if name.startswith("notebooks/") and name not in guests:
        return NOTEBOOKS + posixpath.basename(name).removesuffix(".md") + ".ipynb"
    return guests.get(name, f"docs/{name}")


def relink(markdown: str, name: str) -> str:
    """A page with links that hold on the site.

    Parameters
    ----------
    markdown
        Its text as in the repository.
    name
        Its name on the site.

    A file that the site does not hold is named instead of linked: the site may be read without the repository.
    """

    def replace(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file_of(name)), link["target"]))
        there = page_of(path)
        if there is None:
            return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"
        target = posixpath.relpath(there, posixpath.dirname(name) or ".")
        return f"{link['image']}[{link['text']}]({target}{link['anchor'] or ''})"

    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(replace, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(replace, markdown[end:])])
