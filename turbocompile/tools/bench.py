"""How long an engine takes: a whole forward, and each kind of operation in it, beside the time it needs at least.

A forward is timed as the engine runs it, on a GPU as one CUDA graph between CUDA events. An operation is timed alone,
on the values it has in that forward, again and again, so that a small one finds its inputs in the cache: the sum of the
operations shows where the time goes, and the forward is the time that counts.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx

from turbocompile.cache import cache_path, keep_json
from turbocompile.errors import UnsupportedError
from turbocompile.hardware import Gpu, host_gpu
from turbocompile.ir.cost import OpCost, alike, cost
from turbocompile.ir.execute import SOURCE
from turbocompile.ir.program import SHELL, Program
from turbocompile.report.attentions import named_attentions
from turbocompile.report.report import duration, size
from turbocompile.runtime.cuda_graph import restore_generator

if TYPE_CHECKING:
    from turbocompile.runtime.engine import Engine

CALLS = 10  # of a forward
REPEATS = 5  # of an operation in one recording
SHOWN = 20  # operations of a printed table
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class OpTime:
    """Equal operations of one graph, as in the report, and the seconds that all `count` of them take in a forward."""

    graph: str
    name: str
    where: tuple[str, ...]
    shapes: str
    count: int
    seconds: float
    floor: float | None  # the roofline time on this card, where it is known


@dataclass(frozen=True)
class Bench:
    """seconds: medians of `calls` forwards, as the engine runs (a CUDA graph on a GPU) and kernel by kernel. launch:
    what a call costs the CPU. peak: bytes of the GPU, weights included. Seconds and bytes; None where there is no GPU.
    """

    engine: str
    device: str
    shape: str
    versions: Mapping[str, str]
    calls: int
    seconds: float
    ungraphed: float | None
    launch: float | None
    first: float  # the first call: kernels are compiled in it
    peak: int | None
    ops: tuple[OpTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "versions": dict(self.versions)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.engine} {self.shape} on {self.device}", style="bold")
        yield Text(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        yield Text(f"forward {duration(self.seconds)}, the median of {self.calls}; the first {duration(self.first)}")
        if self.ungraphed is not None and self.launch is not None and self.peak is not None:
            yield Text(
                f"kernel by kernel {duration(self.ungraphed)}; a call costs the CPU {duration(self.launch)}; "
                f"at most {size(self.peak)} of the GPU"
            )
        table = Table(title="Operations, each timed alone", title_justify="left", box=None, pad_edge=False)
        numbers = ("runs", "time", "at least", "share of the rate")
        for column in ("op", "where", "shapes", *numbers):
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        for op in self.ops[:SHOWN]:
            where = f"{op.graph} {', '.join(w for w in op.where[:3] if w)}".strip()
            table.add_row(*map(Text, (op.name.removeprefix("aten."), where, op.shapes, *_numbers([op]))))
        if rest := self.ops[SHOWN:]:
            table.add_row(f"{len(rest)} more", "", "", *_numbers(rest))
        table.add_row("all", "", "", *_numbers(self.ops))
        yield table

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bench:
        """The inverse of `to_dict`. Raises KeyError or TypeError for other data."""
        ops = tuple(OpTime(**{**op, "where": tuple(op["where"])}) for op in data["ops"])
        return cls(**{**data, "ops": ops})


def _numbers(ops: Sequence[OpTime]) -> tuple[str, str, str, str]:
    """Runs, time, the roofline's time and their quotient."""
    seconds = sum(op.seconds for op in ops)
    floors = [op.floor for op in ops if op.floor is not None]
    whole = len(floors) == len(ops)
    least, share = (duration(sum(floors)), f"{sum(floors) / seconds:.0%}") if whole and seconds else ("", "")
    return str(sum(op.count for op in ops)), duration(seconds), least, share


