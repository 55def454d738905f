"""The results as Markdown, for the documents: claims, failures first, and nothing that was typed in."""

from __future__ import annotations

from demos.hunger.concepts import HUNGRY
from demos.hunger.page import claim_groups, headline, search_sections, verdicts
from demos.hunger.sections import instead, taught
from demos.hunger.stages import Found

INTRODUCTION = """\
# The case study: a feature that reads like hunger?

    make case-study

A published story about MambaCoders: in “{prompt}” a feature is active that reads like “hungry”;
turned up, it makes the model say so; and its circuit goes through a mixer head at the food. `demos/hunger`
tests it claim by claim on the bundled model, and on the one that was trained on real text alone. Sentences, thresholds
and seeds were fixed before any result was seen (`concepts.py`, `claims.py`, `options.py`; of what the gates judge, the
dictionaries' own figures were known), and nothing is chosen by hand. Areas with hindsight and
those of SAEs, the cue's real effect and the published method's paths were added afterwards; no claim uses them. It is
not shown that no other sentences would do better: these are the ones that were written down.

Numbers here were written by the command, which also writes `out/hunger/results.json`, `graph.json`, figures and
`report.html`, a page that needs no network. A run that was stopped continues where it was. Its picture of the
embeddings is UMAP's with the extra `.[umap]`, and PCA's without. This page is written by `python -m demos.hunger
--document docs/case-study.md`, its picture by `docs/images/case-study.sh`.

![The report's first page](images/case-study.png)
"""


TOLD = """\
# The case study on models that know the story

    {command}

The [case study](case-study.md) failed on a model that does not know the story itself: its own lead of “ hungry” over
“ sad” tells sentences with food from others with an area of 0.59. Within one frame it does so with 0.78 on average; but
what the frame adds to the lead varies more than what the food does, because in the stories that it was told whole
scenes (“Mom was making soup.”) announced the feeling, and never the noun alone. The models here were trained further
with stories in which the same sentences hold food or something else (`demos/tinystories/cues.py`; none holds a
sentence of the study). The claims and thresholds are those of the case study, judged for write dictionaries (`/write`)
on three models that know, a Mamba-1, a Mamba-2 and a hybrid of Mamba-2 with a layer of attention, and for write
dictionaries, SAEs of the blocks' outputs (`/output`) and MambaCoders of blocks on the model of real text alone; with
those that know no others are bundled. A “head” is what a token sends through one channel of a mixer, or through one
head of attention.

Everything below but the reasons was written by the command. The thresholds of the claims about the planted cue
(`demos/hunger/planted_claims.py`) were committed before any of them was measured.
"""


WHY = """\
## Why claims fail on the model that knows

Looked at afterwards; no claim uses it.

- The study's rule tries the ten latents that tell the sentences of the first half best, and takes the one that moves
  the word most. With write dictionaries this is latent 35 of l3-write (area 0.85 on the first half, 0.63 on the second,
  +0.30 nats). Of the same ten, latent 2 of l1-write reads food with 0.99 on both halves, but moves the word by +0.16.
  “reads”, “points at the word”, “steers” and the two claims about the strongest head are judged of the former. What
  the last token writes into one layer's memory is a small part of what makes the word; the model's own area is 1.00.
- The circuit does start at the planted cue: of all words' embeddings the cue's adds most to the lead in 22 of 23
  sentences. But the features that carry it are written one token later: in 20 of 23 cutting there moves the graph's
  lead most, by -1.75 on average, and by -0.12 at the cue itself (`python -m demos.hunger.places`). The claim about the
  cue's own place was the wrong question, and “the cue and no other word” with it.
- Where the graph says that the lead moves much it does (correlation 0.94), but nearly twice as far (slope 1.88). The
  graph holds gates, norms, selection and errors, which in the model give way as well.

"""


def document(results: Found) -> str:
    """The whole document."""
    told = any("told" in name for name in results["models"])
    intro = TOLD.format(command=command(results)) if told else INTRODUCTION.format(prompt=HUNGRY.prompt)
    parts = [intro, "## What came out\n", headline(results) + "\n"]
    parts.append("".join(f"- {line}\n" for line in verdicts(results)))
    for group in claim_groups(results):
        parts.append(f"## {group['heading']}\n\n{group['text']}\n")
        parts.append(table(group["columns"], group["rows"]))
    if told:
        parts.append(WHY)
    parts.append("## How much there is to find\n\n" + limits(results))
    studied = [
        (m, name, one["sae"]) for m, f in results["models"].items() for name, one in f["concepts"].items() if one["sae"]
    ]
    parts.append("".join(f"- {model}, {name}: {instead(sae)}\n" for model, name, sae in studied))
    parts.append("## What was planted\n")
    parts.append("".join(f"- {taught(m, f['planted'], HUNGRY.name)}\n" for m, f in results["models"].items()))
    return "\n".join(parts)


def command(results: Found) -> str:
    """What makes these results, with the folders of dictionaries that do not come with the package left out."""
    cut = " --cut" if any("cutting" in found for found in results["models"].values()) else ""
    return f"python -m demos.hunger{cut} --models {' '.join(results['models'])} --document docs/case-study-told.md"


def limits(results: Found) -> str:
    """The table of all feelings."""
    section = search_sections(results)[1]
    assert section.table is not None
    lines = [section.text + "\n", f"| {' | '.join(section.table.columns)} |", "|---" * len(section.table.columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in section.table.rows)]) + "\n"


def table(columns: list[str], rows: list[tuple[Found, list[Found]]]) -> str:
    """Claims that fail anywhere first."""
    ordered = sorted(rows, key=lambda row: all(cell["holds"] for cell in row[1]))
    lines = [f"| claim | needs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for claim, cells in ordered:
        found = " | ".join(("pass: " if cell["holds"] else "**FAIL**: ") + cell["found"] for cell in cells)
        lines.append(f"| **{claim['name']}**: {claim['says']} | {claim['needs']} | {found} |")
    return "\n".join(lines) + "\n"
