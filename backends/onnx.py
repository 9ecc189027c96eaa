"""ONNX files: the whole model at one shape in standard operators (opset 23), run by onnxruntime.

The file holds the graph. The weights stay where the engine has them: ONNX finds external data by file, offset and
length, and a safetensors shard is such a file, so that all shapes of an engine share one copy of the weights.
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

SMALL = 256  # elements of a constant that is no weight: shapes, axes, scalars, epsilons
OPSET = 23  # the first with Attention and RMSNormalization
EXTRA = 'pip install "turbocompile[onnx]"'

# The number that a file gives a dtype (onnx.TensorProto.DataType), and the name that onnxruntime gives it.
_ONNX_TYPES = {
    torch.float32: (1, "float"), torch.uint8: (2, "uint8"), torch.int8: (3, "int8"), torch.int16: (5, "int16"),
    torch.int32: (6, "int32"), torch.int64: (7, "int64"), torch.bool: (9, "bool"), torch.float16: (10, "float16"),
    torch.float64: (11, "double"), torch.bfloat16: (16, "bfloat16"),
}  # fmt: skip


def check(target: str) -> None:
    """The file serves every target; raises UnsupportedError where a package is missing."""
    require("onnx", ("onnx", "onnxscript", "onnxruntime"), EXTRA)


def require(backend: str, packages: Sequence[str], install: str) -> None:
    """UnsupportedError that names the packages that are not installed and how to install them."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UnsupportedError(f"the {backend} backend needs {' and '.join(missing)}; {install}")


def emit(program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str) -> list[str]:
    """Writes `name.onnx`, and `name.onnx.data` for what no safetensors file of the folder holds.

    The file is run once, and what it gives compared with the program. Raises UnsupportedError where it cannot be
    written or run, VerificationError where its numbers differ; nothing is left in the folder then.
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
    """What runs the program on `device`, tried once: as `compile_program`, at a build."""
    return compile_program(program, weights, device)


def _try(
    path: Path, program: Program, weights: Mapping[str, torch.Tensor], must_run: bool, runner: Runner | None = None
) -> None:
    """Runs a file once on the CPU and compares it with the program, or warns of why not.

    must_run: the file is meant for a CPU, so that what onnxruntime cannot run there is an UnsupportedError. runner: of
    the file on the CPU, where there is one already. Raises UnsupportedError, VerificationError.
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
    """As `emit`; backend is who asks, for messages. Raises UnsupportedError for what ONNX cannot express."""
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
            assert onnx_program is not None  # None only where a file is named
            _simplify(onnx_program.model)
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"the {backend} backend cannot express the model in ONNX: {_reason(error)}; use backend: triton"
        ) from error
    return onnx_program.model


def _simplify(model: Any) -> None:
    """Inlines functions, folds shapes and scalars, merges equal nodes and drops dead ones, in place.

    The exporter's own optimizer adds a table of rewrites, which finds nothing here and takes 41 of the 58 CPU seconds
    of an export of 30 layers.
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
    """No for what reads a weight, else as the optimizer thinks.

    A folded transpose would be a second copy of the weight, in memory here and in the engine; what runs the file folds
    it when it is loaded.
    """
    sizes = [v.const_value.size for v in node.inputs if v is not None and v.const_value is not None]
    return False if any(size > SMALL for size in sizes) else None


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that it does without, and of its own deprecations."""
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
    """Initializers get the names under which the engine stores them; traces of the machine that built it go."""
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
    """Points initializers at the folder's weights and writes the other large ones into `data`; the files written."""
    import onnx_ir as ir

    stored = _stored(folder)
    others = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        place = next((p for p in stored.get(name, ()) if name in weights and p.holds(folder, weights[name])), None)
        if place is not None:
            value.const_value = ir.ExternalTensor(
                place.file, place.offset, place.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
            )
        elif tensor.size > SMALL:  # what is smaller travels in the graph, which may not exceed 2 GiB
            others.append(value)
    if not others:
        return []
    tensors = ir.external_data.convert_tensors_to_external([v.const_value for v in others], folder, data)
    for value, tensor in zip(others, tensors, strict=True):
        value.const_value = tensor
    return [data]


