"""Capture: a module and one example call become a Program.

The module is copied with parameters that have a shape but no memory, exported once (`torch.export`, non-strict), turned
into a graph whose weights are named tensors of the checkpoint, and cut into a shell and its repeated blocks. The source
module is never run and never changed: helper objects that cache tensors at their first call would otherwise be left
holding fake ones.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from turbocompile import signature as sig
from turbocompile.cut import cut, drop_unread
from turbocompile.errors import CaptureError
from turbocompile.program import SHELL, Program, Subgraph
from turbocompile.quantized import DATA, SCALE, Quantized, is_torchao, quantized
from turbocompile.wan.guards import check_call
from turbocompile.weights import Constant, Dequantize, Expr, Load

aten = torch.ops.aten


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """The Program of `model` at the shapes of the example call.

    model: any module; its parameters may be on the meta device. args, kwargs: as the model is called; tensors may be on
    any device, meta included, their values are not read.

    Raises CaptureError where the model cannot be exported, with the module and the line at fault; UnsupportedError for
    a weight that torchao quantized in a format that is not known here.
    """
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise CaptureError(
            "capture was called under torch.autocast, which a graph does not record; "
            "cast the model instead (model.to(torch.bfloat16)) and call it outside autocast"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {name: quantized(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for wrapper in (True, False):
        signature, tensors = sig.describe(model, args, dict(kwargs or {}), wrapper)
        check_call(model, signature)
        signature, exported, recorder = _export(model, fake_copy(model, mode), signature, tensors, mode)
        if not signature.return_dict or recorder.record.output["kind"] == "class":
            break  # else `return_dict` means something of the model's own here
    program = _program(exported, signature, state, mode)
    program.signature = sig.with_output(program.signature, recorder.record.output)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return cut(program, lists)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy whose parameters are fake CPU tensors (no memory) and whose buffers are real CPU tensors.

    Buffers keep their values because those that are not persistent are in no checkpoint. What torchao quantized becomes
    a tensor of the dtype that it stands for: its operations must not be in the graph.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in memo and (isinstance(t, nn.Parameter) or is_torchao(t)):
                with mode:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
                memo[id(t)] = nn.Parameter(fake, requires_grad=False) if isinstance(t, nn.Parameter) else fake
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                if name in module._non_persistent_buffers_set:
                    raise CaptureError(
                        f"the buffer {name!r} of {type(module).__name__} is on the meta device and in no checkpoint, "
                        "so its values are unknown; build the model with its buffers on the CPU"
                    )
                with mode:  # a buffer of the checkpoint that was not loaded: shape and dtype are enough
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            elif buffer is not None and buffer.device.type != "cpu":
                module._buffers[name] = buffer.cpu()
        # Another attention backend than SDPA would export as an opaque operator and lose the site.
        processor = getattr(module, "processor", None)
        if getattr(processor, "_attention_backend", None) is not None:
            processor._attention_backend = None  # type: ignore[union-attr]
    return twin.requires_grad_(False).eval()  # a graph has one mode: dropout is off


class _Record:
    """Holds what the model returned; export undoes changes to a module's own attributes."""

    output: dict[str, Any]


class _Flat(nn.Module):
    """Calls the model with flat tensors and returns flat tensors, recording the tree of what it returned."""

    def __init__(self, model: nn.Module, signature: sig.Signature) -> None:
        super().__init__()
        self.model = model
        self.signature = signature
        self.record = _Record()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = sig.rebuild(self.signature, tensors)
        flat: list[torch.Tensor] = []
        self.record.output = sig.describe_output(self.model(*args, **kwargs), flat)
        if not flat:
            raise CaptureError(f"{type(self.model).__name__} returned no tensor, so there is nothing to compile")
        return tuple(flat)


def _export(
    model: nn.Module, twin: nn.Module, signature: sig.Signature, tensors: list[torch.Tensor], mode: FakeTensorMode
) -> tuple[sig.Signature, torch.export.ExportedProgram, _Flat]:
    """Exports; integer timesteps are first tried as float32, since samplers give either."""
    attempts = [sig.float_timesteps(signature)]
    if attempts[0] != signature:
        attempts.append(signature)
    for number, attempt in enumerate(attempts):
        with mode:
            fakes = tuple(
                torch.empty_strided(t.shape, t.stride(), dtype=i.dtype, device="cpu")
                for t, i in zip(tensors, attempt.inputs, strict=True)
            )
        flat = _Flat(twin, attempt)
        try:
            with _quiet(), _native_attention(), torch.no_grad(), _DataIsTraced():
                exported = torch.export.export(flat, fakes, strict=False)
            if any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in exported.graph.nodes):
                exported = exported.run_decompositions({})  # inlines no_grad and autocast regions
            return attempt, exported, flat
        except CaptureError:
            raise
        except Exception as error:  # export raises anything; it is re-raised as one sentence below
            if number == len(attempts) - 1:
                raise CaptureError(_explain(model, error)) from error
    raise AssertionError("unreachable")


