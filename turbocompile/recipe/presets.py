"""The Wan models by name: the configurations that their published diffusers folders hold, and tiny ones.

A preset is everything that is needed to build a model without any file: with seeded weights it is a model to try,
test and plan with. Tiny presets have every part of a real pipeline at a size that a CPU runs in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from turbocompile.recipe.configuration import is_vace

TEXT_TOKENS = 512  # Wan pads or cuts every prompt to this many tokens
# flow time of Wan2.2, by task, below which its second expert denoises
BOUNDARY = {"i2v": 0.9, "t2v": 0.875, "ti2v": 0.875, "vace": 0.875}

# Height and width by the name of a resolution and the aspect ratio (width : height), as Wan and rCM publish them.
SIZES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "480p": {"16:9": (480, 832), "9:16": (832, 480), "1:1": (640, 640), "4:3": (480, 640), "3:4": (640, 480)},
    "720p": {"16:9": (720, 1280), "9:16": (1280, 720), "1:1": (960, 960), "4:3": (720, 960), "3:4": (960, 720)},
}

TI2V_CHANNELS = 48  # of the latents of Wan2.2 TI2V 5B; those of every other Wan have 16
CLIP_TOKENS = 257  # tokens of an image from the CLIP encoder of Wan2.1 I2V: 16 x 16 patches and the class token


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents, and latents tokens. The defaults are those of Wan2.1 and of Wan2.2 A14B.

    spatial, temporal: pixels and frames a latent has (the first frame has a latent of its own). patch: latents a token
    has, as (frames, height, width).
    """

    spatial: int = 8
    temporal: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)

    def latent(self, shape: Size) -> tuple[int, int, int]:
        """Latent frames, height and width of a video. Each reference image of VACE takes a latent frame, too."""
        frames = (shape.num_frames - 1) // self.temporal + 1 + shape.references
        return frames, shape.height // self.spatial, shape.width // self.spatial

    def tokens(self, shape: Size) -> int:
        """How many tokens the transformer sees."""
        return math.prod(size // patch for size, patch in zip(self.latent(shape), self.patch, strict=True))

    def pixels(self, latent: Sequence[int]) -> dict[str, int]:
        """The height, width and num_frames of the video of a latent (frames, height, width)."""
        frames, height, width = latent
        spatial = self.spatial
        return {"height": spatial * height, "width": spatial * width, "num_frames": self.temporal * (frames - 1) + 1}

    def wrong(self, shape: Size) -> tuple[str, str] | None:
        """The field of a size that makes no whole number of tokens, and what it must be; None where all is right."""
        for name, patch in (("height", self.patch[1]), ("width", self.patch[2])):
            size, step = getattr(shape, name), self.spatial * patch
            if size % step:
                low = size // step * step
                use = f"{low} or {low + step}" if low else str(step)
                why = f"VAE {self.spatial} times patch {patch}"
                return name, f"must be a multiple of {step} ({why}), not {size}; use {use}"
        step, first = self.temporal * self.patch[0], self.temporal * (self.patch[0] - 1) + 1
        if (shape.num_frames - first) % step:
            low = (shape.num_frames - first) // step * step + first
            use = f"{low} or {low + step}" if low > 0 else str(first)
            return "num_frames", f"must be {step}k + {first}, not {shape.num_frames}; use {use}"
        return None


class Size(Protocol):
    """A size of video: pixels and frames, and the reference images that VACE takes beside it."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def num_frames(self) -> int: ...

    @property
    def references(self) -> int: ...


def vae_strides(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels and frames a latent has, of a configuration of AutoencoderKLWan: by its layers, which do the work.

    `scale_factor_spatial` and `scale_factor_temporal` repeat them; folders of older versions lack them. Raises
    ValueError, with what is wrong, for a configuration that is none or makes a decoder that does not undo the encoder.
    """
    levels, halved = vae.get("dim_mult", (1, 2, 4, 4)), vae.get("temperal_downsample", (False, True, True))
    if not isinstance(levels, (list, tuple)) or not levels:
        raise ValueError(f"dim_mult must be a list, not {levels!r}")
    steps = len(levels) - 1
    if not isinstance(halved, (list, tuple)) or len(halved) < steps or any(type(h) is not bool for h in halved):
        raise ValueError(f"temperal_downsample must be a list of {steps} times true or false, not {halved!r}")
    patch = vae.get("patch_size")
    patch = 1 if patch is None else patch
    if type(patch) is not int or patch < 1:
        raise ValueError(f"patch_size must be a whole number of at least 1, not {patch!r}")
    encoder, decoder = sum(halved[:steps]), sum(halved[len(halved) - steps :])
    if encoder != decoder:
        raise ValueError(
            f"temperal_downsample {list(halved)} has more entries than dim_mult has steps ({steps}), and the decoder "
            "makes other frames than the encoder took"
        )
    return patch * 2**steps, 2**encoder


def latent_channels(vae: Mapping[str, Any]) -> int:
    """The channels of a VAE's latents, from its configuration; a configuration without z_dim has those of Wan2.1."""
    return vae.get("z_dim", len(LATENTS_MEAN))


def wrong_latents(vae: Mapping[str, Any]) -> str | None:
    """What is wrong with the statistics of a VAE's latents, as a sentence; None where all is right."""
    channels = latent_channels(vae)
    for name, default in (("latents_mean", LATENTS_MEAN), ("latents_std", LATENTS_STD)):
        values = vae.get(name, default)
        if not isinstance(values, (list, tuple)) or len(values) != channels:
            count = f"{len(values)} values" if isinstance(values, (list, tuple)) else repr(values)
            return f"{name} has {count} for the {channels} channels of z_dim"
        numbers = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not numbers or (name == "latents_std" and min(values) <= 0):
            return f"{name} holds {values!r}, and must hold finite numbers (of latents_std above zero)"
    return None


# Of each latent channel over the training videos: z = (mu - mean) / std. The VAE's own configuration holds them too.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """One model: the configurations of its parts.

    transformer, vae, text_encoder, image_encoder: keyword arguments of diffusers' WanTransformer3DModel and
        AutoencoderKLWan and of transformers' UMT5Config and CLIPVisionConfig. The text and image encoders of a
        full-size preset are small ones with the true widths at their outputs: they serve synthetic weights alone.
    experts: 2 where a second transformer takes over below `boundary_ratio` (Wan2.2).
    flow_shift: of the scheduler. hub_id: where the weights are published in diffusers' form. expand_timesteps: each
        token has a timestep of its own (TI2V).
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any] | None = None
    experts: int = 1
    boundary_ratio: float | None = None
    flow_shift: float = 3.0
    hub_id: str | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    expand_timesteps: bool = False

    @property
    def task(self) -> str:
        """As in `task_of`."""
        return "ti2v" if self.expand_timesteps else task_of(self.transformer)

    @property
    def geometry(self) -> Geometry:
        return Geometry(*vae_strides(self.vae), tuple(self.transformer["patch_size"]))

    @property
    def pipeline(self) -> str:
        """The diffusers pipeline class."""
        return {"i2v": "WanImageToVideoPipeline", "vace": "WanVACEPipeline"}.get(self.task, "WanPipeline")


