"""On models trained here: the token that attribution names is the one that holds the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from circuits import FrozenModel, Logit, attribute
from demos.localisation.circuits import main, recovered
from demos.localisation.study import load
from demos.localisation.task import Task
from hooked_mamba import HookedMamba

MODELS = Path(__file__).parents[2] / "demos" / "localisation" / "models"


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_the_largest_source_is_the_answers_token(name):
    model = HookedMamba.from_pretrained(MODELS / name)
    prompts = Task.load(MODELS / name).prompts(220, seed=31)  # neither a training seed nor one of the study's
    with torch.no_grad():
        right = model(prompts.tokens)[:, -1].argmax(-1) == prompts.answers
    prompts = prompts.rows(right.nonzero()[:200, 0])
    assert len(prompts) == 200
    frozen = FrozenModel(model, prompts.tokens)
    found = attribute(frozen, targets=Logit(tuple(prompts.answers.tolist())), keep_heads=False)
    assert found.residual.abs().max() < 1e-4
    named = found.embeddings.argmax(1) == prompts.where
    assert float(named.float().mean()) >= 0.95
    with pytest.raises(ValueError, match="2 tokens for 200 rows"):
        attribute(frozen, targets=Logit((1, 2)))


def check_recovery(name, n):
    found = recovered(*load(name), n=n, seed=4)
    assert found.mean("integrated") >= 0.9
    assert found.off("integrated") < 0.12
    for way in ("gradient", "influence", "random"):
        assert found.off("integrated") < found.off(way)
    assert found.mean("random") < 0.3
    return found


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_two_hundred_heads_recover_the_answers_lead(name):
    found = check_recovery(name, 6)
    assert len(found.by_way["gradient"]) == 6
    assert found.nodes == 200 < found.heads / 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recall", "induction"])
def test_two_hundred_heads_recover_the_answers_lead_on_many_prompts(name):
    found = check_recovery(name, 100)
    assert found.mean("integrated") > found.mean("gradient")


def test_the_command_prints_both_tasks(capsys):
    assert main(["--prompts", "1", "--nodes", "20"]) == 0
    printed = capsys.readouterr().out
    assert "recall (2 blocks): 20 of 4352 heads" in printed
    assert "induction (2 blocks): 20 of 4096 heads" in printed
    with pytest.raises(SystemExit):
        main(["--nodes", "0"])
    assert "--nodes must be at least 1, got 0" in capsys.readouterr().err