class _DataIsTraced(TorchFunctionMode):
    """`t.data` leaves the trace: what it gives would be a constant, and a write to it no operation.

    Where no gradients are recorded, `t.detach()` is the same tensor and does not leave it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _explain(model: nn.Module, error: Exception) -> str:
    """One sentence that names the module and the line of the user's code at which export gave up."""
    not_theirs = tuple(f"{Path(f).parent}/" for f in (__file__, torch.__file__))
    where = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        filename = frame.f_code.co_filename
        if filename.startswith((*not_theirs, "<")):
            continue
        module = frame.f_locals.get("self")
        where = (filename, line, type(module).__name__ if isinstance(module, nn.Module) else frame.f_code.co_name)
    name = type(model).__name__
    reason = str(error).strip().split("\n")[0][:300]
    kind = type(error).__name__
    if "DataDependent" in kind or any(w in reason for w in ("data-dependent", "data dependent", "SymInt", "SymBool")):
        reason = "Python there decides by a tensor's value, which a graph cannot; decide by shape, or use torch.where"
    place = f"{where[2]}, {where[0]}:{where[1]}" if where else "no line of the model's own code"
    return f"{name} cannot be captured: {kind} at {place}: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export logs the partial graph of a failure, and warns of what it does on its own; the sentence is enough."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    stderr = sys.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            sys.stderr = io.StringIO()
            yield
        finally:
            sys.stderr = stderr
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _native_attention() -> contextlib.AbstractContextManager[Any]:
    """diffusers chooses attention kernels process-wide; SDPA is the form that the passes know."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return contextlib.nullcontext()
    return dispatch.attention_backend(dispatch.AttentionBackendName.NATIVE)


def _program(
    exported: torch.export.ExportedProgram,
    signature: sig.Signature,
    state: Mapping[str, Quantized | None],
    mode: FakeTensorMode,
) -> Program:
    """The flat Program: lifted parameters, buffers and constants become get_attr nodes with an expression each."""
    _refuse_symbols(exported.graph)
    kinds = torch.export.graph_signature.InputKind
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    shell = Subgraph(fx.Graph())
    program = Program({SHELL: shell}, signature, fake_mode=mode)
    env: dict[fx.Node, fx.Node] = {}
    inputs = 0
    for node in exported.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if node.op == "placeholder" and spec is not None and spec.kind == kinds.USER_INPUT:
            made = shell.graph.create_node("placeholder", f"input_{inputs}", name=f"input_{inputs}")
            inputs += 1
        elif node.op == "placeholder":
            made = _weight(program, exported, spec, node, state)
        elif node.op == "get_attr":
            raise CaptureError(f"the graph reads {node.target!r} in a way that turbocompile does not know")
        elif node.op == "output":
            made = shell.graph.output(tuple(env[n] for n in _user_outputs(exported, node)))
        else:
            operation = _operation(shell.graph, node, env)
            if operation is None:  # an assertion
                continue
            made = operation
            if made.meta:  # a cast that changes nothing: the tensor itself
                env[node] = made
                continue
        made.meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
        made.meta["nn_module_stack"] = _strip(made.meta.get("nn_module_stack"))
        if "val" in node.meta:
            made.meta["val"] = node.meta["val"]
        env[node] = made
    _refuse_writes(shell.graph)
    _drop_unused_weights(shell)
    return program


def _refuse_writes(graph: fx.Graph) -> None:
    """In-place operations may reach only what the graph itself made: two calls must be alike."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
        aliases = schema is None or any(a.alias_info is not None for a in schema.arguments)
        base[node] = base.get(source, source) if source is not None and aliases else node
        if schema is not None and schema.is_mutable and base[node].op in ("placeholder", "get_attr"):
            name = base[node].target if base[node].op == "get_attr" else "its input"
            raise CaptureError(
                f"the model writes to {name} while it runs, so two calls would not be alike; "
                "compile a model whose forward leaves its buffers and inputs alone"
            )


