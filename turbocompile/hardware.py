"""The cards: what they can do on paper, what was measured, and what that decides.

Everything that depends on the kind of GPU is decided here: which 8-bit format a linear gets, which attention, which
format the product with V has. Rates are dense (no structured sparsity), with float32 accumulation, as the vendor gives
them; nothing reaches them, so a time computed from them is a lower bound.
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

    bf16 is the rate of fp16 too. fp8 is None where the tensor cores have no such format. fp32 is the rate of the
    ordinary cores: float32 matrix products run there unless TF32 is allowed, and so does everything that is no product.
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
    # HBM parts are sold by decimal gigabytes; what CUDA reports is about 1% less of the decimal figure.
    Gpu("h100", "H100 SXM", "sm90", 989.4 * T, 1978.9 * T, 1978.9 * T, 66.9 * T, 3350 * G, 80 * 10**9,
        "NVIDIA H100 Tensor Core GPU datasheet and Hopper architecture white paper (sparse figures halved)"),
    Gpu("h200", "H200 SXM", "sm90", 989.4 * T, 1978.9 * T, 1978.9 * T, 66.9 * T, 4800 * G, 141 * 10**9,
        "NVIDIA H200 Tensor Core GPU datasheet (sparse figures halved; the chip of the H100)"),
    # GeForce: products with float32 accumulation run at half the rate of those with float16 accumulation; not so INT8.
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
    """The sizes of an attention. heads: of the queries, of all items of the batch together."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"{self.heads} head{'s' * (self.heads != 1)} of {self.head_dim}"
        return f"{self.queries:,} x {self.keys:,} tokens, {heads}"


DRIFT = 1.08  # a card's own clock moves times by so much between runs (SDPA's by 7%): less is no difference
SLACK = 7 / 8  # an attention with so many of a measured one's tokens counts as it


@dataclass(frozen=True)
class _SageSpeed:
    """How much faster than bf16 SDPA a whole call of Sage is, all quantization included, at one size.

    SDPA is the fastest of its backends there (cuDNN, FlashAttention). pv: Sage's format of the product with V.
    """

    pv: str
    shape: AttentionShape
    speedup: float
    source: str

    def covers(self, shape: AttentionShape) -> bool:
        """Whether `shape` has as many queries, keys and heads at least."""
        mine = self.shape
        enough = SLACK * mine.queries <= shape.queries and SLACK * mine.keys <= shape.keys
        return enough and mine.heads <= shape.heads


def read_speeds(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, tuple[_SageSpeed, ...]]]:
    """The tables of a file like speeds.json: of linears and of attentions, by target.

    `linears`: target -> format -> the time of a bf16 linear over that of an 8-bit one at the shapes of Wan, without the
    quantization of the activation. sm90: geometric means over six shapes of Wan on an H100 (benchmarks/RESULTS.md); the
    others are ratios of the vendors' rates with float32 accumulation. `attentions`: groups of (queries, keys, the time
    of SDPA over that of Sage); benchmarks/attention.py --lengths --write puts a card's there. sm89 and sm120 are what
    SageAttention's authors publish for the same arithmetic against FlashAttention-2.
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


# `attention: auto` takes Sage nowhere on a target that is not here.
SPEEDS = Path(__file__).with_name("speeds.json")
_LINEAR_SPEEDUP, _SAGE_SPEEDUP = read_speeds(SPEEDS)


def check_target(target: str) -> str:
    """The target itself. Raises UnsupportedError where there is none of that name."""
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
    # A laptop's or a cut-down card carries the name of another chip (RTX 4090 Laptop, RTX 5090 D, H100 PCIe, H100 NVL).
    if re.search(r"laptop|max-?q|pcie|nvl|\b[45]090 ?d\b|40 ?gb", name.lower()):
        return None
    return next((gpu for key, gpu in GPUS.items() if key in plain), None)


def gpu_of_target(target: str) -> Gpu | None:
    """The card that stands for a target in estimates; None for the CPU."""
    check_target(target)
    return next((gpu for gpu in _GPUS if gpu.target == target), None)


def target_of(capability: tuple[int, int]) -> str | None:
    """The target that runs on a card of that compute capability, None where there is none.

    Code for a capability runs on later ones of the same major version (8.7 runs 8.6, 12.1 runs 12.0).
    """
    major, minor = capability
    numbers = [int(t[2:]) for t in TARGETS if t != CPU]
    fits = [n for n in numbers if n // 10 == major and n % 10 <= minor]
    return f"sm{max(fits)}" if fits else None


def host_target() -> str:
    """The target of this machine's first GPU, "cpu" where it has none. Raises UnsupportedError for another card."""
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
    """This machine's first GPU where the table has it."""
    return _known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def has_fp8(target: str) -> bool:
    """Whether the target's tensor cores multiply FP8 numbers (Ampere's do not)."""
    return "fp8" in _LINEAR_SPEEDUP[check_target(target)]


