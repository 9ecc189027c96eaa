"""The command line, `turbocompile COMMAND`: each function with `@main.command` is a command.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 it failed, 2 the user's input was wrong.
Each command imports its modules when it runs, so that --help and --version answer at once.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from safetensors import SafetensorError

from turbocompile import defaults
from turbocompile.cli_images import image_options
from turbocompile.errors import TurbocompileError, UnsupportedError, VerificationError
from turbocompile.progress import shown_progress
from turbocompile.recipe.presets import VARIANTS
from turbocompile.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from turbocompile.report.report import Report

# torchao logs a note if it is imported under a torch that it was not built for.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")

# Errors that a path given by the user causes. A full disk is not among them, because the user did not cause it.
USER_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV,
)  # fmt: skip

SEED = click.IntRange(0, 2**63 - 1)


class _Group(click.Group):
    """Turns errors that are raised on purpose into one sentence and an exit code; other errors keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VerificationError as error:
            raise _failure(error, 1) from error
        except TurbocompileError as error:
            raise _failure(error, 2) from error
        except OSError as error:
            code = {**dict.fromkeys(USER_ERRNOS, 2), errno.ENOSPC: 1}.get(error.errno or 0)
            if code is None:
                raise
            sentence = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            raise _failure(sentence, code) from error
        except SafetensorError as error:  # safetensors raises it, and no OSError, if a file cannot be written
            raise _failure(error, 1) from error


class _UserError(click.ClickException):
    exit_code = 2


def _failure(error: Exception | str, code: int) -> click.ClickException:
    sentence = " ".join(str(error).split())
    return _UserError(sentence) if code == 2 else click.ClickException(sentence)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="turbocompile")
def main() -> None:
    """Compile diffusion transformers into engines that run fast, verify themselves, and say what was done."""
    with contextlib.suppress(ValueError):  # raised outside the main thread, which alone sets handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup or a caller may have set another handler
                signal.signal(number, _stopped)
    codecs.register_error("turbocompile", _in_its_place)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="turbocompile")


PLAIN = str.maketrans({"µ": "u", "…": "...", "×": "x", "✓": "v"})


def _in_its_place(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that a terminal without Unicode lacks by a letter or a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "replace").decode(), error.end


def _stopped(number: int, frame: object) -> None:
    """Ends the process by an exception, so that half-written folders are removed."""
    sys.exit(128 + number)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The engine's folder; it must not exist yet.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field, as in model.seed=1.")
