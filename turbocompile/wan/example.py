"""Writes a complete Wan pipeline folder at a tiny size, with seeded random weights and a recipe for it.

It is what diffusers' `save_pretrained` would write, so that everything that takes a real Wan folder takes this one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from turbocompile.defaults import EXAMPLE_HEAD_DIM, EXAMPLE_VARIANT, SEED
from turbocompile.errors import RecipeError
from turbocompile.recipe.presets import VARIANTS, Preset, tiny_preset
from turbocompile.recipe.schema import Recipe
from turbocompile.wan import vace
from turbocompile.wan.source import Source, open_source
from turbocompile.wan.tensors import SINGLE

_RECIPE = """\
# {what}, at a tiny size and with random weights.
model: {{path: .}}

shapes:
  - {{height: {height}, width: {width}, num_frames: {num_frames}}}

sampler: {{kind: rcm, steps: 4}}
"""


def write_example(
    folder: str | Path, variant: str = EXAMPLE_VARIANT, head_dim: int = EXAMPLE_HEAD_DIM, seed: int = SEED
) -> Path:
    """Writes the pipeline of a variant (see configs.VARIANTS) and recipe.yaml into `folder`; returns the recipe's path.

    head_dim: 64 or 128. The same arguments give the same weights as `model: {preset: wan-tiny..., seed: ...}`. The
    folder appears whole or not at all. Raises RecipeError for an existing non-empty folder, or an unknown variant.
    """
    folder = Path(folder)
    if variant not in VARIANTS:
        raise RecipeError(f"there is no example {variant!r}; the variants are {', '.join(VARIANTS)}")
    if head_dim not in (64, 128):
        raise RecipeError(f"examples have a head_dim of 64 or 128, not {head_dim}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists and is not an empty folder; name another one or remove it")
    if folder.resolve() == Path.cwd():
        raise RecipeError("the example goes into a new folder, not into the current one; name it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(made, tiny_preset(variant, head_dim), variant, seed)
        made.chmod(0o755)  # mkdtemp makes private folders
        os.replace(made, folder)  # replaces an empty folder too
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder / "recipe.yaml"


def _write(folder: Path, preset: Preset, variant: str, seed: int) -> None:
    model = {"preset": preset.name, "weights": "synthetic", "seed": seed}
    source = open_source(Recipe.from_dict({"model": model, "target": "cpu"}))
    for name in source.transformers:
        _save_transformer(source, name, folder / name)
    source.components.save(folder)
    index = json.dumps(_index(preset, source), indent=2) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    what = VARIANTS[variant]
    recipe = _RECIPE.format(
        what=what[0].upper() + what[1:], height=preset.height, width=preset.width, num_frames=preset.num_frames
    )
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def _save_transformer(source: Source, name: str, folder: Path) -> None:
    """config.json by diffusers, the weights in its file name."""
    from safetensors.torch import save_file

    transformer = source.transformers[name]
    model: Any = transformer.build()
    model.save_config(folder)
    tensors = {key: transformer.tensors.get(key) for key in transformer.tensors.keys()}  # noqa: SIM118
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def _index(preset: Preset, source: Source) -> dict[str, Any]:
    """model_index.json. Class names are those that transformers 4 and 5, and all diffusers with Wan, know."""
    import diffusers

    parts: dict[str, Any] = {name: [row["library"], row["class"]] for name, row in source.components.table().items()}
    for name in ("transformer", "transformer_2"):
        cls = vace.CLASS if preset.task == "vace" else "WanTransformer3DModel"
        parts[name] = ["diffusers", cls] if name in source.transformers else [None, None]
    if preset.task == "i2v":
        for name in ("image_encoder", "image_processor"):
            parts.setdefault(name, [None, None])
    return {
        "_class_name": preset.pipeline,
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": preset.boundary_ratio,
        "expand_timesteps": preset.expand_timesteps,
        **dict(sorted(parts.items())),
    }
