"""Past tenses for the story grammar."""

from __future__ import annotations

import re

from demos.tinystories.lexicon import entries

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
DOUBLED = frozenset(entries("clap/drop/grab/hug/nod/pat/plan/rub/skip/stop/wag"))


def past(verb: str, plural: bool = False) -> str:
    """The past tense of `verb`; only `be` cares whether its subject is plural."""
    if verb == "be":
        return "were" if plural else "was"
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    stem = verb + verb[-1] if verb in DOUBLED else verb
    return stem + ("d" if stem.endswith("e") else "ed")


REGULAR = entries(
    """ask/chase/climb/close/cry/count/decide/explore/follow/grab/happen/help/hug/jump/laugh/
    learn/like/listen/live/look/love/notice/nod/open/paint/pick/play/point/pull/push/
    reach/roll/scream/share/shout/show/smell/smile/stay/start/stop/talk/thank/touch/try/
    turn/use/wait/walk/want/watch/wave/whisper/wish/wonder/work/yell/clean/carry/bark/
    taste/agree/clap/rub/dance/sail/plant/pack/visit/fix/kiss/splash/drop/spill/wag/plan/
    add/mix"""
)
PRESENT = {word: verb for verb, word in IRREGULAR.items() if verb != "hurt"} | {
    "chased": "chase",
    "grew": "grow",
    "kept": "keep",
    "knew": "know",
    "left": "leave",
    "sang": "sing",
    "stood": "stand",
    "took": "take",
    "blew": "blow",
    "broke": "break",
    "tore": "tear",
    "rode": "ride",
    "shook": "shake",
    "came": "come",
    "gave": "give",
    "brought": "bring",
    "became": "become",
    "would": "will",
}
PRESENT |= {past(verb): verb for verb in REGULAR}
_TOKEN = re.compile(r"\"[^\"]*\"|[A-Za-z_']+|[^A-Za-z_\"]+|\"")


def third_person(verb: str) -> str:
    """The present tense after he, she or it."""
    if verb in ("can", "will"):
        return verb
    if verb == "have":
        return "has"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")


def to_present(text: str, hero: str) -> str:
    """Tell a story of two friends, `hero` = "A and B", in the present tense; speech stays as it is.

    A verb takes the number of the last subject before it: plural after "they", after both names and after a plural
    noun with its article; singular after a name and after any other noun with its article.
    """
    plural, told, words = True, [], [""] * 4
    for token in _TOKEN.findall(text.replace(hero, hero.replace(" ", "_"))):
        lower = token.lower()
        if not (token[0].isalpha() or token[0] == "'"):
            told.append(token)
            if not token.isspace():
                words = [""] * 4
            continue
        if lower == "they" or "_" in token:
            plural, words = True, [""] * 4
        elif lower in ("he", "she", "it", "mom") or (token[0].isupper() and lower not in _OPENERS):
            plural = False
        elif lower in _BE or lower in PRESENT:
            if words[-1] not in _NO_NOUN and not {"the", "a", "an", "their"}.isdisjoint(words[-3:-1]):
                plural = words[-1].endswith("s")
            if lower in _BE:
                token = _BE[lower][plural]
            elif words[-1] not in ("do", "does", "don't", "doesn't", "did", "didn't", "to"):
                token = PRESENT[lower] if plural else third_person(PRESENT[lower])
        told.append(token)
        words.append(lower)
    return "".join(told).replace("_", " ")


_NO_NOUN = frozenset(("they", "he", "she", "it", "and", "then", "but", "so", "all", "both"))
_BE = {
    "was": ("is", "are"),
    "were": ("is", "are"),
    "wasn't": ("isn't", "aren't"),
    "weren't": ("isn't", "aren't"),
    "didn't": ("doesn't", "don't"),
    "couldn't": ("can't", "can't"),
}
_OPENERS = frozenset(
    entries("one/day/then/so/and/but/after/when/as/soon/in/at/from/the/every/first/suddenly/finally/last/there/a/their")
)
