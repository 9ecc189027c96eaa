"""Hands an engine's 8-bit weights to torchao: the inverse of reading torchao's weights at capture."""

from __future__ import annotations

import torch
from torch import nn

from turbocompile.capture.module_weights import DATA, Quantized
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.program import is_op
from turbocompile.ir.stored_names import stored_name
from turbocompile.ir.weights import full_name, stacked
from turbocompile.kernels import ops
from turbocompile.runtime.engine import Engine


def to_torchao(engine: nn.Module, model: nn.Module) -> list[str]:
    """Puts the 8-bit weights of an engine into a model's linears, as the tensors that `quantize_` would put there.

    engine: an Engine with linears in int8 or fp8. model: of the architecture that it came from; changed in place, and
    only in those linears. Fused projections are taken apart, and LoRAs that the engine holds are in the weights. A
    weight whose rows the engine holds in another order is left out. Returns the names of the linears, sorted.

    Raises UnsupportedError where torchao is missing or has no such format, EngineError where engine and model differ;
    the model is then as it was.
    """
    found = {}
    for name, parts in _linear_weights(engine).items():
        found[name] = _linear(model, name, parts), parts
    made = {name: _tensor(parts, linear.weight) for name, (linear, parts) in found.items()}
    for name, (linear, _) in found.items():
        linear.weight = nn.Parameter(made[name], requires_grad=False)
    return sorted(found)


def _linear_weights(engine: nn.Module) -> dict[str, Quantized]:
    """The engine's 8-bit weights, by the names of the model's linears. Raises EngineError, UnsupportedError."""
    engine = getattr(engine, "engine", engine)  # a module that captures at its first call has an engine then
    if not isinstance(engine, Engine):
        raise EngineError("nothing was captured yet; call the module that optimize() returned once")
    program = next(iter(engine.programs.values()))
    found: dict[str, Quantized] = {}
    for graph, sub in program.graphs.items():
        for node in sub.graph.nodes:
            if is_op(node, ops.w8a8_linear):
                data, scale, format = node.args[2], node.args[3], node.args[5]
                for prefix in program.prefixes(graph):
                    found |= _parts(engine, graph, prefix, str(data.target), str(scale.target), format)
    if not found:
        raise UnsupportedError(
            "the engine has no 8-bit linear to hand to torchao; "
            'build it with recipe={"passes": {"w8a8": "int8"}}, or "fp8"'
        )
    return found


def _parts(engine: Engine, graph: str, prefix: str, data: str, scale: str, format: str) -> dict[str, Quantized]:
    """One 8-bit weight of an engine, taken apart into the weights of the model's linears, by their names."""
    weights = next(iter(engine.programs.values())).graphs[graph].weights
    whole = [engine.weights[stored_name(graph, n, weights[n], prefix)] for n in (data, scale)]
    found, start = {}, 0
    for load in stacked(weights[data]):
        name = full_name(load.name, prefix)
        rows = slice(start, start + load.shape[0])
        start = rows.stop
        name = name.removesuffix(DATA).removesuffix(".weight")
        if format == "int8_block":
            raise UnsupportedError(
                f"torchao has no linear for {name!r} in int8_block; build the engine with w8a8: int8"
            )
        found[name] = Quantized(format, whole[0][rows], whole[1][rows])
    return found


def _linear(model: nn.Module, name: str, parts: Quantized) -> nn.Linear:
    """The model's linear with that name. Raises EngineError where it has none, or one of another shape."""
    linear = dict(model.named_modules()).get(name)
    if not isinstance(linear, nn.Linear) or linear.weight.shape != parts.data.shape:
        raise EngineError(
            f"{type(model).__name__} has no linear {name!r} with a weight of {list(parts.data.shape)}; "
            "give the model that the engine was built from"
        )
    return linear


def _tensor(parts: Quantized, like: torch.Tensor) -> torch.Tensor:
    """The tensor that torchao would make of the weight `like`: on its device, and dequantized to its dtype."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise UnsupportedError(
            f"torchao's tensors cannot be imported ({error}); pip install 'turbocompile[torchao]'"
        ) from error

    data, scale = (t.to(like.device, copy=True) for t in (parts.data, parts.scale))
    block = [1, data.shape[1]]
    if parts.format == "int8":
        zeros = torch.zeros_like(scale, dtype=torch.int8)
        per_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        return Int8Tensor(data, scale, block, like.dtype, zero_point=zeros, act_quant_kwargs=per_token)
    product = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()).mm_config
    rows = QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    return Float8Tensor(data, scale, block, mm_config=product, act_quant_kwargs=rows, dtype=like.dtype)
