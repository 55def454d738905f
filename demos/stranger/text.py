"""Text that the study makes itself: snippets of Python, HTML and SQL, with what each character belongs to."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LANGUAGES = ("python", "html", "sql")

# fmt: off
THINGS = (
    "user", "order", "item", "price", "total", "count", "name", "email", "city", "date", "score", "label", "stock",
    "invoice", "parcel", "garden", "river",
)
VERBS = ("load", "find", "count", "sort", "merge", "print", "check", "store", "send", "clean", "update")
PROSE = (
    "the", "small", "red", "boat", "went", "down", "a", "quiet", "river", "and", "nobody", "saw", "it", "again",
    "until", "spring", "came", "back",
)
# fmt: on


@dataclass(frozen=True)
class Document:
    """A text and, for every character, the language that it was written as and whether it stands in quotes."""

    text: str
    language: tuple[int, ...]
    """Index into LANGUAGES."""

    @property
    def quoted(self) -> list[bool]:
        """Whether each character stands between quotation marks of its line, the marks themselves left out."""
        found, mark = [], ""
        for c in self.text:
            opens = c in "'\"" and mark in ("", c)
            found.append(bool(mark) and not opens)
            mark = ("" if mark else c) if opens else "" if c == "\n" else mark
        return found

    def cut(self, first: int, length: int) -> Document:
        """A window of it."""
        return Document(self.text[first : first + length], self.language[first : first + length])


def python(r: random.Random) -> str:
    """A function, a loop or a class."""
    a, b, c = r.sample(THINGS, 3)
    verb, n = r.choice(VERBS), r.randint(2, 99)
    return r.choice(
        (
            f"def {verb}_{a}({b}, {c}={n}):\n    # {prose(r, 4)}\n    if {b} is None:\n        return {c}\n"
            f"    return [{b}[i] + {c} for i in range({n})]\n",
            f'for {a} in {b}s:\n    {c} = {a}.get("{r.choice(THINGS)}", {n})\n    print(f"{a}: {{{c}}}")\n',
            f"class {a.title()}:\n    def __init__(self, {b}):\n        self.{b} = {b}\n"
            f"        self.{c} = '{prose(r, 2)}'\n",
            f"import {verb}\n\n{a} = {verb}.{b}({n})\nwhile {a} > {n}:\n    {a} -= len({c})\nassert {a} not in {b}\n",
            f'try:\n    {a} = int({b}["{c}"])\nexcept ValueError as error:\n'
            f'    raise KeyError("{prose(r, 3)}") from error\n',
        )
    )


def html(r: random.Random) -> str:
    """A list, a form, a table or a paragraph."""
    a, b, c = r.sample(THINGS, 3)
    n = r.randint(2, 99)
    return r.choice(
        (
            f'<ul class="{a}">\n  <li>{prose(r, 3)}</li>\n  <li id="{b}{n}">{prose(r, 2)}</li>\n</ul>\n',
            f'<div id="{a}-{b}">\n  <p>{prose(r, 6)}</p>\n  <a href="/{b}/{n}">{c}</a>\n</div>\n',
            f'<form action="/{a}" method="post">\n  <label>{b}</label>\n  <input name="{c}" value="{n}">\n</form>\n',
            f"<table>\n  <tr><th>{a}</th><th>{b}</th></tr>\n  <tr><td>{c}</td><td>{n}</td></tr>\n</table>\n",
            f'<h2>{a.title()}</h2>\n<!-- {prose(r, 4)} -->\n<img src="{b}.png" alt="{prose(r, 2)}">\n',
        )
    )


def sql(r: random.Random) -> str:
    """A query, an insert, a table or an update."""
    a, b, c, d = r.sample(THINGS, 4)
    n = r.randint(2, 99)
    return r.choice(
        (
            f"SELECT {a}, {b}, COUNT(*)\nFROM {c}s\nWHERE {a} > {n} AND {b} = '{d}'\nGROUP BY {a}, {b};\n",
            f"INSERT INTO {a}s ({b}, {c})\nVALUES ('{prose(r, 2)}', {n}), ('{d}', {n + 1});\n",
            f"CREATE TABLE {a}s (\n  id INTEGER PRIMARY KEY,\n  {b} VARCHAR({n}) NOT NULL,\n  {c} DECIMAL\n);\n",
            f"-- {prose(r, 4)}\nUPDATE {a}s SET {b} = {b} + {n}\nWHERE {c} IN (SELECT id FROM {d}s);\n",
            f"SELECT t.{a} FROM {b}s AS t\nLEFT JOIN {c}s AS s ON s.id = t.{d}\nORDER BY t.{a} DESC LIMIT {n};\n",
        )
    )


MAKERS: tuple[Callable[[random.Random], str], ...] = (python, html, sql)


def prose(r: random.Random, words: int) -> str:
    """Some words of a sentence."""
    first = r.randrange(len(PROSE) - words)
    return " ".join(PROSE[first : first + words])


def document(r: random.Random, length: int, language: int | None = None) -> Document:
    """Snippets, one behind the other, of one language or of two or three in turn, cut to a length."""
    text, which, now = "", [], r.randrange(3) if language is None else language
    while len(text) < length:
        for _ in range(r.randint(1, 2)):
            snippet = MAKERS[now](r) + r.choice(("", "\n"))
            text, which = text + snippet, which + [now] * len(snippet)
        now = now if language is not None else r.choice([i for i in range(3) if i != now])
    return Document(text, tuple(which)).cut(0, length)


def documents(count: int, length: int, seed: int, language: int | None = None) -> list[Document]:
    """Several, the same for the same seed."""
    r = random.Random(seed)
    return [document(r, length, language) for _ in range(count)]


def languages_of(some: list[Document]) -> Tensor:
    """What each character was written as: b l."""
    return torch.tensor([one.language for one in some])


def quoted_of(some: list[Document]) -> Tensor:
    """Whether each character stands in quotes: b l."""
    return torch.tensor([one.quoted for one in some])


def shuffled(one: Document, seed: int) -> Document:
    """The same characters of each language in another order: nothing but their counts is left."""
    r, text = random.Random(seed), list(one.text)
    for language in set(one.language):
        at = [i for i, mine in enumerate(one.language) if mine == language]
        for i, c in zip(at, r.sample([text[i] for i in at], len(at)), strict=True):
            text[i] = c
    return Document("".join(text), one.language)
