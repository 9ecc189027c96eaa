"""Makes a video with an engine, and says what the engine is made of.

    turbocompile optimize examples/wan-mini.yaml -o engine/
    python examples/run_engine.py engine/ --prompt "a red seven moves left and bounces" -o out.mp4

`turbocompile run` does the same with more options; this file shows the API.
"""

import argparse
import sys

import turbocompile
from turbocompile.video.session import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="a folder that `turbocompile optimize` wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("-o", "--out", default="out.mp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    try:
        engine = turbocompile.load(arguments.engine)  # called like the transformer that it was made from
        result = generate(
            engine, arguments.prompt, seed=arguments.seed, steps=arguments.steps, out=arguments.out, progress=show
        )
    except turbocompile.TurbocompileError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)

    print("rewritten:")
    for name, done in engine.report.passes.items():
        print(f"  {name:14} {done.rewritten:4} of {done.sites} sites")
    print("seconds:")
    for stage, seconds in (engine.report.stages | result.timings).items():
        where = "run" if stage in result.timings else "build"
        print(f"  {stage:14} {seconds:7.2f}  ({where})")
    frames, height, width = result.video.shape[1:4]
    print(f"video: {result.path} ({frames} frames of {width} x {height})")


def show(stage: str, fraction: float) -> None:
    if fraction < 1.0:
        print(f"{stage} {fraction:.0%}", file=sys.stderr)


if __name__ == "__main__":
    main()
