"""Write dictionaries: features of what a token writes into a layer's memory, whose effects go to any later token."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from circuits import (
    Channel,
    Direction,
    Feature,
    FrozenModel,
    Logit,
    attribute,
    build_graph,
    load_graph,
    save_graph,
    top_paths,
    trace_paths,
)
from circuits.faithfulness import faithfulness
from circuits.files import to_circuit_tracer, to_networkx
from circuits.integrated import node_effects
from circuits.interventions import (
    CutHead,
    ScaleEmbedding,
    ScaleError,
    ScaleFeature,
    ScaleState,
    SetFeature,
    edit_of,
    frozen_effects,
    intervened,
)
from circuits.keep import Keep, only
from circuits.points import stays
from circuits.push import frozen_changes
from circuits.viewer import about_features, circuit_page
from hooked_mamba.cli.app import make_app
from hooked_mamba.frozen.places import part_of
from hooked_mamba.models import load_model
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Off
from tests.circuits.test_attribution import coders_for
from tests.circuits.writes import EXACT, Written, begun, check_against_whole, some_writers, writable, writer
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent import models as recurrent
from tests.kinds import MAMBA


def built(kind: str) -> tuple[Any, torch.Tensor]:
    """A tiny model, and a prompt of one row."""
    if kind in MAMBA:
        return random_model(4, kind, n_layers=3), random_tokens(4, 1, 5)
    if kind in hybrids.CASES:
        return hybrids.tiny(kind).model, hybrids.tokens_for(1, 5)
    return recurrent.build(kind), recurrent.tokens_for(1, 5)


FEW = (*MAMBA, "rwkv7", "deltanet", "mamba3", "falcon", "zamba2")
MANY = dict.fromkeys((*MAMBA, *recurrent.KINDS, *recurrent.MAMBA3, *hybrids.CASES))
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FEW else pytest.mark.slow) for kind in MANY]
)


def each_kind_begun(*starts: str) -> pytest.MarkDecorator:
    """Kinds that begin in several ways: by default each in one of them, in turn."""
    return pytest.mark.parametrize(
        ("kind", "start"),
        [
            pytest.param(
                kind, start, marks=[] if kind in FEW and FEW.index(kind) % len(starts) == i else pytest.mark.slow
            )
            for kind in MANY
            for i, start in enumerate(starts)
        ],
    )


def check_sums(seed: int) -> None:
    """A random Mamba, dictionaries of any kind on some layers and other coders on others, padding or a memory."""
    draw = random.Random(seed)
    model, tokens = random_model(seed), random_tokens(seed, batch=3, length=8)
    n = model.cfg.n_layers
    written = some_writers(model, seed)
    taken = {coder.cfg.layer for coder in written}
    others = [c for c in coders_for(model, draw.choice(["block", "local"]), seed=seed) if c.cfg.layer not in taken]
    coders = [*written, *others[: draw.randint(0, len(others))]]
    run: dict[str, Any] = {}
    if draw.random() < 0.3:
        mask = torch.ones(3, 8, dtype=torch.long)
        mask[1, :3] = 0
        run["attention_mask"] = mask
    elif draw.random() < 0.5:
        with torch.no_grad():
            run["initial_state"] = model(random_tokens(seed + 1, 3, 4), return_state=True)[1]
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deep = written[-1]
    layer = int(deep.cfg.layer)
    targets = [
        Logit(3), Logit(5, 4, minus=2), Direction(vector, n, 5), Direction(vector, layer, 6, "out"),
        Feature(deep, 4, 5), Channel(layer, 1, 6),
    ]  # fmt: skip
    frozen = FrozenModel(model, tokens, coders, **run)
    found = attribute(frozen, targets=targets)
    assert found.residual.abs().max() < EXACT
    assert all(frozen.coded[int(coder.cfg.layer)].mode == "write" for coder in written)
    with torch.no_grad():
        expected = deep.preact(frozen.value_at(deep.cfg.in_site)[:, 5])[:, 4]
    assert torch.allclose(found.target[12:15], expected, atol=1e-12)
    assert (found.features[layer][12:] == 0).all()  # what it writes does not explain what it reads
    one_by_one = attribute(frozen, targets=targets, batch=1)
    assert torch.allclose(one_by_one.embeddings, found.embeddings, atol=EXACT)


@pytest.mark.parametrize("seed", range(10))
def test_parts_sum_to_their_targets(seed):
    check_sums(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 210))
def test_parts_sum_in_two_hundred_models(seed):
    check_sums(seed)


@each_kind
def test_every_kind_of_branch(kind):
    """Dictionaries on all values that enter memory (and on neurons): rows sum, edges are what removal changes."""
    model, tokens = built(kind)
    coders = [writer(model, part, seed=i) for i, part in enumerate(writable(model))]
    frozen = FrozenModel(model, tokens, coders)
    assert set(frozen.coded) == set(writable(model))
    targets = [Logit(3), Feature(coders[-1], 2), Logit(5, 3)]
    assert attribute(frozen, targets=targets).residual.abs().max() < EXACT
    graph = build_graph(frozen, targets, max_features=14)
    assert float(graph.residual().abs().max()) < EXACT
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "error", "feature")]
    assert torch.allclose(frozen_changes(frozen, graph, targets, ends), -graph.weights[:, ends].t(), atol=EXACT)
    removed = [i for i in ends if graph.nodes[i].kind == "feature"][:3]
    for i in removed:
        effect = frozen_effects(frozen, edit_of(frozen, graph.nodes[i]), targets, hold=graph)[:, 0]
        assert torch.allclose(effect, -graph.weights[: len(targets), i], atol=EXACT)
    with torch.no_grad(), intervened(model, [edit_of(frozen, graph.nodes[i]) for i in removed]):
        assert float((model(tokens) - frozen.logits).abs().max()) > 1e-9
    with torch.no_grad(), only(frozen, Keep.everything(frozen)):
        assert torch.allclose(model(tokens), frozen.logits, atol=1e-9)


@each_kind_begun("empty", "padded", "going on")
def test_covectors_at_few_positions_find_what_whole_ones_do(monkeypatch, kind, start):
    """With a coder on every mixer nothing moves along the stream, whatever else stands in the blocks."""
    model, one = built(kind)
    tokens = torch.cat([one, one.flip(1)])
    moving = [part for part in writable(model) if FrozenModel(model, tokens).chain(part).mix is not None]
    coders = [writer(model, part, seed=i) for i, part in enumerate(moving)]
    frozen = FrozenModel(model, tokens, coders, **begun(model, tokens, start))
    targets = [Logit(3), Logit(5, 3), *(Feature(coder, 2, t) for coder in coders for t in (2, 4))]
    covectors = [target.covector(frozen, row) for target in targets for row in range(2)]
    assert stays(frozen, covectors) == (kind != "rwkv7")  # whose MLPs and values mix two positions
    check_against_whole(monkeypatch, frozen, targets, start)


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("coded", [{0, 1, 2}, {1}, {0, 2}])
def test_places_are_those_of_finite_differences(family, coded):
    model, tokens = random_model(5, family, n_layers=3), random_tokens(5, batch=2, length=5)
    coders = {i: writer(model, i, seed=i) for i in coded}
    frozen, row = FrozenModel(model, tokens, list(coders.values())), 1
    top = coders[max(coded)]
    found = attribute(frozen, targets=[Logit(3), Feature(top, 2, 3)])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)

    def numbers(off: Off = Off(), gone: tuple[int, int, np.ndarray] | None = None) -> np.ndarray:  # noqa: B008
        replay = Written(model, cache, row, coded)
        if gone is not None:
            replay.gone[gone[0]][gone[1]] += gone[2]
        at = max(coded)
        u = replay.own_u(at, replay.resid(off, upto=at))[3]
        enc, b_dec = top.W_enc[:, 2].detach().numpy(), top.b_dec.detach().numpy()
        return np.array([replay.logit(3, -1, off), (u - b_dec) @ enc + top.b_enc[2].item()])

    whole, mine = numbers(), [row, 2 + row]
    assert np.allclose(whole, found.target[mine].numpy(), atol=1e-9)
    for t in range(5):
        effect = whole - numbers(Off(embeddings={t}))
        assert np.allclose(effect, found.embeddings[mine, t].numpy(), atol=1e-9)
    for i in coded:
        here = frozen.coded[i]
        for t in range(5):
            effect = whole - numbers(gone=(i, t, here.error[row, t].numpy()))
            assert np.allclose(effect, found.errors[i][mine, t].numpy(), atol=1e-9)
            for j, index in enumerate(here.codes.indices[row, t].tolist()):
                added = float(here.codes.values[row, t, j]) * here.W_dec[index].numpy()
                effect = whole - numbers(gone=(i, t, added))
                assert np.allclose(effect, found.features[i][mine, t, j].numpy(), atol=1e-9)
    assert float(found.features[min(coded)][row, :4].abs().max()) > 1e-5, "nothing goes from token to token"


@pytest.mark.parametrize("family", MAMBA)
def test_ablating_a_node_is_minus_its_edges(family):
    """Dictionaries beside a mixer's heads and a block's coder."""
    model, tokens = random_model(4, family, n_layers=4), random_tokens(4, 1, 5)
    coders = [writer(model, 1), writer(model, 3, reads="normalized", skip=True), coders_for(model)[2]]
    frozen = FrozenModel(model, tokens, coders)
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = [Logit(3), Direction(vector, 3, 4, "out"), Feature(coders[0], 1, 3)]
    graph = build_graph(frozen, targets, max_features=12, max_heads=8)
    assert {node.at for node in graph.nodes if node.kind == "feature"} == {"out", "u"}
    for j, node in enumerate(graph.nodes):
        if node.kind in ("embed", "error", "feature", "head"):
            effect = frozen_effects(frozen, edit_of(frozen, node), targets, hold=graph)[:, 0]
            assert torch.allclose(effect, -graph.weights[:3, j], atol=EXACT), node.label


def test_edits_of_writes_states_and_channels_together():
    """What is cut of a feature's write, and what an edited state keeps of it, on the frozen model."""
    model, tokens = random_model(6, "mamba", n_layers=2), random_tokens(6, 1, 5)
    coder = writer(model, 0)
    run = FrozenModel(model, tokens, coder)
    index = int(run.coded[0].codes.indices[0, 1, 0])
    target = Direction(torch.ones(model.cfg.d_model, dtype=torch.float64), 1, 4)
    edit = SetFeature(coder, index, 2.0, 1)
    moved = frozen_effects(run, edit, target)
    assert moved.abs().max() > 1e-6
    cut = frozen_effects(run, CutHead(0, 1), target)
    assert torch.allclose(frozen_effects(run, [edit, CutHead(0, 1)], target), cut, atol=EXACT)
    cleared = frozen_effects(run, ScaleState(0, 3, 0.0), target)
    assert torch.allclose(frozen_effects(run, [edit, ScaleState(0, 3, 0.0)], target), cleared, atol=EXACT)
    # In a run that takes the layer as a mixer the same edit changes the same numbers.
    assert torch.allclose(frozen_effects(FrozenModel(model, tokens), edit, target), moved, atol=EXACT)
    blocks = FrozenModel(model, tokens, coders_for(model, "block"))
    assert torch.allclose(frozen_effects(blocks, edit, target), moved, atol=EXACT)
    with pytest.raises(ValueError, match="cannot be edited: it is a split one"):
        frozen_effects(FrozenModel(model, tokens, coders_for(model, "local")), edit, target)
    double = frozen_effects(run, ScaleFeature(coder, index, 1, 2.0), target)[0]
    found = attribute(run, targets=target)
    active = (run.coded[0].codes.indices[:, 1] == index) * found.features[0][:, 1]
    assert torch.allclose(double, active.sum(-1))
    assert torch.allclose(frozen_effects(run, ScaleError(coder, 2), target)[0], -found.errors[0][:, 2])
    assert torch.allclose(frozen_effects(run, ScaleEmbedding(3), target)[0], -found.embeddings[:, 3])


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("selection", ["half", "shares", (0.2, 0.3, 0.5)])
def test_other_rules_sum(family, selection):
    """What goes through the gate and the selection passes to the stream, what goes through the value to features."""
    model, tokens = random_model(3, family, n_layers=3), random_tokens(3, 2, 6)
    coders = [writer(model, 0), writer(model, 2, seed=1)]
    frozen = FrozenModel(model, tokens, coders, selection=selection)
    found = attribute(frozen, targets=[Logit(3), Feature(coders[1], 2, 4)])
    assert found.residual.abs().max() < EXACT
    assert float(found.features[0].abs().max()) > 1e-6
    plain = attribute(FrozenModel(model, tokens, coders), targets=Logit(3))
    assert float((plain.features[0] - found.features[0][:2]).abs().max()) > 1e-9


