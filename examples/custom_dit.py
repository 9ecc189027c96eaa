"""Compiles a diffusion transformer that turbocompile has never seen, and shows what was rewritten and how exact it is.

    python examples/custom_dit.py            # add a folder's name to keep the engine there

Nothing here is written for turbocompile: fused q, k and v, rotate-half rotary, adaLN-zero by `torch.addcmul`. The
passes find the sites by what the graph computes.
"""

import sys

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import turbocompile


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm_q, self.norm_k = nn.RMSNorm(dim // num_heads), nn.RMSNorm(dim // num_heads)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: torch.Tensor, c: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        qkv = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(y)
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class CustomDiT(nn.Module):
    def __init__(self, dim: int = 256, num_heads: int = 4, depth: int = 4, tokens: int = 256) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(16, dim), nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.head = nn.Linear(dim, 16)
        angles = torch.arange(tokens)[:, None] / 100 ** torch.linspace(0, 1, dim // num_heads // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x, c = self.embed(x), self.time(t[:, None])
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model = CustomDiT().eval()
    x, t = torch.randn(2, 256, 16), torch.rand(2)
    engine = turbocompile.optimize(model, args=(x, t))
    Console().print(engine.report)
    with torch.no_grad():
        expected = model(x, t)
    error = (engine(x, t) - expected).abs().max() / expected.abs().max()
    print(f"largest difference to the model: {error:.1e} of the largest value")
    if len(sys.argv) > 1:
        print(f"engine: {engine.save(sys.argv[1])}")


if __name__ == "__main__":
    main()
