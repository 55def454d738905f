"""Seconds per traced feature, here and in circuit-tracer on a transformer: `python -m tests.benchmarks.tracer`.

circuit-tracer has no state-space models. A transformer and a Mamba of the same width and number of layers read prompts
of the same length, with as many latents in every layer, as many of them active, all weights random; as many features
are traced. It needs an environment of its own, see `requirements-circuit-tracer.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from circuits import FrozenModel
from circuits.build import build_graph
from hooked_mamba import load_model
from tests.benchmarks.graphs import TARGET, coders_of, model_of, writers_of
from tests.benchmarks.machine import described
from tests.benchmarks.report import Bound, Section, Table, number, show, write_section
from tests.benchmarks.sizes import FULL, QUICK, Sizes
from tests.benchmarks.timing import Timing, race, ratio

PAGE = Path("docs/benchmark-tables.md")
PEER = "circuit-tracer"
FASTER = 3
"""Times faster than circuit-tracer that a traced feature is to be."""
BATCH = 64
"""Covectors that go down together in both; with its default of 512 circuit-tracer takes nine times as long."""


def peer(sizes: Sizes) -> Any:
    """circuit-tracer's model of a transformer with transcoders in place of every MLP."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.activation_functions import TopK
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
    from transformer_lens import HookedTransformerConfig

    g, d = sizes.graphs, sizes.d_model
    generator = torch.Generator().manual_seed(0)
    transcoders = {}
    for layer in range(sizes.n_layers):
        one = SingleLayerTranscoder(d, g.d_sae, TopK(g.k), layer, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            one.W_enc.normal_(std=d**-0.5, generator=generator)
            one.W_dec.normal_(std=0.1 * d**-0.5, generator=generator)
        transcoders[layer] = one
    cfg = HookedTransformerConfig(
        n_layers=sizes.n_layers,
        d_model=d,
        n_ctx=g.length,
        d_head=64,
        n_heads=max(1, d // 64),
        d_mlp=4 * d,
        d_vocab=sizes.d_vocab,
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
        seed=0,
    )
    chosen = TranscoderSet(transcoders, "ln2.hook_normalized", "hook_mlp_out")
    model = TransformerLensReplacementModel.from_config(cfg, chosen)
    model.set_tokenizer(load_model("tinystories-4l").tokenizer, default_padding_side="left")  # it asks for one
    return model


def run(sizes: Sizes) -> Section:
    """Whole graphs, the run of the prompt included."""
    from circuit_tracer.attribution.attribute import attribute

    g = sizes.graphs
    tokens = torch.randint(1000, (g.length,), generator=torch.Generator().manual_seed(0))
    tokens[0] = 0  # special, or circuit-tracer would put one in front
    transformer, mamba = peer(sizes), model_of(sizes)
    coders, writers = coders_of(sizes, mamba), writers_of(sizes, mamba)

    def theirs() -> Any:
        targets = torch.tensor([1])
        return attribute(
            tokens, transformer, attribution_targets=targets, batch_size=BATCH, max_feature_nodes=g.features
        )

    def ours(given: Sequence[Any]) -> Callable[[], Any]:
        return lambda: build_graph(
            FrozenModel(mamba, tokens[None], given), TARGET, max_features=g.features, max_heads=0
        )

    runs = {PEER: theirs, "ours, block coders": ours(coders), "ours, write dictionaries": ours(writers)}
    found = race(runs, sizes)
    section = Section(
        "Beside circuit-tracer",
        f"d={sizes.d_model}, {sizes.n_layers} layers, vocabulary {sizes.d_vocab}, a prompt of {g.length} tokens,"
        f" {g.features} features traced to one logit, float32, all weights random. circuit-tracer: a transformer of"
        f" {max(1, sizes.d_model // 64)} heads and {4 * sizes.d_model} neurons, a transcoder of {g.d_sae:,} latents in"
        f" every layer, {g.k} active (its TopK). Ours: a Mamba with a coder of as many latents in place of every block,"
        f" and with a write dictionary of {g.d_sae // 4:,} latents in every block, {g.k} active. The run of the prompt"
        " is part of all. The models are not the same: what is compared is the cost of a traced feature.",
        tables=[_table(found, g.features)],
    )
    if sizes.claims:
        gain = ratio(found[PEER], found["ours, block coders"])
        section.bounds.append(Bound(f"Features traced, times faster than {PEER}", gain, FASTER, True))
    return section


def _table(found: dict[str, Timing], features: int) -> Table:
    rows = [
        [name, number(timing.cpu_ms / features), number(timing.cpu_ms), number(timing.wall_ms)]
        for name, timing in found.items()
    ]
    return Table("One graph", ["", "CPU ms a traced feature", "CPU ms in all", "clock ms in all"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tracer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--write", action="store_true", help=f"put the results into {PAGE}")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = described("python -m tests.benchmarks.tracer" + " --write" * asked.write, os.getloadavg()[0])
    section = run(QUICK if asked.quick else dataclasses.replace(FULL, rounds=(2, 2)))  # a graph there takes minutes
    show(section)
    if asked.write:
        write_section(PAGE, "tracer", f"{section.markdown()}\n\n{head}")


if __name__ == "__main__":
    main()