def test_gradients_are_those_of_the_model():
    model, tokens = random_model(3, "mamba", n_layers=2), random_tokens(3, 1, 6)
    coder = writer(model, 1)
    frozen = FrozenModel(model, tokens, coder, selection="gradient")
    found = attribute(frozen, targets=Logit(3))
    kept = {}

    def watch(value, hook):
        kept["u"] = value.requires_grad_() if not value.requires_grad else value
        return kept["u"]

    with torch.enable_grad(), model.hooks([("blocks.1.mixer.hook_x", watch)]):
        gradient = torch.autograd.grad(model(tokens)[0, -1, 3], kept["u"])[0]
    d = coder.W_dec.detach()[frozen.coded[1].codes.indices]
    expected = torch.einsum("ble,blke->blk", gradient, d) * frozen.coded[1].codes.values
    assert torch.allclose(found.features[1], expected, atol=EXACT)


def test_graph_paths_pages_and_files(tmp_path):
    model, tokens = built("falcon")
    coders = [writer(model, part, seed=i) for i, part in enumerate(writable(model))]
    frozen = FrozenModel(model, tokens, coders)
    graph = build_graph(frozen, Logit(3), max_features=80)
    words = {node.label.partition("[")[0] for node in graph.nodes if node.kind == "feature"}
    assert any(word.startswith("write") for word in words)
    assert any(word.startswith("attn") and word.endswith(".write") for word in words)
    assert len({node.label for node in graph.nodes}) == len(graph)
    again = load_graph(save_graph(graph, tmp_path / "graph"))
    assert again.nodes == graph.nodes
    assert again.about["modes"] == {str(part): "write" for part in frozen.coded}
    made = to_circuit_tracer(graph, "some")
    assert len({node["node_id"] for node in made["nodes"]}) == len(graph)
    assert len(to_networkx(graph)) == len(graph)
    features = about_features(frozen, graph)
    assert set(features) == {node.part for node in graph.nodes if node.kind == "feature"}
    assert "attn" in str(circuit_page(graph, features=features).html)
    trace = trace_paths(frozen, Logit(3), k=10**6, length=2)
    assert abs(trace.paths[0].remainder) < EXACT
    assert any(path.nodes[-1].at == "u" for path in trace.paths[0])
    assert len(top_paths(graph, k=3)) == 3
    with pytest.raises(ValueError, match="write dictionary, which the published method has not"):
        trace_paths(frozen, Logit(3), preset="mambacoder")


