"""Training in one call, from Python and from a file; what is said about options that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from hooked_mamba.hooks.names import HookNameError
from hooked_mamba.model_hash import model_hash
from saes.config import sae_config
from saes.naming import default_name
from saes.options import OptionError
from saes.store import DataConfig, ShardReader
from saes.training import RunConfig, TrainConfig, coder_config, load_model, run, train_coders, train_sae
from tests.kinds import MAMBA

WORDS = ["<|endoftext|>", *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]]
TEXTS = ["a b c d e f g", "h i j k", "l m n o p a b c", "d e f g h i j k l m n o p"] * 20


def tokenizer() -> PreTrainedTokenizerFast:
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token=WORDS[0], unk_token="a")


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return HookedMamba(MambaConfig(d_model=8, n_layers=2, d_vocab=len(WORDS), d_state=3), tokenizer(), seed=0)


SMALL = {"batch_size": 32, "context_length": 16, "block_tokens": 128, "steps": 6, "progress": False, "k": 3}


def test_train_sae(model: HookedMamba, tmp_path: Path) -> None:
    sae = train_sae(model, "out_proj_out", 1, "batchtopk", 24, text=TEXTS, n_tokens=192, **(SMALL | {"steps": None}))
    assert sae.cfg.in_site == sae.cfg.out_site == "blocks.1.mixer.hook_out_proj"
    assert (sae.cfg.architecture, sae.cfg.d_sae, sae.cfg.k) == ("batchtopk", 24, 3)
    assert (sae.cfg.model_name, sae.cfg.model_hash) == ("custom", model_hash(model))
    untrained = type(sae)(sae.cfg, seed=0)
    assert (sae.W_dec - untrained.W_dec).abs().max() > 1e-4


def test_gradients_may_be_off_outside(model: HookedMamba) -> None:
    expected = train_sae(model, "out_proj", 1, d_sae=24, text=TEXTS, **SMALL)
    with torch.no_grad():
        sae = train_sae(model, "out_proj", 1, d_sae=24, text=TEXTS, **SMALL)
        assert not torch.is_grad_enabled()
    assert torch.equal(sae.W_dec, expected.W_dec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lern_rate": 1}, "train_sae has no option 'lern_rate'"),
        ({"batchsize": 3}, "nearest: batch_size"),
        ({"d_sea": 3}, "nearest: d_sae|no option 'd_sea'"),
    ],
)
def test_unknown_options_are_errors(model: HookedMamba, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train_sae(model, "x", 0, text=TEXTS, **options)


@pytest.mark.parametrize("kind", ["file", "list", "tokens", "flat tokens", "data set", "disk"])
def test_any_text(model: HookedMamba, tmp_path: Path, kind: str) -> None:
    data = DataConfig(batch_size=32, context_length=16, block_tokens=128)
    text: object = TEXTS
    if kind == "file":
        text = tmp_path / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(TEXTS))
    elif kind == "tokens":
        text = torch.randint(len(WORDS), (20, 16), generator=torch.Generator().manual_seed(0))
    elif kind == "flat tokens":
        text = torch.randint(len(WORDS), (300,), generator=torch.Generator().manual_seed(0))
    elif kind == "data set":
        text = [{"text": string, "id": i} for i, string in enumerate(TEXTS)]
        text = iter_many(text)
    elif kind == "disk":
        data = DataConfig(
            batch_size=32, context_length=16, block_tokens=128, folder=str(tmp_path / "s"), disk_tokens=256
        )
    config = TrainConfig(steps=5, progress=False, log_every=5)
    result = train_coders(model, [sae_config("blocks.0.mixer.hook_y", 16, 24, k=3)], text, config, data)
    assert result.complete
    assert result.measured["l0-y"]["ev"] < 1
    if kind == "disk":
        manifest = ShardReader(tmp_path / "s").manifest
        assert manifest["tokens"] >= 256
        assert manifest["model_hash"] == model_hash(model)


class iter_many:  # stands for a data set, which can be read again
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_what_is_no_text(model: HookedMamba, tmp_path: Path) -> None:
    config = TrainConfig(steps=5, progress=False)
    cfg = [sae_config("blocks.0.mixer.hook_y", 16, 24, k=3)]
    with pytest.raises(FileNotFoundError):
        train_coders(model, cfg, tmp_path / "none.txt", config)
    with pytest.raises(TypeError, match="one row or several"):
        train_coders(model, cfg, torch.zeros(1, 2, 3, dtype=torch.long), config)


def test_the_forms_of_a_coder(model: HookedMamba) -> None:
    sae = coder_config(model, {"site": "dt", "layer": 1, "d_sae": 64})
    assert (sae.in_site, sae.d_in, sae.architecture, sae.k) == ("blocks.1.mixer.hook_dt", 16, "topk", 32)
    assert default_name(sae) == "l1-dt"
    full = coder_config(model, {"site": "blocks.0.mixer.hook_B", "d_sae": 8, "architecture": "standard"})
    assert (full.d_in, full.k, full.input_norm) == (3, None, "scale")
    alias = coder_config(model, {"site": "blocks.0.hook_ssm_out", "d_sae": 64})
    assert alias.in_site == "blocks.0.mixer.hook_out_proj"
    coder = coder_config(model, {"layer": -1, "d_sae": 64, "k": 5, "reads": "resid", "target": "local", "skip": True})
    assert (coder.in_site, coder.out_site) == ("blocks.1.hook_resid_pre", "blocks.1.mixer.hook_out_proj")
    assert (coder.k, coder.target, coder.skip, coder.architecture) == (5, "local", True, "batchtopk")
    assert default_name(coder) == "l1-mambacoder-local"
    nested = coder_config(model, {"layer": 0, "d_sae": 64, "architecture": "matryoshka", "widths": [8, 64]})
    assert nested.matryoshka_widths == (8, 64)
    state = "blocks.0.mixer.hook_h"
    some = coder_config(model, {"site": state, "d_sae": 64}, {state: [1, 2]})
    assert some.d_in == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"d_sae": 8}, 'needs a "site"'),
        ({"layer": 2, "d_sae": 8}, "layer 2 is out of range: the model has 2"),
        ({"layer": 0, "site": "x", "d_sae": 8, "reads": "resid"}, '"reads" is for MambaCoders'),
        ({"layer": 0, "d_sae": 8, "reads": "normalised"}, "nearest: normalized"),
    ],
)
def test_wrong_coders(model: HookedMamba, spec: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        coder_config(model, spec)


def test_unknown_sites(model: HookedMamba) -> None:
    with pytest.raises(HookNameError, match="nearest"):
        coder_config(model, {"site": "blocks.0.mixer.hook_yy", "d_sae": 8})


def test_names_differ(model: HookedMamba) -> None:
    cfg = sae_config("blocks.0.mixer.hook_y", 16, 24, k=3)
    config = TrainConfig(steps=2, progress=False)
    data = DataConfig(batch_size=32, context_length=16, block_tokens=128)
    both = train_coders(model, [cfg, cfg.replace(d_sae=32)], TEXTS, config, data)
    assert list(both.coders) == ["l0-y", "l0-y-topk-32"]
    same = train_coders(model, [cfg] * 3, TEXTS, config, data)
    assert list(same.coders) == ["l0-y", "l0-y-topk-24", "l0-y-topk-24-2"]


def test_a_large_site_with_chosen_positions_and_channels(model: HookedMamba) -> None:
    state = "blocks.0.mixer.hook_h"
    options = {"positions_per_row": 4, "channels": {state: [0, 5]}}
    sae = train_sae(model, "h", 0, d_sae=24, text=TEXTS, **(SMALL | options))
    assert sae.cfg.d_in == 6


@pytest.mark.parametrize("family", MAMBA)
def test_a_run_from_a_file(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "mamba":
        made = HookedMamba(MambaConfig(d_model=8, n_layers=2, d_vocab=len(WORDS), d_state=3), tokenizer(), seed=0)
    else:
        cfg = Mamba2Config(d_model=8, n_layers=2, d_vocab=len(WORDS), d_state=4, head_dim=4)
        made = HookedMamba2(cfg, tokenizer(), seed=0)
    made.save_pretrained(tmp_path / "model")
    assert type(load_model(tmp_path / "model")) is type(made)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    (tmp_path / "run.toml").write_text(f"""
model = "{tmp_path / "model"}"
text = "{tmp_path / "text.txt"}"
out = "{tmp_path / "out"}"
[train]
steps = 5
lr = 1
progress = false
[data]
batch_size = 32
context_length = 16
block_tokens = 128
[[coders]]
layer = 1
d_sae = 32
k = 3
[[coders]]
name = "gates"
site = "gate"
layer = 0
d_sae = 32
k = 3
""")
    result = run(RunConfig.from_file(tmp_path / "run.toml"))
    assert list(result.coders) == ["l1-mambacoder", "gates"]
    assert sorted(path.name for path in (tmp_path / "out" / "coders").iterdir()) == ["gates", "l1-mambacoder"]
    assert result.coders["gates"].cfg.model_name == "model"
