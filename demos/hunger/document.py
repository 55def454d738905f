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
dictionaries, SAEs of the blocks' outputs (`/output`) and MambaCoders of blocks on the model of real text alone; no
other kind is bundled for those that know. A “head” is what a token sends through one channel of a mixer, or through
one head of attention.

Everything below but the reasons was written by the command. The thresholds of the claims about the planted cue
(`demos/hunger/planted_claims.py`) were committed before any of them was measured.
"""


WHY = """\
## Why claims fail on the models that know

Looked at afterwards; no claim uses it.

On the Mamba-1 (tinystories-told-4l):

- The study's rule tries the ten latents that tell the sentences of the first half best, and takes the one that moves
  the word most. With write dictionaries this is latent 616 of l3-write (area 0.81 on the first half, 0.75 on the
  second, +0.22 nats). Of the same ten, latents 45 of l1-write and 102 of l3-write tell food from other words with
  1.00, but move the word by +0.17 and +0.16. “reads” is judged of the former. What the last token writes into one
  layer's memory is a small part of what makes the word; the model's own area is 1.00.
- “says” and “points at the word” fail narrowly: +0.25 nats, where 97.5% of random latents stay below +0.31, and rank
  13 where 10 was asked. In the sentences the strongest head reads the cue in 62%, in the study's own prompt the full
  stop after it.
- The circuit does start at the planted cue: of all words' embeddings the cue's adds most to the lead in 22 of 23
  sentences. But the features that carry it are written one token later: in 20 of 23 cutting there moves the graph's
  lead most, by -1.67 on average, and by -0.12 at the cue itself (`python -m demos.hunger.places`). The claim about
  the cue's own place was the wrong question here, and “the cue and no other word” with it.
- Where the graph says that the lead moves much it does (correlation 0.93), but twice as far (slope 2.00). The graph
  holds gates, norms, selection and errors, which in the model give way as well.
- Dictionaries trained for less long (1.5 million positions and as many through the model, KL 0.092) had 9 of the 14:
  they lacked “steers” and “circuit elsewhere”, and had “says”.

On the Mamba-2 (tinystories-told-mamba2-4l), where the circuit holds: one head, channel 148 of layer 2, is the
strongest in all 40 scored sentences and reads the cue in all of them, and among the features of 23 sentences' graphs
those written at the cue matter most in all 23 (-4.43 on average; `places`).

- “reads”: latent 377 of l3-write has 0.91 on the first half and 0.70 on the second. In two of the second half's five
  frames it tells every sentence with food from every other (1.00), in three it is silent in all (0.50). The best of
  all latents there, with hindsight, has 0.74; the model's own area is 0.98.
- “points at the word”: rank 500; the nearest tokens are “ scarf”, “ carried”, “ pears”, “ oranges” and “ lemon”. A
  random latent's rank is 1,322 in the middle.
- “steers”: at twice its maximum +2%, where 97.5% of random latents stay below +5%; at five times, which is not
  judged, +10% against +10%.
- “slope”: the real lead falls 1.67 times as far as the graph says (correlation 0.85), as on the Mamba-1.

On the hybrid (tinystories-told-hybrid-4l), where the claims about the planted cue hold but for the correlation, 0.72
where 0.8 was asked (slope 0.89):

- “reads” and “beats a token”: latent 671 of l3-write has 0.80 and 0.56. Within four of the five frames of the second
  half it has 0.72 to 1.00, within the study's own 0.00: there food makes it fall. And frames move it further (means
  without food from 0.55 to 1.40) than food does. Of the ten that were tried, latent 559 of l1-write has 0.84 there,
  the most of all latents, but moves the word by +0.09 where 671 moves it by +0.31.
- “says”: +0.46 nats, where 97.5% of random latents stay below +0.58. “points at the word”: rank 322.
- “circuit” and “circuit elsewhere”: in all 40 sentences the strongest head is channel 215 of layer 0 at the full
  stop, +0.82 of the latent's 1.06 in the study's prompt. Every sentence has that full stop. The strongest at the cue
  is attention's head 4 of layer 2 with +0.04, and cutting it there lowers the latent by 0.023 and the word by 0.26
  nats, further than any of 200 random heads.

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