@pytest.mark.parametrize("family", MAMBA)
def test_checks_on_the_real_model(family):
    model, tokens = random_model(4, family, n_layers=2), random_tokens(4, 1, 5)
    coders = [writer(model, i, "standard", seed=i) for i in range(2)]
    frozen = FrozenModel(model, tokens, coders)
    reference = FrozenModel(model, random_tokens(8, 3, 5), coders)

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    graph = build_graph(frozen, Logit(3, minus=4), max_features=8)
    report = faithfulness(frozen, graph, graph, Logit(3, minus=4), metric, reference=reference)
    assert report.edges < EXACT
    assert report.features is not None
    found = node_effects(frozen, metric, reference=reference, steps=32)
    assert abs(found.residual) < 1e-3 * (abs(found.whole - found.none) + 1)
    assert found.largest(5).features[0].shape == (5, 11)
    with torch.no_grad(), only(frozen, Keep.nothing(frozen)):
        _, cache = model.run_with_cache(tokens)
    for i, coder in enumerate(coders):  # what is left of a write is the dictionary's bias
        assert torch.allclose(cache[f"blocks.{i}.mixer.hook_x"].flatten(2), coder.b_dec.expand(1, 5, -1), atol=1e-12)


def test_what_is_refused():
    model, tokens = random_model(2, n_layers=2), random_tokens(2)
    coder = writer(model, 0)
    with pytest.raises(ValueError, match=r"layer 0: mode 'block' needs a coder trained on a branch's output.*'write'"):
        FrozenModel(model, tokens, coder, mode={0: "block"})
    with pytest.raises(ValueError, match="mode 'write' needs a coder for layer 1"):
        FrozenModel(model, tokens, coder, mode="write")
    with pytest.raises(ValueError, match=r"two coders for layer 0, of .*: a branch can be read by one only"):
        FrozenModel(model, tokens, [coder, coders_for(model)[0]])
    assert FrozenModel(model, tokens, coder, mode="mixer").coded == {}
    elsewhere = writer(model, 1, reads="normalized", skip=True)
    elsewhere.cfg = elsewhere.cfg.replace(in_site="blocks.0.norm.hook_out")
    with pytest.raises(ValueError, match=r"a coder with a skip from blocks\.0\.norm\.hook_out"):
        FrozenModel(model, tokens, elsewhere)


def test_parts_have_names():
    assert part_of(3, "mixer") == 3
    assert part_of(3, "attn") == "3.attn"


def test_the_command_takes_write_dictionaries(tmp_path):
    model = load_model("tinystories-4l")
    folders = [writer(model, i, seed=i, d_sae=64).float().save(tmp_path / f"l{i}") for i in range(4)]
    arguments = ["I like to eat", "--target", " toast", "--budget", "8", "--out", str(tmp_path / "c.html")]
    for folder in folders:
        arguments += ["--coder", str(folder)]
    result = CliRunner().invoke(make_app(), ["circuit", *arguments, "--graph", str(tmp_path / "graph")])
    assert result.exit_code == 0, result.output
    graph = load_graph(tmp_path / "graph")
    assert set(graph.about["modes"].values()) == {"write"}
    assert graph.where("feature").any()
