"""A page about the features of dictionaries, or about a single feature, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.explorer.collect import collect, summary
from saes.explorer.data import FeatureData
from saes.explorer.directions import Directions
from saes.explorer.page import Page, render
from saes.explorer.tally import Tally
from saes.naming import Coders, default_name
from saes.store.data import Text


@dataclass(frozen=True)
class Explorer(Mapping[str, FeatureData]):
    """Data about the features of one dictionary or several, by name."""

    data: Mapping[str, FeatureData]

    def __getitem__(self, name: str) -> FeatureData:
        if name not in self.data:
            raise KeyError(f"no dictionary is called {name!r}; there are {', '.join(self.data)}")
        return self.data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def page(self, features: Sequence[int] | None = None, title: str | None = None) -> Page:
        """A page about all features, or about some."""
        chosen = [data if features is None else data.only(features) for data in self.data.values()]
        return render(chosen, title)

    def save(self, path: str | Path, features: Sequence[int] | None = None, title: str | None = None) -> Path:
        """Write that page: one file, to be opened offline."""
        return self.page(features, title).save(path)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()


def explore(model: HookedModel, coder: Coders, tokens: Text, **options: Any) -> Explorer:
    """Read a text through a model and collect what a dictionary's features do: `explore(...).save("page.html")`.

    Parameters
    ----------
    model, coder, tokens
        A model, one dictionary or several, and text in any form.
    options
        Of :func:`saes.explorer.collect`.
    """
    return Explorer(collect(model, coder, tokens, **options))


@torch.no_grad()
def feature_explorer(
    sae: SparseCoder,
    feature_id: int,
    activations: Float[Tensor, "*leading d_in"],
    contexts: Sequence[Any],
    *,
    top_k: int = 20,
    model: HookedModel | None = None,
    label: str | None = None,
) -> Page:
    """A page about one feature, from given activations.

    Parameters
    ----------
    sae
        The dictionary.
    feature_id
        Number of the feature.
    activations
        What the dictionary reads: [n, d_in], one row a context, or [n, l, d_in], one per token.
    contexts
        n texts; with [n, l, d_in] n lists of up to l tokens' texts.
    top_k
        Contexts shown.
    model
        For the words that the feature promotes and suppresses.
    label
        A name for it.

    Raises
    ------
    IndexError
        There is no such feature.
    ValueError
        Activations and contexts do not fit each other.
    """
    F = sae.cfg.d_sae
    if not 0 <= feature_id < F:
        raise IndexError(f"feature {feature_id} does not exist: this dictionary has features 0 to {F - 1}")
    rows = [[text] if isinstance(text, str) else list(text) for text in contexts]
    if activations.ndim == 2 and all(isinstance(text, str) for text in contexts):
        activations = activations[:, None]
    if activations.ndim != 3 or len(activations) != len(rows) or len(rows) == 0:
        raise ValueError(
            f"{len(rows)} contexts need activations [{len(rows)}, d_in] (one a text) or [{len(rows)}, l, d_in] (one a"
            f" token), got {list(activations.shape)}"
        )
    b, l, _ = activations.shape
    for row in rows:
        if not 0 < len(row) <= l:
            raise ValueError(f"a context has {len(row)} tokens, and there are activations of {l}")
    first = model.cfg.d_vocab if model is not None else 0  # the texts' ids stand behind the model's own
    texts = dict(enumerate(dict.fromkeys(text for row in rows for text in row), first))
    place = {text: i for i, text in texts.items()}
    tokens, real = torch.zeros(b, l, dtype=torch.long), torch.zeros(b, l, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor([place[text] for text in row])
        real[i, : len(row)] = True
    tally = Tally(1, top=top_k)
    for start in range(0, b, 64):
        part = slice(start, start + 64)
        z = sae.encode(activations[part].to(sae.W_enc.device))[..., [feature_id]]
        tally.add(z, tokens[part], real[part], real[part])
    name = default_name(sae.cfg)
    labels = {feature_id: label} if label else {}
    feature = torch.tensor([feature_id])
    data = summary(name, sae, feature, tally, model, Directions.of(model, sae, feature, 10, 10), labels, texts)
    return render([data])
