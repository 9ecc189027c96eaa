"""Diffusion transformers written by hand in many styles, each of which states the sites that passes should find in it.

The models are tiny (tens of channels, a dozen tokens). What they share is the function of a DiT: patches, a timestep,
blocks of attention and feed-forward with modulated norms and gated residuals, a modulated head. How it is written is
what `Style` varies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

EPS = 1e-6
TEXT_TOKENS = 5
IN_CHANNELS = 4


@dataclass(frozen=True)
class Style:
    """How a model is written. The first value of each comment is the plainest.

    dim = num_heads * head_dim channels; num_kv_heads < num_heads is grouped-query attention.
    """

    depth: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_ratio: int = 2
    grid: tuple[int, int] = (3, 4)
    batch: int = 2
    qkv: str = "separate"  # chunk | reshape (3, H, D) | unbind (3, H, D after a permute) | interleaved (H, 3, D)
    qkv_bias: str = "all"  # none | q (only q has one)
    layout: str = "blhd"  # bhld: rotary and norms after the transpose
    attention: str = "sdpa"  # softmax | prescaled | einsum | baddbmm
    gqa: str = "enable"  # repeat: k and v repeated for each group
    qk_norm: str = "none"  # channels | heads
    rope: str = "none"  # complex | rotate_half | slices | stacked
    norm: str = "module"  # functional | written
    modulation: str = "table"  # linear | none: affine norms and plain residuals
    modulate: str = "formula"  # addcmul | reordered
    gate: str = "formula"  # addcmul
    mlp: str = "gelu_tanh"  # gelu | silu_glu
    cross: bool = False
    joint: bool = False
    joint_rope: str = "image"  # all: over the concatenated sequence

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


# ---------------------------------------------------------------------------------------------------------- norms


class LayerNorm(nn.Module):
    """LayerNorm over the channels, as a module's op or written out."""

    def __init__(self, dim: int, style: Style, affine: bool) -> None:
        super().__init__()
        self.style, self.dim = style.norm, dim
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim)) if affine else None
        self.bias = nn.Parameter(0.1 * torch.randn(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.style != "written":
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, EPS)
        centred = x - x.mean(-1, keepdim=True)
        n = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
        return n if self.weight is None else n * self.weight + self.bias


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, as a module's op or written out."""

    def __init__(self, dim: int, style: Style) -> None:
        super().__init__()
        self.style = style.norm
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "written":
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


def modulate(style: Style, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if style.modulate == "addcmul":
        return torch.addcmul(shift, x, 1 + scale)
    if style.modulate == "reordered":
        return shift + (scale + 1.0) * x
    return x * (1 + scale) + shift


def gated(style: Style, x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    if gate is None:
        return x + y
    if style.gate == "addcmul":
        return torch.addcmul(x, gate, y)
    return x + gate * y


# --------------------------------------------------------------------------------------------------------- rotary


class Rope(nn.Module):
    """Angles of a 2-D grid: tables per axis, expanded over the grid; a text before it has the angles of a 1-D one."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        half = style.head_dim // 2
        split = (half - half // 2, half // 2)
        self.style = style
        angles = [
            torch.outer(torch.arange(n, dtype=torch.float64), 100.0 ** (-torch.arange(d) / d))
            for n, d in zip(style.grid, split, strict=True)
        ]
        if style.joint and style.joint_rope == "all":
            length = TEXT_TOKENS + style.tokens
            angles = [torch.outer(torch.arange(length, dtype=torch.float64), 100.0 ** (-torch.arange(half) / half))]
        self.axes = len(angles)
        for i, a in enumerate(angles):
            if style.rope == "complex":
                self.register_buffer(f"cis{i}", torch.polar(torch.ones_like(a), a).to(torch.complex64), False)
            else:
                self.register_buffer(f"cos{i}", a.cos().float(), False)
                self.register_buffer(f"sin{i}", a.sin().float(), False)

    def table(self, kind: str) -> Tensor:
        """(tokens, head_dim / 2)."""
        if self.axes == 1:
            return getattr(self, kind + "0")
        (a, b), (h, w) = (getattr(self, kind + "0"), getattr(self, kind + "1")), self.style.grid
        both = [a.view(h, 1, -1).expand(h, w, -1), b.view(1, w, -1).expand(h, w, -1)]
        return torch.cat(both, dim=-1).reshape(h * w, -1)

    def forward(self) -> tuple[Tensor, ...]:
        if self.style.rope == "complex":
            return (self.table("cis"),)
        tables = (self.table("cos"), self.table("sin"))
        if self.style.rope == "rotate_half":
            return tuple(torch.cat([t, t], dim=-1) for t in tables)
        return tables


def rotate(style: Style, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """x: (B, L, H, D), or (B, H, L, D) where the layout says so."""
    tables = tuple(t if style.layout == "bhld" else t.unsqueeze(1) for t in tables)
    if style.rope == "complex":
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * tables[0]).flatten(-2).type_as(x)
    cos, sin = tables
    if style.rope == "rotate_half":
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    if style.rope == "stacked":
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


# ------------------------------------------------------------------------------------------------------ attention


def attend(style: Style, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, H, L, D)."""
    grouped = k.shape[1] != q.shape[1]
    if grouped and (style.gqa == "repeat" or style.attention != "sdpa"):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    scale = q.shape[-1] ** -0.5
    if style.attention == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if style.attention == "prescaled":
        return torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1) @ v
    if style.attention == "einsum":
        p = torch.einsum("bhid,bhjd->bhij", q, k).mul(scale).softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", p, v)
    if style.attention == "baddbmm":
        flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
        start = torch.empty(flat[0].shape[0], q.shape[2], k.shape[2], dtype=q.dtype)
        scores = torch.baddbmm(start, flat[0], flat[1].transpose(-1, -2), beta=0, alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), flat[2]).reshape(q.shape)
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1) @ v


