"""The commands `cache` and `models`: a model's sites, and the models that come with the package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hooked_mamba.cli.base import DEFAULT_MODEL, ModelOption, console, reports_errors, table
from hooked_mamba.cli.inputs import check_inputs


@reports_errors
def cache(
    text: Annotated[str, typer.Argument(help="What the model reads; - reads it from standard input.")],
    model: ModelOption = DEFAULT_MODEL,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", "-s", help="Name or glob, such as 'blocks.2.*' or 'blocks.*.mixer.hook_h'; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(help="Likeliest next tokens shown.", min=0)] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the tensors to this safetensors file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="Folder of a PEFT LoRA to merge into the model; repeatable.")
    ] = None,
) -> None:
    """Read a text: every hook site with its shape, and the likeliest next tokens.

    Without --site, all sites but the largest (those of every state); name these to get them.
    """
    check_inputs(writes={"--out": out}, model=model, device=device)
    from rich.markup import escape

    from hooked_mamba.models import load_model

    loaded = load_model(model, device=device, adapter=adapter)
    text = sys.stdin.read() if text == "-" else text
    tokens = loaded.to_tokens(text)
    logits, values = loaded.run_with_cache(tokens, names_filter=site or None)
    screen = console()
    screen.print(sites_table(f"{tokens.shape[1]} tokens, {len(values)} sites", values))
    if top:
        probabilities = logits[0, -1, : loaded.d_vocab_real].softmax(-1)
        best = probabilities.topk(min(top, len(probabilities)))
        rows = [
            (repr(loaded.to_single_str_token(i)), f"{p:.1%}")
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        screen.print(table("\nLikeliest next tokens", ("token", "probability"), rows, right=["probability"]))
    if out is not None:
        write_tensors(out, dict(values.items()), {"model": model, "text": text})
        screen.print(f"\n{len(values)} tensors in {escape(str(out))}", soft_wrap=True)


def sites_table(title: str, values: Any) -> Any:
    """Sites with shapes, sizes and meanings."""
    rows = (
        (name, " × ".join(map(str, v.shape)), str(v.dtype).removeprefix("torch."), values.text(name))
        for name, v in values.items()
    )
    return table(title, ("site", "shape", "dtype", "what it is"), rows)


def write_tensors(path: Path, tensors: dict[str, Any], about: dict[str, str]) -> None:
    """A safetensors file, written aside and put in place as a whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, aside, metadata=about)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@reports_errors
def demo(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Moved: `make demo`, or `python -m demos.tour`, in a clone of the repository."""
    raise ImportError(
        "the demos are not part of the installed package: clone the repository, and run `make demo` there"
    )


@reports_errors
def models(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The models that come with the package."""
    from hooked_mamba.loading import load_checkpoint
    from hooked_mamba.loading.files import bundled_names

    found = {name: load_checkpoint(name) for name in bundled_names()}
    rows = [
        {
            "name": name,
            "family": c.family,
            "layers": c.cfg.n_layers,
            "width": c.cfg.d_model,
            "vocabulary": c.cfg.d_vocab,
        }
        for name, c in found.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ("name", "family", "layers", "width", "vocabulary")
        console().print(table("", columns, ([row[c] for c in columns] for row in rows), right=columns[2:]))
