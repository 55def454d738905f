"""Which latent reads like the feeling: found on one half of the pairs, scored on the other.

1. On the half to find on, each latent of each layer is a detector: the area under its curve at the last token. Layer 0
   is left out: its MambaCoder reads the last token alone, which all sentences share, and what it writes into memory is
   made of the last four. SAEs of outputs are tried in layer 0 too.
2. The best few by that are tried: set to its natural maximum at the last token of the sentences without a cue, how
   much more likely does a latent make the word? The one that does most is taken.
3. On the other half, whose frames and words it has not seen, its area is the result. The best detector by a single
   token, found and scored on the same halves, is the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demos.hunger import stats
from demos.hunger.concepts import Concept, HalfName, Pair
from demos.hunger.stages import Found
from demos.hunger.subject import Ends, Sentences, Subject, ends
from saes import feature_logits, set_features


def describe(subject: Subject, concept: Concept) -> Found:
    """The pairs, and what their halves share."""
    halves = {half: concept.pairs(half, subject.options.words) for half in ("find", "score")}
    find, score = concept.find, concept.score
    shared = set(find.cues) & set(score.cues) | set(find.others) & set(score.others)
    frames = {f for pair in find.frames for f in pair} & {f for pair in score.frames for f in pair}
    return {
        "counts": {half: len(pairs) for half, pairs in halves.items()},
        "shared_words": sorted(shared),
        "shared_frames": sorted(frames),
        "examples": {
            half: [[p.cue, p.other] for p in pairs[:: max(1, len(pairs) // 5)]] for half, pairs in halves.items()
        },
    }


def natural_maximum(natural: Found, coder: str, z: Float[Tensor, "b F"]) -> Float[Tensor, " F"]:
    """Each latent's largest value in the model's own stories and in the sentences z is of."""
    return torch.maximum(torch.tensor(natural["coders"][coder]["largest"]), z.amax(0))


def sides(subject: Subject, pairs: Sequence[Pair]) -> tuple[Sentences, Sentences]:
    """Sentences with and without a cue."""
    return Sentences.of(subject.model, [p.cue for p in pairs]), Sentences.of(subject.model, [p.other for p in pairs])


def find(subject: Subject, concept: Concept, natural: Found) -> Found:
    """Steps 1 and 2, on the half to find on alone."""
    cues, others = sides(subject, concept.pairs("find", subject.options.words))
    with_cue, without = ends(subject, cues), ends(subject, others)
    word = subject.token(concept.word)
    candidates = []
    maxima: dict[str, Tensor] = {}
    for name, coder in subject.coders.items():
        if coder.cfg.layer < subject.first_layer:
            continue
        z = coder.encode(torch.cat([with_cue.x[name], without.x[name]]))
        maxima[name] = natural_maximum(natural, name, z)
        positive, negative = z.chunk(2)
        areas = stats.auc(positive, negative)
        gap = (positive.mean(0) - negative.mean(0)) / z.std(0).clamp_min(1e-6)
        candidates += [(-float(areas[f]), -float(gap[f]), name, f) for f in range(coder.cfg.d_sae)]
    tried = []
    for area, _, name, f in sorted(candidates)[: subject.options.shortlist]:
        place = {"coder": name, "layer": subject.coders[name].cfg.layer, "feature": f}
        one: Found = {**place, "auc": -area, "maximum": float(maxima[name][f])}
        tried.append(one | {"effect": effect(subject, one, others, without, word)})
    best = max(tried, key=lambda one: one["effect"])
    return {"tried": tried, **best, "baseline": best_token(cues, others)}


def effect(subject: Subject, one: Found, others: Sentences, before: Ends, word: int) -> float:
    """Mean change of the word's log-probability after sentences without a cue, a latent at its natural maximum."""
    with set_features(subject.model, subject.coders[one["coder"]], {one["feature"]: one["maximum"]}, positions=-1):
        after = ends(subject, others)
    return float((after.log_p[:, word] - before.log_p[:, word]).mean())


def occurrence(sentences: Sentences, token: int) -> Float[Tensor, " b"]:
    """1 where a token is in a sentence."""
    return ((sentences.tokens == token) & sentences.mask.bool()).any(1).double()


def best_token(cues: Sentences, others: Sentences) -> Found:
    """The single token that tells the two kinds apart best, and whether it speaks for the cue or against it."""
    both = torch.cat([cues.tokens[cues.mask.bool()], others.tokens[others.mask.bool()]]).unique().tolist()
    areas = [float(stats.auc(occurrence(cues, t), occurrence(others, t))) for t in both]
    best = max(range(len(both)), key=lambda i: abs(areas[i] - 0.5))
    sign = 1 if areas[best] >= 0.5 else -1
    return {"token": both[best], "sign": sign, "auc": areas[best] if sign > 0 else 1 - areas[best]}


