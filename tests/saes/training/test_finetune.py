"""Fine-tuning through the model: the loss is that of plain code, it falls, and a stopped run continues."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from hooked_mamba import cli
from saes.coder import SparseCoder
from saes.command_parts import tell_ending
from saes.config import mambacoder_config, sae_config
from saes.hub import list_coders
from saes.options import OptionError
from saes.store import DataConfig, Rows
from saes.training import FinetuneConfig, ResumeError, TrainResult, finetune_coders
from saes.training.spliced_pass import spliced_pass
from tests.saes.models import mambacoder_on, sae_on, tiny
from tests.saes.training import small
from tests.saes.training.test_run import TEXTS

X = "blocks.{}.mixer.hook_x"
APP = cli.make_app([EntryPoint("sae", "saes.commands:app", cli.GROUP)])
DATA = DataConfig(rows_per_pass=4, context_length=12)


def trained() -> dict[str, SparseCoder]:
    """Untrained, which is all the same here: SAEs of both layers' scan inputs, one with a threshold."""
    d = small.model().site(X.format(0)).width
    kinds = ("topk", "batchtopk")
    coders = {f"l{i}": SparseCoder(sae_config(X.format(i), d, 32, k=4, architecture=kinds[i]), seed=i) for i in (0, 1)}
    coders["l1"].threshold.fill_(0.02)
    return coders


def config(**changes) -> FinetuneConfig:
    settings = {"steps": 9, "lr": 3e-3, "log_every": 4, "checkpoint_every": 3, "progress": False}
    return FinetuneConfig.from_dict({**settings, **changes})


def finetune(out: Path | None = None, *, resume: bool = False, **changes):
    model = small.model()
    return finetune_coders(model, trained(), small.documents_text(), config(**changes), DATA, out=out, resume=resume)


def state(result) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, coder in result.coders.items() for k, v in coder.state_dict().items()}


def plain(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    """A TopK or BatchTopK coder's equations, the largest of each position or of all of them kept."""
    pre = (x - coder.b_dec if coder.cfg.apply_b_dec_to_input else x) @ coder.W_enc + coder.b_enc
    if coder.cfg.architecture == "topk":
        floor = pre.sort(-1).values[..., -coder.k].unsqueeze(-1)
    else:
        floor = pre.flatten().sort().values[-coder.k * x.shape[0] * x.shape[1]]
    return torch.where(pre >= floor, pre.clamp(min=0), 0.0) @ coder.W_dec + coder.b_dec


def test_the_loss_and_its_gradient_are_those_of_plain_code() -> None:
    """By hand: hooks that write what the coders' equations say, and softmaxes summed term by term.

    The second coder reads what the first has changed, so the first's gradient passes through the second's encoder.
    """
    model = tiny()
    coders = {
        "x": sae_on(model, X.format(0), k=5, architecture="batchtopk"),
        "block": mambacoder_on(model, 1),
    }
    tokens = torch.randint(1, model.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))
    found = spliced_pass(model, coders, Rows(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    (found.kl + 0.7 * found.fvu["x"] + 0.4 * found.fvu["block"]).backward()
    grads = {f"{n}.{p}": v.grad.clone() for n, c in coders.items() for p, v in c.named_parameters()}
    for coder in coders.values():
        coder.zero_grad()

    kept: dict[str, torch.Tensor] = {}
    shares: dict[str, torch.Tensor] = {}

    def share(name: str, y: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        y, flat = y.detach().flatten(0, 1), said.flatten(0, 1)
        shares[name] = (y - flat).square().sum() / (y - y.mean(0)).square().sum()
        return said

    def first(value: torch.Tensor, hook: object) -> torch.Tensor:
        return share("x", value, plain(coders["x"], value))

    def look(value: torch.Tensor, hook: object) -> None:
        kept["x"] = value

    def second(value: torch.Tensor, hook: object) -> torch.Tensor:
        return share("block", value, plain(coders["block"], kept["x"]))

    block = coders["block"].cfg
    hooks = [(X.format(0), first), (block.in_site, look), (block.out_site, second)]
    clean, spliced = model(tokens).detach(), model.run_with_hooks(tokens, fwd_hooks=hooks)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(7):
            p, q = clean[b, t].softmax(0), spliced[b, t].softmax(0)
            total = total + sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p))) / 14
    assert float(found.kl.detach()) == pytest.approx(float(total.detach()), rel=1e-10)
    for name, value in shares.items():
        assert float(found.fvu[name].detach()) == pytest.approx(float(value.detach()), rel=1e-10)
    (total + 0.7 * shares["x"] + 0.4 * shares["block"]).backward()
    for name, coder in coders.items():
        for key, parameter in coder.named_parameters():
            torch.testing.assert_close(grads[f"{name}.{key}"], parameter.grad, rtol=1e-8, atol=1e-12)
    assert grads["x.W_enc"].abs().max() > 1e-6


