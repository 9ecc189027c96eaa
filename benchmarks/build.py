"""Times a plan, a build and a load on this machine's processor.

    python benchmarks/build.py [--plan examples/wan21.yaml] [--set model.weights=synthetic]

Each runs in a process of its own, as a user starts it. The output names processor seconds first, because other
processes change them less than wall seconds. The build is that of a two-layer Wan at a tiny size; the plan is the
recipe's `--dry-run`.
"""

from __future__ import annotations

import json
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
else:
    made = Recipe.from_dict(argument) if isinstance(argument, dict) else load_recipe(argument, settings)
    optimize_recipe(made, out and Path(out), dry_run=kind == "plan")
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1e6]))
"""
TINY = {
    "model": {"preset": "wan-tiny", "weights": "synthetic"},
    "components": "none",
    "shapes": [{"height": 64, "width": 64, "num_frames": 5}],
    "target": "cpu",
}


def measured(kind: str, argument: object, settings: list[str], out: str | None = None) -> list[float]:
    """Runs code in a process: its processor seconds, its wall seconds without imports, its peak memory in GB."""
    given = json.dumps([kind, argument, settings, out])
    done = subprocess.run([sys.executable, "-c", MEASURED], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@click.command()
@click.option("--plan", default="examples/wan21.yaml", show_default=True, help="the recipe whose plan is timed")
@click.option("--set", "settings", multiple=True, default=["model.weights=synthetic", "target=sm90"], show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(plan: str, settings: tuple[str, ...], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = str(Path(folder) / "engine-0")
        rows = {
            f"plan of {plan}": [measured("plan", plan, list(settings)) for _ in range(repeats)],
            "build of wan-tiny": [
                measured("build", TINY, [], str(Path(folder) / f"engine-{i}")) for i in range(repeats)
            ],
            "load of it": [measured("load", engine, []) for _ in range(repeats)],
        }
    print("| what | processor s | wall s without imports | peak GB |\n| --- | --- | --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(v):.2f}" for v in zip(*values, strict=True)) + " |")


if __name__ == "__main__":
    main()
