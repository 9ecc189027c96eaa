"""TensorRT plans: the whole model at one shape, built from its ONNX graph for one kind of RTX card.

`tensorrt_rtx` builds for a named compute capability on a machine without a GPU. Its networks are strongly typed: a plan
computes in the dtypes of the graph. Version 1.7 builds float32 attention with grouped heads, or with an odd number of
tokens, only where the layer is marked decomposable. Without a capability in the builder's configuration it builds a
plan for an unknown card and says nothing. Data-centre cards have another product, `tensorrt`, which builds only on the
card itself; this backend does not use it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from turbocompile.backends import NO_TUNING, Tuning
from turbocompile.backends.onnx import require, write_model

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.files import inside
from turbocompile.hardware import check_target, target_of
from turbocompile.ir.program import Program
from turbocompile.ir.serialize import dtype_name

TARGETS = ("sm86", "sm89", "sm120")  # the RTX cards; ComputeCapability has a member of the same name in capitals
EXTRA = 'pip install "turbocompile[tensorrt]"'


def check(target: str) -> None:
    """Raises UnsupportedError where no plan can be built for the target, or a package is missing."""
    if check_target(target) not in TARGETS:
        why = "is no GPU" if target == "cpu" else "is a data-centre card, which tensorrt_rtx does not serve"
        raise UnsupportedError(
            f"the tensorrt backend builds plans for RTX cards ({', '.join(TARGETS)}), and {target} {why}; "
            "use backend: triton"
        )
    require("tensorrt", ("tensorrt_rtx", "onnx", "onnxscript"), EXTRA)


def emit(program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str) -> list[str]:
    """Writes `name-target.plan`, weights included. Raises UnsupportedError where TensorRT refuses the model."""
    check(target)
    model, *data = write_model(program, weights, folder, name, "tensorrt")
    try:
        plan = build_plan(folder / model, target)
    finally:
        for file in (model, *data):
            (folder / file).unlink()
    file = f"{name}-{target}.plan"
    (folder / file).write_bytes(plan)
    return [file]


def prove(program: Program, weights: Mapping[str, torch.Tensor], device: torch.device, target: str) -> Runner | None:
    """The callable that runs the program where `device` is the target; elsewhere a plan is built and thrown away.

    Raises UnsupportedError where TensorRT refuses the model.
    """
    if device.type == "cuda" and target_of(torch.cuda.get_device_capability(device)) == target:
        return compile_program(program, weights, device)
    with tempfile.TemporaryDirectory() as temporary:
        emit(program, weights, Path(temporary), "model", target)
    return None


def build_plan(model: Path, target: str) -> Any:
    """The serialized plan of an ONNX file for a target, as a buffer. Raises UnsupportedError with TensorRT's reason."""
    check(target)
    _refuse_float64(model)
    return _build_apart(model, target) if _may_die(model) else _build(model, target)


def _may_die(model: Path) -> bool:
    """Whether a graph has several attentions, and one of them a mask: where such attentions share a tensor, version 1.7
    ends the process.
    """
    import onnx

    nodes = onnx.load(str(model), load_external_data=False).graph.node
    attentions = [n for n in nodes if n.op_type == "Attention"]
    return len(attentions) > 1 and any(len(n.input) > 3 and n.input[3] for n in attentions)


_CHILD = """
import sys
from pathlib import Path
from turbocompile.backends.tensorrt import _build
from turbocompile.errors import UnsupportedError
try:
    Path(sys.argv[3]).write_bytes(_build(Path(sys.argv[1]), sys.argv[2]))
except UnsupportedError as error:
    print(error)
    sys.exit(2)
"""


def _build_apart(model: Path, target: str) -> bytes:
    """The plan that `_build` makes, in a process of its own. Raises UnsupportedError where that process dies."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "plan"
        command = [sys.executable, "-c", _CHILD, str(model.resolve()), target, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2 and done.stdout.strip():
            raise UnsupportedError(done.stdout.strip().split("\n")[-1])
        if done.returncode or not out.is_file():
            raise UnsupportedError(
                f"TensorRT died while it built a plan for {target} (exit code {done.returncode}), as it does where "
                f"attentions with masks share queries or keys; {_INSTEAD}"
            )
        return out.read_bytes()


def _build(model: Path, target: str) -> Any:
    """The plan of a graph that `build_plan` has checked. Raises UnsupportedError with TensorRT's reason."""
    import tensorrt_rtx as trt

    log = _logger()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.read_bytes(), str(model)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise UnsupportedError(f"TensorRT cannot read the model: {(reasons or ['no reason given'])[0]}; {_INSTEAD}")
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the Python API casts a layer to its own class so
            # Lets TensorRT take the layer apart where no fused kernel fits (see the top of this file).
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and an engine computes float32 in float32, as PyTorch does
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0):
        raise UnsupportedError(f"tensorrt_rtx {trt.__version__} does not build for {target}; upgrade it")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedError(f"TensorRT cannot build a plan of the model for {target}: {log.reason()}; {_INSTEAD}")
    return plan


