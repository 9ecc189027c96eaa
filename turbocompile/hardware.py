"""The cards: their rates on paper, their measured speeds, and the choices that depend on the card.

This module makes each choice that depends on the kind of GPU: the 8-bit format of a linear, the kind of an attention,
the format of its product with V. Rates are dense (no structured sparsity), with float32 accumulation, as the vendor
states them; no kernel reaches them, so a time computed from them is a lower bound.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from turbocompile.errors import UnsupportedError

CPU = "cpu"
TARGETS = (CPU, "sm80", "sm86", "sm89", "sm90", "sm120")
LINEAR_FORMATS = ("int8", "int8_block", "fp8")

T = 1e12
G = 1e9


@dataclass(frozen=True)
class Gpu:
    """One card. Rates: operations per second, a multiply-add being two. Bandwidth: bytes per second. Memory: bytes.

    bf16 is also the rate of fp16. fp8 is None if the tensor cores have no FP8. fp32 is the rate of the ordinary cores,
    which run float32 matrix products (unless TF32 is allowed) and all operations that are not matrix products.
    """

    key: str
    name: str
    target: str
    bf16: float
    fp8: float | None
    int8: float
    fp32: float
    bandwidth: float
    memory: int
    source: str

    def has(self, kind: str) -> bool:
        """Whether the card has arithmetic of that kind ("bf16", "fp8", "int8", "fp32")."""
        return getattr(self, kind) is not None

    def rate(self, kind: str) -> float:
        """Operations per second in "bf16", "fp8", "int8" or "fp32". Raises UnsupportedError for FP8 on Ampere."""
        rates = {"bf16": self.bf16, "fp8": self.fp8, "int8": self.int8, "fp32": self.fp32}
        rate = rates.get(kind)
        if rate is None:
            have = ", ".join(k for k, v in rates.items() if v is not None)
            raise UnsupportedError(f"{self.name} has no {kind} arithmetic; it has {have}")
        return rate


_GPUS = (
    # Data sheets of HBM cards state decimal gigabytes; CUDA reports about 1% less.
    Gpu("h100", "H100 SXM", "sm90", 989.4 * T, 1978.9 * T, 1978.9 * T, 66.9 * T, 3350 * G, 80 * 10**9,
        "NVIDIA H100 Tensor Core GPU datasheet and Hopper architecture white paper (sparse figures halved)"),
    Gpu("h200", "H200 SXM", "sm90", 989.4 * T, 1978.9 * T, 1978.9 * T, 66.9 * T, 4800 * G, 141 * 10**9,
        "NVIDIA H200 Tensor Core GPU datasheet (sparse figures halved; the chip of the H100)"),
    # GeForce: products that accumulate in float32 run at half the rate of float16 accumulation; INT8 is not halved.
    Gpu("rtx5090", "RTX 5090", "sm120", 209.5 * T, 419.0 * T, 838.0 * T, 104.8 * T, 1792 * G, 32 << 30,
        "NVIDIA RTX Blackwell GPU architecture white paper, appendix of the GeForce RTX 5090"),
    Gpu("rtx4090", "RTX 4090", "sm89", 165.2 * T, 330.3 * T, 660.6 * T, 82.6 * T, 1008 * G, 24 << 30,
        "NVIDIA Ada GPU architecture white paper, appendix of the GeForce RTX 4090"),
    Gpu("rtx3090", "RTX 3090", "sm86", 71.2 * T, None, 284.7 * T, 35.6 * T, 936 * G, 24 << 30,
        "NVIDIA Ampere GA102 GPU architecture white paper, table of the GeForce RTX 3090"),
    Gpu("a100", "A100 80GB SXM", "sm80", 312.0 * T, None, 624.0 * T, 19.5 * T, 2039 * G, 80 * 10**9,
        "NVIDIA A100 Tensor Core GPU datasheet"),
)  # fmt: skip
GPUS: dict[str, Gpu] = {gpu.key: gpu for gpu in _GPUS}
DEFAULT_GPU = "h100"


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention. heads: the query heads of all items of the batch together."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"{self.heads} head{'s' * (self.heads != 1)} of {self.head_dim}"
        return f"{self.queries:,} x {self.keys:,} tokens, {heads}"


DRIFT = 1.08  # between runs a card's clock changes times by up to 7% (SDPA's), so a smaller speedup counts as none
SLACK = 7 / 8  # an attention with this share of a measured attention's tokens counts as large as the measured one


@dataclass(frozen=True)
class _SageSpeed:
    """How much faster than bf16 SDPA a whole call of Sage is at one size, with all quantization.

    SDPA is timed with its fastest backend (cuDNN or FlashAttention). pv: Sage's format of the product with V.
    """

    pv: str
    shape: AttentionShape
    speedup: float
    source: str

    def covers(self, shape: AttentionShape) -> bool:
        """Whether `shape` has at least SLACK times as many queries and keys, and at least as many heads."""
        mine = self.shape
        enough = SLACK * mine.queries <= shape.queries and SLACK * mine.keys <= shape.keys
        return enough and mine.heads <= shape.heads


def read_speeds(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, tuple[_SageSpeed, ...]]]:
    """The two tables of a file like speeds.json, by target: the speedups of linears, and those of attentions.

    `linears`: target -> format -> the time of a bf16 linear over the time of an 8-bit linear, without the quantization
    of the activation. sm90 has geometric means over six shapes of Wan on an H100 (benchmarks/RESULTS.md); the other
    targets have ratios of the vendors' rates with float32 accumulation. `attentions`: groups of (queries, keys, the
    time of SDPA over the time of Sage), which benchmarks/attention.py --lengths --write measures and writes. sm89 and
    sm120 have the figures that SageAttention's authors publish for the same arithmetic against FlashAttention-2.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    attentions: dict[str, tuple[_SageSpeed, ...]] = {}
    for group in data["attentions"]:
        heads, head_dim = group["heads"], group["head_dim"]
        rows = (
            _SageSpeed(group["pv"], AttentionShape(queries, keys, heads, head_dim), speedup, group["source"])
            for queries, keys, speedup in group["speedups"]
        )
        attentions[group["target"]] = (*attentions.get(group["target"], ()), *rows)
    return data["linears"], attentions


