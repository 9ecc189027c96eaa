"""Times the memory-bound ops on one GPU: each Triton kernel beside plain torch, torch.compile and a copy.

    python benchmarks/norms.py [--out FOLDER] [--shapes 1.3B-480p ...] [--beside torch compiled] [--sweep]

Inputs are bf16, N(0, 1), (1, L, C); modulations are float32, as Wan computes them. Times are milliseconds of a call in
a CUDA graph of several calls, as the median over three turns over the variants, so that a drift of the card affects all
variants alike. The calls alternate between two sets of tensors of at least 150 MB, three times the L2 of an H100.

"of the copy" is a variant's rate divided by the rate of `copy_` of x, measured in the same turns. A rate is the bytes
that the op has to move (each input read once, each output written once), divided by the time. A kernel that reads an
input twice therefore stays below 100%. The keys of a quantized attention need an additional small launch over some of
their tokens and the rotary's tables: "kernel" is the time without this launch, "kernel and tables" the time with it.
"torch" is the code that a model would contain, in bf16 (for quantizing ops, followed by the reference of the
quantization; for qk_norm_rope, F.rms_norm alone). "compiled" is torch.compile of the op's reference, which takes
minutes. --sweep times other launch configurations, too. FOLDER gets norms.json and norms.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import replayed, versions
from turbocompile.kernels._rows import RowConfig
from turbocompile.kernels.attention import keys_triton
from turbocompile.kernels.attention import prepare_triton as preparing
from turbocompile.kernels.attention.keys_tables_triton import KeysConfig, lay_out
from turbocompile.kernels.attention.sage_attention import e4m3, quantize_rows
from turbocompile.kernels.norms import adaln, norm_quantize, residual_norm
from turbocompile.kernels.norms import norms_triton as norms
from turbocompile.kernels.norms.norms_triton import BlockConfig
from turbocompile.kernels.quantize import gelu_quantize, quantize
from turbocompile.kernels.quantize import quantize_triton as quantizing
from turbocompile.kernels.rotary import qk_norm_rope
from turbocompile.kernels.rotary.rotary_triton import launch_qk_norm_rope

EPS = 1e-6
HEAD_DIM = 128
BF16 = 2  # bytes of an element
BLOCK_K = 128  # how many keys share a scale
BESIDE = ("torch", "compiled")
SETS = 2  # how many sets of tensors the calls alternate between
SWEEP = tuple(
    RowConfig(warps, rows, registers, near)
    for warps, registers, near in (
        (1, 128, 8), (1, 128, 4), (2, 128, 8), (4, 128, 8), (4, 128, 4), (4, 96, 8), (8, 128, 8), (16, 64, 8),
    )
    for rows in (8, 16)
)  # fmt: skip

BLOCK_SWEEP = (  # two programs a multiprocessor, or three with 80 registers
    *(BlockConfig(16, 48, 64, lag) for lag in (2, 3, 4, 5, 7)),
    *(BlockConfig(8, 48, 128, lag) for lag in (2, 3, 4, 5)),
    *(BlockConfig(16, 24, 64, lag) for lag in (3, 4)),
    *(BlockConfig(8, 24, 80, lag) for lag in (3, 4)),
)

KEYS_SWEEP = (
    *(KeysConfig(8, 48, 80, lag) for lag in (3, 4, 5, 7)),
    *(KeysConfig(8, 24, 80, lag) for lag in (3, 5)),
    *(KeysConfig(16, 48, 64, lag) for lag in (2.5, 3, 4)),
)

TILE_SWEEP = tuple(
    RowConfig(warps, 128, registers)
    for warps, registers in ((4, 128), (4, 168), (8, 64), (8, 80), (8, 96), (8, 128), (16, 40), (16, 48), (16, 64))
)

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """The activations of one model."""

    name: str
    grid: tuple[int, int, int]
    dim: int
    ffn: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


SHAPES = (
    Shape("1.3B-480p", (21, 30, 52), 1536, 8960),
    Shape("14B-480p", (21, 30, 52), 5120, 13824),
    Shape("14B-720p", (21, 45, 80), 5120, 13824),
)


@dataclass(frozen=True)
class Case:
    """An op at a shape."""

    name: str
    bytes: int  # bytes that the op has to read and write for each element of x
    elements: int
    kernel: Callable[..., object]  # a function of a launch configuration, or of no argument
    torch: Call
    reference: Callable[..., object]
    args: tuple[object, ...]
    before: Call | None = None  # the part of the kernel's call that another launch does before


@dataclass(frozen=True)
class Result:
    """The median time of a variant."""

    shape: str
    op: str
    variant: str
    milliseconds: float
    fastest: float
    slowest: float
    of_the_copy: float


def cases(shape: Shape) -> list[Case]:
    """The ops of a block, on tensors that they share."""
    c, tokens = shape.dim, shape.tokens
    x, y = (torch.randn(1, tokens, c, device="cuda").bfloat16() for _ in "xy")
    gate, scale, shift = (torch.randn(1, 1, c, device="cuda") for _ in range(3))
    g16, s16, h16 = (t.bfloat16() for t in (gate, scale, shift))
    weight = torch.randn(c, device="cuda").bfloat16()
    widths = (HEAD_DIM // 2 - 2 * (HEAD_DIM // 6), HEAD_DIM // 6, HEAD_DIM // 6)
    angle = [torch.rand(n, d, device="cuda") for n, d in zip(shape.grid, widths, strict=True)]
    cos, sin = [a.cos() for a in angle], [a.sin() for a in angle]
    heads = c // HEAD_DIM
    wide = torch.randn(1, tokens, shape.ffn, device="cuda").bfloat16()

    def layer(r: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(r, (c,), eps=EPS) * (1 + s16) + h16

    plain: dict[str, Callable[[], torch.Tensor]] = {
        "adaln": lambda: layer(x),
        "sum": lambda: x + g16 * y,
        "residual_norm": lambda: layer(x + g16 * y),
        "norm": lambda: F.rms_norm(x, (c,), weight, EPS),
        "quantize": lambda: x,
        "tanh": lambda: F.gelu(wide, approximate="tanh"),
        "erf": lambda: F.gelu(wide),
    }

    def then(name: str, format: str) -> Call:
        return lambda: quantize.reference(plain[name](), format)

    modulated = (x, scale, shift, None, None, EPS)
    summed = (x, y, gate, scale, shift, None, None, EPS, "layer")
    rms = (x, weight, None, EPS, "rms")
    turned = (x, weight, EPS, False, heads, cos, sin, list(shape.grid), True)

    def case(name: str, moved: int, launch: Callable[..., object], torch_: Call, reference: Callable[..., object],
             *args: object) -> Case:  # fmt: skip
        elements = (wide if wide is args[0] else x).numel()  # of Sage's passes the elements of k; v has as many
        return Case(name, moved, elements, partial(launch, *args), torch_, reference, args)

    found = [
        case("adaln", 2 * BF16, norms.launch_adaln, plain["adaln"], adaln.reference, *modulated),
        case("gated_residual", 3 * BF16, norms.launch_gated_residual, plain["sum"], residual_norm.gated, x, y, gate),
        case("residual_norm", 4 * BF16, norms.launch_residual_norm, plain["residual_norm"], residual_norm.reference,
             *summed),
        case("qk_norm_rope", 2 * BF16, launch_qk_norm_rope, plain["norm"], qk_norm_rope.reference, *turned),
        case("gelu_quantize fp8, erf", BF16 + 1, quantizing.launch_gelu_quantize, then("erf", "fp8"),
             gelu_quantize.reference, wide, "none", "fp8"),
    ]  # fmt: skip
    for f in ("fp8", "int8", "int8_block"):
        found += [
            case(f"adaln_quantize {f}", BF16 + 1, norms.launch_adaln_quantize, then("adaln", f),
                 adaln.reference_quantize, *modulated, f),
            case(f"residual_norm_quantize {f}", 3 * BF16 + 1, norms.launch_residual_norm_quantize,
                 then("residual_norm", f), residual_norm.reference_quantize, *summed, f),
            case(f"norm_quantize {f}", BF16 + 1, norms.launch_norm_quantize, then("norm", f), norm_quantize.reference,
                 *rms, f),
            case(f"quantize {f}", BF16 + 1, quantizing.launch_quantize, then("quantize", f), quantize.reference, x, f),
            case(f"gelu_quantize {f}", BF16 + 1, quantizing.launch_gelu_quantize, then("tanh", f),
                 gelu_quantize.reference, wide, "tanh", f),
        ]  # fmt: skip
    k, v = (t.unflatten(-1, (heads, HEAD_DIM)) for t in (x, y))
    k_mean, v_scale = k.float().mean(1)[0], v.float().abs().amax(1)[0] / 448
    blocks = (k, v, k_mean, v_scale, BLOCK_K)
    for name, pool in (("sage's blocks", False), ("sla's blocks", True)):
        launch = partial(preparing.quantize_blocks, pv="fp8", permute=True, pool=pool)
        found.append(case(name, 2 * BF16 + 2, launch, partial(blocked, *blocks), blocked, *blocks))
    for name, kept in (("keys", False), ("keys, k and block means", True)):
        launch = partial(keys_of, kept, *turned)
        plainly = partial(plain_keys, *turned)
        before = partial(lay_out, x, weight, EPS, heads, cos, sin, list(shape.grid))
        moved = BF16 + 1 + (BF16 if kept else 0)
        found.append(Case(name, moved, x.numel(), launch, plainly, plain_keys, turned, before))
    sums = partial(preparing.summarize, feature_map=None)
    found.append(case("sage's sums", 2 * BF16, sums, partial(summed_up, k, v), summed_up, k, v))
    return found


def keys_of(
    kept: bool, x: torch.Tensor, weight: torch.Tensor, eps: float, per_head: bool, heads: int,
    cos: Sequence[torch.Tensor], sin: Sequence[torch.Tensor], grid: Sequence[int], interleaved: bool,
    config: KeysConfig | None = None,
) -> object:  # fmt: skip
    """The quantized keys that an attention reads, from their projection."""
    tables = lay_out(x, weight, eps, heads, cos, sin, grid)
    return keys_triton.norm_keys(x, eps, heads, tables, BLOCK_K, pool=kept, keep=kept, config=config)


def plain_keys(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantized keys that an attention reads, from their projection, in torch."""
    k = qk_norm_rope.reference(x, *args).float()
    keys, scale = quantize_rows((k - k.mean(1, keepdim=True)).transpose(1, 2), BLOCK_K)
    return keys.to(torch.int8), scale


