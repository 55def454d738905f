"""The cue's word swapped: for a word that is no cue, and, as a control, for another cue's word."""

from __future__ import annotations

from demos.hunger import stats
from demos.hunger.ablation import preactivation
from demos.hunger.concepts import Concept
from demos.hunger.selection import activations, sides
from demos.hunger.stages import Found
from demos.hunger.subject import Sentences, Subject, ends


def measure(subject: Subject, concept: Concept, found: Found) -> Found:
    """Mean changes over the scored sentences of the latent and of the word's lead, and how much more than the control's
    they are."""
    options = subject.options
    pairs = concept.pairs("score", options.words)
    word, against = subject.token(concept.word), subject.token(concept.against)
    before = ends(subject, sides(subject, pairs)[0])
    swapped, replaced = (
        ends(subject, Sentences.of(subject.model, [getattr(pair, kind) for pair in pairs]))
        for kind in ("swapped", "replaced")
    )
    measures = {
        "latent": lambda seen: preactivation(subject, found, seen),
        "active": lambda seen: (activations(subject, found, seen) > 0).double(),
        "lead": lambda seen: seen.lead(word, against),
        "word": lambda seen: seen.log_p[:, word],
    }
    result: Found = {}
    for what, of in measures.items():
        lost, control = of(swapped) - of(before), of(replaced) - of(before)
        result[what] = {
            "before": float(of(before).double().mean()),
            "swapped": stats.mean_interval(lost, options.resamples, options.seed),
            "replaced": stats.mean_interval(control, options.resamples, options.seed),
            "more": stats.mean_interval(lost - control, options.resamples, options.seed),
        }
    first = pairs[0]
    result["example"] = {"cue": first.cue, "swapped": first.swapped, "replaced": first.replaced}
    return result
