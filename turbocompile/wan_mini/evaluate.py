"""Evaluates videos of the world of digits: judges them against their prompts, and compares them with a reference.

`evaluate` runs an engine; `evaluate_videos` takes videos from any source, such as a training script. Both use the
prompts of `world.evaluation_set`; every second prompt names a combination that no training video shows. The prompt at
place i has seed i.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from turbocompile.defaults import EVALUATION_PROMPTS
from turbocompile.errors import UnsupportedError
from turbocompile.files import check_file, check_folder, replacing
from turbocompile.recipe.schema import SamplerSpec
from turbocompile.runtime.engine import Engine, load
from turbocompile.sampling import SamplingWarning
from turbocompile.sampling.flow import make_scheduler
from turbocompile.video import file as video_file
from turbocompile.video import vae as wan_vae
from turbocompile.video.components import component
from turbocompile.video.request import choose_sampler, recipe_of
from turbocompile.video.session import default_device, generate
from turbocompile.wan_mini import world
from turbocompile.wan_mini.diversity import diversity
from turbocompile.wan_mini.judge import Verdict, judge
from turbocompile.wan_mini.statistics import Mean, Share, mean_of, psnr, ssim
from turbocompile.wan_mini.world import DIGITS, Combination

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Progress = Callable[[str, float], None]  # called with a stage, "videos" or "vae", and the share that is done
# Makes one video, uint8 (F, H, W, 3), from a combination and a seed.
Maker = Callable[[Combination, int], torch.Tensor]
# A Maker, or videos (F, H, W, 3) or batches of videos (B, F, H, W, 3), uint8, in the order of the combinations.
Videos = Maker | Iterable[torch.Tensor]

ASPECTS = ("digit", "colour", "motion", "all")
GROUPS = ("seen", "held out", "all")
SHAPE = f"{world.SIZE}x{world.SIZE}x{world.FRAMES}"
SHEET_FRAMES = (0, 8, 16, 24, 32)  # the frames of a video that the contact sheet shows
VAE_VIDEOS = 32  # how many videos measure the VAE alone
_THUMBNAIL = 128  # pixels a side of a frame in the contact sheet


# ---------------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Clip:
    """A judged video. frames: uint8 (5, 128, 128, 3), the video's `SHEET_FRAMES` at half size."""

    combination: Combination
    seed: int
    verdict: Verdict
    frames: torch.Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        verdict = self.verdict
        marks = verdict.marks(self.combination)
        return {
            "prompt": self.combination.prompt, "seed": self.seed, "held_out": self.combination.held_out,
            "right": {"digit": marks.digit, "colour": marks.colour, "motion": marks.motion},
            "shows": {name: getattr(verdict, name) for name in ("digit", "colour", "direction", "bounces")},
            "confidence": verdict.confidence, "reason": verdict.reason,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation.

    shares: aspect (`ASPECTS`) -> group (`GROUPS`) -> Share. diversity: of the digits' shapes, 1 if they differ as those
    of real digits do; None if no digit was right twice. psnr (dB), ssim: against the reference; None without a
    reference. vae_psnr (dB): of the VAE alone. settings: the evaluated engine, its sampler and device, and the
    reference.
    """

    clips: tuple[Clip, ...]
    shares: Mapping[str, Mapping[str, Share]]
    diversity: Mean | None = None
    psnr: Mean | None = None
    ssim: Mean | None = None
    vae_psnr: Mean | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        return len(self.clips)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as data for JSON."""
        means = {name: getattr(self, name) for name in ("diversity", "psnr", "ssim", "vae_psnr")}
        return {
            "prompts": self.prompts,
            "settings": dict(self.settings),
            "shares": {a: {g: s.to_dict() for g, s in row.items()} for a, row in self.shares.items()},
            **{name: mean.to_dict() if mean is not None else None for name, mean in means.items()},
            "videos": [clip.to_dict() for clip in self.clips],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.prompts} prompts, every second held out; shares in %, with their 95 % intervals")
        table = Table("right", *GROUPS)
        for aspect, row in self.shares.items():
            table.add_row("all three" if aspect == "all" else aspect, *(_percent(row[group]) for group in GROUPS))
        yield table
        for name, mean, digits in (
            ("diversity of the digits' shapes (1: as real ones)", self.diversity, 2),
            ("PSNR against the reference, dB", self.psnr, 2),
            ("SSIM against the reference", self.ssim, 4),
            ("PSNR of the VAE alone, dB", self.vae_psnr, 2),
        ):
            if mean is not None:
                low, value, high = (f"{x:.{digits}f}" for x in (mean.low, mean.value, mean.high))
                yield Text(f"{name}: {value} ({low} to {high}; {mean.count} videos)")


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.1f} to {100 * high:.1f})" if share.total else "-"


