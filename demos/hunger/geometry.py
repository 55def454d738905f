"""The latent's decoder row among the token embeddings: cosines, ranks, and a picture in three dimensions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from demos.hunger.concepts import Concept
from demos.hunger.natural import matched
from demos.hunger.stages import Found
from demos.hunger.subject import Subject


def cosines(subject: Subject, coder: str, features: Sequence[int]) -> Float[Tensor, "n v"]:
    """Decoder rows against the embeddings of all tokens, which are the unembedding's columns as well."""
    rows = subject.directions(coder, features)
    tokens = subject.model.W_E[: subject.model.d_vocab_real]
    return torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(tokens, dim=1).t()


def ranks(values: Float[Tensor, "n v"], token: int) -> list[int]:
    """1 for the row whose largest value is the token's."""
    return ((values > values[:, token : token + 1]).sum(1) + 1).tolist()


def measure(subject: Subject, concept: Concept, found: Found, natural: Found) -> Found:
    """The word's rank, those that random latents give it, the nearest tokens, and ranks of other words."""
    options, word = subject.options, subject.token(concept.word)
    controls = matched(natural, found["coder"], found["feature"], options.controls, options.seed + 1)
    values = cosines(subject, found["coder"], [found["feature"], *controls])
    best = values[0].topk(15)
    listed = {}
    for text in [concept.word, concept.against, *(f" {w}" for w in (*concept.lexicon, *concept.score.cues[:4]))]:
        ids = subject.model.to_tokens(text, prepend_bos=False)[0]
        if len(ids) == 1:
            token = int(ids[0])
            listed[text] = {"rank": ranks(values[:1], token)[0], "cosine": float(values[0, token])}
    return {
        "tokens": values.shape[1],
        "rank": ranks(values[:1], word)[0],
        "cosine": float(values[0, word]),
        "random_ranks": ranks(values[1:], word),
        "nearest": [[subject.model.to_single_str_token(int(t)), float(c)] for c, t in zip(*best, strict=True)],
        "words": listed,
    }


def method() -> str:
    """ "umap" where umap-learn is installed (pip install 'hooked-mamba[umap]'), else "pca"."""
    return "pca" if importlib.util.find_spec("umap") is None else "umap"


def picture(subject: Subject, concept: Concept, found: Found, how: str) -> Found:
    """The row, the tokens nearest to it, the study's words and as many random tokens, in three dimensions.

    Directions count, not lengths: all vectors are of length 1.

    Parameters
    ----------
    how
        "umap" (cosine distances, 15 neighbours) or "pca".
    """
    options = subject.options
    values = cosines(subject, found["coder"], [found["feature"]])[0]
    groups: dict[str, list[int]] = {
        "the word": [subject.token(concept.word)],
        "words with a cue": single(subject, (*concept.find.cues, *concept.score.cues)),
        "other words": single(subject, (*concept.find.others, *concept.score.others)),
        "nearest to the latent": values.topk(min(options.nearest, len(values))).indices.tolist(),
    }
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(options.seed)).tolist()
    groups["other tokens"] = order[: options.nearest]
    kind = {token: name for name in reversed(groups) for token in groups[name]}  # the first group that has it
    tokens = sorted(kind)
    vectors = torch.cat([subject.directions(found["coder"], [found["feature"]]), subject.model.W_E[tokens]])
    places = embed(torch.nn.functional.normalize(vectors, dim=1), how, options.seed)
    labels = ["the latent", *(subject.model.to_single_str_token(t) for t in tokens)]
    return {
        "method": how,
        "points": [
            {"label": label, "kind": group, "xyz": xyz}
            for label, group, xyz in zip(
                labels, ["the latent", *(kind[t] for t in tokens)], places.tolist(), strict=True
            )
        ],
    }


def single(subject: Subject, texts: Sequence[str]) -> list[int]:
    """Those words that are one token behind a space."""
    ids = [subject.model.to_tokens(f" {text}", prepend_bos=False)[0].tolist() for text in texts]
    return [row[0] for row in ids if len(row) == 1]


def embed(vectors: Float[Tensor, "n d"], how: str, seed: int) -> Float[Tensor, "n 3"]:
    """Three dimensions of many."""
    if how == "umap":
        import umap

        reducer = umap.UMAP(n_components=3, n_neighbors=15, metric="cosine", random_state=seed, n_jobs=1)
        return torch.as_tensor(reducer.fit_transform(vectors.numpy()))
    centred = vectors - vectors.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    sign = torch.where(axes.gather(1, axes.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return centred @ (axes * sign)[:3].t()
