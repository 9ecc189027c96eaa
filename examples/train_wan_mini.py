"""Trains examples/wan-mini from nothing: autoencoder, latents, transformer with text encoder; then judges it.

    python examples/train_wan_mini.py --run runs/wan-mini --device cuda                 # 16 minutes of one H100
    python examples/train_wan_mini.py --run runs/wan-mini --device cuda --seconds 540   # a part; call it again

A run that was stopped or killed goes on from its last checkpoint. The pipeline comes to RUN/wan-mini, with a line of
metrics for every 50 steps in its folder training/; RUN/evaluation.json and RUN/sheet.png say what its videos show.
--smoke takes two steps of everything with one clip each, to try the script: two minutes of a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import TurbocompileError
from turbocompile.training.config import TrainConfig
from turbocompile.training.trainer import Data, Objective, Trainer
from turbocompile.wan_mini import train as wan_mini
from turbocompile.wan_mini import world
from turbocompile.wan_mini.evaluate import evaluate_vae, evaluate_videos, write_sheet


@dataclass(frozen=True)
class VaeStage:
    """One stage of the autoencoder: cut-outs of side x side pixels and so many frames, so many at once."""

    name: str
    config: TrainConfig
    batch: int
    side: int
    frames: int


# Muon learns the autoencoder several times faster than AdamW: 18.5 dB after 240 small steps, where AdamW has 14.
_CONFIG = TrainConfig(steps=1000, optimizer="muon", lr=3e-3, precision="bfloat16", keep=1, cuda_graph=True)
_VAE = replace(_CONFIG, weight_decay=0.0, ema_decay=0.99)
VAE_STAGES = (
    # Short clips are cheap, and teach what a pixel is;
    VaeStage("vae-short", _VAE, batch=32, side=64, frames=9),
    # whole ones teach the causal convolutions' long past: trained on 9 frames alone, frames 12 on came out at 23 dB.
    VaeStage("vae-long", replace(_VAE, steps=800, decay=0.5, ema_decay=0.995), batch=8, side=64, frames=world.FRAMES),
)


@dataclass(frozen=True)
class TransformerStage:
    """One stage of the transformer: so many latent frames of so many scenes at once."""

    name: str
    config: TrainConfig
    batch: int
    frames: int


_TRANSFORMER = replace(_CONFIG, steps=6000, betas=(0.9, 0.98), warmup=200, ema_decay=0.998)
TRANSFORMER_STAGES = (
    # Three latent frames show digit and colour as well as nine do, at a third of the tokens: the slow part, shapes, is
    # learned there;
    TransformerStage("transformer-short", _TRANSFORMER, batch=96, frames=3),
    # then whole videos.
    TransformerStage("transformer", replace(_TRANSFORMER, steps=6600, decay=0.5), batch=48, frames=9),
)
SCENES = 6_144  # whose latents the transformer learns from
PROMPTS, STEPS = 200, 50  # of the evaluation, and of the sampler there
PART = 50  # videos at once


class StoppedError(Exception):
    """The time of this run is over; what it did is saved."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the folder of checkpoints, metrics and results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="stop after so long, to go on later")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of everything with one clip each, to try the script"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    training = Training(
        arguments.run, torch.device(arguments.device), arguments.seconds, arguments.smoke, arguments.seed
    )
    try:
        training.run()
    except StoppedError:
        print("stopped in time; the same command goes on", file=sys.stderr)
    except TurbocompileError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


