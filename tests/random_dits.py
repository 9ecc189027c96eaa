"""Diffusion transformers at random, each a mixture of the ways in which people write one: `random_dit(seed)`.

`zoo` has whole styles, of which a model has one throughout; here every part is drawn by itself, and with it masks,
per-token modulation, tables of shifts, mixed dtypes and constants of a layer. As a script it compiles many of them
with all exact rewrites and says how many were refused and how far engines are from the model in float64.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if "zoo" not in sys.modules:  # as in tests/conftest.py, for a script
    spec = importlib.util.spec_from_file_location("zoo", Path(__file__).parent / "zoo.py")
    sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["zoo"])
import zoo

from turbocompile.build.captured import Twin
from turbocompile.build.compile import Compiled, compile_programs
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import Program
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Settings
from turbocompile.runtime.engine import Engine

Call = tuple[tuple[Any, ...], dict[str, Any]]
IN_CHANNELS, TEXT_CHANNELS, LONGEST = 4, 12, 64

CHOICES: dict[str, tuple[Any, ...]] = {
    "depth": (1, 2, 3, 4),
    "heads": (1, 2, 3, 4),
    "head_dim": (8, 16, 24, 32, 64),
    "tokens": tuple(range(5, 61)),
    "batch": (1, 2),
    "qkv": ("separate", "chunk", "unbind", "view"),
    "qkv_bias": (True, False),
    "layout": ("blhd", "bhld"),
    "attention": ("sdpa", "before", "after", "both", "einsum", "baddbmm"),
    "mask": ("none", "none", "bool", "float"),
    "qk_norm": ("none", "heads", "channels"),
    "norm": ("layer", "affine", "written", "rms", "rms_default_eps", "rms_written", "rms_upcast"),
    "rope": ("none", "complex", "rotate_half", "slices", "stacked"),
    "modulation": ("plus", "addcmul", "torch.addcmul", "tokens", "table", "none"),
    "gate": ("plus", "addcmul", "alpha"),
    "mlp": ("tanh", "gelu", "glu", "swiglu"),
    "cross": (True, False),
    "buffer": ("none", "persistent", "equal"),
    "mixed": (True, False),
}


@dataclass(frozen=True)
class Options:
    """How a model is written; the values are those of CHOICES.

    tokens: of the image; channels are heads * head_dim. mixed: norms, modulation and residuals in float32 where the
    model is in bfloat16. buffer: of each block: one a layer in the state dict, or one of all layers that is not.
    layer_constants: one a layer that is not in the state dict.
    """

    depth: int = 2
    heads: int = 2
    head_dim: int = 16
    tokens: int = 12
    batch: int = 2
    qkv: str = "separate"
    qkv_bias: bool = True
    layout: str = "blhd"
    attention: str = "sdpa"
    mask: str = "none"
    qk_norm: str = "none"
    norm: str = "layer"
    rope: str = "none"
    modulation: str = "plus"
    gate: str = "plus"
    mlp: str = "tanh"
    cross: bool = False
    buffer: str = "none"
    mixed: bool = False
    layer_constants: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


def wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is: a model in float64 is to be exact."""
    return x.float() if x.dtype.itemsize < 4 else x


class Norm(nn.Module):
    """A norm over the last axis, of `size` channels."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.size, self.kind = size, kind
        plain = kind in ("layer", "written")
        self.weight = None if plain else nn.Parameter(1 + 0.2 * torch.randn(size))
        self.bias = nn.Parameter(0.2 * torch.randn(size)) if kind == "affine" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("layer", "affine"):
            return F.layer_norm(x, (self.size,), self.weight, self.bias, 1e-6)
        if self.kind == "written":
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        if self.kind in ("rms", "rms_default_eps"):
            return F.rms_norm(x, (self.size,), self.weight, 1e-6 if self.kind == "rms" else None)
        if self.kind == "rms_written":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        variance = wide(x).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + 1e-6)).to(self.weight.dtype) * self.weight


class Tables(nn.Module):
    """Rotary tables of a sequence, as `zoo.rotate` takes them."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        half = o.head_dim // 2
        angles = torch.outer(torch.arange(LONGEST), 50.0 ** (-torch.arange(half) / half))
        self.kind = o.rope
        if o.rope == "complex":
            self.register_buffer("cis", torch.polar(torch.ones_like(angles), angles), persistent=False)
        else:
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, ...]:
        if self.kind == "complex":
            return (self.cis[:length],)
        tables = (self.cos[:length], self.sin[:length])
        return tuple(torch.cat([t, t], dim=-1) for t in tables) if self.kind == "rotate_half" else tables


