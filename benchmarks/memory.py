"""A step within 80, 24, 16 and 12 GB of one GPU beside the same step with all weights resident: time, peak, bits.

    python benchmarks/memory.py --log memory.jsonl [--preset wan2.1-t2v-14b] [--shape 720x1280x81] [--layers 40]
        [--budgets 80 24 16 12] [--calls 6] [--eager] [--no-vae]
    python benchmarks/memory.py --log memory.jsonl --pipeline FOLDER [--budgets 8]

The engine is that of a preset with SLA (top-k 0.1) and the card's 8-bit linears; its weights are random bytes, written
at once, because building 14B parameters honestly takes longer than measuring them. Each budget has a fresh engine with
`plan_memory`, and PyTorch's allocator is held to the budget (set_per_process_memory_fraction). Times are milliseconds
between CUDA events, the median of the calls after the graph was recorded. A line of JSON a row: what was predicted
(peak, slow-down), what was measured (peak reserved and allocated), and whether the bits are those of the resident step.
Rows of the VAE say the same of decoding 81 frames.

--pipeline builds the whole pipeline of Wan2.1 1.3B at 480p in FOLDER, with random weights in all parts and a text
encoder of its published size (11 GB), and makes a video within each budget: some 30 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import versions

from turbocompile.build.compile import Compiled, compile_programs
from turbocompile.capture.deepen import CAPTURED, deepened
from turbocompile.capture.export import capture
from turbocompile.hardware import host_target
from turbocompile.ir.weights import Constant, full_name
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Recipe
from turbocompile.runtime.cuda_graph import release_cached
from turbocompile.runtime.engine import Engine
from turbocompile.tools.bench import example
from turbocompile.wan.source import open_source

GB = 10**9
POOL = 1 << 30  # random bytes that all weights are cut from
TEXT_ENCODER = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def compiled(preset: str, shape: str, layers: int | None) -> tuple[Compiled, Any]:
    """The Programs of a preset at one shape, captured and rewritten without weights, and the recipe's dtype."""
    height, width, frames = map(int, shape.split("x"))
    config = {"num_layers": layers} if layers else {}
    recipe = Recipe.from_dict(
        {
            "model": {"preset": preset, "weights": "synthetic", "config": config},
            "shapes": [{"height": height, "width": width, "num_frames": frames}],
            "target": host_target(), "verify": "off", "components": "none",
            "passes": {"attention": {"kind": "sla", "allow_untuned": True}},
        }
    )  # fmt: skip
    source = open_source(recipe)
    transformer = source.transformers["transformer"]
    args, kwargs = transformer.example_inputs(recipe.shapes[0])
    count = int(transformer.config["num_layers"])
    few = replace(transformer, config={**transformer.config, "num_layers": min(CAPTURED, count)})
    program = capture(few.build(), args, kwargs)
    if count > CAPTURED:
        deep = deepened(program, "blocks", count)
        assert deep is not None
        program = deep
    tensors = source.synthetic("transformer")
    options = resolve(recipe, tensors.keys())
    return compile_programs("transformer", {shape: program}, tensors, options), recipe.torch_dtype


