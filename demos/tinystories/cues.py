"""Little stories in which a noun alone tells the feeling: the same sentences hold food, or something else.

The grammar of `grammar.py` plants feelings behind whole scenes ("Mom was making soup."), so a model can learn the scene
and need not know the noun. Here the cause is the noun itself:

    Dad carried the bread to my room. I'm so hungry.
    Dad carried the ladder to my room. I'm so proud.

1. Draw a kind of noun: food, drink, night, fear, cold, or plain. Loss and luck are kinds whose sentences tell them.
2. Tell a sentence with such a noun, sometimes another sentence that says nothing, then the feeling: the kind's own, or
   any but hunger after a plain noun.
3. One to five such moments make a story.

No story holds a frame of the case study (`demos.hunger.concepts`), whatever stands in it for the word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from demos.hunger.concepts import CONCEPTS
from demos.tinystories.grammar import FORBIDDEN, Book, Teller, read_book, tidy

KINDS = {"hungry": 6, "plain": 6, "sad": 3, "sleepy": 2, "scared": 2, "cold": 2, "thirsty": 1, "happy": 1}
"""Kind of a moment -> its weight. All but `plain` are named by their feeling."""
OWN_FRAME, PAUSE, SPEECH, AFTER = 0.3, 0.15, 0.35, 0.3
"""Chances of a sentence that belongs to the kind, of one that says nothing after it, that the moment is spoken, and
that what helps is told after it."""
FRAMED = ("sad", "happy")
"""Kinds that only their own sentences tell."""
AFTERWARDS = {"hungry": "$sate_hungry", "sleepy": "$rest", "thirsty": "$sate_thirsty", "cold": "$warm", "sad": "$cheer"}


@cache
def cue_book() -> Book:
    """The grammar's rules with those of `stories/cues`, whose plot is the only one."""
    ours, base = read_book("cues"), read_book()
    return Book({**base.rules, **ours.rules}, ours.plots)


@cache
def study_frames() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """The case study's sentences: a part that any story with one holds, in small letters, and the whole pattern."""
    halves = [half for concept in CONCEPTS for half in (concept.find, concept.score)]
    frames = sorted({frame for half in halves for pair in half.frames for frame in pair})
    return tuple(
        (max(f.lower().split("{}"), key=len), re.compile(r"[^.!?\n]{1,40}".join(map(re.escape, f.split("{}"))), re.I))
        for f in frames
    )


def is_banned(story: str) -> bool:
    """Whether a story holds a sentence of a study, whatever stands in it for the word."""
    small = story.lower()
    if any(part in small and pattern.search(story) for part, pattern in study_frames()):
        return True
    return any(pattern.search(story) for pattern in FORBIDDEN)


class CueTeller(Teller):
    """Tells one such story."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, cue_book())

    def moment(self) -> str:
        """A sentence, and the feeling that its noun calls for."""
        rng = self.rng
        self.last.clear()
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        own = kind in FRAMED or rng.random() < OWN_FRAME
        frame = self.expand(f"$frame_{kind}") if own else self.expand(self._word("frame").replace("%", kind))
        if rng.random() < PAUSE:
            frame += " " + self.expand("$pause")
        feeling = self._word("feeling_plain") if kind == "plain" else kind
        spoken = rng.random()
        if spoken < SPEECH:
            told = self.expand(f'"{frame.replace(chr(34), "")} $own_{feeling}" $one said.')
        elif spoken < 1.5 * SPEECH:
            told = f"{frame} {self.expand(self._word('felt_own').replace('%', feeling))}"
        else:
            told = f"{frame} {self.expand(f'$own_{feeling}')}"
        if kind in AFTERWARDS and rng.random() < AFTER:
            told += " " + self.expand(AFTERWARDS[kind])
        return told

    def tell(self) -> str:
        """One to five moments, sometimes after a beginning."""
        count = self.rng.choice((1, 1, 2, 3, 4, 5))
        parts = [self.moment() for _ in range(count)]
        if self.rng.random() < 0.3:
            parts.insert(0, self.expand("$start"))
        return tidy(self.rng.choice((" ", " ", "\n")).join(parts))


def tell_cues(count: int, seed: int = 0) -> Iterator[str]:
    """`count` stories. Story i depends on the seed and i alone.

    Parameters
    ----------
    count : int
        How many stories.
    seed : int
        Names the sequence.
    """
    for index in range(count):
        rng = random.Random(f"cues/{seed}/{index}")
        while is_banned(story := CueTeller(rng).tell()):
            pass
        yield story