def task_of(transformer: Mapping[str, Any]) -> str:
    """What a transformer of a configuration makes videos from.

    "vace": a control video, masks and reference images beside the text. "i2v": an image, whose latent and mask are
    channels beside the noise. "ti2v": text or an image, whose latent stands for the first frame's noise; it is told by
    TI2V's 48 channels. Else "t2v": text alone.
    """
    if is_vace(transformer):
        return "vace"
    if transformer["in_channels"] > transformer["out_channels"]:
        return "i2v"
    return "ti2v" if transformer["out_channels"] == TI2V_CHANNELS == transformer["in_channels"] else "t2v"


def _transformer(heads: int, head_dim: int, ffn_dim: int, layers: int, **more: Any) -> Mapping[str, Any]:
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    return MappingProxyType(config | more)


def _vae(base_dim: int, channels: int = len(LATENTS_MEAN)) -> Mapping[str, Any]:
    """A VAE of stride 8, of the size of Wan2.1's for a base_dim of 96. channels: of its latents."""
    known = channels == len(LATENTS_MEAN)
    return MappingProxyType(
        {
            "base_dim": base_dim,
            "z_dim": channels,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
            "dropout": 0.0,
            "latents_mean": list(LATENTS_MEAN) if known else [0.0] * channels,
            "latents_std": list(LATENTS_STD) if known else [1.0] * channels,
        }
    )


def _vae_of_ti2v(base_dim: int = 160, decoder_base_dim: int = 256) -> Mapping[str, Any]:
    """Wan2.2's VAE for TI2V 5B: 48 channels at stride 16. Its statistics serve synthetic weights alone."""
    return MappingProxyType(
        dict(_vae(base_dim, TI2V_CHANNELS))
        | {
            "decoder_base_dim": decoder_base_dim,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
        }
    )


