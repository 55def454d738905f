"""What the grammar planted: how often told stories tie the feeling to its causes, and that they hold no frame."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from demos.dictionaries.text import MIXES
from demos.hunger.concepts import CONCEPTS
from demos.hunger.stages import Found
from demos.tinystories.effects import planted_shares


def frames_in(stories: Iterable[str]) -> list[str]:
    """Those frames of any concept that a story holds, whatever stands for the word."""
    text = "\n".join(story.replace("\n", " ") for story in stories)
    frames = {f for concept in CONCEPTS for half in (concept.find, concept.score) for pair in half.frames for f in pair}
    slot = r"[^.!?\n]{1,40}"
    return sorted(f for f in frames if re.search(slot.join(map(re.escape, f.split("{}"))), text, re.I))


def measure(model: str, told: int) -> Found:
    """Shares of planted stories and sentences in what the model was told, and in its whole training mix.

    Parameters
    ----------
    told
        Stories of each kind to count in, at most those that the model was trained on.
    """
    mix = MIXES.get(model)
    if mix is None:
        return {"share_of_rows": 0.0, "stories": 0, "frames": [], "effects": {}}
    stories: Sequence[str] = mix.tell(told)
    effects = {
        effect.effect: {
            "stories": effect.stories,
            "sentences": effect.sentences,
            "of_mix": mix.share * effect.sentences,
            "planted": effect.planted,
            "unplanted": effect.unplanted,
        }
        for effect in planted_shares(stories)
        if effect.effect in {concept.name for concept in CONCEPTS}
    }
    return {"share_of_rows": mix.share, "stories": len(stories), "frames": frames_in(stories), "effects": effects}
