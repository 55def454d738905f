"""What a trained model expects after a cue: probabilities of feeling words, and sampled stories."""

from __future__ import annotations

import math
from typing import Any

import torch

WORDS = ("hungry", "sleepy", "thirsty", "cold", "sad", "scared", "happy", "excited")
PROMPTS = (
    "I like to eat toast for breakfast. I'm so",
    "Mom made soup for dinner. I'm so",
    "I want some bread. I'm so",
    "The sky is blue. I'm so",
    "I see a tree. I'm so",
    "It is late and the moon is out. I'm so",
    "The sun is very hot. I'm so",
    "It is snowing outside. I'm so",
    "I lost my ball. I'm so",
    "I heard a loud noise. I'm so",
    "I'm so",
)
"""Cues and neutral sentences, the study's own prompt first; none of the prompts is a line of the grammar."""
SAMPLE_PROMPTS = ("Once upon a time", "One day, a little girl named", "Tom and Lily were", "The little dog was hungry.")


@torch.no_grad()
def word_probabilities(model: Any, prompt: str, words: tuple[str, ...] = WORDS) -> dict[str, float]:
    """Probability that each word, with a blank before it, comes next; a word of several tokens takes the product."""
    tokenizer = model.tokenizer
    start = tokenizer.encode(prompt, add_special_tokens=False)
    first = model(torch.tensor([start]))[0, -1].float().log_softmax(-1)
    result = {}
    for word in words:
        ids = tokenizer.encode(" " + word, add_special_tokens=False)
        log_prob = float(first[ids[0]])
        if len(ids) > 1:
            later = model(torch.tensor([start + ids]))[0, len(start) : -1].float().log_softmax(-1)
            log_prob += sum(float(later[i, token]) for i, token in enumerate(ids[1:]))
        result[word] = math.exp(log_prob)
    return result


def probe_table(model: Any) -> str:
    """A Markdown table: prompts down, words across."""
    lines = ["| prompt | " + " | ".join(WORDS) + " |", "|---|" + "---|" * len(WORDS)]
    for prompt in PROMPTS:
        found = word_probabilities(model, prompt)
        lines.append(f"| {prompt} | " + " | ".join(f"{found[word]:.3f}" for word in WORDS) + " |")
    return "\n".join(lines)


def sample_stories(model: Any, tokens: int = 140, temperature: float = 0.7, top_p: float = 0.95) -> list[str]:
    """One continuation of each sample prompt; seeds 0, 1, ... and nothing picked by hand."""
    return [
        model.generate(
            prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
            verbose=False,
        )
        for seed, prompt in enumerate(SAMPLE_PROMPTS)
    ]
