"""ONNX files: the whole model at one shape in standard operators (opset 23), run by onnxruntime.

The file holds the graph alone. The weights stay in the engine's safetensors shards, because ONNX finds external data by
file, offset and length. So all shapes of an engine share one copy of the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from turbocompile.backends import NO_TUNING, Tuning
from turbocompile.backends.flatten import Flat, flatten
from turbocompile.backends.trial import Trial, too_large

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.files import inside
from turbocompile.ir.program import Program
from turbocompile.ir.stored_names import SHARDS

SMALL = 256  # elements at most of a constant that is no weight: shapes, axes, scalars, epsilons
OPSET = 23  # the first with Attention and RMSNormalization
EXTRA = 'pip install "turbocompile[onnx]"'

# dtype -> its number in a file (onnx.TensorProto.DataType), and its name in onnxruntime.
_ONNX_TYPES = {
    torch.float32: (1, "float"), torch.uint8: (2, "uint8"), torch.int8: (3, "int8"), torch.int16: (5, "int16"),
    torch.int32: (6, "int32"), torch.int64: (7, "int64"), torch.bool: (9, "bool"), torch.float16: (10, "float16"),
    torch.float64: (11, "double"), torch.bfloat16: (16, "bfloat16"),
}  # fmt: skip


def check(target: str) -> None:
    """Raises UnsupportedError where a package is missing. A file serves every target."""
    require("onnx", ("onnx", "onnxscript", "onnxruntime"), EXTRA)


def require(backend: str, packages: Sequence[str], install: str) -> None:
    """Raises UnsupportedError where a package is not installed. backend: its name; install: the command that does."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UnsupportedError(f"the {backend} backend needs {' and '.join(missing)}; {install}")


def emit(program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str) -> list[str]:
    """Writes `name.onnx`, and `name.onnx.data` for the tensors that no safetensors file of the folder holds.

    The file is run once, and its results are compared with the program's. Raises UnsupportedError where the file cannot
    be written or run, VerificationError where its numbers differ; nothing is left in the folder then.
    """
    check(target)
    files = write_model(program, weights, folder, name, "onnx")
    try:
        _try(folder / files[0], program, weights, must_run=target == "cpu")
    except BaseException:
        for file in files:
            (folder / file).unlink()
        raise
    return files


def prove(program: Program, weights: Mapping[str, torch.Tensor], device: torch.device, target: str) -> Runner | None:
    """The callable that runs the program on `device`, compared with the program once; as `compile_program`."""
    return compile_program(program, weights, device)


def _try(
    path: Path, program: Program, weights: Mapping[str, torch.Tensor], must_run: bool, runner: Runner | None = None
) -> None:
    """Runs a file once on the CPU and compares it with the program, or warns why it was not run.

    must_run: the file is meant for a CPU, so that UnsupportedError is raised where onnxruntime cannot run it there.
    runner: of the file on the CPU, where there is one already. Raises VerificationError where the numbers differ.
    """
    reason = too_large(program)
    if reason is None:
        try:
            runner = runner or Runner(path, program, torch.device("cpu"))
        except UnsupportedError as error:
            if must_run:
                raise
            reason = str(error).partition("; ")[0]
    trial = Trial(program, weights) if reason is None else None
    if trial is None or not trial.computes:
        reason = reason or "the model does not take random integers"
        warnings.warn(f"{path.name} was not tried: {reason}; run it once before you rely on it", stacklevel=3)
        return
    assert runner is not None
    trial.check(runner(*trial.inputs), path.name)


def write_model(
    program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, backend: str
) -> list[str]:
    """Writes the files that `emit` writes, and returns their names. backend: the name in messages.

    Raises UnsupportedError for an operator that ONNX cannot express.
    """
    import onnx_ir as ir

    flat = flatten(program, weights, backend)
    model = _export(flat, backend)
    _tidy(model.graph, flat.names)
    extra = _externalize(model.graph, weights, folder, f"{name}.onnx.data")
    ir.save(model, folder / f"{name}.onnx")
    return [f"{name}.onnx", *extra]


def _export(flat: Flat, backend: str) -> Any:
    """The module as an onnx_ir.Model with inputs input_i and outputs output_i."""
    outputs = next(n for n in reversed(flat.module.graph.nodes) if n.op == "output").args[0]
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(flat.module, flat.example, strict=False)
            onnx_program = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
                input_names=[f"input_{i}" for i in range(len(flat.example))],
                output_names=[f"output_{i}" for i in range(len(outputs))],
            )  # fmt: skip
            assert onnx_program is not None  # the exporter returns None only where it is given the name of a file
            _simplify(onnx_program.model)
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"the {backend} backend cannot express the model in ONNX: {_reason(error)}; use backend: triton"
        ) from error
    return onnx_program.model


