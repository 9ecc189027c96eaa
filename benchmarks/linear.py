"""Times 8-bit linears on one GPU beside bf16 F.linear, at the shapes of Wan: all formats, configurations and libraries.

    python benchmarks/linear.py [--out FOLDER] [--shapes 1536-8960 ...] [--formats fp8 ...] [--rows 32760] [--settle 80]
                                [--turbodiffusion]

Activations are N(0, 1), weights N(0, 1/K), there is a bias, and results are bf16. A call starts from 8-bit data, or, if
it is named "from bf16", quantizes the activations first. Times are milliseconds of a call in a CUDA graph, as the
median over three turns over the variants, so that a drift of the card affects all variants alike. Each variant runs for
--settle milliseconds before it is timed, because a card at its power limit lowers its clock after some milliseconds,
and a model's step lasts longer than that. Calls read and write at least 150 MB, three times the L2 of an H100. A
variant that the card or the library refuses is named, and left out. --turbodiffusion also times that project's
Int8Linear (blocks of 128 x 128, its own quantization), which must be importable. FOLDER gets linear.json and linear.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import replayed, versions
from turbocompile.kernels import ops
from turbocompile.kernels.linear.linear_triton import (
    CONFIGS,
    LinearConfig,
    candidates,
    configs,
    default_config,
    launch_linear,
)
from turbocompile.kernels.quantize.quantize import quantize

BF16 = torch.bfloat16
BASELINE = "bf16 F.linear"
QUANTIZATION, SUMS, PEER = "quantization alone", "_int_mm alone", "TurboDiffusion Int8Linear"
SHORT = "fp8, short sums"  # the configurations whose sums the tensor cores cut short; see linear_triton.py
ROWS = 32760  # tokens of 81 frames of 832 x 480
SPAN = 30.0  # milliseconds of a turn that are timed
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One linear of a model."""

    k: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.k}-{self.n}"


SHAPES = (
    Shape(1536, 1536),
    Shape(1536, 8960),
    Shape(8960, 1536),
    Shape(5120, 5120),
    Shape(5120, 13824),
    Shape(13824, 5120),
)


@dataclass(frozen=True)
class Result:
    """The median time of a call at a shape."""

    shape: str
    format: str
    call: str
    whole: bool  # whether the call includes quantization of the activation
    milliseconds: float
    fastest: float
    slowest: float
    tflops: float
    against: float  # the time of bf16 F.linear divided by this call's time
    error: float  # relative L2 error against the result of bf16 F.linear, which reveals a wrong kernel


@dataclass(frozen=True)
class Variant:
    """A call and its description."""

    format: str
    name: str
    whole: bool
    call: Call


def described(config: LinearConfig) -> str:
    """The configuration in short: its tile, and the fields that differ from the defaults."""
    if config.path == "library":
        return "_scaled_mm" if config.promote else "_scaled_mm promote=False"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.warps} s{config.stages}"
    rest = [
        f.name if getattr(config, f.name) is True else f"{f.name}={getattr(config, f.name)}"
        for f in fields(config)
        if f.name not in ("path", "block_m", "block_n", "block_k", "warps", "stages")
        and getattr(config, f.name) != f.default
    ]
    return " ".join([f"Triton {config.path} {tile}", *rest])


def quantized(call: Callable[..., torch.Tensor], x: torch.Tensor, tail: tuple[Any, ...]) -> torch.Tensor:
    """The 8-bit linear of x, which is first quantized to the format that `tail` names."""
    return call(*ops.quantize(x, tail[3]), *tail)


def codes(x: torch.Tensor, format: str) -> torch.Tensor:
    """x, quantized to the format, without its scale."""
    return ops.quantize(x, format)[0]


def peer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> Call:
    """TurboDiffusion's linear of the same weights, with its quantization of x."""
    from turbodiffusion.ops import Int8Linear

    linear = torch.nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=w.dtype)
    with torch.no_grad():
        linear.weight.copy_(w)
        linear.bias.copy_(bias)
    return partial(Int8Linear.from_linear(linear).to(w.device), x)


def variants(shape: Shape, rows: int, formats: list[str], turbodiffusion: bool) -> list[Variant]:
    """The calls at a shape; the first is the baseline."""
    torch.compiler.reset()  # because torch compiles a function for eight shapes, and runs it uncompiled for others
    x = torch.randn(rows, shape.k, device="cuda", dtype=BF16)
    w = (torch.randn(shape.n, shape.k, device="cuda") * shape.k**-0.5).to(BF16)
    bias = torch.randn(shape.n, device="cuda", dtype=BF16)
    found = [Variant("bf16", BASELINE, True, partial(F.linear, x, w, bias))]
    if turbodiffusion:
        found.append(Variant("int8_block", PEER, True, peer(x, w, bias)))
    for format in (f for f in formats if configs(f, x.device)):
        data, weight = quantize(x, format), quantize(w, format)
        tail = (*weight, bias, format, BF16)
        best = default_config(format, rows, shape.n, shape.k, x.device)
        calls: dict[str, Callable[..., torch.Tensor]] = {
            described(c) + (" (default)" if c == best else ""): partial(launch_linear, config=c)
            for c in candidates(format, shape.n, shape.k, BF16, x.device)
        }
        if format == "int8":  # the library computes only the int32 sums, which are a part of a linear
            found.append(Variant(format, SUMS, False, partial(torch._int_mm, data[0], weight[0].t())))
        for name, call in calls.items():
            label = SHORT if "promote=False" in name else format
            found.append(Variant(label, name, False, partial(call, *data, *tail)))
            if "default" in name:
                found.append(Variant(label, name, True, partial(quantized, call, x, tail)))
        found.append(Variant(format, QUANTIZATION, True, partial(codes, x, format)))
    return found