def linear_speedup(target: str, format: str) -> float | None:
    """How much faster than bf16 a linear in "int8", "int8_block" or "fp8" runs on the target; None where it cannot.

    int8_block counts as int8 where it was not measured: the same product, with scales that change along K.
    """
    if format not in LINEAR_FORMATS:
        raise UnsupportedError(f"there is no linear format {format!r}; choose one of {', '.join(LINEAR_FORMATS)}")
    speedups = _LINEAR_SPEEDUP[check_target(target)]
    return speedups.get(format, speedups.get(format.removesuffix("_block")))


def choose_linear_format(target: str) -> str:
    """The 8-bit format in which linears run fastest on the target: "fp8", "int8", or "off" where none pays (the CPU).

    Where both pay alike int8 is taken: on N(0, 1) its error is a third of FP8's (relative L1 0.0115 against 0.037).
    """
    speedups = _LINEAR_SPEEDUP[check_target(target)]
    paying = [f for f in ("int8", "fp8") if speedups.get(f, 0.0) > 1.0]
    return max(paying, key=speedups.__getitem__) if paying else "off"


@dataclass(frozen=True)
class AttentionChoice:
    """What an attention becomes ("sage" or "native"), and why."""

    kind: str
    why: str


def has_sage(target: str) -> bool:
    """Whether `auto` may choose a SageAttention on the target."""
    return check_target(target) in _SAGE_SPEEDUP


def choose_attention(target: str, shape: AttentionShape, pv: str) -> AttentionChoice:
    """What `auto` means for an attention that is no SLA; pv: the format that Sage's product with V would have.

    Sage is taken where the nearest attention of the table that is not larger was faster with it by more than a card
    drifts: with more queries, keys or heads its fixed cost (quantizing K and V, launches) only weighs less.
    """
    check_target(target)
    if target not in _SAGE_SPEEDUP:
        reason = "8-bit attention does not pay" if target == CPU else "8-bit attention was not measured"
        return AttentionChoice("native", f"{reason} on {target}")
    known = [p for p in _SAGE_SPEEDUP[target] if p.pv == pv and p.shape.head_dim >= shape.head_dim]
    width = min((p.shape.head_dim for p in known), default=0)  # the kernels pad channels to the next one
    fits = [p for p in known if p.shape.head_dim == width and p.covers(shape)]
    if not fits:
        return AttentionChoice("native", f"{shape}: smaller than all that Sage ({pv}) was measured at on {target}")
    point = max(fits, key=lambda p: p.shape.queries * p.shape.keys * p.shape.heads)
    measured = f"Sage ({pv}) has {point.speedup:.2f} times the speed of SDPA at {point.shape}, {point.source}"
    return AttentionChoice("sage" if point.speedup > DRIFT else "native", measured)


def choose_pv(target: str, kind: str = "sage") -> str:
    """The format of the product with V: "fp8" where the target has it, else "fp16"; "none" for SLA on a CPU.

    On a CPU an SLA stays in floating point, and a Sage attention, which runs there only when it is named, emulates FP8,
    as most cards compute it.
    """
    check_target(target)
    if kind == "sla" and target == CPU:
        return "none"
    return "fp8" if target == CPU or has_fp8(target) else "fp16"


def choose_dtype(target: str) -> torch.dtype:
    """The dtype of activations: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if check_target(target) == CPU else torch.bfloat16