# On a target without attentions in this file, `attention: auto` never takes Sage.
SPEEDS = Path(__file__).with_name("speeds.json")
_LINEAR_SPEEDUP, _SAGE_SPEEDUP = read_speeds(SPEEDS)


def check_target(target: str) -> str:
    """Returns the target. Raises UnsupportedError if no target has this name."""
    if target not in TARGETS:
        raise UnsupportedError(f"there is no target {target!r}; choose one of {', '.join(TARGETS)}")
    return target


def find_gpu(name: str) -> Gpu:
    """The card of that name in any spelling ("h100", "RTX 4090", "NVIDIA H100 80GB HBM3"). Raises UnsupportedError."""
    gpu = _known_gpu(name)
    if gpu is None:
        raise UnsupportedError(f"there is no figure for a GPU {name!r}; choose one of {', '.join(GPUS)}")
    return gpu


def _known_gpu(name: str) -> Gpu | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    # Laptop and cut-down cards have the name of a faster card (RTX 4090 Laptop, RTX 5090 D, H100 PCIe, H100 NVL).
    if re.search(r"laptop|max-?q|pcie|nvl|\b[45]090 ?d\b|40 ?gb", name.lower()):
        return None
    return next((gpu for key, gpu in GPUS.items() if key in plain), None)


def gpu_of_target(target: str) -> Gpu | None:
    """The card that stands for a target in estimates; None for the CPU."""
    check_target(target)
    return next((gpu for gpu in _GPUS if gpu.target == target), None)


