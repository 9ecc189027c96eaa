"""The original Wan transformer in plain PyTorch, by its own tensor names: what a checkpoint of any format computes.

Written from the published mathematics, and independent of diffusers. Everything is float32, the rotary tables float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]
HEAD_DIM = 128


def shapes(
    channels: int = 256, ffn: int = 512, text: int = 64, layers: int = 2, inputs: int = 16, image: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's tensors. image: the channels of the CLIP tokens of Wan2.1's image-to-video."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (channels, inputs, 1, 2, 2),
        "patch_embedding.bias": (channels,),
        "head.modulation": (1, 2, channels),
    }

    def linear(name: str, out: int, size: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, size), (out,)

    linear("text_embedding.0", channels, text)
    linear("text_embedding.2", channels, channels)
    linear("time_embedding.0", channels, 256)
    linear("time_embedding.2", channels, channels)
    linear("time_projection.1", 6 * channels, channels)
    linear("head.head", 64, channels)
    for i in range(layers):
        found[f"blocks.{i}.modulation"] = (1, 6, channels)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attention}.{part}", channels, channels)
            for part in ("norm_q", "norm_k"):
                found[f"blocks.{i}.{attention}.{part}.weight"] = (channels,)
        found[f"blocks.{i}.norm3.weight"] = found[f"blocks.{i}.norm3.bias"] = (channels,)
        linear(f"blocks.{i}.ffn.0", ffn, channels)
        linear(f"blocks.{i}.ffn.2", channels, ffn)
        if image is not None:
            linear(f"blocks.{i}.cross_attn.k_img", channels, channels)
            linear(f"blocks.{i}.cross_attn.v_img", channels, channels)
            found[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (channels,)
    if image is not None:
        found["img_emb.proj.0.weight"] = found["img_emb.proj.0.bias"] = (image,)
        linear("img_emb.proj.1", image, image)
        linear("img_emb.proj.3", channels, image)
        found["img_emb.proj.4.weight"] = found["img_emb.proj.4.bias"] = (channels,)
    return found


def random_state(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """Weights at the scale of trained ones: linears N(0, 1 / inputs), norms near 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(**sizes).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            near_one = name.endswith("weight")
            state[name] = 1 + 0.1 * noise if near_one else 0.05 * noise
        else:
            state[name] = noise * math.prod(shape[1:] if "modulation" not in name else shape[-1:]) ** -0.5
    return state


