"""What the passes do, decided once: `resolve` makes it of what a user asked for, the target and the checkpoint.

Behind `resolve` nothing is "auto", nothing has a default, and nothing is added but by name: `with_calibration` and
`with_choices` give other options, and leave these as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from turbocompile.hardware import AttentionChoice, choose_linear_format, choose_pv, has_sage
from turbocompile.recipe.schema import AttentionSpec, Passes, PassSpec, Settings, W8A8Spec

PROJECTION = "proj_l"  # the projection of SLA's linear branch, by the name that all checkpoints of SLA models give it
ALPHAS = (0.3, 0.5, 0.7)  # SmoothQuant's exponents that `smooth: auto` tries
# Largest relative L1 at a site, by format. On N(0, 1) these formats measure 0.012 (int8, int8_block), 0.037 (fp8),
# 0.013 (Sage, PV in FP16) and 0.038 (Sage, PV in FP8).
BUDGETS = {"int8": 0.02, "int8_block": 0.02, "fp8": 0.05, "sage_fp16": 0.02, "sage_fp8": 0.04}
WIDEST_BUDGET = max(BUDGETS.values())  # of a format that another's pass brings


@dataclass(frozen=True)
class PassOptions:
    """The options of a pass that has none but whether it runs."""

    enabled: bool

    def budget(self, formats: Iterable[str]) -> float:
        """The relative L1 that a quantizing pass may reach at a site of these formats: the widest of theirs."""
        return max((BUDGETS[f] for f in formats if f in BUDGETS), default=WIDEST_BUDGET)


@dataclass(frozen=True)
class SlaOptions:
    """Self-attentions become SLA.

    topk: share of the key blocks that a query block attends to. block_q, block_k: tokens of a block. pv: format of the
    product with V ("fp8", "fp16", or "none": floating point). allow_untuned: also where the checkpoint has no
    projection. named: the recipe says `kind: sla`. projections: the checkpoint's keys of projections' weights.
    """

    topk: float
    block_q: int
    block_k: int
    pv: str
    allow_untuned: bool
    named: bool
    projections: frozenset[str]


@dataclass(frozen=True)
class AttentionOptions:
    """What attentions become.

    sla: for self-attentions, or None. others: what an attention that is no SLA becomes; None: what is faster at its
    size on the target. pv: format of Sage's product with V. choices: site -> what it is at the engine's shapes, for a
    twin at a small shape. given_budget: the recipe's.
    """

    enabled: bool
    target: str
    sla: SlaOptions | None
    others: AttentionChoice | None
    pv: str
    given_budget: float | None
    choices: Mapping[str, AttentionChoice]

    @property
    def quantizes(self) -> bool:
        """Whether the pass may quantize an attention."""
        if self.sla is not None:
            return self.sla.pv != "none"
        return has_sage(self.target) if self.others is None else self.others.kind == "sage"

    def budget(self, formats: Iterable[str]) -> float:
        """The recipe's, else the widest of these formats."""
        return PassOptions(self.enabled).budget(formats) if self.given_budget is None else self.given_budget


@dataclass(frozen=True)
class W8A8Options:
    """What linears become.

    format: "int8", "int8_block", "fp8" or "off", and off_reason why it is off. keeps_own: a weight that the checkpoint
    holds in 8 bits stays in its format. in_each_layer: errors are measured in each layer, not in the first alone.
    alphas: SmoothQuant's exponents to try; none: no smoothing. alpha_named: the recipe names the exponent.

    What calibration found: keep: site -> why it stays wide. smoothed: sites whose input is scaled; unsmoothed: site ->
    why its input is not.
    """

    enabled: bool
    target: str
    format: str
    off_reason: str
    keeps_own: bool
    in_each_layer: bool
    alphas: tuple[float, ...]
    alpha_named: bool
    given_budget: float | None
    keep: Mapping[str, str]
    smoothed: frozenset[str]
    unsmoothed: Mapping[str, str]

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration has something to measure."""
        return self.enabled and self.in_each_layer and self.format != "off"

    def budget(self, formats: Iterable[str]) -> float:
        """The recipe's, else the widest of these formats."""
        return PassOptions(self.enabled).budget(formats) if self.given_budget is None else self.given_budget