def _user_outputs(exported: torch.export.ExportedProgram, node: fx.Node) -> list[fx.Node]:
    """The model's own results; what a functional export adds for changed buffers or inputs is refused."""
    kinds = torch.export.graph_signature.OutputKind
    specs = exported.graph_signature.output_specs
    for spec in specs:
        if spec.kind != kinds.USER_OUTPUT:
            raise CaptureError(
                f"the model changes {spec.target!r} while it runs, so two calls would not be alike; "
                "compile a model whose forward leaves its buffers and inputs alone"
            )
    return list(node.args[0])  # type: ignore[arg-type]


def _strip(stack: Any) -> dict[str, tuple[str, str]]:
    """nn_module_stack without the wrapper's level, as plain strings: {key: (path, class name)}."""
    found = {}
    for key, (path, kind) in (stack or {}).items():
        if path == "model" or path.startswith("model."):
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            found[key] = (path.removeprefix("model").removeprefix("."), name)
    return found


def _weight(
    program: Program, exported: Any, spec: Any, node: fx.Node, state: Mapping[str, Quantized | None]
) -> fx.Node:
    """A lifted tensor as a get_attr: by name where a checkpoint has it, by value where none does."""
    value = node.meta.get("val")
    if spec is None or not isinstance(value, torch.Tensor):
        raise CaptureError(f"the graph has an input {node.name!r} that is neither a tensor of the call nor a weight")
    target = spec.target or node.name
    name = target.removeprefix("model.")
    shape, dtype = tuple(value.shape), value.dtype
    if name in state:
        program.shell.weights[name] = _stored(name, shape, dtype, state[name])
    else:
        tensor = exported.constants.get(target)
        if tensor is None:
            tensor = exported.state_dict.get(target)
        if tensor is None or isinstance(tensor, FakeTensor):
            raise CaptureError(
                f"the model computes the tensor {name!r} outside its graph while it is captured; "
                "register it as a buffer in __init__"
            )
        tensor = tensor.detach().cpu()
        if spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR:
            name = "lifted." + hashlib.sha256(_bytes(tensor)).hexdigest()[:16]
        program.shell.weights[name] = Constant(name, shape, dtype)
        program.constants[name] = tensor
    made = program.shell.graph.create_node("get_attr", name)
    return made


def _stored(name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Quantized | None) -> Expr:
    """A tensor of the model; where torchao quantized it, its parts."""
    if parts is None:
        return Load(name, shape, dtype)
    data = Load(name + DATA, shape, parts.data.dtype)
    scale = Load(name + SCALE, tuple(parts.scale.shape), parts.scale.dtype)
    return Dequantize(data, scale, parts.format, dtype)


def _bytes(tensor: torch.Tensor) -> bytes:
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return head + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _operation(graph: fx.Graph, node: Any, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A copy of an operation without device literals: the device is the engine's, chosen when it is loaded."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise CaptureError(
            f"the model uses {target}, which has no graph form here; "
            "use torch.nn.functional.scaled_dot_product_attention instead of flex attention"
        )
    if target is aten.view.default:  # for strides that a decomposition chose, which later ones need not have
        target = aten.reshape.default
    if isinstance(target, torch._ops.OpOverload):
        if target is aten._assert_tensor_metadata.default or target.overloadpacket in (
            aten.sym_constrain_range,
            aten.sym_constrain_range_for_size,
            aten._assert_scalar,
        ):
            return None
        kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if target.overloadpacket in (aten.to, aten.type_as, aten._to_copy) and not (
            kwargs.get("copy") or kwargs.get("memory_format")
        ):
            # One cast form; a cast to the tensor's own dtype is the tensor itself (export records it as a new node, and
            # later reads of the tensor then seem to come from wherever it was last "cast").
            source, cast = args[0], node.meta["val"].dtype
            if source.meta["val"].dtype == cast and target.overloadpacket is not aten._to_copy:
                return env[source]
            target, args, kwargs = aten.to.dtype, (source, cast), {}
    args = fx.map_arg(args, env.__getitem__)
    kwargs = fx.map_arg(kwargs, env.__getitem__)
    return graph.create_node(node.op, target, args, kwargs, name=node.name)


def _refuse_symbols(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            trace = node.meta.get("stack_trace", "").strip().split("\n")
            line = next((t.strip() for t in reversed(trace) if 'File "' in t), "an unknown line")
            raise CaptureError(
                f"a size in the model depends on a tensor's value ({node.target}) at {line}; "
                "a Program has fixed shapes, so compute it from shapes"
            )


def _drop_unused_weights(sub: Subgraph) -> None:
    for node in list(sub.graph.nodes):
        if node.op == "get_attr" and not node.users:
            sub.graph.erase_node(node)
    drop_unread(sub)
