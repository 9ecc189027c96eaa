"""Trains wan-mini: a genuine Wan text-to-video pipeline of moving digits, so small that it trains in minutes.

The models are those of Wan, at smaller sizes: AutoencoderKLWan (8 times smaller in space, 4 times in time, 16
channels), the umT5 encoder, and WanTransformer3DModel. Training has three stages: the autoencoder learns reconstruction
and KL, on cut-outs and then on whole frames; it encodes many scenes; transformer and text encoder learn flow matching
on these latents.

examples/train_wan_mini.py runs the stages. The classes of this file are an example for other data sets.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from turbocompile.recipe.presets import TEXT_TOKENS
from turbocompile.sampling import flow
from turbocompile.training.losses import flow_matching_batch, flow_matching_loss, vae_loss
from turbocompile.training.trainer import Batch, step_generator
from turbocompile.video import vae as wan_vae
from turbocompile.wan import tokenizer as wan_tokenizer
from turbocompile.wan.tensors import SINGLE
from turbocompile.wan_mini import world

# The words of all prompts; the tokenizer has one piece for each word.
WORDS = " ".join(("a an and bounces moves", *world.DIGITS, *world.COLOURS, *world.DIRECTIONS))
PROMPT_TOKENS = 16  # tokens of a padded prompt; the longest prompt has 9, including its end

VAE: Mapping[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
TEXT_ENCODER: Mapping[str, Any] = {
    "d_model": 128,
    "d_kv": 64,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
}
# Every linear of a block takes a multiple of 128 features, because the 128 x 128 tiles of int8_block need it.
TRANSFORMER: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_ENCODER["d_model"],
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
FLOW_SHIFT = 5.0
GUIDANCE = 4.0
PROMPT_DROPOUT = (
    0.1  # the share of training samples without a prompt, because guidance needs a model without prompt, too
)
# This weight is large for an autoencoder of this kind, because the transformer learns a latent of fewer bits sooner,
# and the reconstruction can afford it: with 1e-4 it had 57 dB, far above the 28 dB that are needed.
KL_WEIGHT = 2e-3


# ------------------------------------------------------------------------------------------------------ the autoencoder


class Autoencoder(nn.Module):
    """AutoencoderKLWan as a trainable function from videos to reconstructions.

    forward takes a video (B, 3, F, H, W) in [-1, 1] and noise (B, 16, 1 + (F - 1) / 4, H / 8, W / 8), and returns the
    reconstruction from the latent mean + exp(logvar / 2) noise, in the video's shape, and mean and logvar, in the
    noise's.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(video).latent_dist
        latent = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        return self.vae._decode(latent, return_dict=False)[0], posterior.mean, posterior.logvar


def reconstruct(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The autoencoder's objective: L1 for edges, squared errors because PSNR measures them, and a KL that bounds
    latents.
    """
    loss, parts = vae_loss(*_reconstruction(model, batch), kl_weight=KL_WEIGHT, l1_weight=1.0, mse_weight=2.0)
    return loss, {"l1": parts["l1"], "mse": parts["mse"], "kl": parts["kl"]}


def _reconstruction(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    reconstruction, mean, logvar = model(batch["video"], batch["noise"])
    return reconstruction, batch["video"], mean, logvar


@dataclass
class Clips:
    """Batches for the autoencoder: cut-outs of `frames` frames and side x side pixels, around the digit.

    A batch depends on seed and step alone. Random numbers are drawn on the CPU, and videos are rendered on `device`.
    """

    batch: int
    side: int
    frames: int
    device: torch.device
    seed: int = 0

    def __post_init__(self) -> None:
        self.scans = world.load_scans(train=True)
        self.masks = world.enlarge(self.scans.images).to(self.device)
        self.wanted = [c for c in world.combinations() if not c.held_out]

    def __call__(self, step: int) -> Batch:
        generator = step_generator(self.seed, step)
        chosen = torch.randint(len(self.wanted), (self.batch,), generator=generator)
        scenes = world.draw_scenes([self.wanted[i] for i in chosen.tolist()], self.scans, generator)
        first = torch.randint(world.FRAMES - self.frames + 1, (self.batch, 1), generator=generator)
        frames = first + torch.arange(self.frames)
        place = scenes.corners().gather(1, frames[:, self.frames // 2, None, None].expand(-1, 1, 2))[:, 0]
        # The window lies at random between two places: the left edges of square and window meet, or their right edges
        # do.
        place = place + (scenes.size[:, None] - self.side) * torch.rand(self.batch, 2, generator=generator)
        window = place.clamp(0, world.SIZE - self.side).round()
        latent = (self.batch, VAE["z_dim"], 1 + (self.frames - 1) // 4, self.side // 8, self.side // 8)
        noise = torch.randn(latent, generator=generator)
        video = world.render(
            scenes.to(self.device), self.masks, frames.to(self.device), window.to(self.device), self.side
        )
        return {"video": video, "noise": noise.to(self.device, non_blocking=True)}


def light_norms(vae: Any) -> None:
    """Changes the autoencoder's norms, in place, so that they return the dtype of their input.

    Autocast runs the norms in float32, which takes a third of a training step on an H100; the sum of squares is float32
    either way. The new norm computes diffusers' WanRMS_norm, whose bias is always 0 in Wan.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for module in vae.modules():
        if isinstance(module, WanRMS_norm):
            module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x, dim=1) * (module.scale * module.gamma).to(x.dtype)


