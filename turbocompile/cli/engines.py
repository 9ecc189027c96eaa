"""Commands that look at engines and at this machine: explain, bench, tune, verify, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turbocompile import defaults
from turbocompile.cli.group import (
    check_device,
    json_option,
    main,
    print_json,
    print_rich,
    quiet,
)
from turbocompile.progress import shown_progress


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--after", metavar="PASS", help="Print the graph as it was after a pass (or normalize).")
@click.option("--module", default=defaults.MODULE, show_default=True, help="Which module's graph --after prints.")
@click.option("--gpu", help="The card of the estimates, as in h100, rtx5090, rtx4090, a100.")
@click.option("--html", type=click.Path(path_type=Path), help="Write all of it as one page.")
@json_option
def explain(engine: Path, after: str | None, module: str, gpu: str | None, html: Path | None, as_json: bool) -> None:
    """Show what was done to ENGINE, why not more, what it costs, and its graphs."""
    quiet()
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
        print_json({**report.to_dict(), **more, **({"measured": measured} if measured else {})})
    else:
        print_rich(report.render(gpu))
        for found in read_records(engine).values():
            print_rich(found)


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
@json_option
def bench(engine: Path, overrides: tuple[str, ...], device: str | None, as_json: bool, **options: Any) -> None:
    """Time a forward of ENGINE, and each of its operations.

    The engine of a recipe is built in a temporary folder.
    """
    quiet()
    from turbocompile.tools.bench import bench_path

    check_device(device)
    with shown_progress() as progress:
        found, record = bench_path(engine, overrides, device=device, progress=progress, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        print_rich(found)
        if record is not None:
            click.echo(f"record: {record} (`turbocompile explain` shows it)")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True, help="The GPU to measure on, as in cuda:1.")
@json_option
def tune(engine: Path, device: str, as_json: bool) -> None:
    """Choose the fastest kernels of ENGINE's linears on this GPU.

    Later runs on this machine use them. A build on the card that it is for has done it already.
    """
    quiet()
    from turbocompile.runtime.engine import load
    from turbocompile.tools.tune import tune_engine

    check_device(device)
    with shown_progress() as progress:
        found, path = tune_engine(load(engine, device=device), progress)
    if as_json:
        print_json(found)
    else:
        for kind, choices in found.items():
            for size, config in choices.items():
                click.echo(f"{kind}, {size}: {', '.join(f'{k} {v}' for k, v in config.items() if v is not None)}")
        if path is not None:
            click.echo(f"kept: {path}")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--numeric", is_flag=True, help="Compare with the source model too.")
@json_option
@click.pass_context
def verify(ctx: click.Context, engine: Path, numeric: bool, as_json: bool) -> None:
    """Check that ENGINE is whole; exit code 1 where its numbers are off."""
    quiet()
    from turbocompile.tools.verify_folder import verify_folder

    found = verify_folder(engine, numeric)
    if as_json:
        print_json(found.to_dict())
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
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can run, and what is missing for what."""
    quiet()
    from turbocompile.tools.doctor import collect

    found = collect()
    if as_json:
        print_json(found.to_dict())
    else:
        print_rich(found)
    ctx.exit(0 if found.healthy else 1)
