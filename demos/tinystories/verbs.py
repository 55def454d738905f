"""Past tenses for the story grammar."""

from __future__ import annotations

IRREGULAR = {
    "build": "built",
    "can": "could",
    "do": "did",
    "draw": "drew",
    "drink": "drank",
    "dream": "dreamed",
    "eat": "ate",
    "fall": "fell",
    "feel": "felt",
    "find": "found",
    "fly": "flew",
    "forget": "forgot",
    "get": "got",
    "give": "gave",
    "go": "went",
    "have": "had",
    "hear": "heard",
    "hide": "hid",
    "hold": "held",
    "hurt": "hurt",
    "know": "knew",
    "lie": "lay",
    "lose": "lost",
    "make": "made",
    "meet": "met",
    "put": "put",
    "run": "ran",
    "say": "said",
    "see": "saw",
    "sit": "sat",
    "sleep": "slept",
    "swim": "swam",
    "take": "took",
    "tell": "told",
    "think": "thought",
    "throw": "threw",
    "wake": "woke",
    "win": "won",
}
DOUBLED = {"clap": "clapp", "grab": "grabb", "hug": "hugg", "rub": "rubb", "stop": "stopp", "plan": "plann"}


def past(verb: str, plural: bool = False) -> str:
    """The past tense of `verb`; only `be` cares whether its subject is plural."""
    if verb == "be":
        return "were" if plural else "was"
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    stem = DOUBLED.get(verb, verb)
    return stem + ("d" if stem.endswith("e") else "ed")