@click.option(
    "--lora", "loras", multiple=True, metavar="PATH[:WEIGHT]", help="Add an adapter to the weights; several add up."
)
@click.option("--dry-run", is_flag=True, help="Capture, rewrite and plan without reading weights or writing files.")
@_json
def optimize(
    recipe: Path, out: Path | None, overrides: tuple[str, ...], loras: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Build the engine of RECIPE, a YAML file."""
    if out is None and not dry_run:
        raise click.UsageError("name the engine's folder with -o DIR, or add --dry-run")
    _quiet()
    from turbocompile.build.from_recipe import optimize_recipe
    from turbocompile.recipe.schema import load_recipe

    with shown_progress() as progress:
        report = optimize_recipe(load_recipe(recipe, overrides, loras), out, dry_run=dry_run, progress=progress)
    if as_json:
        _print_json(report.to_dict())
    elif dry_run:
        _print(report)
    else:
        _print_summary(report)
        click.echo(f"\nengine: {out} (`turbocompile explain {out}` shows more)")


@main.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder; new or empty.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights; by default SRC's.")
@click.option("--force", is_flag=True, help="Replace a folder that a conversion wrote.")
@_json
def convert(source: Path, out: Path, dtype: str | None, force: bool, as_json: bool) -> None:
    """Write SRC, a Wan transformer in any format, as a folder for diffusers.

    SRC is a file or folder. Quantized weights are dequantized. Of two experts each is converted by itself.
    """
    _quiet()
    from turbocompile.wan.convert import convert as convert_checkpoint

    with shown_progress() as progress:
        done = convert_checkpoint(source, out, dtype, force=force, progress=progress)
    if as_json:
        _print_json(done.to_dict())
        return
    for note in done.notes:
        click.echo(f"Warning: {note}", err=True)
    click.echo(f"folder: {done.folder} ({done.tensors} tensors in {done.dtype}, {done.bytes / 1e9:.2f} GB)")
    if done.dequantized:
        click.echo(f"dequantized: {done.dequantized} weights")
    for name, what in done.beside.items():
        click.echo(f"beside: {name}, {what}")


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
@image_options
@click.option("--seed", type=SEED, default=defaults.SEED, show_default=True, help="Of the first video's noise.")
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default a GPU where there is one.")
def calibrate(recipe: Path, out: Path, overrides: tuple[str, ...], prompts: tuple[str, ...], **options: Any) -> None:
    """Record what the model of RECIPE is called with while it samples.

    A recipe that names the file (calibration: inputs.safetensors) measures its 8-bit linears on these inputs.
    """
    _quiet()
    from turbocompile.recipe.schema import load_recipe
    from turbocompile.video.record import record_inputs

    _check_device(options["device"])
    with shown_progress() as progress:
        done = record_inputs(load_recipe(recipe, overrides), out, prompts, progress=progress, **options)
    click.echo(f"inputs: {out} ({len(done.chosen())} of {done.seen} calls; name it as `calibration` in the recipe)")


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
@image_options
@click.option("--lora", multiple=True, metavar="PATH[:WEIGHT]", help="An adapter for this video; several add up.")
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default what the engine was built for.")
@click.option("--vram", metavar="SIZE", help="Memory of the GPU to keep to, as in 12GB, 12GiB or auto (what is free).")
@_json
def run(
    engine: Path,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    as_json: bool,
    lora: tuple[str, ...],
    **options: Any,
) -> None:
    """Make a video with ENGINE, a folder that `turbocompile optimize` wrote."""
    _quiet()
    from turbocompile.video.session import generate_all

    _check_device(options["device"])
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
        _print_json(made[0] if len(made) == 1 else {"calls": made})


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
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--after", metavar="PASS", help="Print the graph as it was after a pass (or normalize).")
@click.option("--module", default=defaults.MODULE, show_default=True, help="Which module's graph --after prints.")
@click.option("--gpu", help="The card of the estimates, as in h100, rtx5090, rtx4090, a100.")
@click.option("--html", type=click.Path(path_type=Path), help="Write all of it as one page.")
@_json
def explain(engine: Path, after: str | None, module: str, gpu: str | None, html: Path | None, as_json: bool) -> None:
    """Show what was done to ENGINE, why not more, what it costs, and its graphs."""
    _quiet()
    given = [o for o, v in (("--after", after), ("--html", html), ("--json", as_json or None)) if v is not None]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} are different outputs; ask for one at a time")
    if after is not None:
        from turbocompile.tools.explain import read_graph_text

        click.echo(read_graph_text(engine, module, after), nl=False)
        return
    from turbocompile.tools.explain import read_graph_views, read_records, read_report

    report = read_report(engine)
    if gpu is not None:
        report.gpu(gpu)  # an unknown card is refused before anything is printed
    if html is not None:
        from turbocompile.files import check_file, replacing
        from turbocompile.report.page import page

        check_file(html)
        text = page(report, read_graph_views(engine), read_records(engine), gpu)
        with replacing(html) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(f"page: {html}")
    elif as_json:
        more = {"gpu": report.gpu(gpu).key, "roofline": report.roofline(gpu)} if gpu is not None else {}
        measured = {module: record.to_dict() for module, record in read_records(engine).items()}
        _print_json({**report.to_dict(), **more, **({"measured": measured} if measured else {})})
    else:
        _print(report.render(gpu))
        for found in read_records(engine).values():
            _print(found)


@main.command()
@click.argument("engine", metavar="ENGINE|RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--shape", help="One of the engine's shapes, as in 480x832x81x1; the first by default.")
@click.option("--module", default=defaults.MODULE, show_default=True, help="Which of the engine's modules.")
@click.option(
    "--calls",
    type=click.IntRange(min=1),
    default=defaults.BENCH_CALLS,
    show_default=True,
    help="How many forwards are timed.",
)
@click.option("--device", help="Where to run, as in cpu or cuda:1; by default what the engine was built for.")
@click.option("--vram", metavar="SIZE", help="Memory of the GPU to keep to, as in 12GB, 12GiB or auto (what is free).")
@_json
def bench(engine: Path, overrides: tuple[str, ...], device: str | None, as_json: bool, **options: Any) -> None:
    """Time a forward of ENGINE, and each of its operations.

    The engine of a recipe is built in a temporary folder.
    """
    _quiet()
    from turbocompile.tools.bench import bench_path

    _check_device(device)
    with shown_progress() as progress:
        found, record = bench_path(engine, overrides, device=device, progress=progress, **options)
    if as_json:
        _print_json(found.to_dict())
    else:
        _print(found)
        if record is not None:
            click.echo(f"record: {record} (`turbocompile explain` shows it)")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True, help="The GPU to measure on, as in cuda:1.")
@_json
def tune(engine: Path, device: str, as_json: bool) -> None:
    """Choose the fastest kernels of ENGINE's linears on this GPU.

    Later runs on this machine use them. A build on the card that it is for has done it already.
    """
    _quiet()
    from turbocompile.runtime.engine import load
    from turbocompile.tools.tune import tune_engine

    _check_device(device)
    with shown_progress() as progress:
        found, path = tune_engine(load(engine, device=device), progress)
    if as_json:
        _print_json(found)
    else:
        for kind, choices in found.items():
            for size, config in choices.items():
                click.echo(f"{kind}, {size}: {', '.join(f'{k} {v}' for k, v in config.items() if v is not None)}")
        if path is not None:
            click.echo(f"kept: {path}")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--numeric", is_flag=True, help="Compare with the source model too.")
@_json
@click.pass_context
def verify(ctx: click.Context, engine: Path, numeric: bool, as_json: bool) -> None:
    """Check that ENGINE is whole; exit code 1 where its numbers are off."""
    _quiet()
    from turbocompile.tools.verify_folder import verify_folder

    found = verify_folder(engine, numeric)
    if as_json:
        _print_json(found.to_dict())
    else:
        click.echo(f"{engine}: {found.files} files, {found.bytes / 1e6:.1f} MB, all as they were built")
        for name, error in found.errors.items():
            limit = f", at most {found.limit:g} is right" if found.limit is not None else ""
            click.echo(
                f"{name} against its source model: cosine {error.cosine:.6f}, relative L1 {error.rel_l1:.2g}, "
                f"largest difference {error.max_rel:.2g} of the largest value{limit}"
            )
    ctx.exit(0 if found.good else 1)


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
@_json
def evaluate(engine: Path, sheet: Path | None, as_json: bool, **options: Any) -> None:
    """Judge the videos of ENGINE, a model of moving digits, against their prompts."""
    _quiet()
    from turbocompile.wan_mini.evaluate import check_sheet, write_sheet
    from turbocompile.wan_mini.evaluate import evaluate as evaluate_engine

    _check_device(options["device"])
    if sheet is not None:
        check_sheet(sheet)
    with shown_progress() as progress:
        found = evaluate_engine(engine, progress=progress, **options)
    if as_json:
        _print_json(found.to_dict())
    else:
        _print(found)
    if sheet is not None:  # last, so that an error here does not lose a result that may have taken hours
        write_sheet(found, sheet)
        click.echo(f"sheet: {sheet}", err=as_json)


@main.command()
@_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can run, and what is missing for what."""
    _quiet()
    from turbocompile.tools.doctor import collect

    found = collect()
    if as_json:
        _print_json(found.to_dict())
    else:
        _print(found)
    ctx.exit(0 if found.healthy else 1)


@main.command("init-example")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--variant", type=click.Choice(tuple(VARIANTS)), default=defaults.EXAMPLE_VARIANT, show_default=True)
@click.option("--head-dim", type=click.Choice(["64", "128"]), default=str(defaults.EXAMPLE_HEAD_DIM), show_default=True)
@click.option("--seed", type=SEED, default=defaults.SEED, show_default=True, help="Of the random weights.")
def init_example(folder: Path, variant: str, head_dim: str, seed: int) -> None:
    """Write a tiny Wan pipeline with random weights, and its recipe, into FOLDER."""
    _quiet()
    from turbocompile.wan.example import write_example

    recipe = write_example(folder, variant, int(head_dim), seed)
    click.echo(f"recipe: {recipe} (`turbocompile optimize {recipe} -o engine/` builds it)")


# ------------------------------------------------------------------------------------------------------ reading folders


def _check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"there is no device {device!r} here ({str(error).splitlines()[0]})") from error
    if kind not in ("cpu", "cuda"):  # "meta" computes nothing, and would be timed
        raise UnsupportedError(f"engines run on cpu, cuda, cuda:1 and so on, not {device!r}")


# -------------------------------------------------------------------------------------------------------------- output


def _print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _print(value: RenderableType) -> None:
    """Prints to stdout; if stdout is no terminal, tables are 160 characters wide."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    console.print(value)


def _print_summary(report: Report) -> None:
    """One line a pass: how many of its sites were rewritten."""
    for name, done in report.passes.items():
        click.echo(f"{name}: {done.rewritten} of {done.sites} sites rewritten")
    click.echo("seconds: " + ", ".join(f"{stage} {s:.2f}" for stage, s in report.stages.items()))
    for sentence in report.warnings:
        click.echo(f"Warning: {sentence}", err=True)


def _quiet() -> None:
    """Hides other libraries' notes and warnings; each warning of turbocompile becomes one line."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"turbocompile(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
