"""Small components with seeded weights, for a model whose weights are synthetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from turbocompile.recipe.presets import Preset
from turbocompile.wan.components import ALLOWED, MODELS, entry, quiet
from turbocompile.wan.tensors import synthetic
from turbocompile.wan.tokenizer import VOCAB_SIZE, save_tokenizer


class SyntheticComponents:
    """Small components with seeded weights, and a VAE of the preset's size."""

    def __init__(self, preset: Preset, seed: int, dtype: torch.dtype) -> None:
        """dtype: of the text encoder; the VAE and the image encoder stay in float32."""
        self._preset, self._seed, self._dtype = preset, seed, dtype

    @property
    def names(self) -> tuple[str, ...]:
        image = ("image_encoder", "image_processor") if self._preset.image_encoder else ()
        return ("vae", "text_encoder", "tokenizer", "scheduler", *image)

    def _dtype_of(self, name: str) -> torch.dtype:
        return self._dtype if name == "text_encoder" else torch.float32

    def table(self) -> dict[str, dict[str, str]]:
        made = {}
        for name in self.names:
            cls, library = next(iter(ALLOWED[name].items()))
            dtype = self._dtype_of(name) if name in MODELS else None
            made[name] = entry(name, cls, library, dtype)
        return made

    def vae_config(self) -> Mapping[str, Any]:
        return self._preset.vae

    def _model(self, name: str) -> Any:
        """The model on the current default device, with the library's own initial values."""
        from diffusers import AutoencoderKLWan
        from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

        if name == "vae":
            return AutoencoderKLWan(**self._preset.vae)
        if name == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**self._preset.text_encoder, vocab_size=VOCAB_SIZE))
        return CLIPVisionModel(CLIPVisionConfig(**(self._preset.image_encoder or {})))

    def model(self, name: str) -> Any:
        """The VAE, text encoder or image encoder with its synthetic weights, for inference."""
        with torch.random.fork_rng(devices=[]):  # building draws initial values that are thrown away
            model = self._model(name)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # transformers 5 dropped the level `vision_model.` that version 4 has
                plain = parameter_name.removeprefix("vision_model.")
                parameter.copy_(synthetic(f"{name}.{plain}", tuple(parameter.shape), self._seed))
        if self._dtype_of(name) != torch.float32:  # diffusers warns of any cast
            model = model.to(self._dtype_of(name))
        return model.eval().requires_grad_(False)

    def sizes(self) -> dict[str, int]:
        made = {}
        for name in self.names:
            if name in MODELS:
                with torch.device("meta"):
                    model = self._model(name)
                elements = sum(p.numel() for p in model.parameters())
                made[name] = elements * self._dtype_of(name).itemsize
            else:
                made[name] = 25_000 if name == "tokenizer" else 1_000
        return made

    def save(self, folder: Path) -> dict[str, dict[str, str]]:
        for name in self.names:
            target = folder / name
            if name in MODELS:
                with quiet():
                    self.model(name).save_pretrained(target)
            elif name == "tokenizer":
                save_tokenizer(target)
            elif name == "scheduler":
                scheduler(self._preset.flow_shift).save_pretrained(target)
            else:
                _save_image_processor(target, (self._preset.image_encoder or {})["image_size"])
        return self.table()

    def load(self) -> dict[str, Any]:
        from transformers import PreTrainedTokenizerFast

        from turbocompile.wan import tokenizer

        made: dict[str, Any] = {name: self.model(name) for name in self.names if name in MODELS}
        made["tokenizer"] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.build_tokenizer(),
            pad_token=tokenizer.PAD,
            eos_token=tokenizer.EOS,
            unk_token=tokenizer.UNK,
            model_max_length=512,
        )
        made["scheduler"] = scheduler(self._preset.flow_shift)
        if "image_processor" in self.names:
            from transformers import CLIPImageProcessor

            made["image_processor"] = CLIPImageProcessor(**_image_settings(self._preset.image_encoder["image_size"]))  # type: ignore[index]
        return made


def scheduler(flow_shift: float) -> Any:
    """The scheduler that Wan's diffusers folders have: UniPC on the flow-matching ODE."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )


def _image_settings(size: int) -> dict[str, Any]:
    """CLIP's preprocessing at another image size."""
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _save_image_processor(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "image_processor_type": "CLIPImageProcessor",
        **_image_settings(size),
        "do_convert_rgb": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