_INSTEAD = "use backend: triton"
_DOUBLE = 11  # onnx.TensorProto.DOUBLE


def _refuse_float64(model: Path) -> None:
    """Raises UnsupportedError where the graph computes in float64, because TensorRT would use float32 silently."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    typed = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    typed.update({t.name: t.data_type for t in graph.initializer})
    found = next((name for name, kind in typed.items() if kind == _DOUBLE), None)
    if found is not None:
        raise UnsupportedError(f"TensorRT has no float64, and the model computes {found!r} in it; {_INSTEAD}")


def _logger() -> Any:
    """A TensorRT logger that keeps errors for the message instead of printing them."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return self.errors[0].strip().split("\n")[0][:300] if self.errors else "it gives no reason"

    return Log()


# ------------------------------------------------------------------------------------------------------------ running


def compile_program(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    folder: Path | None = None,
    files: tuple[str, ...] = (),
    tuning: Tuning = NO_TUNING,
) -> Runner:
    """A callable over flat tensors on the card. Without files (an engine in memory) the plan is built first.

    tuning is not read, because TensorRT chooses kernels of its own.
    Raises UnsupportedError where the device is not a card of the kind that the plan was built for.
    """
    target = _card(device)
    if folder is not None and files:
        built_for = Path(files[0]).stem.rpartition("-")[2]
        if built_for != target:
            raise UnsupportedError(
                f"the plan was built for {built_for}, and this machine's {torch.cuda.get_device_name(device)} is "
                f"{target}; build the engine again with target: {target}"
            )
        require("tensorrt", ("tensorrt_rtx",), EXTRA)
        return Runner(inside(folder, files[0]).read_bytes(), program, device)
    with tempfile.TemporaryDirectory() as temporary:
        (file,) = emit(program, weights, Path(temporary), "model", target)
        return Runner((Path(temporary) / file).read_bytes(), program, device)


def _card(device: torch.device) -> str:
    """The target that a device belongs to. Raises UnsupportedError where no plan runs on it."""
    if device.type != "cuda":
        raise UnsupportedError(
            f"a TensorRT plan runs on the RTX card it was built for, and the engine is on {device.type}; "
            "move it with engine.to('cuda') on a machine with that card, or build it with backend: triton"
        )
    target = target_of(torch.cuda.get_device_capability(device))
    if target not in TARGETS:
        raise UnsupportedError(
            f"TensorRT plans run on RTX cards ({', '.join(TARGETS)}), and this machine has an "
            f"{torch.cuda.get_device_name(device)}; build the engine with backend: triton"
        )
    return target


class Runner:
    """Runs a plan: `runner(*tensors) -> tuple of tensors`, each result in memory of its own, on the current stream."""

    def __init__(self, plan: bytes, program: Program, device: torch.device) -> None:
        import tensorrt_rtx as trt

        card = torch.cuda.get_device_name(device)
        log = _logger()
        with torch.cuda.device(device):
            runtime = trt.Runtime(log)
            engine = runtime.deserialize_cuda_engine(plan)
            context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise UnsupportedError(f"TensorRT does not open the plan on this {card}: {log.reason()}; build it again")
        self.device = device
        # Each of these four needs the ones before it.
        self._log, self._runtime, self._engine, self.context = log, runtime, engine, context
        self.inputs = tuple((i.shape, i.dtype) for i in program.signature.inputs)
        self.outputs = tuple((tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in program.shell.outputs())
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        wanted = {
            f"{kind}_{i}": (shape, getattr(trt, dtype_name(dtype)))
            for kind, group in (("input", self.inputs), ("output", self.outputs))
            for i, (shape, dtype) in enumerate(group)
        }
        if {n: (tuple(engine.get_tensor_shape(n)), engine.get_tensor_dtype(n)) for n in names} != wanted:
            raise EngineError("the plan has other inputs or outputs than its program; build the engine again")

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # `given` may be freed before the plan has run, because memory is freed in the order of the stream.
        given = [t.detach().to(dtype).contiguous() for t, (_, dtype) in zip(tensors, self.inputs, strict=True)]
        results = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.outputs)
        for kind, group in (("input", given), ("output", results)):
            for i, tensor in enumerate(group):
                self.context.set_tensor_address(f"{kind}_{i}", tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"TensorRT failed to run the plan: {self._log.reason()}")
        return results
