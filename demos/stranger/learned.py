"""What can be read off the stream: a linear probe at every layer, and a sparse autoencoder trained on one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demos.stranger.model import HookedStranger, tokens_of
from demos.stranger.task import accuracy, class_ids, logits_of
from demos.stranger.text import LANGUAGES, Document, languages_of, quoted_of
from demos.studies.common import percent
from demos.studies.report import Section, Table
from saes import SparseCoder
from saes.splicing import splice
from saes.training import train_sae


def streams(model: HookedStranger, some: list[Document], at_once: int = 16) -> list[Float[Tensor, "n d"]]:
    """The stream entering each layer, and leaving the last, at all characters of documents."""
    n = model.cfg.n_layers
    names = [*(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post"]
    found = []
    for i in range(0, len(some), at_once):
        tokens = tokens_of(*(one.text for one in some[i : i + at_once]))
        _, cache = model.run_with_cache(tokens, names_filter=names)
        found.append([cache[name].flatten(0, 1) for name in names])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def entering(model: HookedStranger, some: list[Document], layer: int, at_once: int = 16) -> Float[Tensor, "n d"]:
    """The stream entering one layer."""
    batches = (some[i : i + at_once] for i in range(0, len(some), at_once))
    found = [model(tokens_of(*(one.text for one in batch)), stop_at_layer=layer) for batch in batches]
    return torch.cat(found).flatten(0, 1)


def balanced(found: Bool[Tensor, " n"], wanted: Bool[Tensor, " n"]) -> float:
    """The mean of how many of the trues and of the falses are found; chance is a half."""
    return float((found[wanted].float().mean() + (~found[~wanted]).float().mean()) / 2)


def probe(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], x_test: Float[Tensor, "m d"], y_test: Bool[Tensor, " m"]
) -> float:
    """Balanced accuracy, on the test's rows, of a ridge regression on standardised activations, both classes alike."""
    mean, std = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
    a, b = (torch.cat([(v.double() - mean) / std, torch.ones(len(v), 1)], 1) for v in (x, x_test))
    weight = torch.where(y, 1 / y.sum(), 1 / (~y).sum()).double()
    gram = a.t() @ (a * weight[:, None]) + 1e-3 * torch.eye(a.shape[1], dtype=a.dtype)
    w = torch.linalg.solve(gram, a.t() @ (weight * torch.where(y, 1.0, -1.0).double()))
    return balanced(b @ w > 0, y_test)


def probe_section(model: HookedStranger, some: list[Document], test: list[Document]) -> Section:
    """In quotes or not, layer by layer, with three controls."""
    random = HookedStranger(model.cfg, seed=0)
    wanted, wanted_test = quoted_of(some), quoted_of(test)
    moved, moved_test = wanted.roll(1, 0), wanted_test.roll(1, 0)  # another document's marks
    rows = []
    every = (streams(one, docs) for one in (model, random) for docs in (some, test))
    for i, (x, x_test, other, other_test) in enumerate(zip(*every, strict=True)):
        values = (
            probe(x, wanted.flatten(), x_test, wanted_test.flatten()),
            probe(other, wanted.flatten(), other_test, wanted_test.flatten()),
            probe(x, moved.flatten(), x_test, moved_test.flatten()),
        )
        name = f"entering layer {i}" if i < model.cfg.n_layers else "leaving the last"
        rows.append([name, *(percent(value) for value in values)])
    return Section(
        "Something that it was never asked for",
        "No class of the model says whether a character stands in quotation marks. A linear probe of the stream, fitted"
        f" on {len(some)} documents and judged on {len(test)} others, does so as well as the table says (balanced"
        " accuracy; chance is 50%). The first row is the control for the character alone: the stream entering layer 0"
        " is nothing but the embedding. The others are the same network with random weights, and the marks of another"
        " document.",
        Table(["stream", "in quotes", "control: random weights", "control: another's marks"], rows),
    )


def f1(active: Bool[Tensor, "n F"], wanted: Bool[Tensor, " n"]) -> Float[Tensor, " F"]:
    """The harmonic mean of precision and recall of every latent as a detector."""
    hit = active[wanted].float().sum(0)
    return 2 * hit / (active.float().sum(0) + wanted.sum()).clamp(min=1)


def train(model: HookedStranger, layer: int, some: list[Document], steps: int) -> SparseCoder:
    """A TopK SAE of the stream entering a layer."""
    with torch.enable_grad():
        return train_sae(
            model,
            f"blocks.{layer}.hook_resid_pre",
            architecture="topk",
            d_sae=512,
            k=16,
            text=tokens_of(*(one.text for one in some)),
            steps=steps,
            batch_size=512,
            context_length=len(some[0].text),
            block_tokens=16 * len(some[0].text),
            progress=False,
        )


