"""`hooked-mamba sae train`, `finetune`, `eval` and `capture`.

Each command imports what it needs when it runs, so that help is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli import DEFAULT_MODEL, check_inputs, console, reports_errors, table
from saes.command_options import (
    CodersArgument,
    ContextOption,
    DeviceOption,
    ModelOption,
    QuietOption,
    TextOption,
    TokensOption,
    WorkOption,
    app,
)
from saes.run_options import run_options
from saes.settings import speaks_of_settings


@app.command()
@reports_errors
@speaks_of_settings
def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="JSON or TOML file of options, or a training's folder; flags override it."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Bundled name, folder or hub id.")] = None,
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Text file, documents separated by <|endoftext|>.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of checkpoints, log and coders.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Block; repeatable, one coder for each.")] = None,
    site: Annotated[
        str | None, typer.Option(help="Site of SAEs (out_proj, x, dt, ...); without it MambaCoders.")
    ] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Latents of each coder.")] = None,
    k: Annotated[int | None, typer.Option(help="Active latents.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="topk, batchtopk, jumprelu, standard, gated or matryoshka.")
    ] = None,
    reads: Annotated[str | None, typer.Option(help="What MambaCoders read: normalized or resid.")] = None,
    target: Annotated[str | None, typer.Option(help="What MambaCoders predict: block or local.")] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Positions of the normalised inputs that are read; taps: as the convolution does."),
    ] = None,
    n_tokens: Annotated[int | None, typer.Option("--n-tokens", help="Tokens to train on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps, instead of tokens.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Tokens a step.")] = None,
    context_length: Annotated[int | None, typer.Option("--context-length", help="Tokens a row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    logger: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb; repeatable.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other option, such as train.warmup=0.1; repeatable.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the last checkpoint in --out, with its options."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Train coders on a model's activations, by flags, a file of options, or both; flags override the file.

    hooked-mamba sae train --text stories.txt --layer 2 --d-sae 1536 --n-tokens 1000000 --out runs/mine
    """
    flags = {
        **{"model": model, "text": None if text is None else str(text), "out": None if out is None else str(out)},
        **{"layer": layer, "site": site, "d_sae": d_sae, "k": k, "architecture": architecture},
        "window": int(window) if window is not None and window.isdigit() else window,
        **{"reads": reads, "target": target, "device": device, "loggers": logger},
        **{"train.n_tokens": n_tokens, "train.steps": steps, "train.lr": lr, "train.seed": seed},
        **{"data.batch_size": batch_size, "data.context_length": context_length, "data.seed": seed},
        "train.progress": False if quiet else None,
    }
    options = run_options(config, flags, setting or [], resume)
    check_inputs(
        reads={"--text": options["text"]},
        folders={"--out": options["out"]},
        model=options.get("model"),
        device=options.get("device"),
    )
    if not quiet:
        typer.echo(f"loading {options.get('model', 'the model')} ...", err=True)
    from saes.command_parts import tell_ending
    from saes.training import RunConfig, run  # takes seconds, so the line above comes first

    result = run(RunConfig.from_dict(options), resume=resume)
    columns = ("coder", "EV", "L0", "dead")
    rows = [(name, f"{m['ev']:.4f}", f"{m['l0']:.2f}", f"{m['dead']:.2%}") for name, m in result.measured.items()]
    console().print(table("", columns, rows, right=columns[1:]))
    tell_ending(result, Path(options["out"]), f"hooked-mamba sae train --resume --out {options['out']}")