@dataclass(frozen=True)
class _Place:
    """Where a file of the folder holds a tensor: `length` bytes from `offset`."""

    file: str
    offset: int
    length: int

    def holds(self, folder: Path, tensor: torch.Tensor) -> bool:
        """Whether the bytes there are the tensor's: files of several modules have tensors of the same names."""
        wanted = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if wanted.numel() != self.length:
            return False
        if self.length == 0:
            return True
        found = torch.from_file(
            str(folder / self.file), shared=False, size=self.offset + self.length, dtype=torch.uint8
        )
        return torch.equal(found[self.offset :], wanted)


def _stored(folder: Path) -> dict[str, list[_Place]]:
    """The tensors of the folder's safetensors files, by name."""
    found: dict[str, list[_Place]] = {}
    for path in sorted(folder.glob(SHARDS)):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found.setdefault(name, []).append(_Place(path.name, 8 + size + start, stop - start))
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
    tried as `emit` tries it.
    """
    check("cpu")
    if folder is not None and files:
        _check_model(folder, files[0])
        return Runner(folder / files[0], program, device)
    with tempfile.TemporaryDirectory() as temporary:  # the session maps what it needs before the files go
        path = Path(temporary) / write_model(program, weights, Path(temporary), "model", "onnx")[0]
        runner = Runner(path, program, device)
        on_cpu = device.type == "cpu"
        _try(path, program, weights, must_run=on_cpu, runner=runner if on_cpu else None)
        return runner


def _check_model(folder: Path, name: str) -> None:
    """EngineError unless the file is an ONNX graph of standard operators whose data lies in plain files of the folder.

    onnxruntime would follow names that lead out of the folder, and reads its own memory at addresses that a name gives.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = inside(folder, name)
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)  # whatever its name ends in
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
    """Whether types differ where onnxruntime gives float for float16 alone: it leaves the last cast out.

    It does so where an operator that it has in float32 alone gives an output, on a CPU.
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
        # Held until the run is over: the session is given addresses.
        given = [t.detach().to(dtype).contiguous() for t, (_, dtype) in zip(tensors, self.inputs, strict=True)]
        results = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.given)
        binding = self.session.io_binding()
        for name, tensor in zip(self.input_names, given, strict=True):
            binding.bind_input(name, *self._place(tensor))
        for name, tensor in zip(self.output_names, results, strict=True):
            binding.bind_output(name, *self._place(tensor))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session runs on a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except _failures() as error:
            raise UnsupportedError(_failed(error, self.name, self.device)) from error
        binding.synchronize_outputs()
        return tuple(t.to(dtype) for t, (_, dtype) in zip(results, self.outputs, strict=True))

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
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
    options.log_severity_level = 4  # errors are raised, and told in a sentence
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except _failures() as error:
        raise UnsupportedError(_failed(error, path.name, device)) from error


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a graph that it cannot load or run; running raises plain RuntimeErrors, too."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
        state.NotImplemented, state.RuntimeException, state.EPFail, RuntimeError,
    )  # fmt: skip


_NODE = re.compile(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", re.DOTALL)


def _failed(error: Exception, name: str, device: torch.device) -> str:
    """One sentence: the operator and the node that onnxruntime does not run, why, and what to do."""
    import onnxruntime

    text = str(error).strip()
    at = _NODE.search(text)
    if at is None:
        reason = _reason(error)
    else:  # the C++ function's place and signature say nothing to a user
        said = at[3].strip().split("\n")[0]
        said = said.rsplit(") ", 1)[-1] if said.startswith("/") else said
        reason = f"the operator {at[1]} at {at[2]!r} fails ({said[:200]})"
    return (
        f"onnxruntime {onnxruntime.__version__} cannot run {name} on {device.type}: {reason}; "
        "use float32 there, or backend: triton"
    )
