"""The command `hooked-mamba circuit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli import DEFAULT_MODEL, ModelOption, check_inputs, new_app, reports_errors

app = new_app("circuit")


@app.command()
@reports_errors
def circuit(
    prompt: Annotated[str, typer.Argument(help="The text whose last token is explained.")],
    target: Annotated[str | None, typer.Option(help="The token to explain; default: the most likely ones.")] = None,
    minus: Annotated[str | None, typer.Option(help="Explain the lead over this token instead.")] = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("out/circuit.html"),
    model: ModelOption = DEFAULT_MODEL,
    coder: Annotated[list[str] | None, typer.Option(help="A coder's folder, name or hub id; may be repeated.")] = None,
    budget: Annotated[int, typer.Option(help="Most features and heads of the circuit.")] = 100,
    graph: Annotated[Path | None, typer.Option(help="Folder for the graph itself.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file whose contexts show what features mean, documents separated by <|endoftext|>."),
    ] = None,
    n_tokens: Annotated[int, typer.Option("--n-tokens", min=1, help="Stop in --text after so many tokens.")] = 50_000,
    choose: Annotated[
        str, typer.Option(help="How nodes are chosen: by influence, or integrated (what ablating them does).")
    ] = "influence",
    selection: Annotated[
        str, typer.Option(help="What edges follow beside the value path: none, half, shares or gradient.")
    ] = "none",
    units: Annotated[
        list[str] | None,
        typer.Option(help="Branches whose units may be nodes (mixer, attn, mlp, moe); may be repeated. Default: all."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Check the circuit by intervening.")] = True,
) -> None:
    """Trace what a prediction is made of: a pruned graph, its checks, and a page to look at."""
    check_inputs(reads={"--text": text}, writes={"--out": out}, folders={"--graph": graph}, model=model)
    if minus is not None and target is None:
        raise ValueError("--minus needs --target: which token's lead is explained?")
    from circuits.extract import check_choices, extract_circuit
    from circuits.files import save_graph
    from circuits.targets import Logit
    from circuits.viewer import about_features, circuit_page
    from hooked_mamba.models import load_model
    from saes.command_parts import load_coders, note_other_weights

    check_choices(budget, choose, selection)
    loaded = load_model(model)
    coders = load_coders(coder or ())
    note_other_weights(coders, loaded, model)
    chosen = None if target is None else Logit(target, minus=minus)
    found = extract_circuit(
        loaded,
        coders,
        prompt,
        chosen,
        budget,
        choose=choose,
        selection=selection,
        units=units or None,
        check=check,
        verbose=True,
    )
    typer.echo(str(found))
    features = about_features(found.frozen, found.graph, text, n_tokens=n_tokens)
    page = circuit_page(found.graph, features=features, report=found.report).save(out)
    typer.echo(f"page: {page}")
    if graph is not None:
        typer.echo(f"graph: {save_graph(found.graph, graph)}")