def random_weights(item: Compiled) -> dict[str, torch.Tensor]:
    """Tensors of the planned shapes and dtypes on the CPU: stretches of one pool of random numbers, that every layer
    begins elsewhere in. Scales make products of about 1.
    """
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (POOL,), dtype=torch.uint8, generator=generator)
    bytes_ &= 0xCF  # as e4m3: from -7.5 to 7.5
    floats = torch.randn(POOL // 4, generator=generator) * 0.02
    pools = {torch.float32: floats, torch.bfloat16: floats.to(torch.bfloat16)}
    made: dict[str, torch.Tensor] = {}
    for number, (name, emission) in enumerate(item.plan.items()):
        expr = emission.expr
        if isinstance(expr, Constant):
            made[name] = item.constants[full_name(expr.key, emission.prefix)]
            continue
        size = math.prod(expr.shape)
        pool = bytes_ if expr.dtype.itemsize == 1 else pools[expr.dtype]
        start = 4096 * number % (len(pool) - size)
        found = pool[start : start + size]
        if expr.dtype.itemsize == 1:
            made[name] = found.view(expr.dtype).view(expr.shape)
            continue
        found = found.view(expr.shape)
        made[name] = found.abs() * 0.02 + 1e-4 if name.endswith("_scale") else found
    return made


def measured(engine: Engine, tensors: list[torch.Tensor], calls: int) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Milliseconds of a step, its first output on the CPU, and the seconds of the first two calls."""
    name = next(iter(engine.programs))
    inputs = {i.path: t for i, t in zip(engine.programs[name].signature.inputs, tensors, strict=True)}
    spent = {}
    for what in ("first", "second"):  # the second records the graph
        began = time.perf_counter()
        out = engine(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        spent[what] = time.perf_counter() - began
    del out
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        start.record()
        engine(**inputs, return_dict=False)
        end.record()
    torch.cuda.synchronize()
    out = engine(**inputs, return_dict=False)[0].cpu()
    return statistics.median(a.elapsed_time(b) for a, b in events), out, spent


def fresh_peaks() -> None:
    gc.collect()
    torch.cuda.synchronize()
    release_cached(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.reset_peak_memory_stats()


def row(
    item: Compiled, weights: dict[str, torch.Tensor], dtype: torch.dtype, budget: float | None, calls: int, graphs: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """One measurement. budget: GB; None is without a plan."""
    fresh_peaks()
    before = torch.cuda.memory_reserved()  # nothing, if all that was taken before was given back
    torch.cuda.set_per_process_memory_fraction(1.0)
    engine = Engine(item.programs, dict(weights), dtype=dtype)
    engine.cuda_graph = graphs
    found: dict[str, Any] = {"budget_gb": budget, "graphs": graphs, "reserved_before_gb": before / GB}
    if budget is None:
        engine.to("cuda")
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * GB / total))
        engine._device = torch.device("cuda", 0)
        plan = engine.plan_memory(int(budget * GB))
        found |= {"plan": plan.to_dict(), "said": plan.sentences()}
    tensors = example(next(iter(item.programs.values())), torch.device("cuda", 0))
    ms, out, spent = measured(engine, tensors, calls)
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    found |= {
        "milliseconds": ms, "seconds": spent, "reserved_gb": reserved / GB, "allocated_gb": allocated / GB,
        "recorded": [g.recorded for g in engine._graphs.values()],
        "reasons": [g.reason for g in engine._graphs.values()],
    }  # fmt: skip
    if budget is not None:
        found |= {
            "predicted_gb": plan.peak / GB, "predicted_over_reserved": plan.peak / reserved,
            "pinned": engine._host.reason if engine._host is not None and not engine._host.pinned else True,
        }  # fmt: skip
    return found, out


def vae_rows(tell: Callable[[dict[str, Any]], None]) -> None:
    """Decodes 81 frames whole and in tiles, with random weights: predicted and measured peaks, beside the weights."""
    from diffusers import AutoencoderKLWan

    from turbocompile.recipe.presets import Geometry, published_vae
    from turbocompile.recipe.schema import Shape
    from turbocompile.video import vae as wan_vae
    from turbocompile.video.components import in_tiles
    from turbocompile.video.memory import vae_needs

    torch.cuda.set_per_process_memory_fraction(1.0)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            empty = AutoencoderKLWan(**published_vae(16)).eval().requires_grad_(False)
        for parameter in empty.parameters():
            parameter.data = parameter.data.to(dtype)
        for height, width in ((480, 832), (720, 1280)):
            size = Shape(height=height, width=width, num_frames=81)
            needs = vae_needs(empty, 0, dtype, Geometry(), size, False)
            for tile, predicted in ((0, needs.working), *needs.tiles.items()):
                fresh_peaks()
                with torch.device("cuda"):
                    vae = AutoencoderKLWan(**published_vae(16)).eval().requires_grad_(False)
                for parameter in vae.parameters():
                    parameter.data = parameter.data.to(dtype)
                if tile:
                    in_tiles(vae, tile)
                latents = torch.randn(1, 16, *Geometry().latent(size), device="cuda")
                fresh_peaks()
                before = torch.cuda.memory_reserved()
                began = time.perf_counter()
                found: dict[str, Any] = {"vae": f"{height}x{width}x81", "dtype": str(dtype), "tile": tile}
                try:
                    wan_vae.to_frames(wan_vae.decode(vae, latents)).cpu()
                except torch.OutOfMemoryError as error:
                    found["failed"] = str(error)[:200]
                found |= {
                    "seconds": time.perf_counter() - began,
                    "predicted_gb": predicted / GB,
                    "reserved_gb": (torch.cuda.max_memory_reserved() - before) / GB,
                    "allocated_gb": torch.cuda.max_memory_allocated() / GB,
                }
                tell(found)
                del vae, latents


def whole_pipeline(folder: Path, layers: int | None, text_layers: int) -> Path:
    """An engine of Wan2.1 1.3B at 480p with components of their published sizes, all random; its folder."""
    from transformers import UMT5Config, UMT5EncoderModel

    from turbocompile.build.from_recipe import optimize_recipe

    engine, parts = folder / "engine", folder / "parts"
    if engine.exists():
        return engine
    config = {"num_layers": layers} if layers else {}
    model = {"preset": "wan2.1-t2v-1.3b", "weights": "synthetic", "config": config}
    shape = {"height": 480, "width": 832, "num_frames": 81}
    given = {"model": model, "shapes": [shape], "sampler": {"kind": "rcm", "steps": 4}, "verify": "off"}
    source = open_source(Recipe.from_dict(given))
    table = source.components.save(parts)
    shutil.rmtree(parts / "text_encoder")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        encoder = UMT5EncoderModel(UMT5Config(**{**TEXT_ENCODER, "num_layers": text_layers})).to(torch.bfloat16)
    encoder.cpu().save_pretrained(parts / "text_encoder")
    del encoder
    index = {name: [row["library"], row["class"]] for name, row in table.items()}
    (parts / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}) + "\n")
    optimize_recipe(Recipe.from_dict({**given, "components": str(parts)}), engine)
    shutil.rmtree(parts)
    return engine


def pipeline_rows(tell: Callable[[dict[str, Any]], None], engine: Path, budgets: list[float | None]) -> None:
    """A video within each budget (None is without a plan): stages' seconds, predicted and measured peaks."""
    from turbocompile.video.session import generate

    for budget in budgets:
        fresh_peaks()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if budget is None else min(1.0, budget * GB / total))
        said: list[str] = []
        vram = None if budget is None else int(budget * GB)
        found: dict[str, Any] = {"pipeline": "1.3B-480p", "budget_gb": budget}
        try:
            made = generate(engine, "a cat walking on the beach", device="cuda:0", vram=vram, say=said.append)
            found |= {"seconds": made.timings, "said": said}
            if made.memory is not None:
                found |= {"predicted_gb": made.memory.peak / GB, "peaks": dict(made.memory.peaks)}
            del made
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {error}"[:1000]
        found |= {
            "reserved_gb": torch.cuda.max_memory_reserved() / GB,
            "allocated_gb": torch.cuda.max_memory_allocated() / GB,
        }
        tell(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="wan2.1-t2v-14b")
    parser.add_argument("--shape", default="720x1280x81")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--budgets", type=float, nargs="*", default=[80, 24, 16, 12])
    parser.add_argument("--calls", type=int, default=6, help="timed, after two")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one, without CUDA graphs")
    parser.add_argument("--pipeline", type=Path, metavar="FOLDER", help="the whole pipeline of 1.3B at 480p instead")
    parser.add_argument("--text-layers", type=int, default=24, help="of the pipeline's text encoder")
    parser.add_argument("--no-resident", action="store_true", help="leave the pipeline's video without a plan out")
    parser.add_argument("--no-vae", action="store_true", help="leave the VAE's rows out")
    parser.add_argument("--log", type=Path, required=True, help="the file that gets the rows")
    arguments = parser.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    def tell(found: dict[str, Any]) -> None:
        line = json.dumps(found)
        print(line, flush=True)
        with arguments.log.open("a") as log:
            log.write(line + "\n")

    if arguments.pipeline is not None:
        tell({"about": versions()})
        began = time.perf_counter()
        engine = whole_pipeline(arguments.pipeline, arguments.layers, arguments.text_layers)
        tell({"built_s": time.perf_counter() - began})
        pipeline_rows(tell, engine, [*([] if arguments.no_resident else [None]), *arguments.budgets])
        return
    began = time.perf_counter()
    item, dtype = compiled(arguments.preset, arguments.shape, arguments.layers)
    weights = random_weights(item)
    about = {k: v for k, v in vars(arguments).items() if k not in ("log", "pipeline")}
    tell({"about": about | versions(), "built_s": time.perf_counter() - began})
    with torch.inference_mode():
        resident, reference = row(item, weights, dtype, None, arguments.calls, not arguments.eager)
        tell(resident)
        for budget in arguments.budgets:
            try:
                found, out = row(item, weights, dtype, budget, arguments.calls, not arguments.eager)
            except Exception as error:  # the other rows are measured all the same
                tell({"budget_gb": budget, "failed": f"{type(error).__name__}: {error}"[:1000]})
                continue
            found["over_resident"] = found["milliseconds"] / resident["milliseconds"]
            found["equal_bits"] = torch.equal(out, reference)
            tell(found)
        if not arguments.no_vae:
            vae_rows(tell)


if __name__ == "__main__":
    main()