def test_the_divergence_falls_and_decoder_rows_keep_their_norms() -> None:
    model = small.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.randint(1, 50, (8, 12), generator=torch.Generator().manual_seed(5))
    rows = Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))
    coders = trained()
    coders["l0"].W_dec.data *= 2.0
    first = float(spliced_pass(model, coders, rows).kl.detach())
    result = finetune_coders(model, coders, small.documents_text(), config(steps=60), DATA)
    assert result.complete
    assert float(spliced_pass(model, coders, rows).kl.detach()) < 0.7 * first
    assert result.measured["l0"]["l0"] <= 4
    torch.testing.assert_close(coders["l0"].W_dec.norm(dim=1), torch.full((32,), 2.0))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = state(finetune(tmp_path / "whole"))
    from saes.training.finetune import Finetuning

    take_step = Finetuning.take_step

    def dies(self: Finetuning, rows: Rows) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        take_step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "take_step", dies)
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path / "parts")
    with pytest.raises(FileExistsError, match="resume=True"):
        finetune(tmp_path / "parts")
    with pytest.raises(ResumeError, match="lr"):
        finetune(tmp_path / "parts", resume=True, lr=1e-3)
    result = finetune(tmp_path / "parts", resume=True)
    for name, value in state(result).items():
        assert torch.equal(value, whole[name]), name
    logs = [(tmp_path / part / "metrics.jsonl").read_text() for part in ("whole", "parts")]
    assert logs[0] == logs[1]
    stored = SparseCoder.load(tmp_path / "parts" / "coders" / "l0")
    assert torch.equal(stored.W_dec, result.coders["l0"].W_dec)


def test_text_that_ends_early_leaves_finished_coders(tmp_path: Path) -> None:
    """Also when a run is resumed at the end: thresholds are those of the last rows."""
    source = small.documents_text()
    rows = torch.stack([source.next_row()[0] for _ in range(22)])

    def ended(resume: bool, text: torch.Tensor = rows):
        data = DataConfig(rows_per_pass=4, context_length=12, epochs=1)
        return finetune_coders(small.model(), trained(), text, config(), data, out=tmp_path, resume=resume)

    first = ended(False)
    assert (first.step, first.complete, first.ended, first.n_steps) == (6, False, "text", 9)
    assert first.ending() == "the text ended at step 6 of 9"
    stored = SparseCoder.load(tmp_path / "coders" / "l1")
    told = list_coders(tmp_path / "coders")[1]
    assert (told.training["steps"], told.training["steps_asked"]) == (6, 9)
    assert told.metrics["l0"] == pytest.approx(4)
    assert float(stored.threshold) not in (0.0, pytest.approx(0.02)), "fitted"
    again = ended(True)
    for name, value in state(first).items():
        assert torch.equal(state(again)[name], value), name
    assert torch.equal(SparseCoder.load(tmp_path / "coders" / "l1").threshold, stored.threshold)


def test_a_finished_run_resumed_has_the_same_thresholds(tmp_path: Path) -> None:
    first, again = state(finetune(tmp_path)), state(finetune(tmp_path, resume=True))
    assert torch.equal(first["l1.threshold"], again["l1.threshold"])
    assert torch.equal(SparseCoder.load(tmp_path / "coders" / "l1").threshold, first["l1.threshold"])


def test_what_it_refuses() -> None:
    model = small.model()
    d = model.site(X.format(0)).width
    penalised = SparseCoder(sae_config(X.format(0), d, 8, architecture="jumprelu"))
    with pytest.raises(ValueError, match=r"jumprelu.*penalty.*topk"):
        finetune_coders(model, penalised, small.documents_text(), config(), DATA)
    with pytest.raises(ValueError, match="holds 5 numbers"):
        finetune_coders(model, SparseCoder(sae_config(X.format(0), 5, 8, k=2)), small.documents_text(), config(), DATA)
    with pytest.raises(OptionError, match="one of them"):
        FinetuneConfig(n_tokens=5, steps=5)
    with pytest.raises(OptionError, match="reconstruction"):
        FinetuneConfig.from_dict({"steps": 5, "reconstructoin": 1})
    huge = mambacoder_config(0, small.D, 8, k=2, architecture="topk")
    coder = SparseCoder(huge, seed=0)
    coder.b_dec.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        finetune_coders(model, coder, small.documents_text(), config(), DATA)


def test_the_command(tmp_path: Path) -> None:
    for name, coder in trained().items():
        coder.save(tmp_path / "run" / "coders" / name)
    folder = tmp_path / "model"
    from hooked_mamba import HookedMamba, MambaConfig
    from tests.saes.training.test_run import WORDS, tokenizer

    cfg = MambaConfig(d_model=small.D, n_layers=2, d_vocab=len(WORDS), d_state=4)
    HookedMamba(cfg, tokenizer(), seed=0).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    line = ["sae", "finetune", str(tmp_path / "run"), "--model", str(folder), "--text", str(tmp_path / "text.txt")]
    line += ["--rows-per-pass", "2", "--context-length", "16", "--out", str(tmp_path / "tuned"), "--quiet"]
    found = CliRunner().invoke(APP, [*line, "--steps", "3"])
    assert found.exit_code == 0, found.output
    assert "coders in" in found.output
    assert SparseCoder.load(tmp_path / "tuned" / "coders" / "l1").cfg.in_site == X.format(1)
    assert "--n-tokens" in CliRunner().invoke(APP, line).output


def test_the_end_of_the_text_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ended(result: TrainResult) -> int:
        try:
            tell_ending(result, tmp_path, "sae train --resume")
        except typer.Exit as error:
            return error.exit_code
        return 0

    assert ended(TrainResult({}, 6, False, {}, "text", 9)) == 0
    assert "the text ended at step 6 of 9: coders are as they were then" in capsys.readouterr().err
    assert ended(TrainResult({}, 6, False, {}, "stopped", 9)) == 130
    assert "stopped at step 6 of 9; to continue: sae train --resume" in capsys.readouterr().err
    assert ended(TrainResult({}, 9, True, {}, "steps", 9)) == 0
    assert capsys.readouterr().err == ""
