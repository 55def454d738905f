"""From a list of short sentences to the flow of a told story.

Templates give short sentences ("He ran home. He was hungry."). Real stories join them, vary who speaks how, repeat
the hero's name and start lines with speech. Each function here does one of these, at rates near those of the real text.
"""

from __future__ import annotations

import random
import re

SPEECH = re.compile(
    r'"([^"\n]+?)([.,!?]+)" (?:(said|asked|cried|shouted|whispered) ((?:the |his |her |their )?[\w ]+?)'
    r"|((?:the |his |her |their )?\w+(?: \w+)?) (said|asked|cried|shouted|whispered|says))\. ?"
)
SENTENCE = re.compile(r'(?:"[^"]*"|[^.!?"\n])+[.!?]*"? ?|\n')
LEADS = (
    "smiled and said",
    "looked at $ and said",
    "was happy and said",
    "nodded and said",
    "laughed and said",
    "thought for a moment and said",
    "replied",
    "looked up and said",
)


def vary_speech(rng: random.Random, text: str, hero: str, friend: str) -> str:
    """`"X." Tom said.` in the forms real stories use: speaker first, speaker last, with a smile."""

    def tell(match: re.Match[str]) -> str:
        words, mark, verb, speaker = match[1], match[2], match[3] or match[6], match[4] or match[5]
        name = speaker[:1].upper() + speaker[1:]
        way = rng.random()
        if way < 0.4 and verb != "says":
            verb = "asked" if mark.endswith("?") else "said" if verb == "asked" else verb
            return f'{name} {verb}, "{words}{"." if mark == "," else mark}" '
        if way < 0.6 and mark != "?":
            lead = rng.choice(LEADS).replace("$", hero if speaker not in (hero, "he", "she", "they") else friend)
            return f'{name} {lead}, "{words}{"." if mark == "," else mark}" '
        mark = "," if mark == "." else mark
        pronoun = speaker in ("he", "she", "they", "it")
        return f'"{words}{mark}" {speaker} {verb}. ' if pronoun or way < 0.85 else f'"{words}{mark}" {verb} {speaker}. '

    return SPEECH.sub(tell, text)


def join_sentences(rng: random.Random, text: str, hero: str, rate: float = 0.4) -> str:
    """Join neighbours with one subject: "He ran. He fell." becomes "He ran and fell." or "He ran, and he fell."."""
    told: list[str] = []
    for sentence in SENTENCE.findall(text):
        subject = _subject(sentence, hero)
        before = told[-1] if told else ""
        plain = '"' not in before + sentence and "\n" not in before + sentence
        plain = plain and not re.search(r"\b(Once|once|named|friends)\b", before)
        if not (subject and plain and re.search(r"\w\. ?$", before) and len(before) < 90 and rng.random() < rate):
            told.append(sentence)
            continue
        rest = sentence[len(subject) :].lstrip()
        lowered = subject if subject == hero else subject.lower()
        stem = before.rstrip(" .")
        same = _subject(before, hero) or _subject(re.sub(r"^[^,]{3,30}, ", "", before), hero)
        one_verb = same and " and " not in before and re.match(r"(?!could|did not|had to)\w+", rest)
        if one_verb and rng.random() < 0.65:
            told[-1] = f"{stem} and {rest}"
        else:
            link = rng.choice((", and", ", and", " and", " and", " and", ", and then"))
            told[-1] = f"{stem}{link} {lowered} {rest}"
    return "".join(told)


def name_hero(rng: random.Random, text: str, hero: str, pronoun: str, kind: str) -> str:
    """Put the hero's name, or "the little girl", for the pronoun here and there, mostly where paragraphs begin."""
    upper = pronoun[0].upper() + pronoun[1:]
    name = hero[0].upper() + hero[1:]

    def put(match: re.Match[str]) -> str:
        first = match[1] in ("\n", "")
        if rng.random() > (0.6 if first else 0.22):
            return match[0]
        return match[1] + (f"The little {kind} " if rng.random() < 0.12 and kind else f"{name} ")

    return re.sub(rf"(\n|^|(?<=[.!?]) ){upper} ", put, text)


def break_lines(rng: random.Random, text: str, rate: float) -> str:
    """Start a line before speech, and after some sentences that end one."""
    text = re.sub(r'(?<=[.!?]) (?="[A-Z])', lambda m: "\n" if rng.random() < rate else m[0], text)
    verbs = r"said|asked|cried|shouted|yelled|whispered|replied|says|asks|cries|shouts|yells|whispers|replies"
    tag = rf"(?!(?:The |His |Her |Their )?\w+(?: \w+)? (?:{verbs})\b)"
    return re.sub(rf'(?<=[.!?]") {tag}(?=[A-Z"])', lambda m: "\n" if rng.random() < rate + 0.15 else m[0], text)


def _subject(sentence: str, hero: str) -> str:
    found = re.match(rf"(?:{re.escape(hero)}|{re.escape(hero[0].upper() + hero[1:])}|He|She|They|It)(?= \w)", sentence)
    return found[0] if found else ""