def target_of(capability: tuple[int, int]) -> str | None:
    """The target that runs on a card of that compute capability; None if none does.

    Code for a capability runs on later ones of the same major version (8.7 runs 8.6, 12.1 runs 12.0).
    """
    major, minor = capability
    numbers = [int(t[2:]) for t in TARGETS if t != CPU]
    fits = [n for n in numbers if n // 10 == major and n % 10 <= minor]
    return f"sm{max(fits)}" if fits else None


def host_target() -> str:
    """The target of this machine's first GPU, "cpu" without a GPU. Raises UnsupportedError if no target fits."""
    if not torch.cuda.is_available():
        return CPU
    capability = torch.cuda.get_device_capability()
    target = target_of(capability)
    if target is None:
        raise UnsupportedError(
            f"this machine's GPU has compute capability {capability[0]}.{capability[1]}, which no target fits; "
            f"name one of {', '.join(TARGETS)}"
        )
    return target


def host_gpu() -> Gpu | None:
    """This machine's first GPU; None if there is no GPU, or GPUS lacks it."""
    return _known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def has_fp8(target: str) -> bool:
    """Whether the target's tensor cores multiply FP8 numbers (Ampere's do not)."""
    return "fp8" in _LINEAR_SPEEDUP[check_target(target)]


def linear_speedup(target: str, format: str) -> float | None:
    """How much faster than bf16 a linear in "int8", "int8_block" or "fp8" runs on the target; None if it cannot run.

    If int8_block was not measured it has the speedup of int8, because the product is the same; only the scales change
    along K. Raises UnsupportedError for an unknown target or format.
    """
    if format not in LINEAR_FORMATS:
        raise UnsupportedError(f"there is no linear format {format!r}; choose one of {', '.join(LINEAR_FORMATS)}")
    speedups = _LINEAR_SPEEDUP[check_target(target)]
    return speedups.get(format, speedups.get(format.removesuffix("_block")))


def choose_linear_format(target: str) -> str:
    """The 8-bit format in which linears run fastest on the target: "fp8" or "int8", or "off" if neither beats bf16.

    If both are equally fast it is int8, whose error on N(0, 1) is a third of FP8's (relative L1 0.0115 and 0.037).
    """
    speedups = _LINEAR_SPEEDUP[check_target(target)]
    paying = [f for f in ("int8", "fp8") if speedups.get(f, 0.0) > 1.0]
    return max(paying, key=speedups.__getitem__) if paying else "off"


@dataclass(frozen=True)
class AttentionChoice:
    """The kind that an attention becomes ("sage" or "native"), and why."""

    kind: str
    why: str


def has_sage(target: str) -> bool:
    """Whether `auto` may choose a SageAttention on the target."""
    return check_target(target) in _SAGE_SPEEDUP


def choose_attention(target: str, shape: AttentionShape, pv: str) -> AttentionChoice:
    """The kind that `auto` gives to an attention that is no SLA. pv: the format that Sage's product with V would have.

    It is sage if the largest measured attention that is not larger than `shape` was faster with Sage by more than
    DRIFT. A smaller measured attention is evidence, because with more queries, keys or heads Sage's fixed cost
    (quantizing K and V, launches) is a smaller part of the time. Raises UnsupportedError for an unknown target.
    """
    check_target(target)
    if target not in _SAGE_SPEEDUP:
        reason = "8-bit attention does not pay" if target == CPU else "8-bit attention was not measured"
        return AttentionChoice("native", f"{reason} on {target}")
    known = [p for p in _SAGE_SPEEDUP[target] if p.pv == pv and p.shape.head_dim >= shape.head_dim]
    width = min(
        (p.shape.head_dim for p in known), default=0
    )  # the kernels pad the channels to the next measured head_dim
    fits = [p for p in known if p.shape.head_dim == width and p.covers(shape)]
    if not fits:
        return AttentionChoice("native", f"{shape}: smaller than all that Sage ({pv}) was measured at on {target}")
    point = max(fits, key=lambda p: p.shape.queries * p.shape.keys * p.shape.heads)
    measured = f"Sage ({pv}) has {point.speedup:.2f} times the speed of SDPA at {point.shape}, {point.source}"
    return AttentionChoice("sage" if point.speedup > DRIFT else "native", measured)


def choose_pv(target: str, kind: str = "sage") -> str:
    """The format of the product with V: "fp8" if the target has FP8, else "fp16"; "none" for SLA on a CPU.

    On a CPU an SLA stays in floating point. Sage runs on a CPU only if the recipe names it; it emulates FP8 there,
    because most cards compute the product in FP8.
    """
    check_target(target)
    if kind == "sla" and target == CPU:
        return "none"
    return "fp8" if target == CPU or has_fp8(target) else "fp16"


def choose_dtype(target: str) -> torch.dtype:
    """The dtype of activations: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if check_target(target) == CPU else torch.bfloat16