def summed_up(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of k and the largest v of each channel, which Sage needs from all tokens before it can quantize."""
    return k.float().mean(1), v.float().abs().amax(1)


def blocked(
    k: torch.Tensor, v: torch.Tensor, k_mean: torch.Tensor, v_scale: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The quantized k and v that Sage multiplies, by heads."""
    keys, scale = quantize_rows((k.float() - k_mean).transpose(1, 2), rows)
    return keys.to(torch.int8), scale, e4m3((v.float() / v_scale).transpose(1, 2))


def copying(elements: int) -> Call:
    """A copy of this many elements."""
    source = torch.randn(elements, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(shape: Shape, sets: tuple[Case, ...], beside: Sequence[str], sweep: bool) -> list[Result]:
    """The results of an op's variants on some sets of tensors; the copy has as many elements as the op's x."""
    case = sets[0]
    calls: dict[str, list[Call]] = {
        "copy": [copying(c.elements) for c in sets],
        "kernel": [c.kernel for c in sets],
    }
    if case.before is not None:
        calls["tables"] = [c.before for c in sets if c.before is not None]
    if "torch" in beside:
        calls["torch"] = [c.torch for c in sets]
    if "compiled" in beside:
        torch.compiler.reset()
        function = torch.compile(case.reference, dynamic=False)
        calls["compiled"] = [partial(function, *c.args) for c in sets]
    if sweep and case.name in [f"{op}_quantize int8_block" for op in ("adaln", "residual_norm", "norm")]:
        for block in BLOCK_SWEEP:
            name = f"{block.warps} warps, {block.elements} elements, {block.registers} registers"
            calls[f"{name}, lag {block.lag}"] = [partial(c.kernel, block) for c in sets]
    elif sweep and case.before is not None:
        for keys in KEYS_SWEEP:
            name = f"{keys.warps} warps, {keys.words} words, {keys.registers} registers, lag {keys.lag}"
            calls[name] = [partial(c.kernel, config=keys) for c in sets]
    elif sweep and "int8_block" in case.name:
        for tile in TILE_SWEEP:
            calls[f"{tile.warps} warps, {tile.registers} registers"] = [partial(c.kernel, tile) for c in sets]
    elif sweep:
        for config in SWEEP:
            if 16 <= case.elements // shape.tokens // (32 * config.warps) <= 64:
                name = f"{config.warps} warps, {config.rows} rows, {config.registers} registers, {config.near} near"
                calls[name] = [partial(c.kernel, config) for c in sets]
    times = replayed(calls)
    if case.before is not None:
        apart = statistics.median(times.pop("tables"))
        times["kernel and tables"] = times["kernel"]
        times |= {n: [t - apart for t in times[n]] for n in ("kernel", *(n for n in times if "warps" in n))}
    medians = {name: statistics.median(t) for name, t in times.items()}
    rate = 2 * BF16 / medians["copy"]
    return [
        Result(shape.name, case.name, name, m, min(times[name]), max(times[name]),
               1.0 if name == "copy" else case.bytes / m / rate)
        for name, m in medians.items()
    ]  # fmt: skip


def table(results: list[Result]) -> str:
    """The results as a table in Markdown, with a line for each variant."""
    lines = ["| shape | op | variant | ms (fastest - slowest) | of the copy |", "| --- | --- | --- | --- | --- |"]
    for r in results:
        spread = f"{r.milliseconds:.4f} ({r.fastest:.4f} - {r.slowest:.4f})"
        lines.append(f"| {r.shape} | {r.op} | {r.variant} | {spread} | {r.of_the_copy:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for norms.json and norms.md")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--ops", nargs="+", help="only ops whose name starts with one of these")
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=BESIDE, help="what else is timed")
    parser.add_argument("--sweep", action="store_true", help="also other launch configurations")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: list[Result] = []
    about = versions()
    with torch.no_grad():
        for shape in (s for s in SHAPES if s.name in arguments.shapes):
            for sets in zip(*(cases(shape) for _ in range(SETS)), strict=True):
                if arguments.ops and not sets[0].name.startswith(tuple(arguments.ops)):
                    continue
                found = measure(shape, sets, arguments.beside, arguments.sweep)
                results += found
                print(table(found).split("\n", 2)[2], flush=True)
                if arguments.out:  # after each op, so that a run that is cut short leaves the results so far
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    document = {"about": about, "results": [asdict(r) for r in results]}
                    (arguments.out / "norms.json").write_text(json.dumps(document, indent=1) + "\n")
                    text = f"{', '.join(f'{k} {v}' for k, v in about.items())}\n\n{table(results)}\n"
                    (arguments.out / "norms.md").write_text(text)


if __name__ == "__main__":
    main()