def _simplify(model: Any) -> None:
    """Inlines functions, folds shapes and scalars, merges equal nodes and drops dead ones, in place.

    These passes stand here because the exporter's own optimizer adds a table of rewrites, which finds nothing in our
    graphs and takes 41 of the 58 CPU seconds that an export of 30 layers takes.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model, should_fold=_may_fold)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)


def _may_fold(node: Any) -> bool | None:
    """False for a node that reads a weight; None for another node, about which the optimizer decides.

    A folded transpose would be a second copy of the weight, in memory here and in the engine. onnxruntime and TensorRT
    fold it when they load the file.
    """
    sizes = [v.const_value.size for v in node.inputs if v is not None and v.const_value is not None]
    return False if any(size > SMALL for size in sizes) else None


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter from warning: it warns of packages that it does without, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(level)


def _tidy(graph: Any, names: Mapping[str, str]) -> None:
    """Gives initializers the names under which the engine stores them; drops traces of the machine that built it."""
    for old, new in names.items():
        value = graph.initializers.pop(old, None)
        if value is not None:
            value.name = new
            graph.register_initializer(value)
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None


def _externalize(graph: Any, weights: Mapping[str, torch.Tensor], folder: Path, data: str) -> list[str]:
    """Points initializers at the folder's weights, and writes the other large initializers into the file `data`.

    Returns the names of the files that it wrote.
    """
    import onnx_ir as ir

    stored = _stored(folder)
    others = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        span = next((s for s in stored.get(name, ()) if name in weights and s.holds(folder, weights[name])), None)
        if span is not None:
            value.const_value = ir.ExternalTensor(
                span.file, span.offset, span.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
            )
        elif tensor.size > SMALL:  # smaller tensors stay in the graph, whose file may not exceed 2 GiB
            others.append(value)
    if not others:
        return []
    tensors = ir.external_data.convert_tensors_to_external([v.const_value for v in others], folder, data)
    for value, tensor in zip(others, tensors, strict=True):
        value.const_value = tensor
    return [data]


@dataclass(frozen=True)
class _Span:
    """The bytes of a file in the folder that hold a tensor: `length` of them from `offset` on."""

    file: str
    offset: int
    length: int

    def holds(self, folder: Path, tensor: torch.Tensor) -> bool:
        """Whether these bytes are the tensor's, because files of several modules have tensors of the same name."""
        wanted = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if wanted.numel() != self.length:
            return False
        if self.length == 0:
            return True
        found = torch.from_file(
            str(folder / self.file), shared=False, size=self.offset + self.length, dtype=torch.uint8
        )
        return torch.equal(found[self.offset :], wanted)


def _stored(folder: Path) -> dict[str, list[_Span]]:
    """The bytes of the tensors in the folder's safetensors files, by the tensors' names."""
    found: dict[str, list[_Span]] = {}
    for path in sorted(folder.glob(SHARDS)):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found.setdefault(name, []).append(_Span(path.name, 8 + size + start, stop - start))
    return found


# ------------------------------------------------------------------------------------------------------------ running


def compile_program(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    folder: Path | None = None,
    files: tuple[str, ...] = (),
    tuning: Tuning = NO_TUNING,
) -> Runner:
    """A callable over flat tensors on `device`. Without files (an engine in memory) the model is exported first, and
    compared with the program as `emit` does. tuning is not read, because onnxruntime runs kernels of its own.
    """
    check("cpu")
    if folder is not None and files:
        _check_model(folder, files[0])
        return Runner(folder / files[0], program, device)
    with tempfile.TemporaryDirectory() as temporary:  # the session maps the files before they are deleted
        path = Path(temporary) / write_model(program, weights, Path(temporary), "model", "onnx")[0]
        runner = Runner(path, program, device)
        on_cpu = device.type == "cpu"
        _try(path, program, weights, must_run=on_cpu, runner=runner if on_cpu else None)
        return runner


