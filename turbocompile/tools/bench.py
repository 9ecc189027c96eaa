"""`turbocompile bench`: times a whole forward of an engine, and each kind of operation beside its roofline time.

A forward is timed as the engine runs it: on a GPU as one CUDA graph, between CUDA events. An operation is timed alone
and repeatedly, on its values of that forward. A small operation then finds its inputs in the cache, so the sum of the
operations may differ from the forward's time. The operations show where the time goes; the forward's time is the figure
that counts.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from turbocompile.cache import cache_path, keep_json
from turbocompile.defaults import BENCH_CALLS, MODULE
from turbocompile.errors import UnsupportedError
from turbocompile.hardware import Gpu, host_gpu
from turbocompile.ir.cost import OpCost, alike, cost
from turbocompile.ir.execute import SOURCE
from turbocompile.ir.program import SHELL, Program
from turbocompile.report.timings import Bench, OpTime
from turbocompile.runtime.timing import launch_seconds, median_seconds, seconds_alone, wait

if TYPE_CHECKING:
    from turbocompile.runtime.engine import Engine

Progress = Callable[[str, float], None]


@torch.no_grad()
def bench(
    engine: Engine,
    *,
    shape: str | None = None,
    calls: int = BENCH_CALLS,
    progress: Progress = lambda stage, fraction: None,
) -> Bench:
    """Times an engine on its device, with random inputs. shape: the name of a Program, by default the first.

    Raises UnsupportedError for another shape or backend.
    """
    if engine.backend != "triton":
        raise UnsupportedError(f"bench times engines of the backend triton, and this one is of {engine.backend}")
    names = list(engine.programs)
    chosen = names[0] if shape is None else shape
    if chosen not in names:
        raise UnsupportedError(f"the engine has no shape {chosen!r}; it has {', '.join(names)}")
    program, cuda = engine.programs[chosen], engine.device.type == "cuda"
    tensors = example(program, engine.device)
    runner = engine.runner(chosen)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    progress("first", 0.0)
    began = time.perf_counter()
    runner(*tensors)
    wait(cuda)
    first = time.perf_counter() - began
    progress("forward", 0.0)
    runner(*tensors)  # a CUDA graph is recorded in the second call
    seconds = median_seconds(lambda: runner(*tensors), calls, cuda)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    plain = engine.compiled(chosen)
    progress("ops", 0.0)
    times = _Operations(program, cuda)
    times.run(plain.shell, SHELL, tensors)
    return Bench(
        engine=engine.model_name,
        device=torch.cuda.get_device_name(engine.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        shape=chosen,
        versions=versions(),
        calls=calls,
        seconds=seconds,
        ungraphed=median_seconds(lambda: plain(*tensors), calls, cuda) if cuda else None,
        launch=launch_seconds(lambda: runner(*tensors)) if cuda else None,
        first=first,
        peak=peak,
        ops=times.rows(host_gpu() if cuda else None),
    )


def example(program: Program, device: torch.device) -> list[torch.Tensor]:
    """Seeded inputs: N(0, 1), a timestep of 500, zeros for whole numbers."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in program.signature.inputs:
        if not i.dtype.is_floating_point:
            tensor = torch.zeros(i.shape, dtype=i.dtype)
        elif i.cast:
            tensor = torch.full(i.shape, 500.0, dtype=i.dtype)
        else:
            tensor = torch.randn(i.shape, generator=generator).to(i.dtype)
        made.append(tensor.to(device))
    return made


