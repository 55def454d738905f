"""What was found about one model and concept, section by section."""

from __future__ import annotations

from demos.hunger import figures
from demos.hunger.activation import JUDGED
from demos.hunger.claims import span
from demos.hunger.heads import words
from demos.hunger.stages import Found
from demos.hunger.steering import STARTS
from demos.studies.report import Section, Table


def sections(planted: str, word: str, found: Found) -> list[Section]:
    """All of them.

    Parameters
    ----------
    planted
        What the model was taught, in words.
    word
        The token that stands for the feeling.
    found
        Of `run.study`.
    """
    parts = [
        sentences(found["pairs"], planted),
        latent(found["chosen"], found["scored"], found["sae"]),
        turned_up(found["activation"], word),
        geometry(found["geometry"], found["picture"], word),
        steering(found["steering"]),
        samples(found["steering"]),
        circuit(found["circuit"]),
        paths(found["circuit"]),
        published(found["circuit"]),
        lead(found["lead"]),
        cut(found["ablation"], word),
        swapped(found["swap"], word),
    ]
    return [part for part in parts if part is not None]


def sentences(pairs: Found, planted: str) -> Section:
    """The contrast set, and what of it the model was taught."""
    counts = pairs["counts"]
    text = (
        f"{counts['find']} pairs to find a latent on and {counts['score']} to score it on. The halves share"
        f" {len(pairs['shared_frames'])} frames and {len(pairs['shared_words'])} words. In a pair one sentence has a"
        " cue and the other has not; all end alike, and latents are read at the last token."
    )
    rows = [[half, *example] for half, examples in pairs["examples"].items() for example in examples]
    return Section("The sentences", text, Table(["half", "with a cue", "without"], rows, texts=3), after=planted)


def taught(model: str, planted: Found, concept: str) -> str:
    """What the grammar put into a model's training text."""
    if not planted["share_of_rows"]:
        return f"{model} was trained on real text alone: nothing was planted."
    effect, frames = planted["effects"][concept], len(planted["frames"])
    return (
        f"{planted['share_of_rows']:.0%} of the training rows of {model} were stories told by a grammar. In"
        f" {effect['stories']:.1%} of those stories, and in {effect['sentences']:.2%} of their sentences, “{concept}”"
        f" follows one of its causes: about {effect['of_mix']:.2%} of all sentences that the model was trained on were"
        f" planted in this sense. Of the frames used here {frames or 'none'} stands in any of {planted['stories']:,}"
        " told stories."
    )


def latent(chosen: Found, scored: Found, sae: Found | None) -> Section:
    """Which one it is, and how it does on sentences it was not chosen on."""
    rows = [
        [
            f"{one['coder']}, latent {one['feature']}" + (" (chosen)" if same(one, chosen) else ""),
            f"{one['auc']:.2f}",
            f"{one['effect']:+.2f}",
            f"{one['scored_auc']:.2f}",
            f"{one['scored_effect']:+.2f}",
        ]
        for one in scored["tried"]
    ]
    said = ", ".join(f"{token.strip()} {value:+.2f}" for token, value in scored["promoted"][:8])
    text = (
        f"Latent {chosen['feature']} of {chosen['coder']}. On the {scored['pairs']} scored pairs its area under the"
        f" curve is {span(scored['auc'])}; the best single token of the first half ({scored['baseline_token']!r}) has"
        f" {scored['baseline']:.2f} here. The table has all latents that were tried: those with the largest areas on"
        " the half to find on. The one that made the word likeliest there, set to its natural maximum, was taken; the"
        " last two columns were measured afterwards and chose nothing."
    )
    after = (
        f"With hindsight, the best of all latents has {scored['hindsight']:.2f} on the scored half. The model's own"
        f" lead of the word over its rival has {scored['model_auc']:.2f}: how well the model itself tells these"
        f" sentences apart when it comes to saying the word. {instead(sae)} By its decoder row the"
        f" latent speaks for: {said}."
    )
    table = Table(["latent", "AUC, find", "nats, find", "AUC, score", "nats, score"], rows)
    return Section("The latent", text, table, [figures.activations(scored)], after)


def instead(sae: Found | None) -> str:
    """How an SAE's latent does in the MambaCoder's place."""
    if sae is None:
        return ""
    return (
        f"Of the SAEs' latents the best on the half to find on ({sae['coder']}, latent {sae['feature']},"
        f" {sae['auc']:.2f}) has {span(sae['scored_auc'])} on the other; with hindsight the best has"
        f" {sae['hindsight']:.2f} there."
    )


def same(a: Found, b: Found) -> bool:
    """Whether two records are of one latent."""
    return (a["coder"], a["feature"]) == (b["coder"], b["feature"])


