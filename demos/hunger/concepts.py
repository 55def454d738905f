"""Feelings, and sentences that call for them or do not.

A pair is a sentence with a cue ("I like to eat toast for breakfast. I'm so") and one without ("I like to draw glass
after school. I'm so"). Pairs come in two halves that share neither a frame nor a word in it: one to find a feature on,
one to score it on. All sentences end alike, so that what tells them apart at the last token must have been carried
there. No frame is one of the story grammar's (tests/demos/test_hunger.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HalfName = Literal["find", "score"]
END = " I'm so"


@dataclass(frozen=True)
class Half:
    """Frames and words of one half."""

    frames: tuple[tuple[str, str], ...]
    """With a cue, and without; `{}` is where the word goes."""
    cues: tuple[str, ...]
    others: tuple[str, ...]
    """Words of the sentences without a cue, as many."""


@dataclass(frozen=True)
class Pair:
    """One pair and its two swaps."""

    cue: str
    """The sentence that calls for the feeling."""
    other: str
    """The one that does not."""
    swapped: str
    """The first with its cue taken out: its frame with the other word; `other` where the cue is no noun."""
    replaced: str
    """The first with another cue's word."""
    frame: int
    word: int

    def differing(self, a: Sequence[int], b: Sequence[int]) -> range:
        """Where `a` differs from `b`: what is left of it between the longest common beginning and end."""
        start = 0
        while start < min(len(a), len(b)) and a[start] == b[start]:
            start += 1
        end = 0
        while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
            end += 1
        return range(start, len(a) - end)


@dataclass(frozen=True)
class Concept:
    """A feeling."""

    name: str
    word: str
    """The token that the model should say, its space included."""
    against: str
    """The token that its lead is measured over."""
    lexicon: tuple[str, ...]
    """Words that count as speaking of it."""
    find: Half
    score: Half

    def pairs(self, half: HalfName, limit: int | None = None) -> list[Pair]:
        """All pairs of a half, frame by frame.

        Parameters
        ----------
        limit
            Words of the half that are used; None: all.
        """
        chosen = self.find if half == "find" else self.score
        n = len(chosen.cues[:limit])
        found = []
        for f, (with_cue, without) in enumerate(chosen.frames):
            for w in range(n):
                cue, other = with_cue.format(chosen.cues[w]) + END, without.format(chosen.others[w]) + END
                same_words = chosen.cues == chosen.others
                swapped = other if same_words else with_cue.format(chosen.others[w]) + END
                replaced = with_cue.format(chosen.cues[(w + 1) % n]) + END
                found.append(Pair(cue, other, swapped, replaced, f, w))
        return found

    @property
    def prompt(self) -> str:
        """The sentence whose circuit is traced: the first of the scored half."""
        return self.pairs("score")[0].cue


def words(text: str) -> tuple[str, ...]:
    """Words of a line."""
    return tuple(text.split())


def both(*frames: str) -> tuple[tuple[str, str], ...]:
    """Frames that fit cues and other words alike."""
    return tuple((frame, frame) for frame in frames)


NEAR_THINGS = both(
    "Look at the {} near us.",
    "My friend told me about the {}.",
    "There is the {} again.",
    "We drew the {} on a wall.",
    "This is the {} from my book.",
)
FAR_THINGS = both(
    "I can tell you about the {}.",
    "Mom showed us the {} today.",
    "They all know the {} well.",
    "I remember the {} from before.",
    "The {} is what I think of.",
)
PLAIN_FIND, PLAIN_SCORE = words("table car fence ball wheel chair"), words("box door truck spoon bench cup")
TOYS_FIND, TOYS_SCORE = words("ball doll car train kite boat"), words("toy truck balloon robot book teddy")

HUNGRY = Concept(
    "hungry",
    " hungry",
    " sad",
    words("hungry hunger eat eats ate eaten eating food meal lunch dinner breakfast snack tummy"),
    find=Half(
        (
            *both("Look at the {} near the door.", "My friend has some {} with her.", "We found {} behind the house."),
            ("My dad likes to cook {} at home.", "My dad likes to clean {} at home."),
            ("There will be {} for lunch today.", "There will be {} for the art class today."),
        ),
        words("bread cake cheese rice pizza honey fruit corn"),
        words("paper sand wood string gold rope metal clothes"),
    ),
    score=Half(
        (
            ("I like to eat {} for breakfast.", "I like to draw {} after school."),
            *both(
                "Here is all the {} you asked for.", "Grandma keeps {} in her bag.", "The man on the street sells {}."
            ),
            ("They cut the {} and shared it.", "They washed the {} and dried it."),
        ),
        words("toast soup jam pasta candy salad butter meat"),
        words("glass grass mud cloth paint money dirt leaves"),
    ),
)

OTHERS = (
    Concept(
        "sleepy",
        " sleepy",
        " happy",
        words("sleepy tired sleep sleeps slept sleeping asleep nap bed bedtime dream dreams yawn yawned night"),
        find=Half(NEAR_THINGS, words("bed moon pillow dream night nap"), PLAIN_FIND),
        score=Half(FAR_THINGS, words("blanket stars pajamas dark evening bedtime"), PLAIN_SCORE),
    ),
    Concept(
        "sad",
        " sad",
        " happy",
        words("sad sadly cry cries cried crying tears unhappy upset miss missed sorry"),
        find=Half(
            (
                ("I lost my {} at the park.", "I used my {} at the park."),
                ("My {} is broken now.", "My {} is purple now."),
                ("Nobody can find my {}.", "Nobody can lift my {}."),
                ("A boy took my {} away.", "A boy took my {} inside."),
                ("I can not play with my {} anymore.", "I can always play with my {} here."),
            ),
            TOYS_FIND,
            TOYS_FIND,
        ),
        score=Half(
            (
                ("My {} fell into the river.", "My {} sits on the table."),
                ("The wind blew my {} far off.", "The man put my {} over there."),
                ("The dog tore up my {}.", "The dog looked at my {}."),
                ("We had to throw out my {}.", "We had to walk past my {}."),
                ("I left my {} on the bus.", "I keep my {} on the bed."),
            ),
            TOYS_SCORE,
            TOYS_SCORE,
        ),
    ),
    Concept(
        "scared",
        " scared",
        " happy",
        words("scared scary afraid fear frightened monster hide hid hiding screamed shaking"),
        find=Half(NEAR_THINGS, words("monster storm wolf ghost snake thunder"), PLAIN_FIND),
        score=Half(FAR_THINGS, words("noise shadow spider lion dragon witch"), PLAIN_SCORE),
    ),
    Concept(
        "cold",
        " cold",
        " happy",
        words("cold freezing freeze froze snow snowy ice icy shiver shivered winter warm coat"),
        find=Half(NEAR_THINGS, words("snow wind ice scarf snowman frost"), PLAIN_FIND),
        score=Half(FAR_THINGS, words("winter rain coat mittens icicle snowflake"), PLAIN_SCORE),
    ),
)

CONCEPTS = (HUNGRY, *OTHERS)
"""The study's own first; the others in the order in which ties between them are broken."""
