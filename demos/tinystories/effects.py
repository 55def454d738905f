"""How often a text plants each cause-and-feeling effect, counted from the text alone.

    python -m demos.tinystories.effects --generated 6000 --text train.txt

A feeling word counts as planted where one of its cue words stands at most `REACH` words before it in its story:
"The soup smelled good. Tom was so hungry." The same count over real text says what was there already.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from demos.tinystories import lexicon
from demos.tinystories.grammar import tell_stories
from demos.tinystories.text import read_stories

REACH = 25
"""Words before the feeling in which a cue counts."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FOOD_WORDS = {word for food in lexicon.FOODS for word in food.split()} - {"ice", "fish", "chicken"}
CUES: dict[str, frozenset[str]] = {
    "hungry": frozenset(
        _FOOD_WORDS
        | {f"{word}s" for word in _FOOD_WORDS}
        | _words("eat ate eaten food toast lunch dinner breakfast supper snack kitchen tummy oven cooking meal")
    ),
    "sleepy": _words(
        "night moon stars bed bedtime late dark pajamas pillow blanket yawned nap sleep eyes long ran played"
    ),
    "tired": _words("night bed late ran run walked walk played worked work climbed carried jumped long heavy"),
    "thirsty": _words("hot dry sun sunny water drink juice milk lemonade tea throat"),
    "cold": _words("snow snowing snowy winter ice icy wind windy rain wet coat scarf mittens hat blanket"),
    "sad": _words("lost lose gone broke broken find away popped died miss cry cried crying nobody"),
    "scared": _words("dark noise sound monster thunder storm wolf lost shadow roared barked loud alone"),
    "happy": _words("found new friend friends together hug hugged won fixed played thank yes"),
    "excited": _words("birthday party trip race zoo beach park farm tomorrow surprise present"),
    "proud": _words("built made learned finished won helped cleaned"),
}
"""Feeling words and the words that plant them."""


class EffectShare(NamedTuple):
    """How often one effect is planted in a text."""

    effect: str
    stories: float
    """Share of stories with at least one planted feeling word."""
    sentences: float
    """Share of sentences that hold a planted feeling word."""
    planted: int
    """Planted feeling words."""
    unplanted: int
    """Feeling words without a cue before them."""


def planted_shares(stories: Iterable[str]) -> list[EffectShare]:
    """Count every effect of :data:`CUES` in a text.

    Raises
    ------
    ValueError
        If there are no stories.
    """
    stories = list(stories)
    if not stories:
        raise ValueError("no stories to count in")
    sentences = sum(len(re.findall(r"[.!?]+", story)) for story in stories)
    in_stories, in_sentences, planted, bare = (dict.fromkeys(CUES, 0) for _ in range(4))
    for story in stories:
        found: dict[str, set[int]] = {}
        recent: list[str] = []
        sentence = 0
        for word in re.findall(r"[a-z']+|[.!?]+", story.lower()):
            if word[0] in ".!?":
                sentence += 1
                continue
            if word in CUES:
                if CUES[word].isdisjoint(recent[-REACH:]):
                    bare[word] += 1
                else:
                    planted[word] += 1
                    found.setdefault(word, set()).add(sentence)
            recent.append(word)
        for effect, where in found.items():
            in_stories[effect] += 1
            in_sentences[effect] += len(where)
    return [
        EffectShare(
            effect,
            in_stories[effect] / len(stories),
            in_sentences[effect] / max(1, sentences),
            planted[effect],
            bare[effect],
        )
        for effect in CUES
    ]


def share_table(told: list[EffectShare], real: list[EffectShare]) -> str:
    """A Markdown table of both counts, side by side."""
    lines = [
        "| effect | generated: stories | sentences | planted / without cue"
        " | real: stories | sentences | planted / without cue |",
        "|---|---|---|---|---|---|---|",
    ]
    for a, b in zip(told, real, strict=True):
        cells = [f"{s.stories:.2%} | {s.sentences:.3%} | {s.planted:,} / {s.unplanted:,}" for s in (a, b)]
        lines.append(f"| {a.effect} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table for generated stories beside a real text."""
    parser = argparse.ArgumentParser(description="Count planted effects.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True, help="real stories to compare with")
    parser.add_argument("--generated", type=int, default=6000, help="generated stories to count in")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stories")
    args = parser.parse_args(argv)
    told = planted_shares(tell_stories(args.generated, args.seed))
    print(share_table(told, planted_shares(read_stories(args.text))))


if __name__ == "__main__":
    main()