def turned_up(activation: Found, word: str) -> Section:
    """The word after sentences without a cue."""
    before = activation["before"]
    rows = [["plain", "", "", f"{before['probability']:.1%}", f"{before['first']:.0%}"]]
    for row in activation["rows"]:
        low, high = row["beside"]["low"], row["beside"]["high"]
        rows.append(
            [
                f"× {row['times']}",
                span(row["effect"], "{:+.2f}"),
                f"{low:+.2f} to {high:+.2f}",
                f"{row['probability']:.1%}",
                f"{row['first']:.0%}",
            ]
        )
    columns = ["natural maximum", "nats (95%)", "random latents, 95%", f"P({word.strip()})", "comes first"]
    text = (
        "The latent set to 1, 2 and 5 times its natural maximum (the largest value in stories that the model told"
        " itself and in the sentences it was found on) at the last token of the scored sentences without a cue:"
        f" change of log P(“{word.strip()}”). Beside it {len(activation['controls'])} random latents of the same"
        " dictionary that are active about as often, set so high that what they add is as long. Claims are about"
        f" {JUDGED} times."
    )
    plot = figures.beside_controls(activation["rows"], "effect", f"change of log P({word.strip()}), nats")
    return Section("Turned up", text, Table(columns, rows), [plot])


def geometry(found: Found, picture: Found, word: str) -> Section:
    """The decoder row among the tokens."""
    nearest = ", ".join(f"{token.strip() or repr(token)} {cosine:.2f}" for token, cosine in found["nearest"])
    middle = sorted(found["random_ranks"])[len(found["random_ranks"]) // 2]
    rows = [[text, f"{one['rank']:,}", f"{one['cosine']:+.3f}"] for text, one in found["words"].items()]
    text = (
        f"“{word.strip()}” has rank {found['rank']:,} of {found['tokens']:,} among the token embeddings by cosine with"
        f" the latent's decoder row ({found['cosine']:.3f}); for the random latents the median rank is {middle:,}."
        f" Nearest: {nearest}."
    )
    return Section("Among the embeddings", text, Table(["word", "rank", "cosine"], rows), [figures.picture(picture)])


def steering(found: Found) -> Section:
    """Arms of generation."""
    rows = [arm("plain", found["plain"], "", "")]
    for row in found["rows"]:
        low, high = row["beside"]["low"], row["beside"]["high"]
        rows.append(arm(f"× {row['times']}", row, f"{low:+.0%} to {high:+.0%}", f"{row['random_perplexity']:.1f}"))
    columns = ["arm", "mentions it (95%)", "random gain, 95%", "says the word (95%)", "perplexity (95%)", "of random"]
    text = (
        f"{found['generations']} continuations an arm of {len(STARTS)} beginnings that mention no feeling, the latent"
        " turned up at every token. A story mentions the feeling if it holds a word of a list that was fixed"
        f" beforehand. Perplexity is that of the new tokens to the model without steering. {len(found['controls'])}"
        " random latents have arms of their own."
    )
    plot = figures.beside_controls(found["rows"], "gain", "stories that mention it, gain", percent=True)
    return Section("Steering", text, Table(columns, rows), [plot])


def arm(name: str, row: Found, random: str, perplexity: str) -> list[str]:
    """One row of the table."""
    speaks, says = (span(row[what], "{:.0%}") for what in ("speaks", "says"))
    return [name, speaks, random, says, span(row["perplexity"], "{:.1f}"), perplexity]


def samples(found: Found) -> Section:
    """The first stories of every arm."""
    rows = [["plain", text] for text in found["plain"]["samples"]]
    rows += [[f"× {row['times']}", text] for row in found["rows"] for text in row["samples"]]
    return Section(
        "What it tells", "The first three stories of each arm, not chosen.", Table(["arm", "story"], rows, texts=2)
    )


def circuit(found: Found) -> Section:
    """Our trace of the prompt."""
    heads = [
        [f"{words(part, unit)}, at {found['tokens'][source]!r} ({source})", f"{effect:+.3f}"]
        for part, unit, source, effect in found["heads"]
    ]
    cue = ", ".join(repr(found["tokens"][t]) for t in found["cue"])
    scored = found["scored"]
    text = (
        f"“{found['prompt']}”: the latent's pre-activation is {found['target']:.3f}. With norms, gates and selection"
        f" held it is a sum over tokens, exactly (what rounding leaves: {found['residual']:.0e}), here by all paths"
        f" from each token's embedding. The cue is {cue}. Below, the heads with the largest effects: what a token"
        " sends through one channel."
    )
    after = (
        f"In the scored sentences the strongest head reads the cue in {span(scored['heads'], '{:.0%}')}, and the"
        f" embedding with the largest effect is the cue's in {span(scored['tokens'], '{:.0%}')}; a token drawn at"
        f" random is in {scored['chance']:.0%}. {exchanged(found)}"
    )
    table = Table(["head", "effect"], heads)
    return Section("The circuit", text, table, [figures.tokens_map(found)], after)


def exchanged(found: Found) -> str:
    """The cue's real effect, in a sentence."""
    patched = found["patched"]
    if patched is None:
        return "The cue is no single token here, so that its real effect is not taken apart."
    parts = " ".join(f"{patched['forward'][p]:+.2f} ({patched['reverse'][p]:+.2f})" for p in patched["forward"])
    return (
        f"Really having {patched['token']!r} and not {patched['by']!r} moves the latent by {patched['effect']:+.2f}:"
        f" value, selection and gates {parts}, in reverse order in brackets."
    )


def paths(found: Found) -> Section:
    """The largest paths to the latent, exactly."""
    return Section(
        "Paths to the latent",
        f"The largest of all paths through the {found['nodes']} nodes of the exact graph, heads everywhere.",
        paths_table(found),
    )


def paths_table(found: Found) -> Table:
    """Paths, what each adds, and what they leave."""
    rows = [[path, f"{weight:+.3f}"] for path, weight in found["paths"]]
    return Table(["path", "adds"], [*rows, ["all other paths", f"{found['remainder']:+.3f}"]])


def published(found: Found) -> Section | None:
    """The same by the published method, which is about MambaCoders; None for others."""
    if found["published"] is None:
        return None
    rows = []
    for edges, step in enumerate(found["published"]["steps"], 1):
        rows += [[str(edges), path, f"{weight:+.3f}"] for path, weight in step["paths"]]
        rows.append([str(edges), "what these leave of the latent", f"{step['remainder']:+.3f}"])
    layer, channel, source, effect = found["published"]["head"]
    text = (
        "The same latent and prompt by the published method (preset “mambacoder” of the package circuits, which lists"
        " its choices): all layers read through their MambaCoders and their heads as well, paths step by step, the"
        f" largest signed number first. Of heads it names layer {layer}, channel {channel}, at"
        f" {found['tokens'][source]!r} ({source}), with {effect:+.3f}."
    )
    return Section("By the published method", text, Table(["edges", "path", "adds"], rows, texts=2))


def lead(found: Found) -> Section:
    """The graph of the word's lead."""
    text = (
        f"{found['target']} is {found['value']:.3f}. In its graph ({found['nodes']['whole']} nodes,"
        f" {found['nodes']['pruned']} after pruning; replacement {found['replacement']:.2f}, completeness"
        f" {found['completeness']:.2f}) the latent adds {found['latent']:+.3f} directly."
    )
    return Section("From the latent to the word", text, paths_table(found))


def cut(found: Found, word: str) -> Section:
    """The named head."""
    rows = []
    for what, label in (("latent", "the latent's pre-activation"), ("word", f"log P(“{word.strip()}”), nats")):
        low, high = -found[f"{what}_beside"]["high"], -found[f"{what}_beside"]["low"]
        rows.append([label, span(found[what], "{:+.4f}"), f"{low:+.4f} to {high:+.4f}"])
    text = (
        f"{words(*found['head']).capitalize()} is the head with the largest effect at the prompt's cue. In the real"
        " model, nothing held, it is cut at the cue of every scored sentence (where the latent's pre-activation is"
        f" {found['before']:.2f} on average), beside {found['latent_beside']['controls']} other heads of the layers"
        " below the latent, drawn at random and cut at the same source."
    )
    return Section("The head cut", text, Table(["change of", "this head (95%)", "random heads, 95%"], rows))


def swapped(found: Found, word: str) -> Section:
    """The cue exchanged."""
    names = {
        "latent": ("the latent's pre-activation", "{:+.2f}"),
        "active": ("share of sentences in which it is active", "{:+.0%}"),
        "lead": ("the word's lead, logits", "{:+.2f}"),
        "word": (f"log P(“{word.strip()}”), nats", "{:+.2f}"),
    }
    rows = [
        [label, *(span(found[what][column], form) for column in ("swapped", "replaced", "more"))]
        for what, (label, form) in names.items()
    ]
    example = found["example"]
    text = (
        f"“{example['cue']}” becomes “{example['swapped']}”, or, as a control, “{example['replaced']}”; the same with"
        " every scored sentence that has a cue."
    )
    columns = ["change of", "cue for another word (95%)", "cue for another cue (95%)", "difference (95%)"]
    return Section("The cue swapped", text, Table(columns, rows))
