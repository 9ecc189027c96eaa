"""The cards: what they can do on paper, what was measured, and what that decides.

Everything that depends on the kind of GPU is decided here: which 8-bit format a linear gets, which attention, which
format the product with V has. Rates are dense (no structured sparsity), with float32 accumulation, as the vendor gives
them; nothing reaches them, so a time computed from them is a lower bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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

# Time of a bf16 linear over the time of an 8-bit one at the shapes of Wan, quantization of the activation left out.
# sm90: geometric means over six shapes of Wan on an H100 (benchmarks/RESULTS.md). The others: ratios of the vendors'
# rates with float32 accumulation, not measured here.
_LINEAR_SPEEDUP: dict[str, dict[str, float]] = {
    CPU: {},
    "sm80": {"int8": 2.0},
    "sm86": {"int8": 4.0},
    "sm89": {"int8": 4.0, "fp8": 2.0},
    "sm90": {"int8": 1.73, "int8_block": 1.13, "fp8": 1.87},
    "sm120": {"int8": 4.0, "fp8": 2.0},
}


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


def _speeds(source: str, pv: str, heads: int, head_dim: int, *rows: tuple[int, int, float]) -> tuple[_SageSpeed, ...]:
    """Speeds at (queries, keys, speedup) each."""
    return tuple(_SageSpeed(pv, AttentionShape(q, k, heads, head_dim), s, source) for q, k, s in rows)


# Where `attention: auto` takes Sage: nowhere on a target that is not here.
# sm90: benchmarks/attention.py on one H100 (benchmarks/RESULTS.md); --lengths prints rows as they stand here.
# sm89, sm120: what SageAttention's authors publish for the same arithmetic against FlashAttention-2, head_dim 128, 32K
# tokens: 431 over 164 and 554 over 214 TOPS with FP8, 322 over 164 and 479 over 214 with FP16 (their Triton kernel).
_H100 = "measured on an H100"
# fmt: off
_ON_H100 = (
    *_speeds(_H100, "fp8", 4, 64,
        (256, 256, 0.47), (512, 512, 0.53), (1024, 1024, 0.56), (2304, 2304, 0.58), (4096, 4096, 0.68),
        (256, 257, 0.51), (512, 257, 0.53), (1024, 257, 0.53), (2304, 257, 0.46), (4096, 257, 0.50),
        (256, 512, 0.53), (1024, 512, 0.54), (2304, 512, 0.50), (4096, 512, 0.50)),
    *_speeds(_H100, "fp8", 12, 64,
        (256, 256, 0.47), (512, 512, 0.44), (1024, 1024, 0.44), (2304, 2304, 0.62), (4096, 4096, 0.78),
        (8192, 8192, 0.95), (16384, 16384, 1.02), (32760, 32760, 1.24), (256, 257, 0.36), (512, 257, 0.53),
        (1024, 257, 0.49), (2304, 257, 0.57), (4096, 257, 0.65), (8192, 257, 0.76), (16384, 257, 0.85),
        (32760, 257, 0.92), (256, 512, 0.44), (1024, 512, 0.42), (2304, 512, 0.52), (4096, 512, 0.61),
        (8192, 512, 0.73), (16384, 512, 0.84), (32760, 512, 0.94)),
    *_speeds(_H100, "fp8", 12, 128,
        (256, 256, 0.52), (512, 512, 0.53), (1024, 1024, 0.61), (2304, 2304, 0.84), (4096, 4096, 0.98),
        (8192, 8192, 1.17), (16384, 16384, 1.23), (32760, 32760, 1.56), (256, 257, 0.59), (512, 257, 0.57),
        (1024, 257, 0.53), (2304, 257, 0.63), (4096, 257, 0.72), (8192, 257, 0.81), (16384, 257, 0.91),
        (32760, 257, 1.00), (256, 512, 0.53), (1024, 512, 0.49), (2304, 512, 0.60), (4096, 512, 0.70),
        (8192, 512, 0.82), (16384, 512, 0.94), (32760, 512, 1.02)),
    *_speeds(_H100, "fp8", 40, 128,
        (256, 256, 0.42), (512, 512, 0.63), (1024, 1024, 0.75), (2304, 2304, 1.00), (4096, 4096, 1.04),
        (8192, 8192, 1.19), (16384, 16384, 1.30), (32760, 32760, 1.43), (75600, 75600, 1.50), (256, 257, 0.47),
        (512, 257, 0.67), (1024, 257, 0.67), (2304, 257, 0.77), (4096, 257, 0.84), (8192, 257, 0.95),
        (16384, 257, 0.99), (32760, 257, 1.04), (256, 512, 0.45), (1024, 512, 0.66), (2304, 512, 0.78),
        (4096, 512, 0.85), (8192, 512, 0.97), (16384, 512, 1.01), (32760, 512, 1.06)),
    *_speeds(_H100, "fp16", 4, 64,
        (256, 256, 0.46), (512, 512, 0.50), (1024, 1024, 0.52), (2304, 2304, 0.52), (4096, 4096, 0.60),
        (256, 257, 0.49), (512, 257, 0.50), (1024, 257, 0.50), (2304, 257, 0.47), (4096, 257, 0.47),
        (256, 512, 0.50), (1024, 512, 0.50), (2304, 512, 0.48), (4096, 512, 0.49)),
    *_speeds(_H100, "fp16", 12, 64,
        (256, 256, 0.45), (512, 512, 0.43), (1024, 1024, 0.42), (2304, 2304, 0.55), (4096, 4096, 0.64),
        (8192, 8192, 0.74), (16384, 16384, 0.79), (32760, 32760, 0.88), (256, 257, 0.51), (512, 257, 0.50),
        (1024, 257, 0.47), (2304, 257, 0.53), (4096, 257, 0.56), (8192, 257, 0.59), (16384, 257, 0.63),
        (32760, 257, 0.66), (256, 512, 0.19), (1024, 512, 0.41), (2304, 512, 0.48), (4096, 512, 0.53),
        (8192, 512, 0.60), (16384, 512, 0.65), (32760, 512, 0.69)),
    *_speeds(_H100, "fp16", 12, 128,
        (256, 256, 0.49), (512, 512, 0.50), (1024, 1024, 0.44), (2304, 2304, 0.51), (4096, 4096, 0.53),
        (8192, 8192, 0.57), (16384, 16384, 0.58), (32760, 32760, 0.72), (256, 257, 0.56), (512, 257, 0.54),
        (1024, 257, 0.41), (2304, 257, 0.43), (4096, 257, 0.42), (8192, 257, 0.43), (16384, 257, 0.44),
        (32760, 257, 0.45), (256, 512, 0.50), (1024, 512, 0.39), (2304, 512, 0.42), (4096, 512, 0.43),
        (8192, 512, 0.45), (16384, 512, 0.47), (32760, 512, 0.48)),
    *_speeds(_H100, "fp16", 40, 128,
        (256, 256, 0.35), (512, 512, 0.46), (1024, 1024, 0.48), (2304, 2304, 0.54), (4096, 4096, 0.52),
        (8192, 8192, 0.57), (16384, 16384, 0.63), (32760, 32760, 0.74), (256, 257, 0.37), (512, 257, 0.47),
        (1024, 257, 0.44), (2304, 257, 0.43), (4096, 257, 0.42), (8192, 257, 0.44), (16384, 257, 0.44),
        (32760, 257, 0.44), (256, 512, 0.35), (1024, 512, 0.45), (2304, 512, 0.45), (4096, 512, 0.45),
        (8192, 512, 0.47), (16384, 512, 0.44), (32760, 512, 0.46)),
)
# fmt: on
_SAGE_SPEEDUP: dict[str, tuple[_SageSpeed, ...]] = {
    "sm89": (
        *_speeds("published for an RTX 4090, heads not given", "fp8", 1, 128, (32768, 32768, 2.63)),
        *_speeds("published for an RTX 4090, heads not given", "fp16", 1, 128, (32768, 32768, 1.96)),
    ),
    "sm90": _ON_H100,
    "sm120": (
        *_speeds("published for an RTX 5090, heads not given", "fp8", 1, 128, (32768, 32768, 2.59)),
        *_speeds("published for an RTX 5090, heads not given", "fp16", 1, 128, (32768, 32768, 2.24)),
    ),
}


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
