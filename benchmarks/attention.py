"""Times whole attention calls on one GPU: Sage and SLA beside cuDNN's attention, forward, and SLA's training step.

    python benchmarks/attention.py [--out FOLDER] [--shapes 1.3B-480p ...] [--parts] [--accuracy] [--lengths [--write]]

Each call starts from bf16 q, k, v (B, L, H, D) of N(0, 1), in a model's layout, and includes all quantization and
layout work. Times are milliseconds between CUDA events around a call, as the median over all calls. The calls run in
three turns over the variants, so that a drift of the card changes the times of all variants alike; in a turn, some
calls of one variant are queued back to back. --shapes without a name times no shape. --accuracy measures errors on
random inputs and on the inputs of wan-mini's attentions. --lengths measures from which size on Sage is faster
(lengths.py), and --write puts these speedups into turbocompile/speeds.json, which `attention: auto` reads. FOLDER gets
attention.json and attention.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import lengths
import torch
from timing import milliseconds, versions
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from turbocompile.kernels import ops
from turbocompile.kernels.attention.sla_attention import kept_blocks, reference
from turbocompile.kernels.attention.sla_triton import sla_forward

from turbocompile.hardware import SPEEDS, target_of

TOPK = 0.1
FORMATS = ("fp8", "fp16")
HEAD_DIM = 128
BLOCKS = ((64, 128), (128, 64), (64, 64))  # SLA's block_q and block_k
TRAINING_BLOCKS = (64, 64)
WAN_MINI = Path(__file__).parent.parent / "examples" / "wan-mini"


@dataclass(frozen=True)
class Shape:
    """The self-attention of one model."""

    name: str
    tokens: int
    heads: int
    rounds: int  # how many calls a turn makes


SHAPES = (Shape("1.3B-480p", 32760, 12, 10), Shape("14B-480p", 32760, 40, 6), Shape("14B-720p", 75600, 40, 3))
TRAINED = ("1.3B-480p",)


@dataclass(frozen=True)
class Result:
    """The median time of a call at a shape."""

    shape: str
    call: str
    milliseconds: float
    fastest: float
    slowest: float
    against: float  # cuDNN's time divided by this call's time


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """cuDNN's dense attention of q, k, v (B, L, H, D)."""
    return lengths.sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)


def inference_calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """The forward calls by name; the first is the baseline."""
    q, k, v = (torch.randn(1, shape.tokens, shape.heads, HEAD_DIM, device="cuda").bfloat16() for _ in "qkv")
    weight, bias = torch.randn(HEAD_DIM, HEAD_DIM, device="cuda").bfloat16() * 0.1, torch.randn(HEAD_DIM, device="cuda")
    bias = bias.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "cuDNN bf16": lambda: cudnn(q, k, v),
        "Sage fp8": lambda: ops.sage_attention(q, k, v, HEAD_DIM**-0.5, False, "fp8"),
    }
    for blocks in BLOCKS:
        args = (q, k, v, weight, bias, TOPK, *blocks, "softmax", "fp8")
        calls[f"SLA {blocks[0]}/{blocks[1]} fp8"] = partial(ops.sla_attention, *args)
    if shape.name in TRAINED:  # also the portable kernels, which other GPUs run
        calls["Sage fp16"] = lambda: ops.sage_attention(q, k, v, HEAD_DIM**-0.5, False, "fp16")
        calls["SLA 64/128 fp16"] = lambda: ops.sla_attention(q, k, v, weight, bias, TOPK, 64, 128, "softmax", "fp16")
    return calls


def training_calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """The calls of forward and backward by name; the first is the baseline."""
    leaves = [torch.randn(1, shape.tokens, shape.heads, HEAD_DIM, device="cuda").bfloat16() for _ in "qkv"]
    leaves += [torch.randn(HEAD_DIM, HEAD_DIM, device="cuda").bfloat16() * 0.1, leaves[0].new_zeros(HEAD_DIM)]
    leaves = [t.requires_grad_() for t in leaves]
    grad = torch.randn(leaves[0].shape, device="cuda").bfloat16()
    options = (TOPK, *TRAINING_BLOCKS, "softmax", "none")
    return {
        "cuDNN bf16, forward + backward": lambda: torch.autograd.grad(cudnn(*leaves[:3]), leaves[:3], grad),
        "SLA 64/64, forward + backward": lambda: torch.autograd.grad(
            ops.sla_attention(*leaves, *options), leaves, grad
        ),
    }


