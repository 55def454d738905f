"""Adapters that PEFT itself wrote, merged here and by PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hooked_mamba import load_model
from tests.hooked_mamba.loading.folders import MAKERS, files_of, write

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unchecked")]

FAMILIES = [family for family in MAKERS if family not in ("Zamba", "Zamba2", "gated DeltaNet", "RWKV-7", "Mamba-3")]
"""Families of transformers whose layers PEFT takes by the last part of their names."""
METHODS = {
    "lora": {},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "patterns, biases": {"bias": "all", "rank_pattern": {"in_proj": 5}, "alpha_pattern": {"in_proj": 3}},
}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_as_peft_merges(peft, family, method, tmp_path):
    model = MAKERS[family]().float().eval()
    base = write(tmp_path / "base", *files_of(family))
    ends = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    embedding = next(name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    if family == "Qwen3-Next" and "dora" in method:  # PEFT takes these as experts' parameters, which take no DoRA
        ends -= {"gate_proj", "up_proj", "down_proj"}
    targets = ends - {"lm_head"} | ({embedding} if "biases" not in method else set())
    try:
        adapted = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=sorted(targets), **METHODS[method])
        )
    except ValueError:  # it takes no LoRA on out_proj of some families
        targets -= {"out_proj"}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=sorted(targets), **METHODS[method]))
    generator = torch.Generator().manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    adapted.save_pretrained(tmp_path / "a")
    tokens = torch.randint(3, 17, (2, 9), generator=generator)
    live = adapted.eval()(tokens).logits
    merged = adapted.merge_and_unload()
    ours = load_model(base, adapter=tmp_path / "a")
    if merged.config.tie_word_embeddings and embedding in targets:  # merged into both, which was trained in one
        merged.lm_head.weight = nn.Parameter(files_of(family)[1][f"{_embed(files_of(family)[1])}"].clone())
    expected = type(ours).from_hf(merged).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=5e-7), name
    if not any(end == "dt_proj" for end in targets):  # which runs asleep there
        assert torch.allclose(ours(tokens), live, rtol=1e-3, atol=1e-3)


def _embed(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if name.endswith(("embeddings.weight", "embed_tokens.weight")))


@torch.no_grad()
@pytest.mark.parametrize(("family", "first"), [("Jamba", "gate_up_proj"), ("Nemotron-H", "up_proj")])
def test_experts_as_peft_merges_them(peft, family, first, tmp_path):
    model, base = MAKERS[family]().float().eval(), write(tmp_path / "base", *files_of(family))
    parameters = [f"experts.{first}", "experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=parameters))
    generator = torch.Generator().manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    adapted.save_pretrained(tmp_path / "a")
    ours = load_model(base, adapter=tmp_path / "a")
    expected = type(ours).from_hf(adapted.merge_and_unload()).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=5e-7), name


def test_a_live_model_is_refused(peft):
    model = MAKERS["Mamba"]()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["in_proj"]))
    from hooked_mamba import HookedMamba

    for live in (adapted, adapted.base_model, adapted.base_model.model):
        with pytest.raises(ValueError, match=r"has adapters of PEFT.*merge_and_unload\(\)"):
            HookedMamba.from_hf(live)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "PromptTuning", "Vera"])
def test_other_methods_are_named(peft, kind, tmp_path):
    base = write(tmp_path / "base", *files_of("Mamba"))
    options = {"target_modules": ["in_proj"]} if kind != "PromptTuning" else {"num_virtual_tokens": 2}
    options |= {"feedforward_modules": []} if kind == "IA3" else {}
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    config.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"peft_type='{config.peft_type.value}', and only 'LORA' is merged here"):
        load_model(base, adapter=tmp_path / "a")
