"""Capture: a module and one example call become a Program.

The module is lent parameters that have a shape but no memory, exported once (`torch.export`, non-strict), turned into a
graph whose weights are named tensors of the checkpoint, and cut into a shell and its repeated blocks. The module itself
is traced, not a copy, because a wrapped `forward`, a hook or a closure would lead out of a copy; then the module gets
its own parameters back, with whatever else the trace changed (isolation.py).
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import operator
import sys
import traceback
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # export would import it later, and that import adds filters of warnings to the process
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from turbocompile.capture.blocks import cut
from turbocompile.capture.guards import check_call, check_parameters
from turbocompile.capture.hooks import check_hooks
from turbocompile.capture.isolation import State
from turbocompile.capture.module_weights import DATA, SCALE, Quantized, is_torchao, named_tensors, quantized
from turbocompile.capture.process import compiling, process_kept, quiet
from turbocompile.errors import CaptureError
from turbocompile.ir import signature as sig
from turbocompile.ir.program import SHELL, Program, Subgraph, drop_unread
from turbocompile.ir.weights import Constant, Dequantize, Expr, Load

aten = torch.ops.aten


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    numbers: Container[str] = (),
    float_timesteps: bool = True,
) -> Program:
    """The Program of `model` at the shapes of the example call.

    model: any module; its parameters may be on the meta device. No other thread may call it meanwhile. args, kwargs: as
    the model is called, which is how it is traced; tensors may be on any device, meta included, their values are not
    read. numbers: paths of the Python floats that are inputs of the Program, not fixed. float_timesteps: integer
    timesteps are tried as float32 first, since samplers give either.

    Raises CaptureError where the model cannot be exported, with the module and the line at fault; UnsupportedError for
    a weight that torchao quantized in a format that is not known here.
    """
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise CaptureError(
            "capture was called under torch.autocast, which a graph does not record; "
            "cast the model instead (model.to(torch.bfloat16)) and call it outside autocast"
        )
    with compiling():
        check_hooks(model)
        check_parameters(model)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        state = {name: quantized(name, tensor) for name, tensor, saved in named_tensors(model) if saved}
        for wrapper in (True, False):
            signature, tensors = sig.describe(model, args, dict(kwargs or {}), wrapper, numbers)
            check_call(model, signature)
            spelling = sig.Spelling.of(signature, args, kwargs or {})
            with lent(model, mode, call=(args, kwargs)):
                alone = contextvars.copy_context()  # what the trace sets in a ContextVar stays in it
                signature, exported, recorder = alone.run(
                    _export, model, signature, spelling, tensors, mode, float_timesteps
                )
            if not signature.return_dict or recorder.record.output["kind"] == "class":
                break  # else `return_dict` means something of the model's own here
        program = _program(exported, signature, state, mode)
    program.signature = sig.with_output(program.signature, recorder.record.output)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return cut(program, lists)


@contextlib.contextmanager
def lent(model: nn.Module, mode: FakeTensorMode, **more: Any) -> Iterator[None]:
    """The model, ready to be traced: parameters are fake CPU tensors (no memory), other tensors real ones on the CPU,
    dropout is off. more: what the trace may change, too, by a name.

    Buffers keep their values because those that are not persistent are in no checkpoint. What torchao quantized becomes
    a tensor of the dtype that it stands for: its operations must not be in the graph.
    """
    state = State(model=model, **more)
    given: dict[int, torch.Tensor] = {}

    def made(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in given:
            if isinstance(t, nn.Parameter) or is_torchao(t):
                with mode:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
                given[id(t)] = nn.Parameter(fake, requires_grad=False) if isinstance(t, nn.Parameter) else fake
            elif t.device.type == "meta" and id(t) in stored:  # not loaded: shape and dtype are enough
                with mode:
                    given[id(t)] = torch.empty(t.shape, dtype=t.dtype, device="cpu")
            else:
                given[id(t)] = t.cpu() if t.device.type not in ("cpu", "meta") else t
        return given[id(t)]

    tensors = list(named_tensors(model))
    stored = {id(t) for _, t, saved in tensors if saved}
    _check_buffers(model)
    try:
        with process_kept(), torch.device("cpu"):
            state.replace(made)
            if any(t.device.type not in ("cpu", "meta") for _, t, _ in tensors):
                state.empty_caches()  # of tensors on the model's device
            for module in model.modules():
                held = vars(module)
                held["training"] = False  # a graph has one mode
                held["_compiled_call_impl"] = None
                # Another attention backend than SDPA would export as an opaque operator and lose the site.
                processor = getattr(module, "processor", None)
                if getattr(processor, "_attention_backend", None) is not None:
                    processor._attention_backend = None  # type: ignore[union-attr]
            yield
    finally:
        state.restore()


def _check_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            kept = name in module._non_persistent_buffers_set
            if kept and buffer is not None and buffer.device.type == "meta":
                raise CaptureError(
                    f"the buffer {name!r} of {type(module).__name__} is on the meta device and in no checkpoint, "
                    "so its values are unknown; build the model with its buffers on the CPU"
                )


class _Record:
    """Holds what the model returned; export undoes changes to a module's own attributes."""

    output: dict[str, Any]