def parts(call: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """The milliseconds of each kernel of a call, by the kernel's name."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = trace.key_averages()
    return {e.key[:40]: round(e.device_time_total / repeats / 1e3, 4) for e in events if e.device_time_total}


def measure(shape: Shape, calls: dict[str, Callable[[], object]]) -> list[Result]:
    """The results of the calls at a shape."""
    times = milliseconds(calls, shape.rounds)
    base = statistics.median(next(iter(times.values())))
    return [
        Result(shape.name, name, statistics.median(t), min(t), max(t), base / statistics.median(t))
        for name, t in times.items()
    ]


def table(results: list[Result]) -> str:
    """The results as a table in Markdown."""
    lines = ["| shape | call | ms (fastest - slowest) | cuDNN's time over it |", "| --- | --- | --- | --- |"]
    for r in results:
        spread = f"{r.milliseconds:.3f} ({r.fastest:.3f} - {r.slowest:.3f})"
        lines.append(f"| {r.shape} | {r.call} | {spread} | {r.against:.2f} |")
    return "\n".join(lines)


def inputs(kind: str, tokens: int = 8192, heads: int = 4) -> list[torch.Tensor]:
    """q, k, v of N(0, 1), changed as `kind` says."""
    q, k, v = (torch.randn(1, tokens, heads, HEAD_DIM, device="cuda") for _ in "qkv")
    if kind == "K with a bias by channel, N(0, 16)":
        k += 4 * torch.randn(1, 1, heads, HEAD_DIM, device="cuda")
    elif kind == "one K channel in 20 at 8 times, q halved":
        q, k = q * 0.5, k * torch.where(torch.arange(HEAD_DIM, device="cuda") % 20 == 0, 8.0, 1.0)
    elif kind == "heavy tails: all divided by sqrt(chi2_5 / 5)":
        q, k, v = (t * (5 / torch.randn(5, *t.shape, device="cuda").square().sum(0)).sqrt() for t in (q, k, v))
    elif kind == "q at 1e-3":
        q = q * 1e-3
    return [t.bfloat16() for t in (q, k, v)]


KINDS = (
    "N(0, 1)",
    "K with a bias by channel, N(0, 16)",
    "one K channel in 20 at 8 times, q halved",
    "heavy tails: all divided by sqrt(chi2_5 / 5)",
    "q at 1e-3",
)


Found = dict[str, tuple[float, float]]  # op -> cosine and relative L1 error


def sage_accuracy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Found:
    """The errors of each SageAttention op against attention in float64, without quantization."""
    scale = q.shape[-1] ** -0.5
    exact = [t.double().transpose(1, 2) for t in (q, k, v)]
    truth = ((exact[0] @ exact[1].transpose(-1, -2) * scale).softmax(-1) @ exact[2]).transpose(1, 2)
    return {f"Sage {pv}": errors(ops.sage_attention(q, k, v, scale, False, pv), truth) for pv in FORMATS}


def sla_accuracy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Found:
    """The errors of each SLA op against SLA in float64, without quantization, with the same block map.

    The projection is zero, because the linear branch is not quantized and would only dilute the error.
    """
    found = {}
    zero = q.new_zeros(q.shape[-1], q.shape[-1])
    for block_q, block_k in BLOCKS:
        blocks = -(-q.shape[1] // block_k)
        y, lut = sla_forward(q, k, v, zero, zero[0], kept_blocks(TOPK, blocks), block_q, block_k, "softmax", "fp8")
        chosen = torch.zeros(*lut.shape[:2], blocks, dtype=torch.bool, device="cuda")
        chosen = chosen.scatter(2, lut.long(), True).unflatten(0, (q.shape[0], -1))
        args = [t.double() for t in (q, k, v, zero, zero[0])]
        truth = reference(*args, TOPK, block_q, block_k, "softmax", "none", chosen=chosen)
        found[f"SLA {block_q}/{block_k} fp8"] = errors(y, truth)
    return found


def wan_mini_accuracy() -> dict[str, Found]:
    """The mean and the worst errors over all attentions of wan-mini, at three times of two prompts."""
    from turbocompile.wan_mini import world  # here, because the rest of this file needs torch and the kernels alone
    from turbocompile.wan_mini.activations import record_pipeline

    recorded = record_pipeline(WAN_MINI, world.evaluation_set(2), device="cuda", dtype=torch.bfloat16)
    found: dict[str, Found] = {}
    for name, is_self in (("self", True), ("cross", False)):
        each = []
        for a in (a for a in recorded if a.is_self == is_self):
            each.append(sage_accuracy(a.q, a.k, a.v) | (sla_accuracy(a.q, a.k, a.v) if is_self else {}))
        by_op = {op: [e[op] for e in each] for op in each[0]}
        for word, cosine, distance in (("mean", statistics.mean, statistics.mean), ("worst", min, max)):
            found[f"wan-mini, {name}, {word} of {len(each)}"] = {
                op: (cosine(c for c, _ in pairs), distance(e for _, e in pairs)) for op, pairs in by_op.items()
            }
    return found


def errors(y: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """The cosine between two results, and the relative L1 error."""
    y = y.double()
    cosine = (y * truth).sum() / (y.norm() * truth.norm())
    return cosine.item(), ((y - truth).abs().sum() / truth.abs().sum()).item()


def accuracy() -> dict[str, Found]:
    """Kind of input -> the errors."""
    found = {}
    for kind in KINDS:
        q, k, v = inputs(kind)
        found[kind] = sage_accuracy(q, k, v) | sla_accuracy(q, k, v)
    return found | wan_mini_accuracy()


def accuracy_table(found: dict[str, Found]) -> str:
    """The errors as a table in Markdown, with a line for each kind of input."""
    ops_shown = list(next(iter(found.values())))
    lines = []
    for kind, each in found.items():
        cells = [f"{each[op][0]:.5f} / {each[op][1]:.4f}" if op in each else "" for op in ops_shown]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    head = f"| cosine / relative L1 | {' | '.join(ops_shown)} |"
    return "\n".join([head, "| --- " * (len(ops_shown) + 1) + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for attention.json and attention.md")
    parser.add_argument("--shapes", nargs="*", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--accuracy", action="store_true", help="also the errors on some kinds of inputs")
    parser.add_argument("--lengths", action="store_true", help="also Sage beside SDPA at short and long sequences")
    parser.add_argument("--write", action="store_true", help="put the speedups of --lengths into speeds.json")
    parser.add_argument("--parts", action="store_true", help="also the time of each kernel")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: list[Result] = []
    kernels: dict[str, dict[str, float]] = {}
    for shape in (s for s in SHAPES if s.name in arguments.shapes):
        groups = [inference_calls, training_calls] if shape.name in TRAINED else [inference_calls]
        for group in groups:
            calls = group(shape)
            results += measure(shape, calls)
            if arguments.parts:
                kernels |= {f"{shape.name} {name}": parts(call) for name, call in calls.items()}
    about = versions()
    text = f"{', '.join(f'{k} {v}' for k, v in about.items())}\n"
    document: dict[str, object] = {"about": about, "results": [asdict(r) for r in results], "kernels": kernels}
    if results:
        text += f"\n{table(results)}\n"
    if arguments.accuracy:
        document["accuracy"] = found = accuracy()
        text += f"\n{accuracy_table(found)}\n"
    if arguments.lengths:
        rows = [lengths.measure(size) for size in lengths.sizes()]
        document["lengths"] = [asdict(row) for row in rows]
        text += f"\n{lengths.table(rows)}\n"
        if arguments.write:
            target = target_of(torch.cuda.get_device_capability())
            card = torch.cuda.get_device_name().removeprefix("NVIDIA ")
            lengths.write_speeds(SPEEDS, lengths.speeds(rows, str(target), f"measured on {card}"))
    print(text)
    for name, times in kernels.items():
        print(name, times)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "attention.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.out / "attention.md").write_text(text)


if __name__ == "__main__":
    main()