def _check_model(folder: Path, name: str) -> None:
    """Raises EngineError unless the file is an ONNX graph of standard operators with its data in the folder's files.

    onnxruntime would follow names that lead out of the folder, and one such name makes it read its own memory.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = inside(folder, name)
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)  # not by the name's ending
    except DecodeError as error:
        raise EngineError(f"{name} in the engine is no ONNX file; copy it again or build it again") from error
    domains = {o.domain for o in model.opset_import} | {n.domain for n in model.graph.node}
    if domains - {"", "ai.onnx"} or model.functions:
        raise EngineError(f"{name} in the engine holds operators that are not ONNX's own; build it again")
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                inside(folder, entry.value)


def _tensors(graph: Any) -> Iterator[Any]:
    """The constant tensors of a graph and of the graphs in it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _widened(has: list[Any], needs: list[Any]) -> bool:
    """Whether types differ only where onnxruntime returns float32 instead of float16.

    On a CPU it leaves the last cast out, where an operator that it has in float32 alone makes an output.
    """
    half = ("tensor(float)", "tensor(float16)")
    return len(has) == len(needs) and all(
        a == b or ((a[0], b[0]) == half and a[1] == b[1]) for a, b in zip(has, needs, strict=True)
    )


class Runner:
    """Runs an ONNX file: `runner(*tensors) -> tuple of tensors`, each result in memory of its own."""

    def __init__(self, path: Path, program: Program, device: torch.device) -> None:
        self.device, self.name = device, path.name
        self.session = _session(path, device)
        self.inputs = tuple((i.shape, i.dtype) for i in program.signature.inputs)
        self.outputs = tuple((tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in program.shell.outputs())
        self.input_names = [i.name for i in self.session.get_inputs()]
        self.output_names = [o.name for o in self.session.get_outputs()]
        types = {f"tensor({name})": dtype for dtype, (_, name) in _ONNX_TYPES.items()}
        self.given = [
            (shape, types.get(o.type, dtype))
            for o, (shape, dtype) in zip(self.session.get_outputs(), self.outputs, strict=True)
        ]
        for found, wanted in ((self.session.get_inputs(), self.inputs), (self.session.get_outputs(), self.outputs)):
            has = [(v.type, list(v.shape)) for v in found]
            needs = [(f"tensor({_ONNX_TYPES[dtype][1]})", list(shape)) for shape, dtype in wanted]
            if has != needs and not _widened(has, needs):
                raise EngineError(f"{path.name} takes or gives {has} where its program has {needs}; build it again")

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # `given` lives until the run is over, because the session has only the tensors' addresses.
        given = [t.detach().to(dtype).contiguous() for t, (_, dtype) in zip(tensors, self.inputs, strict=True)]
        results = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.given)
        binding = self.session.io_binding()
        for name, tensor in zip(self.input_names, given, strict=True):
            binding.bind_input(name, *self._memory(tensor))
        for name, tensor in zip(self.output_names, results, strict=True):
            binding.bind_output(name, *self._memory(tensor))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session runs on a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except _failures() as error:
            raise UnsupportedError(_failed(error, self.name, self.device)) from error
        binding.synchronize_outputs()
        return tuple(t.to(dtype) for t, (_, dtype) in zip(results, self.outputs, strict=True))

    def _memory(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        """A tensor as a binding takes it: device, its index, dtype, shape, address."""
        return (
            self.device.type,
            self.device.index or 0,
            _ONNX_TYPES[tensor.dtype][0],
            list(tensor.shape),
            tensor.data_ptr(),
        )


def _session(path: Path, device: torch.device) -> Any:
    """An InferenceSession on the device. Raises UnsupportedError where onnxruntime cannot run the model there."""
    import onnxruntime

    if device.type == "cpu":
        providers: list[Any] = ["CPUExecutionProvider"]
    elif device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    else:
        raise UnsupportedError(
            f"the installed onnxruntime does not run on {device.type}; pip install onnxruntime-gpu for CUDA, or move "
            "the engine to the CPU"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # logs nothing but fatal errors, because errors are raised as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except _failures() as error:
        raise UnsupportedError(_failed(error, path.name, device)) from error


def _failures() -> tuple[type[Exception], ...]:
    """The errors that onnxruntime raises for a graph that it cannot load or run; RuntimeError is one of them."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
        state.NotImplemented, state.RuntimeException, state.EPFail, RuntimeError,
    )  # fmt: skip


_NODE = re.compile(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", re.DOTALL)


def _failed(error: Exception, name: str, device: torch.device) -> str:
    """A message in one sentence: the operator and node that onnxruntime does not run, the reason, and a remedy."""
    import onnxruntime

    text = str(error).strip()
    at = _NODE.search(text)
    if at is None:
        reason = _reason(error)
    else:  # the message without the C++ function that onnxruntime puts before it
        said = at[3].strip().split("\n")[0]
        said = said.rsplit(") ", 1)[-1] if said.startswith("/") else said
        reason = f"the operator {at[1]} at {at[2]!r} fails ({said[:200]})"
    return (
        f"onnxruntime {onnxruntime.__version__} cannot run {name} on {device.type}: {reason}; "
        "use float32 there, or backend: triton"
    )
