"""Model cards: the contents of a repository of coders as Markdown, with every name escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from saes.registry import Entry

MARK = "<!-- written by hooked-mamba; remove this line to keep your own text -->"
"""Marks a card that may be overwritten."""

TAGS = ("saelens", "sparse-autoencoder", "interpretability", "mamba")

_MARKDOWN = re.compile(r"([\\`*_{}\[\]#!|~$:@]|(?<=www)\.)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class _Verbatim(str):
    """Text that is safe as it is."""


def escape(value: Any) -> str:
    """Any value as one line of Markdown that shows it and does nothing else: no markup, links, HTML or table cells."""
    if isinstance(value, _Verbatim):
        return value
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    line = _CONTROL.sub(" ", str(value))
    return _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))


def quoted(value: Any) -> _Verbatim:
    """A value for YAML or Python: in double quotes, special characters escaped."""
    return _Verbatim(json.dumps(str(value)))


TEMPLATE = """\
---
{%- if loads_there %}
library_name: saelens
{%- endif %}
license: {{ license | quoted }}
tags:
{%- for tag in tags %}
- {{ tag | quoted }}
{%- endfor %}
{%- if base_models %}
base_model:
{%- for model in base_models %}
- {{ model | quoted }}
{%- endfor %}
{%- endif %}
---
{{ mark }}

# {{ title }}

{{ entries | length }} sparse
{%- if kinds == ["sae"] %} autoencoder{{ "s" if entries | length > 1 }}
{%- elif kinds == ["mambacoder"] %} MambaCoder{{ "s" if entries | length > 1 }}
{%- else %} autoencoders and MambaCoders{% endif %} on
{%- if models %} {{ models | join(", ") }}{% else %} a model that is not named{% endif %}.
Licence: {{ license }}.

| name | kind | architecture | reads | predicts | d_in → d_sae → d_out | k |
|---|---|---|---|---|---|---|
{%- for e in entries %}
| {{ e.name }} | {{ e.kind }} | {{ e.architecture }}{{ ", skip" if e.skip }} |
{#- #} {{ e.site }}{{ ", " ~ e.window ~ " positions" if e.window > 1 }} |
{%- if e.kind == "sae" %} the same{% else %} {{ e.out_site }}{{ ", local part" if e.target == "local" }}{% endif %} |
{#- #} {{ e.d_in }} → {{ e.d_sae }} → {{ e.d_out }} | {{ e.k }} |
{%- endfor %}
{% if measures %}
## Metrics

| name |{% for m in measures %} {{ m }} |{% endfor %}
|---|{% for m in measures %}---|{% endfor %}
{%- for e in entries %}
| {{ e.name }} |{% for m in measures %} {{ e.metrics.get(m) }} |{% endfor %}
{%- endfor %}
{% endif %}
{%- if trained %}
## Training
{% for e in trained %}
- {{ e.name }}: {% for key, value in e.training.items() %}{{ ", " if not loop.first }}{{ key }} {{ value }}{% endfor %}
{%- endfor %}
{% endif %}
{%- if hashes %}
Weights of the model they were trained on (SHA-256, first digits):{% for h in hashes %} {{ h }}{% endfor %}.
{% endif %}
## Use

```python
from saes import SparseCoder

coder = SparseCoder.from_pretrained({{ repo | quoted }}, {{ entries[0].name | quoted }})
```

{% if loads_there -%}
Each folder is a SAELens directory (`cfg.json`, `sae_weights.safetensors`); BatchTopK and Matryoshka are JumpReLU there.
{% endif -%}
{% if only_here -%}
No counterpart in SAELens, loads here only: {{ only_here | join(", ") }}.
{% endif -%}
"""

_environment = Environment(finalize=escape, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
_environment.filters["quoted"] = quoted
_environment.filters["join"] = lambda values, by: _Verbatim(by.join(escape(value) for value in values))
_template = _environment.from_string(TEMPLATE)

_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _loads_in_saelens(entry: Entry) -> bool:
    """SAELens has no SAE with a skip, no TopK or gated transcoder, and none that reads several positions."""
    if entry.kind == "sae":
        return not entry.skip
    return entry.architecture not in ("topk", "gated") and entry.window == 1


def model_card(entries: Sequence[Entry], *, repo: str, title: str | None = None, license: str = "mit") -> str:
    """The card of a repository of coders: sites, sizes, model, metrics, licence, and how to load one.

    Parameters
    ----------
    entries
        What it holds, at least one.
    repo
        What :meth:`saes.SparseCoder.from_pretrained` takes.
    title
        Headline; None: `repo`.
    license
        The hub's name for the weights' licence.
    """
    if not entries:
        raise ValueError("a card is about at least one coder")
    only_here = sorted(entry.name for entry in entries if not _loads_in_saelens(entry))
    models = sorted({entry.model for entry in entries if entry.model})
    return _template.render(
        entries=sorted(entries, key=lambda entry: entry.name),
        kinds=sorted({entry.kind for entry in entries}),
        models=models,
        base_models=[model for model in models if _HUB_MODEL.fullmatch(model)],
        hashes=sorted({entry.model_hash for entry in entries if entry.model_hash}),
        trained=[entry for entry in sorted(entries, key=lambda entry: entry.name) if entry.training],
        measures=list(dict.fromkeys(name for entry in entries for name in entry.metrics)),
        repo=repo,
        title=title or repo,
        license=license,
        loads_there=len(only_here) < len(entries),
        only_here=only_here,
        tags=[tag for tag in TAGS if tag != "saelens" or len(only_here) < len(entries)],
        mark=_Verbatim(MARK),
    )
