"""Old names work for one release and name the new ones."""

from __future__ import annotations

import importlib

import pytest

from hooked_mamba import HookedMamba, MambaConfig
from saes.naming import full_name
from saes.options import OptionError
from saes.splicing import LatentEdit
from saes.training import ResumeError, train_sae

OLD = {
    "saes.Edit": (LatentEdit, "saes.splicing.LatentEdit"),
    "saes.splicing.Edit": (LatentEdit, "saes.splicing.LatentEdit"),
    "saes.training.CheckpointError": (ResumeError, "saes.training.checkpoint.ResumeError"),
    "saes.training.checkpoint.CheckpointError": (ResumeError, "saes.training.checkpoint.ResumeError"),
    "saes.registry.default_name": (full_name, "saes.naming.full_name"),
}


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_new_one_and_says_so(old):
    module, _, name = old.rpartition(".")
    new, path = OLD[old]
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {path};"):
        assert getattr(importlib.import_module(module), name) is new
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'no_{name}'"):
        getattr(importlib.import_module(module), f"no_{name}")


def test_variant_is_architecture():
    model = HookedMamba(MambaConfig(d_model=8, n_layers=1, d_vocab=17, d_state=3), seed=0)
    text = [[i % 17 for i in range(j, j + 16)] for j in range(20)]
    options = {"text": text, "steps": 1, "batch_size": 16, "context_length": 16, "block_tokens": 32, "progress": False}
    with pytest.warns(DeprecationWarning, match=r"train_sae\(variant=...\) is now architecture="):
        sae = train_sae(model, "out_proj", 0, variant="standard", d_sae=12, **options)
    assert sae.cfg.architecture == "standard"
    with pytest.raises(OptionError, match="architecture and variant"):
        train_sae(model, "out_proj", 0, "topk", d_sae=12, variant="standard", **options)
