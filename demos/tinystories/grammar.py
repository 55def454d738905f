"""A seeded generator of little stories, to widen a small training text.

How a story is told:

1. Draw a hero (a girl or boy, a pair of friends, an animal, a thing), a friend and a grown-up.
2. Draw a plot that suits the hero. A plot is a list of beats; a beat is a list of alternatives.
3. Expand one alternative of each beat, in order, until no symbol is left.
4. Tidy: "a apple" becomes "an apple". Tell another story if a forbidden sentence came out.

The templates are the text files in `stories/`:

    @rule NAME            one alternative a line
    @plot NAME KINDS      beats parted by blank lines; `--` alone is a new paragraph; a beat that begins
                          with `?` is told in two stories of five
    {a|b|}                one of these (may nest, may be empty)
    $food  $Food          a rule, a word list of `lexicon` or a character; a capital capitalises
    $food1                drawn once a story, then the same
    $felt_sleepy          the rule `felt` with `%` replaced by "sleepy" (likewise $sayfeel_...)
    [be] [go]             the verb in the past tense, agreeing with the hero; [be 2] is plural, [be 1] singular

Only the standard library is used, and the same seed always tells the same stories.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from demos.tinystories import lexicon, style
from demos.tinystories.verbs import past, to_present

FORBIDDEN = (
    re.compile(r"\bi like to eat\b", re.I),
    re.compile(r"\bfor breakfast\W+i'm so\b", re.I),
    re.compile(r"\btoast\b(?:\W+\w+){0,12}?\W+hungry\b", re.I),
    re.compile(r"\bhungry\b(?:\W+\w+){0,12}?\W+toast\b", re.I),
)
"""Sentences of the studies that are made with the trained models: no generated story may hold them."""

WORDS = {
    "toy": lexicon.TOYS,
    "thing": lexicon.THINGS,
    "drink": lexicon.DRINKS,
    "animal": lexicon.ANIMALS,
    "place": lexicon.PLACES,
    "home": lexicon.HOMES,
    "room": lexicon.ROOMS,
    "spot": lexicon.SPOTS,
    "color": lexicon.COLORS,
    "size": lexicon.SIZES,
    "look": lexicon.LOOKS,
    "trait": lexicon.TRAITS,
    "flaw": lexicon.FLAWS,
    "weather": lexicon.WEATHERS,
    "nature": lexicon.NATURE,
    "game": lexicon.GAMES,
    "sound": lexicon.SOUNDS,
    "helper": lexicon.HELPERS,
    "pet": lexicon.PET_NAMES,
    "girl": ("girl", "boy"),
}
# How likely a story speaks again of what it spoke of last, instead of drawing anew.
STICKY = {"food": 0.6, "toy": 0.5, "thing": 0.5, "animal": 0.4, "place": 0.5, "drink": 0.7, "room": 0.5}
PRONOUNS = {
    "girl": ("she", "her", "her", "herself"),
    "boy": ("he", "him", "his", "himself"),
    "it": ("it", "it", "its", "itself"),
    "pair": ("they", "them", "their", "themselves"),
}
# Chances of an optional beat, and, between beats, of a sentence, of a feeling with its cause, of a line break;
# chance that a story about two friends is told in the present tense.
OPTIONAL, FILLER, MOMENT, BREAK, PRESENT = 0.5, 0.5, 0.12, 0.12, 0.5
SYMBOL = re.compile(r"\$([A-Za-z]+(?:_[a-z]+)?)(\d?)")
CHOICE = re.compile(r"\{([^{}]*)\}")
VERB = re.compile(r"\[([a-z]+)(?: ([12]))?\]")


class Plot(NamedTuple):
    """A plot: its name, the kinds of hero it suits, and its beats (each a tuple of alternatives)."""

    name: str
    kinds: tuple[str, ...]
    beats: tuple[tuple[str, ...], ...]


class Book(NamedTuple):
    """All rules and plots read from the template files."""

    rules: dict[str, tuple[str, ...]]
    plots: tuple[Plot, ...]


@cache
def read_book(folder: str = ".") -> Book:
    """Read every template file of a folder in `stories`, once."""
    rules: dict[str, tuple[str, ...]] = {}
    plots: list[Plot] = []
    for path in sorted((Path(__file__).parent / "stories" / folder).glob("*.txt")):
        for section in re.split(r"^@", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            head, _, body = section.partition("\n")
            keyword, name, *kinds = head.split()
            if keyword == "rule" and name not in rules:
                rules[name] = tuple(line.strip() for line in body.splitlines() if line.strip())
            elif keyword == "plot":
                beats = (block.strip().splitlines() for block in re.split(r"\n\s*\n", body))
                plots.append(Plot(name, tuple(kinds), tuple(tuple(beat) for beat in beats if beat)))
            else:
                raise ValueError(f"{path.name}: expected a new rule or plot, got '@{head}'")
    return Book(rules, tuple(plots))


@cache
def _rank_weights(count: int) -> tuple[float, ...]:
    return tuple(accumulate(1 / (rank + 3) for rank in range(count)))


def draw(rng: random.Random, items: tuple[str, ...]) -> str:
    """One of `items`, an entry of rank r with weight 1 / (r + 3): common words come first in the lists."""
    return rng.choices(items, cum_weights=_rank_weights(len(items)))[0]


class Teller:
    """Tells one story: holds the random state and who and what the story is about.

    Parameters
    ----------
    rng : random.Random
        Source of every choice.
    book : Book, optional
        Rules and plots; default: those of `stories`.
    """

    def __init__(self, rng: random.Random, book: Book | None = None) -> None:
        self.rng = rng
        self.book = book or read_book()
        self.plot = rng.choice(self.book.plots)
        self.bound: dict[str, str] = {}
        self.last: dict[str, str] = {}
        self.plural = False
        self._cast()

    def _person(self, *but: str) -> tuple[str, str]:
        while True:
            kind = self.rng.choice(("girl", "boy"))
            name = draw(self.rng, lexicon.GIRLS if kind == "girl" else lexicon.BOYS)
            if name not in but:
                return name, kind

    def _cast(self) -> None:
        """Draw hero, friend and grown-up, and bind the symbols that name them."""
        rng, bound = self.rng, self.bound
        kind = rng.choices(self.plot.kinds, weights=[3 if k == "one" else 1 for k in self.plot.kinds])[0]
        one, gender = self._person()
        friend, _ = self._person(one)
        if kind == "pair":
            bound |= {"hero": f"{one} and {friend}", "one": one, "other": friend}
            friend, _ = self._person(one, friend)
            gender, self.plural = "pair", True
        else:
            bound["other"] = friend
            if kind in ("animal", "thing"):
                bound["kind"] = draw(rng, lexicon.ANIMALS if kind == "animal" else lexicon.TOYS)
                named = kind == "animal" and rng.random() < 0.6
                one = draw(rng, lexicon.PET_NAMES) if named else f"the {bound['kind']}"
                gender = "it" if kind == "thing" else rng.choice(("girl", "boy", "boy", "it"))
            if kind == "animal" and rng.random() < 0.5:
                friend = bound["other"] = f"the {draw(rng, lexicon.ANIMALS)}"
            bound |= {"hero": one, "one": one}
        bound |= {"friend": friend, "girl": "girl" if gender == "girl" else "boy"}
        bound["mom"] = rng.choices(lexicon.ADULTS, cum_weights=_rank_weights(len(lexicon.ADULTS)))[0]
        bound["mhe"] = "he" if bound["mom"] in ("dad", "daddy", "grandpa") else "she"
        bound |= dict(zip(("he", "him", "his", "heself"), PRONOUNS[gender], strict=True))
        bound["intro"] = "$intro_one {$habit|$habit $habit}" if kind == "one" else f"$intro_{kind} $habit"
        bound["start"] = "$intro_start" if kind == "one" else bound["intro"]
        bound["Im"] = "{I'm|I am|I'm|We are}" if self.plural else "{I'm|I'm|I am}"

    def _food(self) -> tuple[str, str]:
        """The food of the moment, and how it stands after "some": `cookies`, but `soup`."""
        food = self.last.get("food")
        if food is None or self.rng.random() > STICKY["food"]:
            food = self.last["food"] = draw(self.rng, lexicon.FOODS)
        if food in lexicon.MASS_FOODS:
            return food, food
        ending = "ies" if re.search(r"[^aeiou]y$", food) else "es" if re.search(r"(ch|sh|o)$", food) else "s"
        return food, (food[:-1] if ending == "ies" else food) + ending

    def _word(self, name: str) -> str:
        """What a symbol stands for, before its own symbols are expanded."""
        if name in self.bound:
            return self.bound[name]
        if name in ("food", "foods", "afood"):
            one, many = self._food()
            if name == "food":
                return one
            return many if name == "foods" else (f"some {many}" if one == many else f"a {one}")
        if name in WORDS:
            if name in self.last and self.rng.random() < STICKY.get(name, 0.0):
                return self.last[name]
            self.last[name] = draw(self.rng, WORDS[name])
            return self.last[name]
        if name in self.book.rules:
            return self.rng.choice(self.book.rules[name])
        rule, _, feeling = name.partition("_")
        if feeling and rule in self.book.rules:
            return self.rng.choice(self.book.rules[rule]).replace("%", feeling)
        raise ValueError(f"no rule, word list or character is called {name!r}")

    def _symbol(self, match: re.Match[str]) -> str:
        name, number = match[1], match[2]
        capital = name[0].isupper() and name not in self.bound
        name = name[0].lower() + name[1:] if capital else name
        if number and name + number in self.bound:
            text = self.bound[name + number]
        else:
            text = self.expand(self._word(name))
            if number:
                self.bound[name + number] = text
        return text[:1].upper() + text[1:] if capital else text

    def expand(self, text: str) -> str:
        """Replace choices, symbols and verbs until plain text is left."""
        while "{" in text:
            text = CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        text = SYMBOL.sub(self._symbol, text)
        return VERB.sub(lambda m: past(m[1], plural=self.plural if m[2] is None else m[2] == "2"), text)

    def tell(self) -> str:
        """The whole story: paragraphs joined by line breaks."""
        parts: list[str] = []
        for beat in self.plot.beats:
            if beat == ("--",):
                parts.append("\n")
            elif beat[0].startswith("?"):
                if self.rng.random() < OPTIONAL:
                    parts.append(self.expand(self.rng.choice(beat)[1:]))
            else:
                parts.append(self.expand(self.rng.choice(beat)))
                if beat is not self.plot.beats[-1]:
                    parts += self._between()
        return self._flow(tidy(" ".join(parts)))

    def _between(self) -> list[str]:
        """Now and then a sentence, a small cause and feeling, or a line break between two beats."""
        between = []
        if self.rng.random() < FILLER:
            between.append(self.expand("$filler"))
        if self.rng.random() < MOMENT:
            between.append(self.expand("$moment"))
        if self.rng.random() < BREAK:
            between.append("\n")
        return between

    def _flow(self, text: str) -> str:
        """Vary speech, join sentences, name the hero, break lines."""
        hero, rng = self.bound["hero"], self.rng
        text = style.vary_speech(rng, text, self.bound["one"], self.bound["friend"])
        text = style.name_hero(
            rng, text, hero, self.bound["he"], self.bound.get("kind", "" if self.plural else self.bound["girl"])
        )
        text = style.join_sentences(rng, text, hero)
        if self.plural and "Once" not in text[:4] and rng.random() < PRESENT:
            text = to_present(text, hero)
        return tidy(
            style.break_lines(rng, text, rng.choice((0.1, 0.3, 0.9)) if self.plural else rng.choice((0.05, 0.2)))
        )


def tidy(text: str) -> str:
    """Mend what joining leaves: articles, double blanks, the capital after a full stop."""
    text = re.sub(r" named the [a-z]+( [a-z]+)?(?=[.,])", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n[ \n]*", "\n", text).strip()
    text = re.sub(r" ([.,!?])", r"\1", text)
    text = re.sub(r'([.!?]")\.', r"\1", text)
    text = re.sub(r"\bin the (beach|zoo|farm|lake|school|market|playground|sea|store)\b", r"at the \1", text)
    text = re.sub(r"\bin the (hill|mountain)\b", r"on the \1", text)
    text = re.sub(r"\b([a-z]{3,})(,| and) \1\b(?! and)", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeio]|un(?!i)|umb|ug)", r"\1n ", text)
    text = re.sub(r"\b([Aa])n (?=one\b)", r"\1 ", text)
    return re.sub(r"(^|[.!?] |\n)([a-z])", lambda m: m[1] + m[2].upper(), text)


def tell_story(rng: random.Random) -> str:
    """One story free of the forbidden sentences; tells again where one slipped in."""
    while True:
        story = Teller(rng).tell()
        if not any(pattern.search(story) for pattern in FORBIDDEN):
            return story


def tell_stories(count: int, seed: int = 0) -> Iterator[str]:
    """`count` stories. Story i depends on the seed and i alone, so a longer run begins like a shorter one.

    Parameters
    ----------
    count : int
        How many stories.
    seed : int
        Names the sequence.
    """
    for index in range(count):
        yield tell_story(random.Random(f"{seed}/{index}"))
