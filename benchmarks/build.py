"""Times a plan, a build and a load on this machine's processor.

    python benchmarks/build.py [--plan examples/wan21.yaml] [--set model.weights=synthetic]
    python benchmarks/build.py --gpu

Each runs in a process of its own, as a user starts it, and from empty caches (Triton's and turbocompile's). The table
shows processor seconds first, because other processes change them less than wall seconds. The build is that of a
two-layer Wan at a tiny size; the plan is the recipe's `--dry-run`. With --gpu it builds for this machine's card:
the recipe, and small DiTs of two blocks in bfloat16, by `optimize` without options.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

MEASURED = """
import json, resource, sys, time
from pathlib import Path
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.runtime.engine import load
from turbocompile.recipe.schema import Recipe, load_recipe
kind, argument, settings, out = json.loads(sys.stdin.read())
started = time.perf_counter()
if kind == "load":
    load(argument)
elif kind == "dit":
    import torch
    import turbocompile
    from custom_dit import CustomDiT
    torch.manual_seed(0)
    model = CustomDiT(**argument).to("cuda", torch.bfloat16).eval()
    call = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((2, 256, 16), (2,))]
    torch.cuda.synchronize()
    started = time.perf_counter()
    turbocompile.optimize(model, tuple(call))
else:
    made = Recipe.from_dict(argument) if isinstance(argument, dict) else load_recipe(argument, settings)
    optimize_recipe(made, out and Path(out), dry_run=kind == "plan")
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1e6]))
"""
EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "model": {"preset": "wan-tiny", "weights": "synthetic"},
    "components": "none",
    "shapes": [{"height": 64, "width": 64, "num_frames": 5}],
    "target": "cpu",
}


def measured(kind: str, argument: object, settings: list[str], out: str | None = None) -> list[float]:
    """Runs a plan, a build or a load in a process of its own, with empty caches.

    Returns its processor seconds, its wall seconds without imports, and its peak memory in GB.
    """
    given = json.dumps([kind, argument, settings, out])
    with tempfile.TemporaryDirectory() as empty:
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "XDG_CACHE_HOME": f"{empty}/cache", "PYTHONPATH": path}
        command, env = [sys.executable, "-c", MEASURED], os.environ | caches
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.strip().splitlines()[-1])


def on_gpu(plan: str, repeats: int, folder: str) -> dict[str, list[list[float]]]:
    """Measures builds for this machine's card: name -> the results of `measured`."""
    rows = {}
    for dim in (64, 96):
        sizes = {"dim": dim, "num_heads": dim // 32, "depth": 2}
        rows[f"optimize of a DiT of {dim} channels"] = [measured("dit", sizes, []) for _ in range(repeats)]
    given = ["model.weights=synthetic", "target=host", "components=none"]
    rows[f"build of {plan}"] = [measured("build", plan, given, str(Path(folder) / "engine"))]
    return rows


def on_cpu(plan: str, settings: list[str], repeats: int, folder: str) -> dict[str, list[list[float]]]:
    """Measures a plan, a build and a load, which need no card: name -> the results of `measured`."""
    engines = [str(Path(folder) / f"engine-{i}") for i in range(repeats)]
    return {
        f"plan of {plan}": [measured("plan", plan, settings) for _ in range(repeats)],
        "build of wan-tiny": [measured("build", TINY, [], engine) for engine in engines],
        "load of it": [measured("load", engines[0], []) for _ in range(repeats)],
    }


@click.command()
@click.option("--plan", default="examples/wan21.yaml", show_default=True, help="the recipe whose plan is timed")
@click.option("--set", "settings", multiple=True, default=["model.weights=synthetic", "target=sm90"], show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--gpu", is_flag=True, help="time builds for this machine's card instead")
def main(plan: str, settings: tuple[str, ...], repeats: int, gpu: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = on_gpu(plan, repeats, folder) if gpu else on_cpu(plan, list(settings), repeats, folder)
    print("| what | processor s | wall s without imports | peak GB |\n| --- | --- | --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(v):.2f}" for v in zip(*values, strict=True)) + " |")


if __name__ == "__main__":
    main()