def build_vae(seed: int = 0) -> Any:
    """The autoencoder before training, in float32."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**VAE)


# -------------------------------------------------------------------------------------------------------- the latents


@torch.no_grad()
def encode_scenes(vae: Any, wanted: Sequence[world.Combination], seed: int, batch: int = 16) -> torch.Tensor:
    """The posterior means (N, 16, 9, 32, 32), bfloat16, of one whole video for each of the given combinations.

    batch: how many videos are encoded at a time.
    """
    device = next(vae.parameters()).device
    scans = world.load_scans(train=True)
    masks = world.enlarge(scans.images).to(device)
    made = []
    for number, start in enumerate(range(0, len(wanted), batch)):
        scenes = world.draw_scenes(list(wanted[start : start + batch]), scans, step_generator(seed, number))
        video = world.render(scenes.to(device), masks).to(vae.dtype)
        made.append(vae.encode(video).latent_dist.mode().bfloat16())
    return torch.cat(made)


def normalized(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """(latents - mean) / std in float32, with each channel's mean and std from the autoencoder's configuration."""
    mean, std = (
        torch.tensor(values, device=latents.device).reshape(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents.float() - mean) / std


def statistics(latents: torch.Tensor) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel of latents (N, C, T, H, W), C numbers each."""
    sums = torch.zeros(2, latents.shape[1], dtype=torch.float64, device=latents.device)
    for part in latents.split(256):
        sums += torch.stack((part.double().mean((2, 3, 4)).sum(0), part.double().square().mean((2, 3, 4)).sum(0)))
    mean, square = sums / len(latents)
    return mean.tolist(), (square - mean.square()).clamp(min=1e-12).sqrt().tolist()


# ----------------------------------------------------------------------------------------------- transformer and text


class TextToVideo(nn.Module):
    """Transformer and text encoder, which are trained together, as one function to the velocity.

    forward takes noisy (B, 16, T, H, W), timestep (B,), 0 to 1000, and token ids and their mask (B, 16), int64; it
    returns the velocity in noisy's shape. As in Wan's pipeline, the embeddings behind the prompt are zeros up to 512
    tokens, and the transformer attends to them.
    """

    def __init__(self, transformer: Any, text_encoder: Any) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embeddings (B, 512, 128) of token ids and their mask (B, 16), zeros behind the prompt."""
        hidden = self.text_encoder(ids, mask).last_hidden_state
        return F.pad(hidden * mask[..., None], (0, 0, 0, TEXT_TOKENS - ids.shape[1]))

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return self.transformer(noisy, timestep, self.text(ids, mask), return_dict=False)[0]


def denoise(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective of transformer and text encoder: flow matching."""
    velocity = model(batch["noisy"], batch["timestep"], batch["ids"], batch["mask"])
    return flow_matching_loss(velocity, batch["latents"], batch["noise"]), {}