def activations(subject: Subject, found: Found, seen: Ends) -> Float[Tensor, " b"]:
    """The chosen latent at the last token."""
    return subject.coders[found["coder"]].encode(seen.x[found["coder"]])[:, found["feature"]]


def score(subject: Subject, concept: Concept, found: Found) -> Found:
    """Step 3; and for comparison the other latents that were tried, the best latent with hindsight, the model itself.

    `hindsight` is the largest area of any latent on the very half that scores; `model_auc` is that of the model's lead
    of the word, what it makes of the cue in the end.
    """
    options = subject.options
    pairs = concept.pairs("score", options.words)
    cues, others = sides(subject, pairs)
    with_cue, without = ends(subject, cues), ends(subject, others)
    positive, negative = activations(subject, found, with_cue), activations(subject, found, without)
    token, sign = found["baseline"]["token"], found["baseline"]["sign"]
    base = sign * occurrence(cues, token), sign * occurrence(others, token)

    def area(chosen: Tensor) -> float:
        return float(stats.auc(positive[chosen], negative[chosen]))

    def more(chosen: Tensor) -> float:
        return area(chosen) - float(stats.auc(base[0][chosen], base[1][chosen]))

    word, against = subject.token(concept.word), subject.token(concept.against)
    areas = {
        name: stats.auc(*(coder.encode(side.x[name]) for side in (with_cue, without)))
        for name, coder in subject.coders.items()
    }
    tried = [
        {**one, "scored_auc": float(areas[one["coder"]][one["feature"]]),
         "scored_effect": effect(subject, one, others, without, word)}
        for one in found["tried"]
    ]  # fmt: skip
    promoted, suppressed = promotes(subject, found["coder"], found["feature"])
    return {
        "pairs": len(pairs),
        "auc": stats.bootstrap(area, len(pairs), options.resamples, options.seed),
        "baseline": float(stats.auc(*base)),
        "baseline_token": subject.model.to_single_str_token(token),
        "more": stats.bootstrap(more, len(pairs), options.resamples, options.seed),
        "frames": [pair.frame for pair in pairs],
        "activations": {"cue": positive.tolist(), "other": negative.tolist()},
        "sentences": {"cue": [p.cue for p in pairs], "other": [p.other for p in pairs]},
        "tried": tried,
        "hindsight": max(float(area.max()) for area in areas.values()),
        "model_auc": float(stats.auc(with_cue.lead(word, against), without.lead(word, against))),
        "promoted": promoted,
        "suppressed": suppressed,
    }


def promotes(subject: Subject, coder: str, feature: int, k: int = 12) -> tuple[list[list[Any]], list[list[Any]]]:
    """Tokens whose logits a latent raises and lowers most, at activation 1 and without the final norm's scale."""
    model = subject.model
    if subject.kind != "write":
        said = feature_logits(model, subject.coders[coder], feature, k=k)
        return [list(pair) for pair in said.promoted[0]], [list(pair) for pair in said.suppressed[0]]
    logits = (subject.directions(coder, [feature])[0] * model.ln_final.weight) @ model.W_U[:, : model.d_vocab_real]
    logits = logits - logits.mean()
    ends = logits.topk(k), (-logits).topk(k)
    named = [[[model.to_single_str_token(int(t)), float(logits[t])] for t in end.indices] for end in ends]
    return named[0], named[1]


def best_sae(subject: Subject, concept: Concept) -> Found:
    """The SAE latent of largest area on the half to find on, and how it does on the other; for comparison alone."""
    options = subject.options

    def latents(half: HalfName) -> dict[str, tuple[Tensor, Tensor]]:
        seen = [ends(subject, side) for side in sides(subject, concept.pairs(half, options.words))]
        return {name: (coder.encode(seen[0].x[name]), coder.encode(seen[1].x[name])) for name, coder in saes.items()}

    saes = subject.saes
    found = {name: stats.auc(*both) for name, both in latents("find").items()}
    name = max(found, key=lambda one: float(found[one].max()))
    feature = int(found[name].argmax())
    scored = latents("score")
    positive, negative = (z[:, feature] for z in scored[name])

    def area(chosen: Tensor) -> float:
        return float(stats.auc(positive[chosen], negative[chosen]))

    return {
        "coder": name,
        "feature": feature,
        "auc": float(found[name][feature]),
        "scored_auc": stats.bootstrap(area, len(positive), options.resamples, options.seed),
        "hindsight": max(float(stats.auc(*both).max()) for both in scored.values()),
    }
