"""New texts cut together from real ones: sentences that a model knows, in contexts that it does not.

    python -m demos.dictionaries.cuttings --text train.txt --stories 2500 --out runs/cut.txt

From one to three sentences in a row of one story, then of another, until there are 14. A model that has learnt a small
text partly by heart is as sure of these as of new text, which it is not of the text itself; stories that models tell
are new to it too, but simpler. Drawn with a seed, the same on every run.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterable, Iterator

from demos.dictionaries import made
from demos.tinystories.text import read_stories

SENTENCE = re.compile(r'\S.*?[.!?]"?(?=\s|$)')

SENTENCES = 14
"""Of a text at least."""


def cuttings(stories: Iterable[str], n: int, seed: int = 0) -> Iterator[str]:
    """Texts of sentences of several stories.

    Parameters
    ----------
    stories
        Those of more than three sentences are used.
    n
        How many texts.
    seed
        Of all draws.

    Raises
    ------
    ValueError
        No story has more than three sentences.
    """
    sentences = [SENTENCE.findall(story.replace("\n", " ")) for story in stories]
    long = [one for one in sentences if len(one) > 3]
    if not long:
        raise ValueError("no story has more than three sentences: there is nothing to cut from")
    draw = random.Random(seed)
    for _ in range(n):
        text: list[str] = []
        while len(text) < SENTENCES:
            of = draw.choice(long)
            first = draw.randrange(len(of))
            text += of[first : first + draw.randint(1, 3)]
        yield " ".join(text)


def main(argv: list[str] | None = None) -> int:
    """The command line."""

    def make(args: argparse.Namespace) -> Iterator[str]:
        return cuttings(read_stories(args.text), args.stories, args.seed)

    return made.write(made.parser("cuttings", stories=2500), argv, make)


if __name__ == "__main__":
    sys.exit(main())