@dataclass
class Latents:
    """Batches for the transformer, from normalized latents (N, 16, 9, 32, 32) and the N prompts of their videos.

    frames: how many latent frames of each video are used, from the first on; None: all.
    """

    batch: int
    latents: torch.Tensor
    prompts: Sequence[str]
    seed: int = 0
    frames: int | None = None

    def __post_init__(self) -> None:
        self.device = self.latents.device
        ids, mask = tokenize([*self.prompts, ""])
        self.ids, self.mask = ids.to(self.device), mask.to(self.device)

    def __call__(self, step: int) -> Batch:
        generator = step_generator(self.seed, step, self.device)
        chosen = torch.randint(len(self.latents), (self.batch,), generator=generator, device=self.device)
        dropped = torch.rand(self.batch, generator=generator, device=self.device) < PROMPT_DROPOUT
        text = torch.where(dropped, len(self.latents), chosen)
        drawn = flow_matching_batch(
            self.latents[chosen, :, : self.frames], generator, shift=FLOW_SHIFT, logit_normal=True
        )
        return {**drawn, "ids": self.ids[text], "mask": self.mask[text]}


def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of N prompts and their mask, each (N, 16) int64."""
    tokenizer = wan_tokenizer.build_tokenizer(WORDS)
    tokenizer.enable_padding(length=PROMPT_TOKENS, pad_token=wan_tokenizer.PAD)
    encoded = tokenizer.encode_batch(list(prompts))
    ids = torch.tensor([e.ids for e in encoded])
    return ids, torch.tensor([e.attention_mask for e in encoded])


def build_text_to_video(seed: int = 0, **changes: Any) -> TextToVideo:
    """Transformer and text encoder before training, in float32. changes: fields that replace those of TRANSFORMER."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = WanTransformer3DModel(**{**TRANSFORMER, **changes})
        nn.init.zeros_(transformer.proj_out.weight)  # so that the first prediction is 0, the mean of all velocities
        config = UMT5Config(**TEXT_ENCODER, vocab_size=wan_tokenizer.vocab_size(WORDS))
        return TextToVideo(transformer, UMT5EncoderModel(config))


@torch.no_grad()
def sample_videos(
    model: TextToVideo,
    vae: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = GUIDANCE,
    precision: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Makes a video for each prompt and its seed, as an engine would, but in batches: uint8 (B, 33, 256, 256, 3).

    The solver is UniPC with guidance. precision: bfloat16 runs the models under autocast. The noise of a seed is that
    which `generate` draws on the CPU for the seed, so that an engine on the CPU makes the same video.
    """
    device = next(model.parameters()).device
    count = len(prompts)
    ids, mask = (part.to(device) for part in tokenize([*prompts, ""]))
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        text = model.text(ids, mask)

    def velocity(x: torch.Tensor, timestep: torch.Tensor, expert: str, conditional: bool) -> torch.Tensor:
        chosen = text[:count] if conditional else text[count:].expand(count, -1, -1)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return model.transformer(x, timestep, chosen, return_dict=False)[0]

    shape = (VAE["z_dim"], 1 + (world.FRAMES - 1) // 4, world.SIZE // 8, world.SIZE // 8)
    noise = torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(s)) for s in seeds])
    x = flow.solve(flow.guided(velocity, guidance), noise.to(device), kind="unipc", steps=steps, shift=FLOW_SHIFT)
    return torch.cat([wan_vae.to_frames(wan_vae.decode(vae, part)) for part in x.split(8)])


# ------------------------------------------------------------------------------------------------------- the pipeline


def save_model(model: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a model's folder: config.json and the weights in bfloat16, under the file names of the model's library.

    The folder appears whole, because it is written under another name first.
    """
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    transformers = hasattr(model.config, "save_pretrained")
    (model.config.save_pretrained if transformers else model.save_config)(made)
    name = "model.safetensors" if transformers else SINGLE
    kept = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(kept, made / name, {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The autoencoder of a folder that `save_model` wrote; its bfloat16 weights become float32."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False).to(device)


def save_pipeline(folder: Path, model: TextToVideo, tensors: Mapping[str, torch.Tensor], vae_folder: Path) -> None:
    """Writes a folder of diffusers' WanPipeline.

    tensors: the weights to write for `model`, for example moving averages, under the model's names. vae_folder: the
    autoencoder's folder, which is copied.
    """
    import diffusers

    from turbocompile.wan.synthetic_components import scheduler

    for name in ("transformer", "text_encoder"):
        own = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
        if (
            name == "text_encoder"
        ):  # the embedding is stored once, because the library ties its second name to the first
            own.pop("encoder.embed_tokens.weight", None)
        save_model(getattr(model, name), own, folder / name)
    if vae_folder != folder / "vae":
        shutil.copytree(vae_folder, folder / "vae", dirs_exist_ok=True)
    wan_tokenizer.save_tokenizer(folder / "tokenizer", WORDS)
    scheduler(FLOW_SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