def coder_section(
    model: HookedStranger, labels: list[str], layer: int, some: list[Document], test: list[Document], steps: int
) -> Section:
    """Latents that stand for a language or for quotes, beside single dimensions and a coder of random weights."""
    site = f"blocks.{layer}.hook_resid_pre"
    coder = train(model, layer, some, steps)
    random = HookedStranger(model.cfg, seed=0)
    other = train(random, layer, some, steps)
    x, x_test = entering(model, some, layer), entering(model, test, layer)
    z, z_test = coder.encode(x) > 0, coder.encode(x_test) > 0
    r, r_test = (other.encode(entering(random, docs, layer)) > 0 for docs in (some, test))
    middle = x.median(0).values
    signs, signs_test = (torch.cat([v > middle, v < middle], 1) for v in (x, x_test))
    traits: dict[str, Callable[[list[Document]], Tensor]] = {
        name: (lambda docs, i=i: (languages_of(docs) == i).flatten()) for i, name in enumerate(LANGUAGES)
    } | {"in quotes": lambda docs: quoted_of(docs).flatten()}
    rows = []
    for name, trait in traits.items():
        wanted, wanted_test = trait(some), trait(test)
        cells = [name]
        for fit, judge in ((z, z_test), (r, r_test), (signs, signs_test)):
            best = int(f1(fit, wanted).argmax())
            cells.append(f"{float(f1(judge, wanted_test)[best]):.2f}")
        best = int(f1(z, wanted).argmax())
        cells.append(f"{float(2 * wanted_test.float().mean() / (1 + wanted_test.float().mean())):.2f}")
        cells += (
            effects(model, labels, coder, site, test, z, best, LANGUAGES.index(name)) if name in LANGUAGES else ["", ""]
        )
        rows.append([f"{name} (latent {best})", *cells[1:]])
    said, silent = coder(x_test), float((~z_test.any(0)).float().mean())
    explained = 1 - float((said - x_test).square().sum() / (x_test - x_test.mean(0)).square().sum())
    with splice(model, coder):
        spliced = accuracy(model, labels, test)
    mean = x.mean(0)
    with model.hooks([(site, lambda value, hook: mean.expand_as(value))]):
        blank = accuracy(model, labels, test)
    return Section(
        "A sparse autoencoder on its stream",
        f"512 latents, 16 active, trained on the stream entering layer {layer} over {len(some)} documents ({steps}"
        f" steps of 512 characters). On the {len(test)} others it explains {percent(explained)} of the variance;"
        f" {percent(silent)} of the latents are silent. With its reconstruction in place of the stream the model gets"
        f" {percent(spliced)} of the characters right, without it"
        f" {percent(accuracy(model, labels, test))}, with the stream's mean everywhere {percent(blank)}.",
        Table(
            ["trait", "best latent", "random weights", "one dimension", "always on", "deleted", "others deleted"],
            rows,
        ),
        after="F1 of a single latent as a detector of the trait, chosen on the training documents, judged on the"
        " others. Controls: the best latent of a coder trained in the same way on the network with random weights; the"
        " best single dimension of the stream above or below its median; a detector that is always on. Deleted: what"
        " the latent adds is taken out of the stream, and the language's logit changes by so much, a mean over the"
        " language's characters; others deleted: the largest change of ten other latents that are active about as"
        " often.",
    )


def effects(
    model: HookedStranger,
    labels: list[str],
    coder: SparseCoder,
    site: str,
    test: list[Document],
    active: Bool[Tensor, "n F"],
    latent: int,
    language: int,
) -> list[str]:
    """The change of a language's logit, on its characters, without a latent, and without ten others."""
    often = active.float().mean(0)
    near = (often - often[latent]).abs().argsort().tolist()
    peers = [i for i in near if i != latent][:10]
    chosen = test[: max(2, len(test) // 4)]
    here = languages_of(chosen) == language
    one = int(class_ids(labels)[language])
    before = logits_of(model, chosen)[..., one][here].mean()

    def without(i: int) -> float:
        def edit(value: Tensor, hook: object) -> Tensor:
            z = coder.encode(value)
            less = z.clone()
            less[..., i] = 0
            return value - (coder.decode(z, value) - coder.decode(less, value))

        with model.hooks([(site, edit)]):
            return float(logits_of(model, chosen)[..., one][here].mean() - before)

    changes = [without(i) for i in peers]
    return [f"{without(latent):+.2f}", f"{max(changes, key=abs):+.2f}"]