def errors(found: list[Variant]) -> tuple[list[Variant], list[float], list[str]]:
    """The variants that run, with their errors against the first variant's result, and why the others were refused."""
    expected = found[0].call().float()
    kept: list[Variant] = []
    distances: list[float] = []
    refused: list[str] = []
    for v in found:
        try:
            y = v.call()
            torch.cuda.synchronize()
        except Exception as e:  # of any kind, because a compiler, a library or a launch may refuse
            refused.append(f"{v.format}, {v.name}: {type(e).__name__}: {str(e).splitlines()[0][:200]}")
            continue
        linear = y.shape == expected.shape and y.dtype == BF16
        kept.append(v)
        distances.append(((y.float() - expected).norm() / expected.norm()).item() if linear else float("nan"))
        del y
    return kept, distances, refused


def measure(
    shape: Shape, rows: int, formats: list[str], settle: float, turbodiffusion: bool
) -> tuple[list[Result], list[str]]:
    """The results of the variants at a shape, and the refused variants with the reasons."""
    kept, distances, refused = errors(variants(shape, rows, formats, turbodiffusion))
    times = list(replayed({i: [v.call] for i, v in enumerate(kept)}, settle, SPAN).values())
    base = statistics.median(times[0])
    flops = 2 * rows * shape.k * shape.n
    results = []
    for v, error, t in zip(kept, distances, times, strict=True):
        median = statistics.median(t)
        rate = 0.0 if v.name == QUANTIZATION else flops / median / 1e9
        results.append(
            Result(shape.name, v.format, v.name, v.whole, median, min(t), max(t), rate, base / median, error)
        )
    return results, [f"{shape.name}, {line}" for line in refused]


def table(results: list[Result]) -> str:
    """The results as a table in Markdown, with a line for each result."""
    lines = [
        "| K-N | format | call | from | ms (fastest - slowest) | TFLOP/s | bf16's time over it | rel. L2 to bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        spread = f"{r.milliseconds:.3f} ({r.fastest:.3f} - {r.slowest:.3f})"
        start = "bf16" if r.whole else "8 bits"
        cells = [r.shape, r.format, r.call, start, spread, f"{r.tflops:.0f}", f"{r.against:.2f}", f"{r.error:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best(results: list[Result]) -> str:
    """A table in Markdown: for each shape and format the fastest kernel of turbocompile and the fastest of the library.

    The times do not include quantization.
    """
    lines = ["| K-N | format | ours | ms | over bf16 | library | ms | over bf16 |", "| --- " * 8 + "|"]
    groups = dict.fromkeys((r.shape, r.format) for r in results if r.call != BASELINE)
    for shape, format in groups:
        cells = [shape, format]
        for ours in (True, False):
            own = [
                r for r in results
                if (r.shape, r.format, r.whole) == (shape, format, False) and r.call.startswith("Triton") == ours
                and r.call != SUMS
            ]  # fmt: skip
            fastest = min(own, key=lambda r: r.milliseconds, default=None)
            cells += (
                [fastest.call, f"{fastest.milliseconds:.3f}", f"{fastest.against:.2f}"] if fastest else ["", "", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for linear.json and linear.md")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--formats", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the activation")
    parser.add_argument(
        "--settle", type=float, default=80.0, help="milliseconds that a variant runs before it is timed"
    )
    parser.add_argument("--turbodiffusion", action="store_true", help="its Int8Linear, installed here, competes too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: list[Result] = []
    refused: list[str] = []
    about = versions() | {"rows": str(arguments.rows)}
    for shape in (s for s in SHAPES if s.name in arguments.shapes):
        own, lines = measure(shape, arguments.rows, arguments.formats, arguments.settle, arguments.turbodiffusion)
        results += own
        refused += lines
        print(table(own), flush=True)
        if arguments.out:  # after every shape, so that a run that is cut short leaves the results so far
            save(arguments.out, about, results, refused)
    print(best(results), *refused, sep="\n")


def save(folder: Path, about: dict[str, str], results: list[Result], refused: list[str]) -> None:
    """Writes linear.json and linear.md."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "results": [asdict(r) for r in results], "refused": refused}
    (folder / "linear.json").write_text(json.dumps(document, indent=1) + "\n")
    heading = ", ".join(f"{k} {v}" for k, v in about.items())
    parts = [heading, best(results), table(results), "\n".join(f"- {line}" for line in refused)]
    (folder / "linear.md").write_text("\n\n".join(p for p in parts if p) + "\n")


if __name__ == "__main__":
    main()
