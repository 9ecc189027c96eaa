"""Times a forward of an engine on one GPU, beside the diffusers model of the same configuration, eager and compiled.

    python benchmarks/forward.py engine/ [--out FOLDER] [--rounds 10] [--no-compiled]

The diffusers model has the engine's configuration, random bf16 weights, and cuDNN's attention, which is the fastest of
torch's for it on an H100; "compiled" is diffusers' own `compile_repeated_blocks`. The engine runs on the same inputs,
as one CUDA graph, which is how a user runs it. Times are milliseconds between CUDA events, as the median over three
turns over all calls, so that a drift of the card affects all calls alike. FOLDER gets forward.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from timing import milliseconds, versions

import turbocompile
from turbocompile.runtime.engine import Engine
from turbocompile.tools.bench import example

ENGINE, EAGER, COMPILED = "engine", "diffusers, eager", "diffusers, compiled"


def peer(engine: Engine) -> Any:
    """diffusers' model of the engine's configuration, with initial random weights.

    The weights that `from_pretrained` keeps in float32 are float32 here, too.
    """
    with torch.device("cuda"):
        model = WanTransformer3DModel.from_config(dict(engine.config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not any(kept in name for kept in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.set_attention_backend("_native_cudnn")
    return model


def calls(engine: Engine, compiled: bool) -> dict[str, Callable[[], object]]:
    """The calls of the engine and of the diffusers models by name, on the same inputs, of the engine's first shape."""
    program = next(iter(engine.programs.values()))
    tensors = example(program, torch.device("cuda"))
    inputs = {i.path: t for i, t in zip(program.signature.inputs, tensors, strict=True)}
    model = peer(engine)
    models = {ENGINE: engine, EAGER: model}
    if compiled:
        other = copy.deepcopy(model)
        other.compile_repeated_blocks()
        models[COMPILED] = other
    return {name: lambda m=m: m(**inputs, return_dict=False) for name, m in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, help="a folder for forward.json")
    parser.add_argument("--rounds", type=int, default=10, help="calls in each of the three turns")
    parser.add_argument("--no-compiled", action="store_true", help="leave the compiled model out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        loaded = turbocompile.load(arguments.engine, device="cuda")
        for name, engine in loaded.experts.items():
            found = calls(engine, not arguments.no_compiled)
            for call in found.values():
                call()  # compiles
                call()  # records the CUDA graph
            times = milliseconds(found, arguments.rounds)
            ours = statistics.median(times[ENGINE])
            for call_name, t in times.items():
                median = statistics.median(t)
                rows.append({"model": name, "call": call_name, "milliseconds": median, "over": median / ours})
                spread = f"{median:.1f} ({min(t):.1f} - {max(t):.1f})"
                print(f"| {name} | {call_name} | {spread} | {median / ours:.2f} |", flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        document = {"about": versions() | {"engine": str(arguments.engine)}, "results": rows}
        (arguments.out / "forward.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