class _Flat(nn.Module):
    """Calls the model as its user does with flat tensors, and returns flat tensors; records what tree they were in."""

    def __init__(self, model: nn.Module, signature: sig.Signature, spelling: sig.Spelling) -> None:
        super().__init__()
        self.model = model
        self.signature, self.spelling = signature, spelling
        self.record = _Record()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = {i.path: t for i, t in zip(self.signature.inputs, tensors, strict=True)}
        args, kwargs = self.spelling.call(leaves)
        flat: list[torch.Tensor] = []
        self.record.output = sig.describe_output(self.model(*args, **kwargs), flat)
        if not flat:
            raise CaptureError(f"{type(self.model).__name__} returned no tensor, so there is nothing to compile")
        return tuple(flat)


def _export(
    model: nn.Module,
    signature: sig.Signature,
    spelling: sig.Spelling,
    tensors: list[torch.Tensor],
    mode: FakeTensorMode,
    float_timesteps: bool,
) -> tuple[sig.Signature, torch.export.ExportedProgram, _Flat]:
    """Exports; integer timesteps are first tried as float32, since samplers give either."""
    attempts = [sig.float_timesteps(signature)] if float_timesteps else [signature]
    if attempts[0] != signature:
        attempts.append(signature)
    for number, attempt in enumerate(attempts):
        with mode:
            fakes = tuple(
                torch.empty_strided(t.shape, t.stride(), dtype=i.dtype, device="cpu")
                for t, i in zip(tensors, attempt.inputs, strict=True)
            )
        flat = _Flat(model, attempt, spelling)
        try:
            with quiet(), _native_attention(), torch.no_grad(), _DataIsTraced():
                exported = torch.export.export(flat, fakes, strict=False)
                if not all(_is_plain(n) for n in exported.graph.nodes):
                    exported = exported.run_decompositions({})  # inlines no_grad and autocast regions, and torch.vmap
            return attempt, exported, flat
        except CaptureError:
            raise
        except Exception as error:  # export raises anything; it is re-raised as one sentence below
            if number == len(attempts) - 1:
                raise CaptureError(_explain(model, error)) from error
    raise AssertionError("unreachable")


def _is_plain(node: fx.Node) -> bool:
    """Whether a node of an exported graph is an operator, and no region or level of a transform."""
    return (
        node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    )


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
    not_theirs = tuple(f"{folder}/" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))
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
    elif "data is not allocated" in reason:
        reason = (
            "Python there reads a tensor's value, as torch.tensor([a, b]) of tensors does, which a graph cannot; "
            "use torch.stack"
        )
    place = f"{where[2]}, {where[0]}:{where[1]}" if where else "no line of the model's own code"
    return f"{name} cannot be captured: {kind} at {place}: {reason}"


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
            if str(name).startswith("lifted."):
                name = "a tensor that it keeps"
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
        tensor = tensor.detach().cpu().clone()  # what is done to the model later does not reach the Program
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
    if target is aten.detach_.default:  # of torch.tensor(t), which copies
        target = aten.clone.default
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
    if isinstance(target, torch._ops.OpOverload):
        target, args, kwargs = _with_dtype(graph, target, args, kwargs, node.meta.get("val"))
    return graph.create_node(node.op, target, args, kwargs, name=node.name)


# Operators that compute integers and booleans in torch's default dtype: each is the same on a cast of its input.
_IN_DEFAULT_DTYPE = (
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.true_divide, aten.pow, aten.float_power, aten.lerp,
    aten.sin, aten.cos, aten.tan, aten.asin, aten.acos, aten.atan, aten.atan2, aten.sinh, aten.cosh, aten.tanh,
    aten.exp, aten.exp2, aten.expm1, aten.log, aten.log2, aten.log10, aten.log1p, aten.sqrt, aten.rsqrt,
    aten.reciprocal, aten.sigmoid, aten.erf, aten.erfc,
)  # fmt: skip


def _with_dtype(
    graph: fx.Graph, target: Any, args: Any, kwargs: dict[str, Any], value: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """An operation whose floating result does not depend on torch's default dtype, which another process may set.

    What makes a tensor out of numbers says its dtype; integers are cast before they are computed with.
    """
    if not isinstance(value, torch.Tensor) or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return target, args, kwargs
    tensors = [n for n in (*args, *kwargs.values()) if isinstance(n, fx.Node)]
    if target is aten.where.Scalar:
        chosen = [graph.call_function(aten.scalar_tensor.default, (a,), {"dtype": value.dtype}) for a in args[1:]]
        for node in chosen:
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = torch.empty((), dtype=value.dtype)
        return aten.where.self, (args[0], *chosen), kwargs
    if any(t.meta["val"].dtype.is_floating_point or t.meta["val"].dtype.is_complex for t in tensors if _one(t)):
        return target, args, kwargs
    names = [a.name for a in target._schema.arguments]
    if not tensors and "dtype" in names:
        given = names.index("dtype") < len(args) and args[names.index("dtype")] is not None
        return target, args, kwargs if given else {**kwargs, "dtype": value.dtype}
    if target.overloadpacket not in _IN_DEFAULT_DTYPE:
        return target, args, kwargs

    def cast(n: fx.Node) -> fx.Node:
        made = graph.call_function(aten.to.dtype, (n, value.dtype))
        with value.fake_mode:  # type: ignore[attr-defined]
            made.meta["val"] = torch.empty_like(n.meta["val"], dtype=value.dtype)
        made.meta |= {k: n.meta[k] for k in ("nn_module_stack", "stack_trace") if k in n.meta}
        return made

    return target, fx.map_arg(args, cast), fx.map_arg(kwargs, cast)


def _one(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


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