def published_vae(channels: int) -> Mapping[str, Any]:
    """The VAE that Wan's transformers of so many latent channels are published with: stride 16 for 48, else 8."""
    return _vae_of_ti2v() if channels == TI2V_CHANNELS else _vae(96, channels)


def _text_encoder(width: int) -> Mapping[str, Any]:
    """A small umT5 encoder of the given output width; its vocabulary is the local tokenizer's."""
    return MappingProxyType(
        {
            "d_model": width,
            "d_kv": 32,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.0,
            "tie_word_embeddings": True,
        }
    )


def _image_encoder(width: int, image_size: int, patch_size: int) -> Mapping[str, Any]:
    """A small CLIP vision tower of the given width; its tokens are the patches and one for the class."""
    return MappingProxyType(
        {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": width // 16,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
        }
    )


def _tiny(variant: str, head_dim: int) -> Preset:
    """A tiny pipeline: 2 blocks of 256 channels, so that all linears are multiples of 128 (int8_block needs that)."""
    more: dict[str, Any] = {"text_dim": 64, **_TINY.get(variant, {})}
    experts = 2 if variant.endswith("-experts") else 1
    kind = variant.removeprefix("t2v").removeprefix("-")
    transformer = _transformer(256 // head_dim, head_dim, 512, 2, **more)
    return Preset(
        name="-".join(["wan-tiny", *([kind] if kind else []), *(["128"] if head_dim == 128 else [])]),
        transformer=transformer,
        vae=_vae_of_ti2v(8, 8) if variant == "ti2v" else _vae(8),
        text_encoder=_text_encoder(64),
        image_encoder=_image_encoder(32, 32, 8) if transformer["image_dim"] is not None else None,
        experts=experts,
        boundary_ratio=BOUNDARY[task_of(transformer)] if experts == 2 else None,
        height=256,
        width=256,
        num_frames=17,
        expand_timesteps=variant == "ti2v",
    )


_IMAGE = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 256}
# variant of a tiny pipeline -> what its transformer has otherwise
_TINY: Mapping[str, Mapping[str, Any]] = {
    "i2v": {"in_channels": 36},
    "i2v-image": _IMAGE,
    "i2v-experts": {"in_channels": 36},
    "flf2v": {**_IMAGE, "pos_embed_seq_len": 2 * 17},  # 2 images of 4 x 4 patches and the class token
    "ti2v": {"in_channels": TI2V_CHANNELS, "out_channels": TI2V_CHANNELS},
    "vace": {"vace_layers": (0, 1), "vace_in_channels": 96},
}


# variant of a tiny pipeline -> what it is
VARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "t2v": "text to video (as Wan2.1 T2V)",
        "i2v": "image to video by 36 input channels",
        "i2v-image": "image to video by 36 input channels and CLIP tokens (as Wan2.1 I2V)",
        "i2v-experts": "image to video with a high-noise and a low-noise transformer (as Wan2.2 I2V A14B)",
        "t2v-experts": "text to video with a high-noise and a low-noise transformer (as Wan2.2 T2V A14B)",
        "flf2v": "a first and a last image to video (as Wan2.1 FLF2V)",
        "ti2v": "text or an image to video, with a timestep for each token (as Wan2.2 TI2V 5B)",
        "vace": "text, a control video, masks and reference images to video (as Wan2.1 VACE)",
    }
)


def tiny_preset(variant: str = "t2v", head_dim: int = 64) -> Preset:
    """The tiny preset of a variant (see VARIANTS) and head dimension (64 or 128); KeyError where there is none."""
    return PRESETS[_tiny(variant, head_dim).name]


def boundary_of(ratio: float | None, task: str) -> float:
    """The flow time in [0, 1] below which the second of two experts denoises. ratio: the model's own, if it has one.

    task: as `task_of` says it.
    """
    return BOUNDARY[task] if ratio is None else float(ratio)


def preset_for(transformer: Mapping[str, Any], experts: int = 1, boundary_ratio: float | None = None) -> Preset:
    """A preset around any configuration of the transformer: a VAE of the true size and small encoders that fit it."""
    image_dim = transformer["image_dim"]
    return Preset(
        name="wan",
        transformer=transformer,
        vae=published_vae(transformer["out_channels"]),
        text_encoder=_text_encoder(transformer["text_dim"]),
        image_encoder=_image_encoder(image_dim, 224, 14) if image_dim is not None else None,
        experts=experts,
        boundary_ratio=boundary_ratio,
        expand_timesteps=task_of(transformer) == "ti2v",
    )