def random_call(
    frames: int = 2, height: int = 4, width: int = 4, text: int = 64, inputs: int = 16, image: int | None = None
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a call, as diffusers' transformer takes them; 512 text tokens, of an image 257."""
    generator = torch.Generator().manual_seed(7)
    call = {
        "hidden_states": torch.randn(1, inputs, frames, height, width, generator=generator),
        "timestep": torch.tensor([321.0]),
        "encoder_hidden_states": torch.randn(1, 512, text, generator=generator),
    }
    if image is not None:
        call["encoder_hidden_states_image"] = torch.randn(1, 257, image, generator=generator)
    return call


@torch.no_grad()
def original_wan(
    state: State,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_image: torch.Tensor | None = None,
) -> torch.Tensor:
    """The velocity (1, 16, frames, height, width) of a latent of the same frames, height and width."""
    net = _Net({name: tensor.float() for name, tensor in state.items()})
    return net(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)


class _Net:
    def __init__(self, state: State) -> None:
        self.state = state
        self.channels = state["patch_embedding.bias"].shape[0]
        self.layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def layer_norm(self, x: torch.Tensor, name: str = "", eps: float = 1e-6) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"] if name else normed

    def rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.state[f"{name}.weight"]

    def __call__(self, x, timestep, text, image) -> torch.Tensor:
        x = F.conv3d(x, self.state["patch_embedding.weight"], self.state["patch_embedding.bias"], stride=(1, 2, 2))
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)[0]  # [tokens, channels], in the order t, h, w
        angles = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128) * timestep.double()
        e = self.linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()]).float())
        e = self.linear("time_embedding.2", F.silu(e))
        e0 = self.linear("time_projection.1", F.silu(e)).reshape(6, self.channels)
        text = self.linear("text_embedding.0", text[0])
        text = self.linear("text_embedding.2", F.gelu(text, approximate="tanh"))
        seen = None
        if image is not None:
            seen = self.layer_norm(image[0], "img_emb.proj.0", eps=1e-5)
            seen = F.gelu(self.linear("img_emb.proj.1", seen))
            seen = self.layer_norm(self.linear("img_emb.proj.3", seen), "img_emb.proj.4", eps=1e-5)
        turns = rotations(grid)
        for i in range(self.layers):
            x = self.block(f"blocks.{i}", x, e0, text, seen, turns)
        shift, scale = self.state["head.modulation"][0] + e
        x = self.linear("head.head", self.layer_norm(x) * (1 + scale) + shift)
        t, h, w = grid  # a token's 64 numbers are in the order of patch rows, patch columns, channels
        return x.reshape(t, h, w, 2, 2, 16).permute(5, 0, 1, 3, 2, 4).reshape(1, 16, t, 2 * h, 2 * w)

    def block(self, name: str, x, e0, text, image, turns) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.state[f"{name}.modulation"][0] + e0
        attended = self.self_attention(f"{name}.self_attn", self.layer_norm(x) * (1 + scale1) + shift1, turns)
        x = x + attended * gate1
        x = x + self.cross_attention(f"{name}.cross_attn", self.layer_norm(x, f"{name}.norm3"), text, image)
        y = self.linear(f"{name}.ffn.0", self.layer_norm(x) * (1 + scale2) + shift2)
        return x + self.linear(f"{name}.ffn.2", F.gelu(y, approximate="tanh")) * gate2

    def self_attention(self, name: str, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        q = turned(heads(self.rms_norm(self.linear(f"{name}.q", x), f"{name}.norm_q")), turns)
        k = turned(heads(self.rms_norm(self.linear(f"{name}.k", x), f"{name}.norm_k")), turns)
        v = heads(self.linear(f"{name}.v", x))
        out = attention(q, k, v)
        projection = f"{name}.attn_op.local_attn.proj_l"
        if f"{projection}.weight" in self.state:  # SLA where all keys are one block, which is selected
            phi_q, phi_k = q.softmax(-1), k.softmax(-1)
            linear = phi_q @ (phi_k.transpose(1, 2) @ v) / (1e-5 + phi_q @ phi_k.sum(1)[..., None])
            out = out + self.linear(projection, linear)
        return self.linear(f"{name}.o", joined(out))

    def cross_attention(self, name: str, x: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None):
        q = heads(self.rms_norm(self.linear(f"{name}.q", x), f"{name}.norm_q"))
        k = heads(self.rms_norm(self.linear(f"{name}.k", text), f"{name}.norm_k"))
        out = attention(q, k, heads(self.linear(f"{name}.v", text)))
        if image is not None:
            k = heads(self.rms_norm(self.linear(f"{name}.k_img", image), f"{name}.norm_k_img"))
            out = out + attention(q, k, heads(self.linear(f"{name}.v_img", image)))
        return self.linear(f"{name}.o", joined(out))


def heads(x: torch.Tensor) -> torch.Tensor:
    """[tokens, channels] as [heads, tokens, 128]."""
    return x.reshape(x.shape[0], -1, HEAD_DIM).transpose(0, 1)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1) @ v


def rotations(grid: tuple[int, ...]) -> torch.Tensor:
    """The rotary angles as complex numbers [tokens, 64]: 22 pairs turn with the frame, 21 each with row and column."""
    angles = []
    for axis, (size, pairs) in enumerate(zip(grid, (22, 21, 21), strict=True)):
        speed = 10000 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        along = torch.outer(torch.arange(size, dtype=torch.float64), speed)
        where = [1, 1, 1, pairs]
        where[axis] = size
        angles.append(along.reshape(where).expand(*grid, pairs))
    return torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, -1).reshape(-1, 64))


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [heads, tokens, 128] with each pair of neighbours turned by its angle."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], 64, 2))
    return torch.view_as_real(pairs * turns).reshape(x.shape).float()