@torch.no_grad()
def bench(
    engine: Engine, *, shape: str | None = None, calls: int = CALLS, progress: Progress = lambda stage, fraction: None
) -> Bench:
    """Times an engine on the device it is on, with random inputs. shape: a program's name, the first by default.

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
    _wait(cuda)
    first = time.perf_counter() - began
    progress("forward", 0.0)
    runner(*tensors)  # a CUDA graph is recorded in the second call
    seconds = _median(lambda: runner(*tensors), calls, cuda)
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
        ungraphed=_median(lambda: plain(*tensors), calls, cuda) if cuda else None,
        launch=_launch(lambda: runner(*tensors)) if cuda else None,
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
    """Of what decides the speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        found |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return found


# ------------------------------------------------------------------------------------------------------------- timing


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _median(call: Callable[[], object], calls: int, cuda: bool) -> float:
    """Seconds of one call among several in a row."""
    call()
    _wait(cuda)
    if not cuda:
        spent = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def _launch(call: Callable[[], object]) -> float:
    """Seconds of the CPU until a call returns, with nothing queued before it."""
    spent = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(spent)


def _alone(call: Callable[[], object], cuda: bool) -> float:
    """Seconds of one operation: of REPEATS in a CUDA graph, so that launching them takes no part."""
    if not cuda:
        return _median(call, 3, False)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it cannot be recorded: its launches count too
        restore_generator(torch.device("cuda"))
        return _median(call, REPEATS, True)
    graph.replay()
    torch.cuda.synchronize()
    return _median(graph.replay, 3, True) / REPEATS


def _wake(device: torch.device, seconds: float = 0.3) -> None:
    """Keeps an idle card busy until its clock is up: it counts at a fifth of its speed for the first tenths."""
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        x @ x
        torch.cuda.synchronize()


def time_attentions(program: Program, device: torch.device) -> dict[str, float]:
    """Seconds of one run of each attention, by its site, on N(0, 1) in the shapes and strides of its operands.

    Masks keep every key.
    """
    found = {}
    if device.type == "cuda":
        _wake(device)
    for graph, sub in program.graphs.items():
        for site, node in named_attentions(graph, sub) if program.count(graph) else ():
            values = {n: _filled(n.meta["val"], device) for n in node.all_input_nodes}
            args, kwargs = (fx.map_arg(x, values.__getitem__) for x in (node.args, dict(node.kwargs)))
            found[site] = _alone(lambda t=node.target, a=args, k=kwargs: t(*a, **k), device.type == "cuda")  # type: ignore[misc]
    return found


def _filled(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """N(0, 1) in the shape and strides of a value; ones where it is a mask or whole numbers."""
    if not value.dtype.is_floating_point:
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    if 0 in value.stride():  # expanded: its numbers share memory, which nothing may write at random
        return torch.randn(value.shape, dtype=value.dtype, device=device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).normal_()


class _Operations:
    """Runs a compiled program node by node, and times one of each kind.

    That of a repeated block in its second call: the first reads what the shell laid out, the others what a block did.
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
            self.seconds[graph, key] = _alone(call, self.cuda)

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
    module: str = "transformer",
    calls: int = CALLS,
    device: str | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> tuple[Bench, Path | None]:
    """Times a module of an engine's folder, or of a recipe, whose engine is built in a temporary folder.

    The second value is where the record is, None of a recipe and where it could not be kept. Raises TurbocompileError.
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
        engine = load(folder, device=device or default_device(folder))
        if module not in engine.experts:
            raise UnsupportedError(f"the engine has no module {module!r}; it has {', '.join(engine.experts)}")
        found = bench(engine.experts[module], shape=shape, calls=calls, progress=progress)
        if built:
            return found, None
        return found, save_record(found, module, str(engine.manifest["digest"]))


def record_path(module: str, digest: str) -> Path:
    """Where the last bench of an engine's module is kept."""
    return cache_path("bench", f"{digest}-{module}")


def save_record(found: Bench, module: str, digest: str) -> Path | None:
    """Keeps it for `explain`, and says where; None (and a warning) where the cache cannot be written."""
    return keep_json("bench", f"{digest}-{module}", found.to_dict())


def read_record(module: str, digest: str) -> Bench | None:
    """The last bench of an engine on this machine; None where there is none, or it is of another version."""
    try:
        return Bench.from_dict(json.loads(record_path(module, digest).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