@app.command()
@reports_errors
def finetune(
    coders: CodersArgument,
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints, log and coders.")],
    model: ModelOption = None,
    n_tokens: Annotated[int | None, typer.Option("--n-tokens", help="Tokens to train on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps, instead of tokens.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    reconstruction: Annotated[
        float, typer.Option(help="Weight of the variance missed at the coders' sites, beside the divergence.")
    ] = 1.0,
    rows_per_pass: Annotated[int, typer.Option("--rows-per-pass", min=1, help="Rows a step.")] = 16,
    context_length: ContextOption = 256,
    seed: Annotated[int, typer.Option(help="Seed of the text's order.")] = 0,
    device: DeviceOption = "cpu",
    logger: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Fine-tune trained coders through the model: on the divergence of its predictions with all of them in place.

    hooked-mamba sae finetune runs/mine --text stories.txt --n-tokens 1000000 --out runs/mine-tuned
    """
    check_inputs(reads={"--text": text}, folders={"--out": out}, model=model, device=device)
    from saes.command_parts import load_coders, model_of, tell_ending, trained_model
    from saes.store import DataConfig
    from saes.training import FinetuneConfig, finetune_coders
    from saes.training.loop import check_folder

    config = FinetuneConfig(
        n_tokens=n_tokens, steps=steps, lr=lr, reconstruction=reconstruction, seed=seed, progress=not quiet
    )
    data = DataConfig(rows_per_pass=rows_per_pass, context_length=context_length, seed=seed)
    check_folder(out, resume)
    named = load_coders(coders, device)
    loaded = model_of(named, model or trained_model(coders), device)
    result = finetune_coders(loaded, named, text, config, data, out=out, resume=resume, loggers=logger or ())
    columns = ("coder", "KL", "EV", "L0")
    rows = [(name, f"{m['kl']:.4f}", f"{m['ev']:.4f}", f"{m['l0']:.2f}") for name, m in result.measured.items()]
    console().print(table("", columns, rows, right=columns[1:]))
    tell_ending(result, out, "the same command with --resume")


@app.command("eval")
@reports_errors
def eval_(
    coders: CodersArgument,
    text: TextOption,
    model: ModelOption = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Figure or group (reconstruction, sparsity, loss); repeatable. Default: all."),
    ] = None,
    n_tokens: TokensOption = 20_000,
    context_length: ContextOption = 256,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
    work: WorkOption = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Evaluate coders on a text: reconstruction, sparsity, and the loss of the model when it runs on them."""
    check_inputs(
        reads={"--text": text}, writes={"--json": json_file}, folders={"--work": work}, model=model, device=device
    )
    from saes.command_parts import load_coders, model_of, processes, text_rows, trained_model
    from saes.evaluation import evaluate
    from saes.report import chosen_metrics

    chosen_metrics(metric or None)
    with processes(device, work) as (world, device):
        named = load_coders(coders, device)
        loaded = model_of(named, model or trained_model(coders), device)
        rows = text_rows(text, loaded, context_length)
        report = evaluate(loaded, named, rows, metric or None, n_tokens=n_tokens, folder=work, progress=not quiet)
        if world.first:
            console().print(report)
            if json_file is not None:
                report.save(json_file)


@app.command()
@reports_errors
def capture(
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")],
    site: Annotated[list[str], typer.Option(help="Full name of a hook site; repeatable.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Bundled name, folder or hub id.")] = DEFAULT_MODEL,
    n_tokens: TokensOption = 1_000_000,
    context_length: ContextOption = 256,
    dtype: Annotated[str, typer.Option(help="Precision on disk: float32, float16 or bfloat16.")] = "bfloat16",
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Write a model's activations on a text as sharded safetensors; processes under torchrun share the text."""
    check_inputs(reads={"--text": text}, folders={"--out": out}, model=model, device=device)
    from hooked_mamba.models import load_model
    from saes.command_parts import processes, text_rows
    from saes.options import check_choice
    from saes.store import Capture, capture_shared
    from saes.store.shards import DTYPES, read_manifest

    check_choice("dtype", dtype, tuple(DTYPES))
    with processes(device, out) as (world, device):
        loaded = load_model(model, device=device)
        reader = Capture(loaded, [loaded.resolve(name) for name in site], dtype=DTYPES[dtype])
        rows = text_rows(text, loaded, context_length)
        capture_shared(reader, rows, out, n_tokens, progress=not quiet)
        if world.first:
            found = read_manifest(out)
            typer.echo(
                f"{out}: {found['tokens']:,} positions of {len(found['streams'])} sites, {len(found['shards'])} shards"
            )