def attend(o: Options, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention over (B, H, L, D). mask: boolean or added, (B, 1, 1, L_k)."""
    if o.attention == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scale = q.shape[-1] ** -0.5
    if o.attention == "baddbmm":
        flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
        if mask is None:
            start, beta = torch.empty(flat[0].shape[0], q.shape[2], k.shape[2], dtype=q.dtype), 0
        else:
            added = mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e4)
            start, beta = added.expand(*q.shape[:3], k.shape[2]).reshape(-1, q.shape[2], k.shape[2]), 1
        scores = torch.baddbmm(start, flat[0], flat[1].transpose(-1, -2), beta=beta, alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), flat[2]).reshape(q.shape)
    if o.attention == "before":
        scores = (q * scale) @ k.transpose(-2, -1)
    elif o.attention == "both":
        scores = (q * scale**0.5) @ (k * scale**0.5).transpose(-2, -1)
    elif o.attention == "einsum":
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    else:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Self-attention, or cross-attention where the block gives it a context."""

    def __init__(self, o: Options, cross: bool) -> None:
        super().__init__()
        self.o = o
        self.fused = o.qkv != "separate" and not cross
        if self.fused:
            self.qkv = nn.Linear(o.dim, 3 * o.dim, bias=o.qkv_bias)
        else:
            self.q, self.k, self.v = (nn.Linear(o.dim, o.dim, bias=o.qkv_bias) for _ in range(3))
        size = o.head_dim if o.qk_norm == "heads" else o.dim
        kind = o.norm if o.norm.startswith("rms") else "rms"
        self.norms = nn.ModuleList(Norm(size, kind) for _ in range(0 if o.qk_norm == "none" else 2))
        self.out = nn.Linear(o.dim, o.dim)

    def parts(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """q, k and v, (B, L, H, D) each."""
        b, length, (h, d) = x.shape[0], x.shape[1], (self.o.heads, self.o.head_dim)
        if not self.fused:
            made = [self.q(x), self.k(context), self.v(context)]
        elif self.o.qkv == "chunk":
            made = list(self.qkv(x).chunk(3, dim=-1))
        elif self.o.qkv == "view":
            made = list(self.qkv(x).view(b, length, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0))
            made = [t.transpose(1, 2) for t in made]
        else:
            made = list(self.qkv(x).unflatten(-1, (3, h, d)).unbind(2))
        if self.o.qk_norm == "channels":
            made[:2] = [norm(t.flatten(2)) for norm, t in zip(self.norms, made[:2], strict=True)]
        return [t.reshape(b, -1, h, d) for t in made]

    def forward(self, x: Tensor, context: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        style = zoo.Style(rope=self.o.rope, layout=self.o.layout)
        made = self.parts(x, context)
        if self.o.layout == "bhld":
            made = [t.transpose(1, 2) for t in made]
        if self.o.qk_norm == "heads":
            made[:2] = [norm(t) for norm, t in zip(self.norms, made[:2], strict=True)]
        if tables:
            made[:2] = [zoo.rotate(style, t, tables).to(t.dtype) for t in made[:2]]
        made = [t.to(made[2].dtype) for t in made]
        if self.o.layout == "blhd":
            made = [t.transpose(1, 2) for t in made]
        return self.out(attend(self.o, *made, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.kind, hidden = o.mlp, 2 * o.dim
        self.up = nn.Linear(o.dim, 2 * hidden if o.mlp == "swiglu" else hidden)
        self.gate = nn.Linear(o.dim, hidden, bias=False) if o.mlp == "glu" else None
        self.down = nn.Linear(hidden, o.dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            a, b = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(a) * b)
        if self.gate is not None:
            return self.down(self.up(x) * F.silu(self.gate(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "tanh" else "none"))


class Block(nn.Module):
    def __init__(self, o: Options, layer: int) -> None:
        super().__init__()
        self.o = o
        self.norm1, self.norm2 = Norm(o.dim, o.norm), Norm(o.dim, o.norm)
        self.attn, self.mlp = Attention(o, cross=False), FeedForward(o)
        self.cross = Attention(o, cross=True) if o.cross else None
        self.norm3 = Norm(o.dim, "affine") if o.cross else None
        if o.modulation == "table":
            self.scale_shift_table = nn.Parameter(torch.randn(1, 6, o.dim) / o.dim**0.5)
        elif o.modulation not in ("none", "tokens"):
            self.modulation = nn.Linear(o.dim, 6 * o.dim)
        if o.buffer != "none":
            value = torch.linspace(0.5, 1.5, o.dim) + (0.3 * layer if o.buffer == "persistent" else 0.0)
            self.register_buffer("gain", value, persistent=o.buffer == "persistent")
        if o.layer_constants:
            self.register_buffer("constant", torch.linspace(0.5, 1.5, o.dim) + 0.3 * layer, persistent=False)

    def values(self, temb: Tensor) -> list[Tensor | None]:
        """Shift, scale and gate of attention, then of the feed-forward: (B, 1, C), or (B, L, C) a token."""
        if self.o.modulation == "none":
            return [None] * 6
        if self.o.modulation == "table":
            return list((self.scale_shift_table + temb).chunk(6, dim=1))
        if self.o.modulation == "tokens":
            return [t.squeeze(2) for t in temb.chunk(6, dim=2)]
        return list(self.modulation(F.silu(temb)).unsqueeze(1).chunk(6, dim=-1))

    def normed(self, norm: Norm, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        mixed = self.o.mixed
        n = norm(wide(x) if mixed else x)
        if shift is not None and scale is not None:
            shift, scale = (wide(t) if mixed else t for t in (shift, scale))
            if self.o.modulation == "addcmul":
                n = shift.addcmul(n, 1 + scale)
            elif self.o.modulation == "torch.addcmul":
                n = torch.addcmul(n, n, scale) + shift
            else:
                n = n * (1 + scale) + shift
        return n.to(x.dtype)

    def gated(self, x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
        if gate is None:
            return x + y
        a, g, b = (wide(t) for t in (x, gate, y)) if self.o.mixed else (x, gate, y)
        if self.o.gate == "addcmul":
            return torch.addcmul(a, g, b).to(x.dtype)
        return (torch.add(a, g * b, alpha=0.5) if self.o.gate == "alpha" else a + g * b).to(x.dtype)

    def forward(self, x: Tensor, temb: Tensor, text: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.values(temb)
        y = self.normed(self.norm1, x, shift1, scale1)
        x = self.gated(x, gate1, self.attn(y, y, tables, None if self.o.cross else mask))
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), text, (), mask)
        if self.o.buffer != "none":
            x = x * self.gain
        if self.o.layer_constants:
            x = x * self.constant
        return self.gated(x, gate2, self.mlp(self.normed(self.norm2, x, shift2, scale2)))


class Dit(nn.Module):
    """forward(x (B, L, C_in), timestep (B,), text (B, T, C_text), mask): (B, L, C_in).

    mask: (B, T) of the text where blocks have cross-attention, else (B, L); boolean (True: attend) or added.
    """

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.o = o
        self.embed, self.text_in = nn.Linear(IN_CHANNELS, o.dim), nn.Linear(TEXT_CHANNELS, o.dim)
        self.time_in = nn.Linear(16, o.dim)
        self.time_out = nn.Linear(o.dim, o.dim * (6 if o.modulation in ("table", "tokens") else 1))
        self.tables = Tables(o) if o.rope != "none" else None
        self.blocks = nn.ModuleList(Block(o, i) for i in range(o.depth))
        self.norm, self.head = Norm(o.dim, "layer"), nn.Linear(o.dim, IN_CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        o, length = self.o, x.shape[1]
        angles = wide(timestep)[:, None] * 100.0 ** (-torch.arange(8) / 8)
        temb = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))))
        if o.modulation == "table":
            temb = temb.unflatten(1, (6, -1))
        elif o.modulation == "tokens":
            temb = temb.unflatten(1, (6, -1))[:, None] * torch.linspace(0.5, 1.0, length, dtype=x.dtype)[:, None, None]
        x, text = self.embed(x), self.text_in(text)
        tables = self.tables(length) if self.tables is not None else ()
        if mask is not None:
            mask = mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, temb, text, tables, mask)
        return self.head(self.norm(x))


def draw(seed: int, **fixed: Any) -> Options:
    """The options of a seed; `fixed` names some of them."""
    rng = random.Random(seed)
    drawn = {name: rng.choice(values) for name, values in CHOICES.items()}
    return replace(Options(**drawn), **fixed)


def in_dtype(model: nn.Module, dtype: torch.dtype, o: Options) -> nn.Module:
    """The model with its floating tensors in a dtype; where it is mixed, norms, tables and buffers stay float32."""
    for name, module in model.named_modules():
        wide_norm = o.mixed and isinstance(module, Norm) and not name.endswith(("norm", "norm3")) and "attn" not in name
        keep = dtype.itemsize < 4 and (wide_norm or (o.mixed and isinstance(module, Tables)))
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point() and not keep:
                tensor.data = tensor.data.to(dtype)
    return model


def random_dit(
    seed: int, dtype: torch.dtype = torch.float32, calls: int = 1, **fixed: Any
) -> tuple[nn.Module, list[Call]]:
    """A model and example calls of it, the same for the same arguments.

    dtype: float32 or bfloat16. calls: how many, each of another number of tokens. fixed: options that are not drawn;
    `layer_constants` is drawn never.
    """
    o = draw(seed, **fixed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = in_dtype(Dit(o).eval().requires_grad_(False), dtype, o)
        made = [example(replace(o, tokens=max(2, o.tokens - 3 * i)), dtype) for i in range(calls)]
    return model, made


def example(o: Options, dtype: torch.dtype) -> Call:
    """A call, of random numbers."""
    texts = 7
    args = (
        torch.randn(o.batch, o.tokens, IN_CHANNELS),
        torch.rand(o.batch),
        torch.randn(o.batch, texts, TEXT_CHANNELS),
    )
    args = tuple(t.to(dtype) for t in args)
    if o.mask == "none":
        return args, {}
    seen = torch.rand(o.batch, texts if o.cross else o.tokens) > 0.3
    seen[:, 0] = True
    mask = seen if o.mask == "bool" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e4)
    return args, {"mask": mask}


# ------------------------------------------------------------------------------------------------------------ numbers


def in_float64(model: nn.Module, call: Call) -> Tensor:
    """What the model gives in float64, of the same weights and inputs."""

    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    exact = copy.deepcopy(model)
    for module in exact.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.is_complex():
                module._buffers[name] = tensor.to(torch.complex128)
            elif tensor is not None and tensor.is_floating_point():
                module._buffers[name] = tensor.double()
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    args, kwargs = call
    return exact(*map(widened, args), **{k: widened(v) for k, v in kwargs.items()})


def relative_l2(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Outcome:
    """What became of a model: relative L2 of engine and model to float64, and what its build warned of."""

    seed: int
    options: Options
    engine: float
    eager: float
    rewritten: int
    warnings: tuple[str, ...]


def compiled(seed: int, dtype: torch.dtype, **fixed: Any) -> Outcome:
    """Compiles one model with all exact rewrites, verified by numbers; it is captured once for both."""
    model, (call,) = random_dit(seed, dtype, **fixed)
    program = capture(model, *call)
    item = compile_program(program, model)
    evaluate = Evaluator(item.source, item.constants)
    weights = {name: evaluate(e.expr, e.prefix) for name, e in item.plan.items()}
    engine = Engine(item.programs, weights, name="dit", config={}, dtype=dtype)
    truth = in_float64(model, call)
    errors = [relative_l2(f(*call[0], **call[1]), truth) for f in (engine, model)]
    return Outcome(seed, model.o, *errors, sum(r.rewritten for r in item.results), tuple(item.warnings))


def compile_program(program: Program, model: nn.Module, passes: dict[str, Any] | None = None) -> Compiled:
    """The Program as `optimize` compiles it for a CPU, measured on itself. passes: as in a recipe."""
    options = resolve(Settings.from_dict({"target": "cpu", "passes": passes or {}}))
    source = ModuleTensors(model)
    return compile_programs("dit", {"call": program}, source, options, twin=Twin(program, "call"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    done: list[Outcome] = []
    failed = 0
    for seed in range(given.first, given.first + given.number):
        try:
            outcome = compiled(seed, dtype)
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}\n  {draw(seed)}", flush=True)
            continue
        done.append(outcome)
        for text in outcome.warnings:
            print(f"seed {seed}: {text}\n  {outcome.options}", flush=True)
        if outcome.engine > 1.5 * outcome.eager:
            print(
                f"seed {seed}: engine {outcome.engine:.2e}, eager {outcome.eager:.2e}\n  {outcome.options}", flush=True
            )
    ratios = sorted(o.engine / o.eager for o in done)
    print(
        f"{given.dtype}: {given.number} models, {failed} failed, {sum(bool(o.warnings) for o in done)} with a warning; "
        f"{sum(o.rewritten for o in done)} sites rewritten; error of the engine beside that of the model, both to "
        f"float64: median {ratios[len(ratios) // 2]:.2f}, largest {ratios[-1]:.2f}; largest error of an engine "
        f"{max(o.engine for o in done):.1e}, of a model {max(o.eager for o in done):.1e}"
    )


if __name__ == "__main__":
    main()