# ---------------------------------------------------------------------------------------------------------- the videos


def evaluate_videos(
    videos: Videos,
    combinations: Sequence[Combination] | None = None,
    *,
    reference: Videos | None = None,
    vae_psnr: Mean | None = None,
    settings: Mapping[str, Any] | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judges videos against combinations, by default those of `world.evaluation_set()`.

    videos: a function that makes the uint8 video (33, 256, 256, 3) of a combination and a seed (the combination's
    place); or such videos, or batches (B, 33, 256, 256, 3) of such videos, in the order of the combinations. They are
    judged on the device where they are. reference: likewise, for PSNR and SSIM. save: a folder for the videos 000.mp4
    and so on. vae_psnr, settings: fields of the result. progress: called with "videos" and the share that is done.

    The same videos give the same Evaluation. Raises UnsupportedError for another shape or dtype, and for too few or too
    many videos.
    """
    wanted = list(combinations) if combinations is not None else world.evaluation_set()
    tell = progress or (lambda stage, fraction: None)
    tell("videos", 0.0)
    others = _one_by_one(reference, wanted) if reference is not None else None
    clips: list[Clip] = []
    psnrs: list[float] = []
    ssims: list[float] = []
    for batch in _batches(videos, wanted):
        verdicts = judge(batch)
        for made, verdict in zip(batch, verdicts, strict=True):
            place = len(clips)
            if place == len(wanted):
                raise UnsupportedError(f"there are more videos than the {len(wanted)} combinations")
            if save is not None:
                video_file.write_video(Path(save) / f"{place:03d}.mp4", made)
            if others is not None:
                other = _next(others, place, "reference videos").to(made.device)
                _check_video(other)
                psnrs.append(psnr(made, other))
                ssims.append(ssim(made, other))
            clips.append(Clip(wanted[place], place, verdict, _thumbnails(made)))
            tell("videos", min(len(clips) / len(wanted), 1.0))
    if len(clips) < len(wanted):
        raise UnsupportedError(f"there are {len(clips)} videos for {len(wanted)} combinations")
    return Evaluation(
        clips=tuple(clips),
        shares=_shares(clips),
        diversity=diversity(_right_glyphs(clips)),
        psnr=mean_of(psnrs) if psnrs else None,
        ssim=mean_of(ssims) if ssims else None,
        vae_psnr=vae_psnr,
        settings=dict(settings or {}),
    )


def _batches(videos: Videos, wanted: Sequence[Combination]) -> Iterator[torch.Tensor]:
    """Yields `videos` as batches (B, F, H, W, 3), uint8. Raises UnsupportedError for another shape or dtype."""
    made = (videos(c, seed) for seed, c in enumerate(wanted)) if callable(videos) else videos
    for video in made:
        batch = video if video.ndim == 5 else video[None]
        _check_video(batch[0] if len(batch) else batch)
        yield batch


def _check_video(video: torch.Tensor) -> None:
    shape = (world.FRAMES, world.SIZE, world.SIZE, 3)
    if video.dtype != torch.uint8 or tuple(video.shape) != shape:
        raise UnsupportedError(f"a video to judge is uint8 {shape}, not {video.dtype} {tuple(video.shape)}")


def _one_by_one(videos: Videos, wanted: Sequence[Combination]) -> Iterator[torch.Tensor]:
    return itertools.chain.from_iterable(_batches(videos, wanted))


def _next(videos: Iterator[torch.Tensor], place: int, what: str) -> torch.Tensor:
    found = next(videos, None)
    if found is None:
        raise UnsupportedError(f"there are only {place} {what}")
    return found


def _thumbnails(video: torch.Tensor) -> torch.Tensor:
    chosen = video[list(SHEET_FRAMES)].permute(0, 3, 1, 2).float()
    small = F.avg_pool2d(chosen, world.SIZE // _THUMBNAIL)
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def _shares(clips: Sequence[Clip]) -> dict[str, dict[str, Share]]:
    groups = {
        "seen": [c for c in clips if not c.combination.held_out],
        "held out": [c for c in clips if c.combination.held_out],
        "all": list(clips),
    }
    marks = {name: [c.verdict.marks(c.combination) for c in group] for name, group in groups.items()}
    return {
        aspect: {name: Share(sum(getattr(m, aspect) for m in found), len(found)) for name, found in marks.items()}
        for aspect in ASPECTS
    }


def _right_glyphs(clips: Sequence[Clip]) -> dict[int, list[torch.Tensor]]:
    """Digit -> the glyphs of the videos that show the digit and whose prompts name it."""
    found: dict[int, list[torch.Tensor]] = {}
    for clip in clips:
        if clip.verdict.digit == clip.combination.digit:
            found.setdefault(clip.combination.digit, []).append(clip.verdict.glyph)
    return found


@torch.no_grad()
def evaluate_vae(vae: Any, videos: int = VAE_VIDEOS, progress: Progress | None = None) -> Mean:
    """The PSNR, in dB, of uint8 videos after the VAE's encoder and decoder, which no transformer can exceed.

    vae: diffusers' AutoencoderKLWan. videos: how many videos are drawn, with scans of the held-back writers, from a
    fixed seed. progress: called with "vae" and the share that is done.
    """
    rng = random.Random(0)
    wanted = rng.sample(world.combinations(), videos)
    scans = world.load_scans(train=False)
    masks = world.enlarge(scans.images)
    generator = torch.Generator().manual_seed(0)
    found = []
    for done, combination in enumerate(wanted):
        truth = world.render(world.draw_scenes([combination], scans, generator), masks)
        again = wan_vae.decode(vae, wan_vae.encode(vae, truth)).cpu()
        found.append(psnr(wan_vae.to_frames(again), wan_vae.to_frames(truth)))
        if progress is not None:
            progress("vae", (done + 1) / videos)
    return mean_of(found)


# ----------------------------------------------------------------------------------------------------------- an engine


def evaluate(
    engine: Engine | str | Path,
    *,
    prompts: int = EVALUATION_PROMPTS,
    reference: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    device: torch.device | str | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Makes the videos of the first `prompts` of the evaluation set with an engine, and judges them.

    engine: the engine's folder, or the Engine that `turbocompile.load` returned. prompts: an even number. reference:
    the folder of another engine, which runs by its own recipe; or the folder of a diffusers pipeline, which runs with
    the engine's solver, steps and guidance, or, if the engine is distilled, with its own scheduler, 50 steps and
    guidance 5. The reference gets the same seeds. steps, guidance: replace the recipe's. device: as in `generate`.
    save: a folder for the videos. progress: called with "videos" or "vae" and the share that is done.

    One video takes about a minute on a CPU. Raises TurbocompileError before the first video if the engine does not make
    videos of this world's shape from text, or has random weights.
    """
    wanted = world.evaluation_set(prompts)
    if save is not None:
        check_folder(save)
    tell = progress or (lambda stage, fraction: None)
    made_by = _open_engine(engine, device)
    sampler = choose_sampler(recipe_of(made_by).sampler, "t2v", steps=steps, guidance=guidance)
    maker = _engine_maker(made_by, steps, guidance, tell, len(wanted))
    other = _open_reference(Path(reference), sampler, made_by.device) if reference is not None else None
    found = evaluate_videos(
        maker,
        wanted,
        reference=other,
        settings={
            "engine": str(made_by.folder),
            "sampler": dataclasses.asdict(sampler),
            "device": str(made_by.device),
            "reference": str(reference) if reference is not None else None,
        },
        save=save,
        progress=progress,
    )
    tell("vae", 0.0)
    return dataclasses.replace(
        found, vae_psnr=evaluate_vae(component(made_by, "vae"), min(VAE_VIDEOS, prompts), progress)
    )


def _open_engine(engine: Engine | str | Path, device: torch.device | str | None) -> Engine:
    """The engine, on `device`. Raises UnsupportedError if its videos would not be of this world."""
    if not isinstance(engine, Engine):
        engine = load(engine, device=device or default_device(engine))
    elif device is not None:
        engine.to(device)
    recipe = recipe_of(engine)
    name = engine.folder
    if engine.manifest.get("task", "t2v") != "t2v":
        raise UnsupportedError(f"{name} makes videos from images; the evaluation is of videos from text")
    if f"{SHAPE}x1" not in [shape.name for shape in recipe.shapes]:
        known = ", ".join(shape.name for shape in recipe.shapes)
        raise UnsupportedError(
            f"the evaluation is of models of moving digits at {SHAPE}, one video at once, and {name} has the shapes "
            f"{known}; build it with that shape"
        )
    if recipe.model.weights == "synthetic":
        raise UnsupportedError(f"the weights of {name} are synthetic, so there is nothing to judge in its videos")
    return engine


def _engine_maker(engine: Engine, steps: int | None, guidance: float | None, tell: Progress, total: int) -> Maker:
    """A Maker of an engine's videos, `total` in all; it calls `tell` after the steps of each video, too."""

    def make(combination: Combination, seed: int) -> torch.Tensor:
        def within(stage: str, fraction: float) -> None:
            if stage == "denoise":
                tell("videos", (seed + 0.99 * fraction) / total)

        with warnings.catch_warnings():
            if seed:  # the sampler has warned at the first video
                warnings.simplefilter("ignore", SamplingWarning)
            options: dict[str, Any] = {"steps": steps, "guidance": guidance}
            found = generate(engine, combination.prompt, seed=seed, shape=f"{SHAPE}x1", progress=within, **options)
        return found.video[0].to(engine.device)  # so that the judge runs there

    return make


def _open_reference(folder: Path, sampler: SamplerSpec, device: torch.device) -> Maker:
    """A Maker of the videos of an engine's or a diffusers pipeline's folder. Raises UnsupportedError for other
    folders.
    """
    if (folder / "manifest.json").is_file():
        return _engine_maker(_open_engine(folder, device), None, None, lambda stage, fraction: None, 1)
    if not (folder / "model_index.json").is_file():
        raise UnsupportedError(f"{folder} is neither an engine nor a diffusers pipeline, so it cannot be the reference")
    return _pipeline_maker(folder, sampler, device)


def _pipeline_maker(folder: Path, sampler: SamplerSpec, device: torch.device) -> Maker:
    from diffusers import WanPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # because the loading takes only a second
    try:
        pipeline = WanPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"the reference {folder} cannot be opened as a WanPipeline ({reason})") from error
    finally:
        logging.enable_progress_bar()
    config = pipeline.transformer.config
    if config.in_channels != config.out_channels or config.get("image_dim") is not None:
        raise UnsupportedError(
            f"the reference {folder} makes videos from images; the evaluation is of videos from text"
        )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    steps, guidance = 50, 5.0
    if sampler.kind != "rcm":
        assert sampler.steps is not None
        assert sampler.guidance is not None
        assert sampler.shift is not None
        steps, guidance = sampler.steps, sampler.guidance
        pipeline.scheduler = make_scheduler(sampler.kind, sampler.shift)

    def make(combination: Combination, seed: int) -> torch.Tensor:
        video = pipeline(
            prompt=combination.prompt,
            negative_prompt="",
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator(device).manual_seed(seed),
            output_type="np",
        ).frames[0]
        return torch.from_numpy(video).mul(255.0).round().to(torch.uint8)

    return make


