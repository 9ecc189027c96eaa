"""Commands that write models: optimize, convert, init-example."""

from __future__ import annotations

from pathlib import Path

import click

from turbocompile import defaults
from turbocompile.cli.group import (
    SEED,
    json_option,
    main,
    print_json,
    print_rich,
    print_summary,
    quiet,
)
from turbocompile.progress import shown_progress
from turbocompile.recipe.presets import VARIANTS


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The engine's folder; it must not exist yet.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field, as in model.seed=1.")
@click.option(
    "--lora", "loras", multiple=True, metavar="PATH[:WEIGHT]", help="Add an adapter to the weights; several add up."
)
@click.option("--dry-run", is_flag=True, help="Capture, rewrite and plan without reading weights or writing files.")
@json_option
def optimize(
    recipe: Path, out: Path | None, overrides: tuple[str, ...], loras: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Build the engine of RECIPE, a YAML file."""
    if out is None and not dry_run:
        raise click.UsageError("name the engine's folder with -o DIR, or add --dry-run")
    quiet()
    from turbocompile.build.from_recipe import optimize_recipe
    from turbocompile.recipe.schema import load_recipe

    with shown_progress() as progress:
        report = optimize_recipe(load_recipe(recipe, overrides, loras), out, dry_run=dry_run, progress=progress)
    if as_json:
        print_json(report.to_dict())
    elif dry_run:
        print_rich(report)
    else:
        print_summary(report)
        click.echo(f"\nengine: {out} (`turbocompile explain {out}` shows more)")


@main.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder; new or empty.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights; by default SRC's.")
@click.option("--force", is_flag=True, help="Replace a folder that a conversion wrote.")
@json_option
def convert(source: Path, out: Path, dtype: str | None, force: bool, as_json: bool) -> None:
    """Write SRC, a Wan transformer in any format, as a folder for diffusers.

    SRC is a file or folder. Quantized weights are dequantized. Of two experts each is converted by itself.
    """
    quiet()
    from turbocompile.wan.convert import convert as convert_checkpoint

    with shown_progress() as progress:
        done = convert_checkpoint(source, out, dtype, force=force, progress=progress)
    if as_json:
        print_json(done.to_dict())
        return
    for note in done.notes:
        click.echo(f"Warning: {note}", err=True)
    click.echo(f"folder: {done.folder} ({done.tensors} tensors in {done.dtype}, {done.bytes / 1e9:.2f} GB)")
    if done.dequantized:
        click.echo(f"dequantized: {done.dequantized} weights")
    for name, what in done.beside.items():
        click.echo(f"beside: {name}, {what}")


@main.command("init-example")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--variant", type=click.Choice(tuple(VARIANTS)), default=defaults.EXAMPLE_VARIANT, show_default=True)
@click.option("--head-dim", type=click.Choice(["64", "128"]), default=str(defaults.EXAMPLE_HEAD_DIM), show_default=True)
@click.option("--seed", type=SEED, default=defaults.SEED, show_default=True, help="Of the random weights.")
def init_example(folder: Path, variant: str, head_dim: str, seed: int) -> None:
    """Write a tiny Wan pipeline with random weights, and its recipe, into FOLDER."""
    quiet()
    from turbocompile.wan.example import write_example

    recipe = write_example(folder, variant, int(head_dim), seed)
    click.echo(f"recipe: {recipe} (`turbocompile optimize {recipe} -o engine/` builds it)")


# ------------------------------------------------------------------------------------------------------ reading folders