@dataclass(frozen=True)
class CompileOptions:
    """Everything that decides what a model's graphs become: one member a pass, and what all of them need.

    verify: "numeric", "shapes" or "off". rewrite: False leaves the graphs as captured.
    """

    target: str
    backend: str
    verify: str
    rewrite: bool
    lora: PassOptions
    norms: PassOptions
    rope: PassOptions
    attention: AttentionOptions
    fuse_qkv: PassOptions
    w8a8: W8A8Options
    qk_norm_rope: PassOptions
    adaln: PassOptions
    residual_norm: PassOptions
    gelu_quant: PassOptions
    norm_attention: PassOptions

    def of(self, name: str) -> PassOptions | AttentionOptions | W8A8Options:
        """The options of a pass by its name; a pass of another package runs."""
        return getattr(self, name) if name in _MEMBERS else PassOptions(self.rewrite)

    def with_calibration(
        self, keep: Mapping[str, str], smoothed: frozenset[str], unsmoothed: Mapping[str, str]
    ) -> CompileOptions:
        """With what calibration found of the linears."""
        return replace(self, w8a8=replace(self.w8a8, keep=keep, smoothed=smoothed, unsmoothed=unsmoothed))

    def with_choices(self, choices: Mapping[str, AttentionChoice]) -> CompileOptions:
        """With what each attention is at the engine's shapes, for a twin that has another."""
        return replace(self, attention=replace(self.attention, choices=choices))

    def in_floating_point(self) -> CompileOptions:
        """With the same attentions, none of them quantized."""
        attention, native = self.attention, AttentionChoice("native", "attention is judged by itself")
        sla = None if attention.sla is None else replace(attention.sla, pv="none")
        return replace(self, attention=replace(attention, sla=sla, others=native))


_MEMBERS = tuple(f.name for f in dataclasses.fields(Passes) if f.name != "enabled")


def resolve(asked: Settings, checkpoint: Iterable[str] = ()) -> CompileOptions:
    """The options of a recipe, or of a module's settings. checkpoint: the names of its tensors."""
    passes, target = asked.passes, asked.target
    members = {
        name: PassOptions(passes.enabled and spec.enabled)
        for name in _MEMBERS
        if isinstance(spec := getattr(passes, name), PassSpec)
    }
    return CompileOptions(
        target=target,
        backend=asked.backend,
        verify=asked.verify,
        rewrite=passes.enabled,
        attention=_attention(passes.attention, passes.enabled, asked, checkpoint),
        w8a8=_w8a8(passes.w8a8, passes.enabled, asked),
        **members,
    )


def _attention(asked: AttentionSpec, enabled: bool, settings: Settings, checkpoint: Iterable[str]) -> AttentionOptions:
    target = settings.target
    projections = frozenset(key for key in checkpoint if key.endswith(f".{PROJECTION}.weight"))
    standard = settings.backend != "triton"  # operators of ONNX alone
    sla = None
    if asked.kind == "sla" or (asked.kind == "auto" and projections and not standard):
        pv = choose_pv(target, "sla") if asked.pv == "auto" else asked.pv
        blocks = (asked.topk, asked.block_q, asked.block_k)
        sla = SlaOptions(*blocks, pv, asked.allow_untuned, asked.kind == "sla", projections)
    pv = choose_pv(target, "sage") if asked.pv == "auto" else asked.pv
    others = None
    if asked.kind in ("native", "sage"):
        others = AttentionChoice(asked.kind, "the recipe asks for it")
    elif standard:
        others = AttentionChoice("native", f"the backend {settings.backend} has standard operators alone")
    elif sla is not None and sla.pv == "none":
        others = AttentionChoice("native", "an SLA would be in floating point here, and so is this attention")
    elif pv == "none":
        others = AttentionChoice("native", "the recipe says pv: none, and Sage has no such product")
    return AttentionOptions(enabled and asked.enabled, target, sla, others, pv, asked.budget, {})


def _w8a8(asked: W8A8Spec, enabled: bool, settings: Settings) -> W8A8Options:
    target, format, reason = settings.target, asked.format, "switched off in the recipe"
    if format == "auto":
        format, reason = choose_linear_format(target), f"8-bit linears do not pay on {target}"
        if settings.backend != "triton":
            format, reason = "off", f"the backend {settings.backend} has standard operators alone"
    alphas = ALPHAS if asked.smooth == "auto" else () if asked.smooth == "off" else (float(asked.smooth),)
    return W8A8Options(
        enabled=enabled and asked.enabled,
        target=target,
        format=format,
        off_reason=reason,
        keeps_own=asked.format == "auto" and format != "off",
        in_each_layer=asked.layers == "all",
        alphas=alphas,
        alpha_named=asked.smooth not in ("auto", "off"),
        given_budget=asked.budget,
        keep={},
        smoothed=frozenset(),
        unsmoothed={},
    )