# --------------------------------------------------------------------------------------------------- the contact sheet


def write_sheet(evaluation: Evaluation, path: str | Path) -> Path:
    """Writes a PNG with a row for each video: its frames 0, 8, 16, 24 and 32, its prompt, and the judge's verdict.

    Missing folders are made. Returns the path. Raises UnsupportedError for a name that does not end in .png.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = check_sheet(path)
    gap, text = 4, 440
    row = _THUMBNAIL + gap
    sheet = Image.new("RGB", (len(SHEET_FRAMES) * row + text, evaluation.prompts * row + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for number, clip in enumerate(evaluation.clips):
        top = gap + number * row
        for column, frame in enumerate(clip.frames.numpy()):
            sheet.paste(Image.fromarray(frame), (gap + column * row, top))
        for line, (words, colour) in enumerate(_legend(clip)):
            draw.text((len(SHEET_FRAMES) * row + 3 * gap, top + 4 + 25 * line), words, fill=colour, font=font)
    with replacing(path) as temporary:
        sheet.save(temporary)
    return path


def check_sheet(path: str | Path) -> Path:
    """The path of a contact sheet. Raises UnsupportedError for another suffix than .png, and where `check_file`
    does.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UnsupportedError(f"{path}: the contact sheet is a PNG file; give a name that ends in .png")
    return check_file(path)


def _legend(clip: Clip) -> Iterator[tuple[str, str]]:
    """Yields the lines of a video's legend and their colours: the prompt, then the parts of the verdict."""
    verdict, held_out = clip.verdict, " (held out)" if clip.combination.held_out else ""
    marks = verdict.marks(clip.combination)
    yield clip.combination.prompt + held_out, "black"
    motion = "none" if verdict.direction is None else verdict.direction + (" and bounces" if verdict.bounces else "")
    for right, words in (
        (
            marks.digit,
            f"digit: {'none' if verdict.digit is None else DIGITS[verdict.digit]} ({verdict.confidence:.2f})",
        ),
        (marks.colour, f"colour: {verdict.colour or 'none'}"),
        (marks.motion, f"motion: {motion}"),
    ):
        yield f"{'right' if right else 'wrong'}   {words}", "darkgreen" if right else "firebrick"
    if verdict.reason:
        yield verdict.reason, "gray"
