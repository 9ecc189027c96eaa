"""Commands that sample: run, calibrate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turbocompile import defaults
from turbocompile.cli.group import (
    PATH,
    SEED,
    check_device,
    json_option,
    main,
    print_json,
    print_rich,
    quiet,
)
from turbocompile.progress import shown_progress

_OF_IMAGES = (
    click.option("--image", type=PATH, help="The first frame, for image-to-video models."),
    click.option("--last-image", type=PATH, help="The last frame, for models that take one (FLF2V, Wan2.2 I2V)."),
    click.option("--control", type=PATH, metavar="VIDEO", help="VACE: a video, or a folder of its frames as pictures."),
    click.option(
        "--mask", type=PATH, help="VACE: what of the control is made anew (white): a video, folder or picture."
    ),
    click.option("--reference", type=PATH, multiple=True, help="VACE: a picture of what the video shows; one or more."),
    click.option("--control-scale", type=float, help="VACE: how much the control counts, 1.0 where not given."),
)


def _images(command: Any) -> Any:
    """The options of a command that makes a video from images."""
    for option in reversed(_OF_IMAGES):
        command = option(command)
    return command


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="What the video shows; several make a video each.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A text file with a prompt on each line.")
@click.option("--negative-prompt", help="What it must not show; for samplers with guidance.")
@click.option("--num-samples", "samples", type=click.IntRange(min=1), help="Videos of each prompt, a seed each.")
@click.option("-o", "--out", default="out.mp4", show_default=True, type=click.Path(path_type=Path), help="The video.")
@click.option("--frames", type=click.Path(path_type=Path), help="A folder for the frames as PNG, besides.")
@click.option("--latents", type=click.Path(path_type=Path), help="A .safetensors file for the latents, besides.")
@click.option(
    "--seed",
    type=SEED,
    default=defaults.SEED,
    show_default=True,
    help="The same seed gives the same video on one device.",
)
@click.option("--steps", type=int, help="Steps of the sampler, instead of the recipe's.")
@click.option("--guidance", type=float, help="Classifier-free guidance, instead of the recipe's.")
@click.option("--sigma-max", type=float, help="rcm: the first noise level, instead of the recipe's.")
@click.option("--ode/--no-ode", default=None, help="rcm: follow the ODE, or draw new noise at each step.")
@click.option(
    "--shape",
    metavar="HxWxF",
    help="One of the engine's shapes, as in 480x832x81, 480p or '720p 9:16'; the first by default.",
)
@_images
@click.option("--lora", multiple=True, metavar="PATH[:WEIGHT]", help="An adapter for this video; several add up.")
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default what the engine was built for.")
@click.option("--vram", metavar="SIZE", help="Memory of the GPU to keep to, as in 12GB, 12GiB or auto (what is free).")
@json_option
def run(
    engine: Path,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    as_json: bool,
    lora: tuple[str, ...],
    **options: Any,
) -> None:
    """Make a video with ENGINE, a folder that `turbocompile optimize` wrote."""
    quiet()
    from turbocompile.video.session import generate_all

    check_device(options["device"])
    wanted = [*prompts, *(_prompts_in(prompt_file) if prompt_file is not None else ())]
    if not wanted:
        raise click.UsageError("there is no prompt; give --prompt or --prompt-file")
    made: list[dict[str, Any]] = []
    with shown_progress() as progress:
        calls = generate_all(
            engine, wanted, lora=lora or None, progress=progress, say=lambda s: click.echo(s, err=True), **options
        )
        for result in calls:
            paths = [str(path) for path in result.paths]
            made.append({"paths": paths, "timings": result.timings, "shape": list(result.video.shape)})
            if result.memory is not None:
                made[-1]["memory"] = {**result.memory.to_dict(), "measured_peak": result.memory_peak}
            if not as_json:
                for path in paths:
                    click.echo(f"video: {path}")
                click.echo("seconds: " + ", ".join(f"{stage} {s:.2f}" for stage, s in result.timings.items()))
    if as_json:
        print_json(made[0] if len(made) == 1 else {"calls": made})


def _prompts_in(path: Path) -> list[str]:
    """The prompts of a file, one on each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(
            f"--prompt-file {path} cannot be read as text ({error}); name a file of prompts"
        ) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise click.UsageError(f"--prompt-file {path} holds no prompt; write one on each line")
    return found


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file, as in inputs.safetensors.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field, as in shapes.0.height=256."
)
@click.option(
    "--prompt", "prompts", multiple=True, default=["a cat walking on the beach"], show_default=True, help="One or more."
)
@click.option("--negative-prompt", help="What the videos must not show; for samplers with guidance.")
@click.option(
    "--calls",
    type=click.IntRange(1, defaults.MAX_CALIBRATION_CALLS),
    default=defaults.CALIBRATION_CALLS,
    show_default=True,
    help="How many calls are kept.",
)
@click.option("--steps", type=int, help="Steps of the sampler, instead of the recipe's.")
@click.option("--guidance", type=float, help="Classifier-free guidance, instead of the recipe's.")
@_images
@click.option("--seed", type=SEED, default=defaults.SEED, show_default=True, help="Of the first video's noise.")
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default a GPU where there is one.")
def calibrate(recipe: Path, out: Path, overrides: tuple[str, ...], prompts: tuple[str, ...], **options: Any) -> None:
    """Record what the model of RECIPE is called with while it samples.

    A recipe that names the file (calibration: inputs.safetensors) measures its 8-bit linears on these inputs.
    """
    quiet()
    from turbocompile.recipe.schema import load_recipe
    from turbocompile.video.record import record_inputs

    check_device(options["device"])
    with shown_progress() as progress:
        done = record_inputs(load_recipe(recipe, overrides), out, prompts, progress=progress, **options)
    click.echo(f"inputs: {out} ({len(done.chosen())} of {done.seen} calls; name it as `calibration` in the recipe)")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), help="An engine or a diffusers pipeline, for PSNR and SSIM."
)
@click.option(
    "--prompts",
    type=int,
    default=defaults.EVALUATION_PROMPTS,
    show_default=True,
    help="How many; even. Every second is held out.",
)
@click.option("--steps", type=int, help="Steps of the sampler, instead of the recipe's.")
@click.option("--guidance", type=float, help="Classifier-free guidance, instead of the recipe's.")
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default what the engine was built for.")
@click.option("--save", type=click.Path(path_type=Path), help="A folder for the videos.")
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG with frames of each video and what was seen.")
@json_option
def evaluate(engine: Path, sheet: Path | None, as_json: bool, **options: Any) -> None:
    """Judge the videos of ENGINE, a model of moving digits, against their prompts."""
    quiet()
    from turbocompile.wan_mini.evaluate import check_sheet, write_sheet
    from turbocompile.wan_mini.evaluate import evaluate as evaluate_engine

    check_device(options["device"])
    if sheet is not None:
        check_sheet(sheet)
    with shown_progress() as progress:
        found = evaluate_engine(engine, progress=progress, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        print_rich(found)
    if sheet is not None:  # last, so that an error here does not lose a result that may have taken hours
        write_sheet(found, sheet)
        click.echo(f"sheet: {sheet}", err=as_json)
