"""What a page makes a browser fetch."""

from __future__ import annotations

from html.parser import HTMLParser


class Requests(HTMLParser):
    """What a page makes a browser fetch: everything but links that a reader clicks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.frames: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "srcdoc":
                self.frames.append(value or "")
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag not in ("a", "base")):
                self.found.append(value or "")


def requests_of(text: str) -> list[str]:
    parser = Requests()
    parser.feed(text)
    return parser.found + [one for frame in parser.frames for one in requests_of(frame)]