class Projections(nn.Module):
    """q, k and v of one stream, normed: (B, L, H, D) each, or (B, H, L, D)."""

    def __init__(self, style: Style, queries: bool = True, fused: bool = True) -> None:
        super().__init__()
        d, hq, hk = style.head_dim, style.num_heads, style.num_kv_heads
        self.style = style
        self.heads = {"q": hq, "k": hk, "v": hk} if queries else {"k": hk, "v": hk}
        self.fused = style.qkv != "separate" and queries and fused
        if self.fused:
            self.to_qkv = nn.Linear(style.dim, (hq + 2 * hk) * d, bias=style.qkv_bias != "none")
        else:
            for name, heads in self.heads.items():
                bias = style.qkv_bias == "all" or (style.qkv_bias == "q" and name == "q")
                setattr(self, f"to_{name}", nn.Linear(style.dim, heads * d, bias=bias))
        for name in ("q", "k"):
            if style.qk_norm != "none" and name in self.heads:
                setattr(self, f"norm_{name}", RMSNorm(d if style.qk_norm == "heads" else self.heads[name] * d, style))

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """(B, L, channels) each; the fused projection may give (B, L, H, D)."""
        if not self.fused:
            return {name: getattr(self, f"to_{name}")(x) for name in self.heads}
        y, d = self.to_qkv(x), self.style.head_dim
        heads = list(self.heads.values())
        if self.style.qkv == "chunk" or heads[0] != heads[1]:
            return dict(zip("qkv", y.split([h * d for h in heads], dim=-1), strict=True))
        if self.style.qkv == "interleaved":
            return dict(zip("qkv", y.unflatten(-1, (heads[0], 3, d)).unbind(-2), strict=True))
        y = y.unflatten(-1, (3, heads[0], d))
        parts = y.permute(2, 0, 1, 3, 4).unbind(0) if self.style.qkv == "unbind" else [y[:, :, i] for i in range(3)]
        return dict(zip("qkv", parts, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, t in self.split(x).items():
            norm = getattr(self, f"norm_{name}", None)
            if norm is not None and self.style.qk_norm == "channels":
                t = norm(t.flatten(2))
            t = t.reshape(*x.shape[:2], self.heads[name], self.style.head_dim)
            if self.style.layout == "bhld":
                t = t.transpose(1, 2)
            if norm is not None and self.style.qk_norm == "heads":
                t = norm(t)
            found[name] = t
        return found

    def fusable(self) -> int:
        return int(not self.fused)


class Attention(nn.Module):
    """Self-attention, cross-attention (a context's k and v), or joint attention over text and image."""

    def __init__(self, style: Style, kind: str) -> None:
        super().__init__()
        self.style, self.kind = style, kind
        if kind == "cross":
            self.to_q = nn.Linear(style.dim, style.dim)
            self.kv = Projections(style, queries=False)
            if style.qk_norm != "none":
                self.norm_q = RMSNorm(style.head_dim if style.qk_norm == "heads" else style.dim, style)
        else:
            self.qkv = Projections(style)
        if kind == "joint":
            self.text = Projections(style, fused=False)
            self.to_text = nn.Linear(style.dim, style.dim)
        self.to_out = nn.Linear(style.dim, style.dim)

    def query(self, x: Tensor) -> Tensor:
        q = self.to_q(x)
        if self.style.qk_norm == "channels":
            q = self.norm_q(q)
        q = q.unflatten(-1, (self.style.num_heads, -1))
        q = q.transpose(1, 2) if self.style.layout == "bhld" else q
        return self.norm_q(q) if self.style.qk_norm == "heads" else q

    def forward(self, x: Tensor, context: Tensor | None, tables: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        style = self.style
        parts = self.qkv(x) if self.kind != "cross" else {"q": self.query(x), **self.kv(context)}
        along = 2 if style.layout == "bhld" else 1
        rotary = style.rope != "none" and self.kind != "cross"
        everywhere = self.kind == "joint" and style.joint_rope == "all"
        if rotary and not everywhere:
            parts |= {n: rotate(style, parts[n], tables) for n in "qk"}
        if self.kind == "joint":
            text = self.text(context)
            parts = {n: torch.cat([text[n], parts[n]], dim=along) for n in "qkv"}
        if rotary and everywhere:
            parts |= {n: rotate(style, parts[n], tables) for n in "qk"}
        if style.layout == "blhd":
            parts = {n: t.transpose(1, 2) for n, t in parts.items()}
        out = attend(style, parts["q"], parts["k"], parts["v"]).transpose(1, 2).flatten(2)
        if self.kind != "joint":
            return (self.to_out(out),)
        length = context.shape[1]
        return self.to_out(out[:, length:]), self.to_text(out[:, :length])

    def sites(self) -> Counter[str]:
        found = Counter(attention=1)
        found["fuse_qkv"] = sum(m.fusable() for m in self.modules() if isinstance(m, Projections))
        found["qk_norm_rope"] = int(self.style.qk_norm != "none")
        found["w8a8"] = sum(isinstance(m, nn.Linear) for m in self.modules())
        return found


# --------------------------------------------------------------------------------------------------------- blocks


class Mlp(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.kind = style.mlp
        hidden = style.mlp_ratio * style.dim
        self.up = nn.Linear(style.dim, hidden)
        self.gate = nn.Linear(style.dim, hidden) if self.kind == "silu_glu" else None
        self.down = nn.Linear(hidden, style.dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))

    def sites(self) -> Counter[str]:
        gelu = self.gate is None
        return Counter(w8a8=sum(isinstance(m, nn.Linear) for m in self.modules()), gelu_quant=int(gelu))


class Modulation(nn.Module):
    """Six (B, 1, C) values of a stream: shift, scale and gate of attention, then of the feed-forward."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        if style.modulation == "table":
            self.table = nn.Parameter(torch.randn(1, 6, style.dim) / style.dim**0.5)
        elif style.modulation == "linear":
            self.linear = nn.Linear(style.dim, 6 * style.dim)

    def forward(self, temb: Tensor) -> list[Tensor | None]:
        if self.style.modulation == "none":
            return [None] * 6
        if self.style.modulation == "table":
            return list((self.table + temb).chunk(6, dim=1))
        return [t.unsqueeze(1) for t in self.linear(F.silu(temb)).chunk(6, dim=-1)]


class Stream(nn.Module):
    """What a stream of tokens has in a block besides attention: modulation, norms, feed-forward, residuals."""

    def __init__(self, style: Style, cross: bool) -> None:
        super().__init__()
        self.style = style
        plain = style.modulation == "none"
        self.modulation = Modulation(style)
        self.norm1, self.norm2 = (LayerNorm(style.dim, style, affine=plain) for _ in range(2))
        self.norm3 = LayerNorm(style.dim, style, affine=True) if cross else None
        self.mlp = Mlp(style)

    def norm(self, norm: LayerNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return norm(x) if scale is None or shift is None else modulate(self.style, norm(x), scale, shift)

    def feed_forward(self, x: Tensor, values: list[Tensor | None]) -> Tensor:
        shift, scale, gate = values[3:]
        return gated(self.style, x, gate, self.mlp(self.norm(self.norm2, x, scale, shift)))

    def sites(self) -> Counter[str]:
        modulated = self.style.modulation != "none"
        found = Counter(adaln=2 if modulated else 0)
        # Attention's residual is followed by a norm, and so is cross-attention's; the feed-forward's ends the block.
        found["residual_norm"] = 1 + int(self.norm3 is not None) + int(modulated)
        # The first norm of a block has no residual before it; modulated it is an adaln, and else a quantize joins it.
        found["gelu_quant"] = int(not modulated)
        return found


class Block(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.stream = Stream(style, style.cross)
        self.text_stream = Stream(style, False) if style.joint else None
        self.attn = Attention(style, "joint" if style.joint else "self")
        self.cross_attn = Attention(style, "cross") if style.cross else None

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        values = self.stream.modulation(temb)
        shift, scale, gate = values[:3]
        y = self.stream.norm(self.stream.norm1, x, scale, shift)
        if self.text_stream is None:
            (y,) = self.attn(y, None, tables)
        else:
            text_values = self.text_stream.modulation(temb)
            z = self.text_stream.norm(self.text_stream.norm1, text, text_values[1], text_values[0])
            y, z = self.attn(y, z, tables)
            text = gated(self.style, text, text_values[2], z)
            text = self.text_stream.feed_forward(text, text_values)
        x = gated(self.style, x, gate, y)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.stream.norm3(x), text, None)[0]
        return self.stream.feed_forward(x, values), text


class Dit(nn.Module):
    """forward(x (B, C_in, h, w), timestep (B,), text (B, TEXT_TOKENS, dim)) -> (B, h * w, C_in); joint: text too."""

    def __init__(self, style: Style = Style()) -> None:
        super().__init__()
        self.style = style
        self.embed = nn.Linear(IN_CHANNELS, style.dim)
        self.time_in = nn.Linear(8, style.dim)
        self.time_out = nn.Linear(style.dim, (6 if style.modulation == "table" else 1) * style.dim)
        self.text_in = nn.Linear(style.dim, style.dim)
        self.rope = Rope(style) if style.rope != "none" else None
        self.blocks = nn.ModuleList(Block(style) for _ in range(style.depth))
        self.norm = LayerNorm(style.dim, style, affine=False)
        self.head_table = nn.Parameter(torch.randn(1, 2, style.dim) / style.dim**0.5)
        self.head = nn.Linear(style.dim, IN_CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        style = self.style
        x = self.embed(x.flatten(2).transpose(1, 2))
        angles = timestep[:, None] * 10.0 ** (-torch.arange(4))
        c = F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        temb = self.time_out(c)
        if style.modulation == "table":
            temb = temb.unflatten(1, (6, -1))
        text = self.text_in(text)
        tables = self.rope() if self.rope is not None else ()
        for block in self.blocks:
            x, text = block(x, text, temb, tables)
        shift, scale = (self.head_table + c.unsqueeze(1)).chunk(2, dim=1)
        out = self.head(modulate(style, self.norm(x), scale, shift))
        return (out, text) if style.joint else out

    def sites(self) -> Counter[str]:
        return Counter(adaln=1)


class Stack(nn.Module):
    """Blocks of which each is `make()`, one behind the other, on whatever they take."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PlainBlock(nn.Module):
    """A block of a Plain: attention of two heads with a residual."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y)


class Plain(nn.Module):
    """Two equal blocks of 64 channels behind a timestep, as short as a model can be written: plain(x, t)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(64) for _ in range(2))

    def forward(self, x, t):
        x = x + t[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


def example(style: Style, seed: int = 0) -> tuple[Tensor, ...]:
    """Arguments of a call: x, timestep, text."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(style.batch, IN_CHANNELS, *style.grid, generator=g)
    timestep = torch.linspace(0.3, 0.9, style.batch)
    return x, timestep, torch.randn(style.batch, TEXT_TOKENS, style.dim, generator=g)


def build(style: Style = Style(), seed: int = 0) -> Dit:
    """A model with seeded weights, whose modulation is no near-identity as it is after a usual initialization."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Dit(style).eval().requires_grad_(False)


def expected_sites(model: nn.Module) -> dict[str, int]:
    """The sites of each pass, counted from the modules that the model has (w8a8 and gelu_quant: where they are on)."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, (Dit, Stream, Attention, Mlp)):
            found += module.sites()
    names = ("attention", "fuse_qkv", "w8a8", "qk_norm_rope", "adaln", "residual_norm", "gelu_quant")
    return {name: found[name] for name in names}


def styles(**fixed: object) -> st.SearchStrategy[Style]:
    """All styles, with some fields fixed."""
    choices: dict[str, Callable[[], st.SearchStrategy[object]]] = {
        "batch": lambda: st.sampled_from([2, 1]),
        "num_heads": lambda: st.sampled_from([2, 4]),
        "num_kv_heads": lambda: st.sampled_from([2, 1]),
        "qkv": lambda: st.sampled_from(["separate", "chunk", "reshape", "unbind", "interleaved"]),
        "qkv_bias": lambda: st.sampled_from(["all", "none", "q"]),
        "layout": lambda: st.sampled_from(["blhd", "bhld"]),
        "attention": lambda: st.sampled_from(["sdpa", "softmax", "prescaled", "einsum", "baddbmm"]),
        "gqa": lambda: st.sampled_from(["enable", "repeat"]),
        "qk_norm": lambda: st.sampled_from(["none", "channels", "heads"]),
        "rope": lambda: st.sampled_from(["none", "complex", "rotate_half", "slices", "stacked"]),
        "norm": lambda: st.sampled_from(["module", "written"]),
        "modulation": lambda: st.sampled_from(["table", "linear", "none"]),
        "modulate": lambda: st.sampled_from(["formula", "addcmul", "reordered"]),
        "gate": lambda: st.sampled_from(["formula", "addcmul"]),
        "mlp": lambda: st.sampled_from(["gelu_tanh", "gelu", "silu_glu"]),
        "cross": lambda: st.booleans(),
        "joint": lambda: st.booleans(),
        "joint_rope": lambda: st.sampled_from(["image", "all"]),
    }
    drawn = {name: make() for name, make in choices.items() if name not in fixed}
    return st.builds(Style, **drawn, **{name: st.just(value) for name, value in fixed.items()})


# One of each, named after the model family that is written so.
GALLERY = {
    "plain": Style(),
    "dit": Style(qkv="unbind", modulation="linear", layout="bhld"),
    "video": Style(qk_norm="channels", rope="slices", cross=True, norm="written"),
    "llama_like": Style(
        num_kv_heads=1, rope="rotate_half", qk_norm="heads", qkv="chunk", mlp="silu_glu", qkv_bias="none", layout="bhld"
    ),
    "mmdit": Style(joint=True, qk_norm="heads", modulation="linear", layout="bhld"),
    "mmdit_rope": Style(joint=True, qk_norm="heads", rope="stacked", joint_rope="all", layout="bhld"),
    "explicit": Style(attention="softmax", modulate="addcmul", gate="addcmul", rope="complex", qk_norm="heads"),
    "baddbmm": Style(attention="baddbmm", modulate="reordered", mlp="gelu"),
    "einsum": Style(attention="einsum", qkv="interleaved", qk_norm="heads", rope="stacked"),
    "grouped": Style(num_kv_heads=1, gqa="repeat", attention="prescaled", qkv_bias="q"),
    "encoder": Style(modulation="none", cross=True, norm="written"),
}