def with_transformer(preset: Preset, transformer: Mapping[str, Any]) -> Preset:
    """The preset with another configuration of the transformer, and encoders of the widths that it takes."""
    changed = replace(preset, transformer=MappingProxyType(dict(transformer)))
    text_dim, image_dim = transformer["text_dim"], transformer["image_dim"]
    if text_dim != preset.text_encoder["d_model"]:
        changed = replace(changed, text_encoder=_text_encoder(text_dim))
    if transformer["out_channels"] != preset.vae["z_dim"]:
        changed = replace(
            changed, vae=_vae(preset.vae["base_dim"], transformer["out_channels"]), expand_timesteps=False
        )
    old = preset.image_encoder["hidden_size"] if preset.image_encoder else None
    if image_dim != old:
        changed = replace(changed, image_encoder=None if image_dim is None else _image_encoder(image_dim, 224, 14))
    return changed


def _full(name: str, hub: str, transformer: Mapping[str, Any], **more: Any) -> Preset:
    vae = published_vae(transformer["out_channels"])
    return Preset(name, transformer, vae, _text_encoder(4096), hub_id=f"Wan-AI/{hub}", **more)


_OF_14B = (40, 128, 13824, 40)  # heads, channels of a head, of the feed-forward network, layers
_OF_1_3B = (12, 128, 8960, 30)
_CLIP = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_720P: dict[str, Any] = {"height": 720, "width": 1280, "flow_shift": 5.0}

_PRESETS = (
    *(_tiny(variant, head_dim) for variant in VARIANTS for head_dim in (64, 128)),
    _full("wan2.1-t2v-1.3b", "Wan2.1-T2V-1.3B-Diffusers", _transformer(*_OF_1_3B)),
    _full("wan2.1-t2v-14b", "Wan2.1-T2V-14B-Diffusers", _transformer(*_OF_14B)),
    _full(
        "wan2.1-i2v-14b",
        "Wan2.1-I2V-14B-480P-Diffusers",
        _transformer(*_OF_14B, **_CLIP),
        image_encoder=_image_encoder(1280, 224, 14),
    ),
    _full(
        "wan2.1-i2v-14b-720p",
        "Wan2.1-I2V-14B-720P-Diffusers",
        _transformer(*_OF_14B, **_CLIP),
        image_encoder=_image_encoder(1280, 224, 14),
        **_720P,
    ),
    _full(
        "wan2.1-flf2v-14b",
        "Wan2.1-FLF2V-14B-720P-diffusers",
        _transformer(*_OF_14B, **_CLIP, pos_embed_seq_len=2 * CLIP_TOKENS),
        image_encoder=_image_encoder(1280, 224, 14),
        **_720P,
    ),
    _full(
        "wan2.1-vace-1.3b",
        "Wan2.1-VACE-1.3B-diffusers",
        _transformer(*_OF_1_3B, vace_layers=tuple(range(0, 30, 2)), vace_in_channels=96),
    ),
    _full(
        "wan2.1-vace-14b",
        "Wan2.1-VACE-14B-diffusers",
        _transformer(*_OF_14B, vace_layers=tuple(range(0, 40, 5)), vace_in_channels=96),
        **_720P,
    ),
    _full(
        "wan2.2-t2v-a14b",
        "Wan2.2-T2V-A14B-Diffusers",
        _transformer(*_OF_14B),
        experts=2,
        boundary_ratio=BOUNDARY["t2v"],
        **_720P,
    ),
    _full(
        "wan2.2-i2v-a14b",
        "Wan2.2-I2V-A14B-Diffusers",
        _transformer(*_OF_14B, in_channels=36),
        experts=2,
        boundary_ratio=BOUNDARY["i2v"],
        height=720,
        width=1280,
    ),
    _full(
        "wan2.2-ti2v-5b",
        "Wan2.2-TI2V-5B-Diffusers",
        _transformer(24, 128, 14336, 30, in_channels=TI2V_CHANNELS, out_channels=TI2V_CHANNELS),
        height=704,
        width=1280,
        num_frames=121,
        flow_shift=5.0,
        expand_timesteps=True,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})
HUB_PRESETS: Mapping[str, Preset] = MappingProxyType({p.hub_id: p for p in _PRESETS if p.hub_id})