def versions() -> dict[str, str]:
    """The versions of the software that decides the speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        found |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return found


class _Operations:
    """Runs a compiled Program node by node, and times one node of each kind.

    Nodes of a repeated block are timed in the block's second call, because only in the first call does the shell decide
    the layout of the block's inputs; in all others the previous block does.
    """

    def __init__(self, program: Program, cuda: bool) -> None:
        self.program, self.cuda = program, cuda
        self.seconds: dict[tuple[str, tuple[Any, ...]], float] = {}
        self.runs: Counter[str] = Counter()

    def run(self, bound: Any, graph: str, tensors: Any) -> Any:
        self.runs[graph] += 1
        return _Interpreter(self, bound.code, graph).run(*bound.operands, *tensors)

    def time(self, graph: str, node: fx.Node, call: Callable[[], object]) -> None:
        key = alike(node)
        repeated = self.runs[graph] > 1 or self.program.count(graph) == 1
        if key is not None and repeated and (graph, key) not in self.seconds:
            self.seconds[graph, key] = seconds_alone(call, self.cuda)

    def rows(self, card: Gpu | None) -> tuple[OpTime, ...]:
        made = []
        for op in cost(self.program).ops:
            one = {k: v // op.count for k, v in op.work.items()}
            key = (op.name, op.shapes, tuple(sorted(one.items())), op.bytes // op.count)
            spent = self.seconds.get((op.graph, key))  # None: folded into a constant when the engine was loaded
            if spent is not None:
                same = (op.graph, op.name, op.where, op.shapes, op.count)
                made.append(OpTime(*same, seconds=spent * op.count, floor=_floor(op, card)))
        return tuple(sorted(made, key=lambda op: -op.seconds))


def _floor(op: OpCost, card: Gpu | None) -> float | None:
    try:
        return op.seconds(card) if card is not None else None
    except UnsupportedError:
        return None


class _Interpreter(fx.Interpreter):
    def __init__(self, owner: _Operations, code: fx.GraphModule, graph: str) -> None:
        super().__init__(code)
        self.owner, self.graph_name = owner, graph

    def run_node(self, n: fx.Node) -> Any:
        source = n.meta.get(SOURCE)
        if n.op == "call_module":
            bound = self.fetch_attr(str(n.target))
            out = self.owner.run(bound, str(source.args[0]), self.map_nodes_to_values(n.args, n))
            return out[0] if bound.single else out
        if n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.owner.time(self.graph_name, source, lambda: n.target(*args, **kwargs))  # type: ignore[operator]
        return super().run_node(n)


# --------------------------------------------------------------------------------------------------------- the record


def bench_path(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    shape: str | None = None,
    module: str = MODULE,
    calls: int = BENCH_CALLS,
    device: str | None = None,
    vram: str | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> tuple[Bench, Path | None]:
    """Times a module of an engine's folder, or of a recipe, whose engine is built in a temporary folder.

    vram: the GPU's memory that the engine may take (`Engine.plan_memory`). The second value is the path of the record;
    None for a recipe, and if the cache cannot be written. Raises TurbocompileError for a damaged engine, an unknown
    module or shape, and a recipe that cannot be built.
    """
    from turbocompile.build.from_recipe import optimize_recipe
    from turbocompile.recipe.schema import load_recipe
    from turbocompile.runtime.engine import load
    from turbocompile.video.session import default_device

    with tempfile.TemporaryDirectory() as temporary:
        folder, built = Path(path), Path(path).suffix in (".yaml", ".yml")
        if built:
            recipe = load_recipe(path, [*overrides, "components=none"])
            folder = Path(temporary) / "engine"
            optimize_recipe(recipe, folder, progress=progress)
        elif overrides:
            raise UnsupportedError(f"--set changes a recipe, and {path} is no .yaml file; build the engine again")
        engine = load(folder, device=device or default_device(folder), vram=vram)
        if module not in engine.experts:
            raise UnsupportedError(f"the engine has no module {module!r}; it has {', '.join(engine.experts)}")
        found = bench(engine.experts[module], shape=shape, calls=calls, progress=progress)
        if built:
            return found, None
        return found, save_record(found, module, str(engine.manifest["digest"]))


def record_path(module: str, digest: str) -> Path:
    """The path of the record of the last bench of an engine's module."""
    return cache_path("bench", f"{digest}-{module}")


def save_record(found: Bench, module: str, digest: str) -> Path | None:
    """Keeps the record for `explain` and returns its path; None (and a warning) if the cache cannot be written."""
    return keep_json("bench", f"{digest}-{module}", found.to_dict())


def read_record(module: str, digest: str) -> Bench | None:
    """The last bench of an engine's module on this machine; None if there is none, or another version wrote it."""
    try:
        return Bench.from_dict(json.loads(record_path(module, digest).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
