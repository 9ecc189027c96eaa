"""Trains the classifier of the digits' judge, which turbocompile ships as turbocompile/digits/judge.safetensors.

    python examples/train_judge.py -o judge.safetensors

It takes some three minutes on one core, and writes the same bytes on one kind of CPU. At the end it says how many of
the held-back writers' scans the classifier reads, each drawn in the middle of a frame; it was trained on none of them.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbocompile.wan_mini import world
from turbocompile.wan_mini.diversity import draw_glyphs
from turbocompile.wan_mini.train_judge import train_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("judge.safetensors"))
    parser.add_argument("--steps", type=int, default=1500, help="of each of the two networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    classifier = train_classifier(world.load_scans(train=True), arguments.steps, progress=show)
    save_file(classifier.state_dict(), arguments.out)
    scans = world.load_scans(train=False)
    found = classifier(draw_glyphs(scans.images)[:, None]).argmax(1)
    right = int((found == scans.labels).sum())
    print(f"{arguments.out}: {right} of {len(found)} held-back scans are right ({100 * right / len(found):.2f} %)")


def show(fraction: float) -> None:
    """A live line in a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\rtraining {fraction:4.0%}", end="\n" if fraction == 1.0 else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