class Training:
    """The stages, each skipped where its result is there."""

    def __init__(self, folder: Path, device: torch.device, seconds: float | None, smoke: bool, seed: int) -> None:
        self.folder, self.device, self.smoke, self.seed = folder, device, smoke, seed
        self.pipeline = folder / "wan-mini"
        self.began = time.monotonic()
        self.end = self.began + seconds if seconds else math.inf
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # at head_dim 64 cuDNN's attention, forward and backward, is the faster one: a step takes 76 ms instead of 93
        torch.backends.cuda.enable_flash_sdp(False)

    def run(self) -> None:
        vae = self.train_vae()
        latents, prompts = self.make_latents(vae)
        model = self.train_transformer(latents, prompts)
        print(f"pipeline: {self.pipeline}")
        self.judge(model, vae)

    # ---- what the stages share

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:.0f} s] {text}", file=sys.stderr, flush=True)

    def some(self, count: int, few: int = 1) -> int:
        """As many as that, or `few` to try the script."""
        return min(count, few) if self.smoke else count

    def config(self, config: TrainConfig) -> TrainConfig:
        """The configuration of this run: its share of the steps, what the device can do, what time is left."""
        steps = self.some(config.steps, 2)
        cuda = self.device.type == "cuda"
        return replace(
            config,
            steps=steps,
            warmup=min(config.warmup, steps // 2),
            seed=self.seed,
            cuda_graph=cuda,
            precision=config.precision if cuda else "float32",
            max_seconds=None if self.end == math.inf else max(1e-3, self.end - time.monotonic()),
        )

    def fit(self, name: str, model: torch.nn.Module, data: Data, objective: Objective, config: TrainConfig) -> None:
        """Trains, and leaves the averaged weights in the model."""
        trainer = Trainer(model, data, objective, self.config(config), self.folder / name, device=self.device)
        if not trainer.run().finished:
            raise StoppedError
        model.load_state_dict(trainer.ema_state_dict())
        log = self.pipeline / "training" / f"{name}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / name / "metrics.jsonl", log)
        self.say(f"{name} is done")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # ---- the autoencoder

    def train_vae(self) -> Any:
        """The autoencoder, as its folder has it: in bfloat16, the latents' statistics in its configuration."""
        folder = self.pipeline / "vae"
        if not (folder / "config.json").exists():
            model = wan_mini.Autoencoder(wan_mini.build_vae(self.seed))
            wan_mini.light_norms(model.vae)
            for stage in VAE_STAGES:
                clips = wan_mini.Clips(self.some(stage.batch), stage.side, stage.frames, self.device, self.seed)
                self.fit(stage.name, model, clips, wan_mini.reconstruct, stage.config)
            with self.autocast():
                sample = wan_mini.encode_scenes(model.vae, self.wanted(self.some(512)), seed=1)
            mean, std = wan_mini.statistics(sample)
            model.vae.register_to_config(latents_mean=mean, latents_std=std)
            wan_mini.save_model(model.vae, model.vae.state_dict(), folder)
        return wan_mini.load_vae(folder, self.device)

    @staticmethod
    def wanted(count: int) -> list[world.Combination]:
        """`count` combinations that are not held out, in turn."""
        seen = [c for c in world.combinations() if not c.held_out]
        return [seen[i % len(seen)] for i in range(count)]

    # ---- latents and transformer

    def make_latents(self, vae: Any) -> tuple[torch.Tensor, list[str]]:
        """Normalized latents of many scenes, kept in RUN/latents.pt, and their prompts."""
        wanted = self.wanted(self.some(SCENES))
        path = self.folder / "latents.pt"
        if path.exists():
            latents = torch.load(path, map_location=self.device, weights_only=True)
        else:
            wan_mini.light_norms(vae)
            with self.autocast():
                latents = wan_mini.encode_scenes(vae, wanted, seed=2)
            for part in latents.split(512):
                part.copy_(wan_mini.normalized(part, vae))
            torch.save(latents, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            self.say(f"latents of {len(latents)} scenes")
        return latents, [c.prompt for c in wanted]

    def train_transformer(self, latents: torch.Tensor, prompts: list[str]) -> wan_mini.TextToVideo:
        model = wan_mini.build_text_to_video(self.seed)
        if self.device.type == "cuda":
            for block in model.transformer.blocks:
                block.compile(dynamic=False)
        for stage in TRANSFORMER_STAGES:
            data = wan_mini.Latents(self.some(stage.batch), latents, prompts, self.seed, stage.frames)
            self.fit(stage.name, model, data, wan_mini.denoise, stage.config)
        wan_mini.save_pipeline(self.pipeline, model, model.state_dict(), self.pipeline / "vae")
        return model

    # ---- what came out

    def judge(self, model: wan_mini.TextToVideo, vae: Any) -> None:
        """PSNR of the autoencoder; the table of digit, colour and motion on seen and held-out combinations; a sheet."""
        psnr = evaluate_vae(vae, self.some(32))
        (self.folder / "vae_psnr.json").write_text(json.dumps(psnr.to_dict()) + "\n", encoding="utf-8")
        self.say(f"autoencoder: {psnr.value:.2f} dB on scans it has not seen")
        wanted = world.evaluation_set(self.some(PROMPTS, 2))
        precision = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        parts = (wanted[i : i + PART] for i in range(0, len(wanted), PART))
        seeds = (range(i, i + PART) for i in range(0, len(wanted), PART))
        videos = (
            wan_mini.sample_videos(
                model.eval(),
                vae,
                [c.prompt for c in part],
                seed[: len(part)],
                steps=self.some(STEPS),
                precision=precision,
            )
            for part, seed in zip(parts, seeds, strict=True)
        )
        found = evaluate_videos(videos, wanted)
        (self.folder / "evaluation.json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        write_sheet(found, self.folder / "sheet.png")
        self.say("judged")
        for aspect, row in found.shares.items():
            print(aspect, ", ".join(f"{group} {100 * share.value:.1f} %" for group, share in row.items()))


if __name__ == "__main__":
    main()
