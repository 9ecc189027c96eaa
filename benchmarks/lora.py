"""How long adapters take to be put into a 14B's engine on the GPU, exchanged and taken out again.

    python benchmarks/lora.py [--engine engine/] [--layers 40] [--rank 64] [--format fp8] [--rounds 3] [--out FOLDER]

Without --engine the engine has the Programs of Wan2.1 14B and random weights, made on the GPU; the first exchange then
keeps on the host what the engine was built with. With --engine that is read from the folder again. The adapters are of
rank --rank, in bf16, on the ten linears of each layer. FOLDER gets lora.json. `--device cpu --layers 2` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import turbocompile
from turbocompile.build.compile import compile_programs
from turbocompile.capture.deepen import deepened
from turbocompile.capture.export import capture
from turbocompile.ir.program import Program
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Recipe
from turbocompile.runtime.engine import Engine
from turbocompile.runtime.lora import slots_of, tensors_of
from turbocompile.wan.source import open_source

MODULES = (
    *(f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
)


def engine_of(layers: int, format: str, device: torch.device) -> Engine:
    """The engine of a 14B with random weights on the device, at a small size of video."""
    recipe = Recipe.from_dict({
        "model": {"preset": "wan2.1-t2v-14b", "weights": "synthetic", "config": {"num_layers": layers}},
        "shapes": [{"height": 128, "width": 128, "num_frames": 5}], "components": "none", "verify": "off",
        "target": "cpu" if device.type == "cpu" else "host", "dtype": "bfloat16",
        "passes": {"w8a8": format, "attention": "native"},
    })  # fmt: skip
    source = open_source(recipe).transformers["transformer"]
    program = _program(source, recipe, layers)
    item = compile_programs("transformer", {"one": program}, source.tensors, resolve(recipe, source.tensors.keys()))
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, emission in item.plan.items():
        expr = emission.expr
        if expr.dtype == torch.int8:
            made = torch.randint(-127, 128, expr.shape, generator=generator, device=device, dtype=torch.int8)
        elif name in item.constants or not expr.dtype.is_floating_point:
            made = torch.zeros(expr.shape, dtype=expr.dtype, device=device)
        else:
            made = torch.empty(expr.shape, device=device).normal_(generator=generator)
            made = (made * 100 if expr.dtype.itemsize == 1 else made.abs() * 1e-3).to(expr.dtype)
        weights[name] = made
    return Engine(item.programs, weights, name="Wan 14B", config=source.config, dtype=torch.bfloat16)


def _program(source: object, recipe: Recipe, layers: int) -> Program:
    from dataclasses import replace

    few = replace(source, config={**source.config, "num_layers": min(layers, 3)})  # type: ignore[type-var, attr-defined]
    args, kwargs = few.example_inputs(recipe.shapes[0])  # type: ignore[attr-defined]
    program = capture(few.build(), args, kwargs)  # type: ignore[attr-defined]
    return (deepened(program, "blocks", layers) or program) if layers > 3 else program


def write_lora(engine: Engine, rank: int, seed: int, path: Path) -> None:
    """A LoRA of the engine's linears, in bf16."""
    specs = tensors_of(slots_of(engine.programs))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, _) in specs.items():
        if any(name.endswith(f".{module}.weight") for module in MODULES) and name.startswith("blocks."):
            stem = f"transformer.{name.removesuffix('.weight')}"
            for part, size in (("lora_A", (rank, shape[1])), ("lora_B", (shape[0], rank))):
                value = torch.empty(size).normal_(std=0.01, generator=generator)
                tensors[f"{stem}.{part}.weight"] = value.bfloat16()
    save_file(tensors, path)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes until the GPU is done."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--format", default="fp8", choices=["fp8", "int8", "int8_block", "off"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.engine is not None:
        engine = turbocompile.load(given.engine, device=device)
    else:
        engine = engine_of(given.layers, given.format, device)
    before = {name: tensor.clone().view(torch.uint8) for name, tensor in engine.weights.items()}
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(2)]
        for seed, path in enumerate(paths):
            write_lora(engine, given.rank, seed, path)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            resident = torch.cuda.memory_allocated(device)
        for _ in range(given.rounds):
            for name, lora in (("set", paths[0]), ("exchange", paths[1]), ("unset", None)):
                found.setdefault(name, []).append(seconds(lambda lora=lora: engine.set_lora(lora), device))
        changed = [n for n, t in engine.weights.items() if not torch.equal(t.view(torch.uint8), before[n])]
    said = {
        "parameters": sum(t.numel() for t in engine.weights.values()), "rank": given.rank, "first_set": found["set"][0],
        **{name: statistics.median(times[1:] or times) for name, times in found.items()},
        "bits_restored": not changed,
    }  # fmt: skip
    if device.type == "cuda":
        said["more_memory"] = torch.cuda.max_memory_allocated(device) - resident
    print(json.dumps(said, indent=1))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "lora.json").write_text(json.dumps({**said, "all": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
