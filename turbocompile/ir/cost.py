"""What a Program costs on paper: operations, bytes, memory, and the time that they take at the very least.

Operations are counted from the shapes in `meta["val"]`. A product (linear, matmul, convolution, attention) counts its
products alone, a multiply-add as two; softmax, scales and biases inside it are some percent and overlap with them.
Everything else counts operations per element. Bytes are what must cross the memory bus if every op reads its inputs and
writes its outputs once: views are free, and what an op keeps to itself (a quantized copy of q) is not counted. So every
figure is a floor, and the roofline time is one too.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbocompile.hardware import Gpu
from turbocompile.ir.program import SHELL, Program, Subgraph, call, module_path, walk_tensors
from turbocompile.ir.stored_names import stored_weights
from turbocompile.ir.weights import nbytes

Work = dict[str, int]  # kind of arithmetic ("bf16", "fp8", "int8", "fp32") -> operations
KINDS = ("bf16", "fp8", "int8", "fp32")
MEMORY = "memory"
_MOST = 1 << 80  # no count is larger; one that is, in a file, is a mistake or an attack


def natural(value: Any) -> int:
    """A count that was read from a file. Raises ValueError where it is no whole number of a sensible size."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
        raise ValueError(f"{str(value)[:20]!r} is no count")
    return value


# ------------------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class OpCost:
    """Equal ops of one graph: what they do in one forward of the model, all calls of the graph together.

    name: as in "aten.linear". where: paths of the modules that they come from. shapes: as in
    "1x32760x1536 bf16, 8960x1536 bf16 -> 1x32760x8960 bf16". count: how often they run. work: operations by kind.
    """

    name: str
    graph: str
    where: tuple[str, ...]
    shapes: str
    count: int
    work: Work
    bytes: int

    @property
    def flops(self) -> int:
        return sum(self.work.values())

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each resource is busy at its full rate, by kind of arithmetic, and "memory".

        Raises UnsupportedError where the card lacks the arithmetic.
        """
        return {**{k: n / gpu.rate(k) for k, n in self.work.items() if n}, MEMORY: self.bytes / gpu.bandwidth}

    def seconds(self, gpu: Gpu) -> float:
        """The roofline time of all `count` of them: the slowest of tensor cores, ordinary cores and memory."""
        times = self.times(gpu)
        tensor = sum(t for kind, t in times.items() if kind not in ("fp32", MEMORY))  # one unit: its formats take turns
        return max(tensor, times.get("fp32", 0.0), times[MEMORY])

    def bound(self, gpu: Gpu) -> str:
        """What binds: "memory", or the kind of arithmetic that takes longest."""
        times = self.times(gpu)
        if times[MEMORY] >= self.seconds(gpu):
            return MEMORY
        return max((k for k in times if k != MEMORY), key=times.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "count": self.count, "flops": self.flops, "bytes": self.bytes, "graph": self.graph,
            "where": list(self.where), "shapes": self.shapes, "work": dict(self.work),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpCost:
        """The inverse of `to_dict`. Raises KeyError, TypeError, AttributeError or ValueError for other data."""
        work = {str(k): natural(v) for k, v in data["work"].items()}
        if not set(work) <= set(KINDS):
            raise ValueError(f"unknown arithmetic {sorted(set(work) - set(KINDS))[0]!r}")
        return cls(
            str(data["name"]), str(data["graph"]), tuple(str(w) for w in data["where"]), str(data["shapes"]),
            natural(data["count"]), work, natural(data["bytes"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One forward of a Program. Parameters and activations in bytes: see `parameter_bytes` and `activation_bytes`."""

    ops: tuple[OpCost, ...]
    parameters: int
    activations: int

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    def seconds(self, gpu: Gpu) -> float:
        """The sum of the ops' roofline times: they run one after the other."""
        return sum(op.seconds(gpu) for op in self.ops)


def cost(program: Program) -> Cost:
    """What one forward of the program costs, at the shape it was captured at."""
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for graph, sub in program.graphs.items():
        calls = program.count(graph)
        for node in sub.graph.nodes:
            work, moved = node_cost(node)
            if calls and (any(work.values()) or moved):
                row = rows.setdefault((graph, *_alike(node, work, moved)), [work, moved, 0, []])
                row[2] += calls
                if (path := module_path(node)) not in row[3]:
                    row[3].append(path)
    ops = [
        OpCost(name, graph, tuple(paths), shapes, n, {k: v * n for k, v in work.items()}, moved * n)
        for (graph, name, shapes, _, _), (work, moved, n, paths) in rows.items()
    ]
    return Cost(tuple(ops), parameter_bytes([program]), activation_bytes(program))


def _alike(node: fx.Node, work: Work, moved: int) -> tuple[Any, ...]:
    return (op_name(node), describe(node), tuple(sorted(work.items())), moved)


def alike(node: fx.Node) -> tuple[Any, ...] | None:
    """What nodes of one `OpCost` have in common within their graph; None for a node that costs nothing."""
    work, moved = node_cost(node)
    return _alike(node, work, moved) if any(work.values()) or moved else None


def node_cost(node: fx.Node) -> tuple[Work, int]:
    """Operations by kind, and bytes read and written, of one run of a node."""
    name = schema_name(node)
    if node.op != "call_function" or node.target in (call, operator.getitem) or name in _EMPTY or is_view(node):
        return {}, 0
    if next(walk_tensors(node.meta.get("val")), None) is None:  # assertions
        return {}, 0
    work = {k: int(n) for k, n in _RULES.get(name, _elementwise)(node).items()}
    return work, _bytes_moved(node, name)


def op_name(node: fx.Node) -> str:
    """The op without its overload, as in "aten.linear"."""
    return schema_name(node).replace("::", ".")


def schema_name(node: fx.Node) -> str:
    """As in "aten::linear"; the plain name of a function that is no operator."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


SHORT = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool", torch.float8_e4m3fn: "fp8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def tensor_text(value: Any) -> str:
    """As in "1x32760x1536 bf16"; a tuple's tensors are separated by commas."""
    return ", ".join(
        f"{'x'.join(map(str, t.shape)) or 'scalar'} {SHORT.get(t.dtype, str(t.dtype).removeprefix('torch.'))}"
        for t in walk_tensors(value)
    )


def describe(node: fx.Node) -> str:
    """Shapes and dtypes of what a node reads and makes, as in "3 of 1x12x32760x128 bf16 -> 1x12x32760x128 bf16".

    What is a thousand times smaller than the largest (biases, scales, tables) is left out.
    """
    read = [t for n in node.all_input_nodes for t in walk_tensors(n.meta["val"])]
    made = list(walk_tensors(node.meta["val"]))
    least = max((t.numel() for t in read + made), default=0) / 1000

    def text(tensors: list[Any]) -> str:
        shown = [tensor_text(t) for t in tensors if t.numel() >= least]
        runs = ((one, len(list(same))) for one, same in itertools.groupby(shown))
        return ", ".join(one if n == 1 else f"{n} of {one}" for one, n in runs)

    return f"{text(read)} -> {text(made)}"


# ------------------------------------------------------------------------------------------------------------- bytes

# Ops that look at data instead of moving it, unless they have to copy (`is_view` asks).
_MAY_COPY = ("aten::reshape", "aten::reshape_as", "aten::flatten", "aten::contiguous", "aten::to", "aten::type_as")
_EMPTY = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_permuted", "aten::empty_strided")
_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_")
_GATHERS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: along an expanded dimension (stride 0) there is one."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0]
    return math.prod(sizes) * tensor.dtype.itemsize


def _bytes_moved(node: fx.Node, name: str) -> int:
    written = sum(storage_bytes(t) for t in walk_tensors(node.meta["val"]))
    read = [t for n in node.all_input_nodes for t in walk_tensors(n.meta["val"])]
    if name in _OVERWRITE:
        return written + sum(storage_bytes(t) for t in read[1:])
    if name in _GATHERS:  # of the table, only the rows that are taken
        return 2 * written + sum(storage_bytes(t) for t in read[1:])
    return written + sum(storage_bytes(t) for t in read)


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at the storage of its first argument. The schema says so; reshape and to may copy."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    if schema.name == "aten::dropout":  # hands its input on where it is not training
        return not arguments(node)["train"]
    if not _aliases(node) or schema.arguments[0].is_write:
        return False
    if schema.name not in _MAY_COPY:
        return True
    source, made = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if source.dtype != made.dtype:
        return False
    if schema.name == "aten::contiguous":
        return bool(source.is_contiguous())
    return _can_view(source, made.shape)


def _aliases(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _can_view(tensor: torch.Tensor, shape: torch.Size) -> bool:
    try:
        torch.empty_strided(tensor.shape, tensor.stride(), device="meta").view(shape)
    except RuntimeError:  # what view says of strides that do not allow it
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- memory


def parameter_bytes(programs: Iterable[Program]) -> int:
    """Bytes of all weights as stored: a weight that differs from call to call counts once a call, a shared one once.

    Programs of several shapes share their weights.
    """
    return sum(parameters_by_dtype(programs).values())


def parameters_by_dtype(programs: Iterable[Program]) -> dict[str, int]:
    """Bytes of all weights as stored, by dtype ("bfloat16", "int8", ...)."""
    stored: dict[str, Any] = {}
    for program in programs:
        stored |= {weight.name: weight.expr for weight in stored_weights(program)}
    found: dict[str, int] = {}
    for expr in stored.values():
        name = str(expr.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + nbytes(expr)
    return dict(sorted(found.items()))


def activation_bytes(program: Program) -> int:
    """The most bytes of activations alive at once, inputs included, when each is freed after its last use.

    Weights, and what an op allocates for itself, are not counted.
    """
    inner = {name: _peak(sub, {}, inputs=False) for name, sub in program.graphs.items() if name != SHELL}
    return _peak(program.shell, inner, inputs=True)


def _peak(sub: Subgraph, inner: Mapping[str, int], inputs: bool) -> int:
    """inputs: whether this graph's inputs count (a block's inputs are alive in the shell, and count there)."""
    nodes = list(sub.graph.nodes)
    storage = _storages(nodes)
    size: dict[Any, int] = {}
    born: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for i, node in enumerate(nodes):
        for key, tensor in storage.get(node, ()):
            if key not in born:
                born[key] = i
                counts = key[0].op == "call_function" or (inputs and key[0].op == "placeholder")
                size[key] = storage_bytes(tensor) if counts else 0
        for read in (*node.all_input_nodes, node):
            for key, _ in storage.get(read, ()):
                last[key] = len(nodes) if node.op == "output" or key[0].op == "placeholder" else i
    dying: dict[int, list[Any]] = {}
    for key, i in last.items():
        dying.setdefault(i, []).append(key)
    live = peak = 0
    for i, node in enumerate(nodes):
        made = sum(size[key] for key, _ in storage.get(node, ()) if born[key] == i)
        within = inner.get(str(node.args[0]), 0) if node.op == "call_function" and node.target is call else 0
        peak = max(peak, live + max(made, within))
        live += made - sum(size[key] for key in dying.get(i, ()))
    return peak


def _storages(nodes: list[fx.Node]) -> dict[fx.Node, list[tuple[Any, torch.Tensor]]]:
    """Per node the storages that its value lies in, each as ((node that made it, index), tensor)."""
    found: dict[fx.Node, list[tuple[Any, torch.Tensor]]] = {}
    for node in nodes:
        if node.op == "output" or "val" not in node.meta:
            continue
        if node.op == "call_function" and node.target is operator.getitem:
            parent = found[node.args[0]]  # type: ignore[index]
            found[node] = [parent[node.args[1] if len(parent) > 1 else 0]]  # type: ignore[index]
        elif node.op == "call_function" and (is_view(node) or (_aliases(node) and schema_name(node) not in _MAY_COPY)):
            found[node] = found[node.args[0]][:1]  # type: ignore[index]
        else:
            found[node] = [((node, i), t) for i, t in enumerate(walk_tensors(node.meta["val"]))]
    return found


# --------------------------------------------------------------------------------------------------------- operations

Rule = Callable[[fx.Node], Mapping[str, float]]
_RULES: dict[str, Rule] = {}


def _counts(*names: str) -> Callable[[Rule], Rule]:
    """Registers how the operations of ops are counted, by their schema names."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the op's schema, defaults filled in, nodes replaced by their values."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    return {name: fx.node.map_aggregate(value, _value_of) for name, value in given.items()}


def _value_of(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def arithmetic(dtype: torch.dtype) -> str:
    """The kind of arithmetic in which a product of such numbers runs."""
    if dtype.itemsize == 1:
        return "fp8" if dtype.is_floating_point else "int8"
    return "bf16" if dtype.itemsize == 2 and dtype.is_floating_point else "fp32"


def _elements(node: fx.Node) -> int:
    """Elements of the largest tensor that a node reads or makes: reductions work on what they read."""
    values = [node.meta["val"], *(n.meta["val"] for n in node.all_input_nodes)]
    return max((t.numel() for v in values for t in walk_tensors(v)), default=0)


# Operations per element of what is no product. Norms: centre, square, sums, scale. An affine, a modulation and a gated
# residual are two more each. Softmax: maximum, subtraction, exponential, sum, division. Quantization: absolute value,
# maximum, scale, rounding. Rotary: two products and a sum.
_LAYER, _RMS, _AFFINE, _QUANTIZE, _ROPE, _GELU = 5, 4, 2, 4, 3, 8
_PER_ELEMENT = {
    "aten::gelu": _GELU, "aten::silu": 4, "aten::sigmoid": 3, "aten::softmax": 5, "aten::_softmax": 5, "aten::var": 3,
    "aten::var_mean": 3, "aten::addcmul": 2, "aten::lerp": 3, "aten::linalg_vector_norm": 2,
    "turbocompile::rope": _ROPE, "turbocompile::quantize": _QUANTIZE, "turbocompile::gelu_quantize": _GELU + _QUANTIZE,
}  # fmt: skip
_MOVED = """
cat concat stack clone copy copy_ to _to_copy contiguous reshape reshape_as flatten type_as slice_scatter
select_scatter repeat repeat_interleave tile roll flip constant_pad_nd pad full full_like zeros zeros_like ones
ones_like fill_ zero_ arange new_zeros new_ones new_full scalar_tensor complex _unsafe_view pixel_shuffle
pixel_unshuffle
"""
_MOVES = tuple(f"aten::{name}" for name in _MOVED.split())


def _elementwise(node: fx.Node) -> Mapping[str, float]:
    """One operation per element where the tables above say nothing else."""
    return {"fp32": _PER_ELEMENT.get(schema_name(node), 1) * _elements(node)}


@_counts(*_MOVES, *_GATHERS)
def _moves(node: fx.Node) -> Mapping[str, float]:
    return {}


@_counts("aten::linear")
def _linear(node: fx.Node) -> Mapping[str, float]:
    weight = arguments(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * weight.shape[-1]}


@_counts("aten::matmul", "aten::mm", "aten::bmm", "aten::mv")
def _matmul(node: fx.Node) -> Mapping[str, float]:
    left, out = arguments(node)["self"], node.meta["val"]
    return {arithmetic(left.dtype): 2 * out.numel() * left.shape[-1]}


@_counts("aten::dot", "aten::outer")
def _vectors(node: fx.Node) -> Mapping[str, float]:
    return {arithmetic(node.meta["val"].dtype): 2 * _elements(node)}


@_counts("aten::addmm", "aten::baddbmm")
def _addmm(node: fx.Node) -> Mapping[str, float]:
    a = arguments(node)
    left = a.get("mat1", a.get("batch1"))
    return {arithmetic(left.dtype): 2 * node.meta["val"].numel() * left.shape[-1]}  # type: ignore[union-attr]


@_counts("aten::einsum")
def _einsum(node: fx.Node) -> Mapping[str, float]:
    """Every combination of the indices once; an ellipsis stands for the leading dimensions of the output."""
    a = arguments(node)
    letters = a["equation"].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for names, tensor in zip(letters, a["tensors"], strict=True):
        named = names.replace("...", "")
        rest = tensor.dim() - len(named)
        head = names.index("...") if "..." in names else 0
        dims = list(tensor.shape)
        sizes["..."] = max(sizes.get("...", 1), math.prod(dims[head : head + rest]))
        sizes.update(zip(named, dims[:head] + dims[head + rest :], strict=True))
    return {arithmetic(node.meta["val"].dtype): 2 * math.prod(sizes.values())}


@_counts("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def _convolution(node: fx.Node) -> Mapping[str, float]:
    """weight (C_out, C_in / groups, *kernel): every output element is a product over one row of it."""
    weight = arguments(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * math.prod(weight.shape[1:])}


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key that count; query i sees keys 0 to i when causal."""
    if not causal:
        return queries * keys
    triangle = min(queries, keys)
    return triangle * (triangle + 1) // 2 + max(0, queries - keys) * keys


@_counts("aten::scaled_dot_product_attention")
def _attention(node: fx.Node) -> Mapping[str, float]:
    """q (..., H, Lq, D), k and v (..., Hkv, Lk, D): 2 Lq Lk D operations a head for each of QK and PV."""
    a = arguments(node)
    q, k, v = a["query"], a["key"], a["value"]
    pairs = math.prod(q.shape[:-2]) * _pairs(q.shape[-2], k.shape[-2], a["is_causal"])
    return {arithmetic(q.dtype): 2 * pairs * (q.shape[-1] + v.shape[-1])}


def _add(*parts: tuple[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, n in parts:
        found[kind] = found.get(kind, 0) + n
    return found


def _pv(pv: str, dtype: torch.dtype) -> str:
    return {"fp8": "fp8", "fp16": "bf16"}.get(pv, arithmetic(dtype))


@_counts("turbocompile::sage_attention", "turbocompile::norm_sage_attention")
def _sage(node: fx.Node) -> Mapping[str, float]:
    """q (B, L, H, D): QK in INT8, PV in FP8 or FP16, and k's norm and rotary where it makes k."""
    a = arguments(node)
    b, length, heads, dim = a["q"].shape
    one = 2 * b * heads * dim * _pairs(length, a["v"].shape[1], a["is_causal"])
    return _add(("int8", one), (_pv(a["pv"], a["q"].dtype), one), *_norm_and_rotary(a))


def kept_keys(length: int, topk: float, block_k: int) -> int:
    """Keys that each query of a sparse-linear attention sees: max(1, floor(topk * blocks)) blocks of block_k."""
    blocks = -(-length // block_k)
    return min(length, min(blocks, max(1, int(topk * blocks))) * block_k)


@_counts("turbocompile::sla_attention", "turbocompile::norm_sla_attention")
def _sla(node: fx.Node) -> Mapping[str, float]:
    """A head: 4 L K block_k D for the K kept key blocks, 4 L D^2 for the linear branch, 2 D^3 to fold proj_l into it.

    k's norm and rotary besides, where it makes k. The block map (pooled scores) is block_q * block_k times smaller than
    the full scores, and left out.
    """
    a = arguments(node)
    b, length, heads, dim = a["q"].shape
    kind = arithmetic(a["q"].dtype)
    half = 2 * b * heads * length * kept_keys(length, a["topk"], a["block_k"]) * dim
    linear = b * heads * (4 * length * dim**2 + 2 * dim**3)
    products = ((kind if a["pv"] == "none" else "int8", half), (_pv(a["pv"], a["q"].dtype), half), (kind, linear))
    return _add(*products, *_norm_and_rotary(a))


@_counts("turbocompile::w8a8_linear")
def _w8a8(node: fx.Node) -> Mapping[str, float]:
    weight = arguments(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * weight.shape[-1]}


@_counts("aten::layer_norm", "aten::native_layer_norm", "aten::group_norm", "aten::native_group_norm", "aten::rms_norm")
def _norm(node: fx.Node) -> Mapping[str, float]:
    norm = "rms" if "rms" in schema_name(node) else "layer"
    return {"fp32": _norm_operations(norm, arguments(node)) * _elements(node)}


def _norm_operations(norm: str, a: Mapping[str, Any]) -> int:
    """Operations per element of a norm, with the affine and the modulation that it has."""
    affine = 1 * (a.get("weight") is not None) + 1 * (a.get("bias") is not None)
    return (_RMS if norm == "rms" else _LAYER) + affine + _AFFINE * (a.get("scale") is not None)


@_counts("turbocompile::qk_norm_rope")
def _qk_norm_rope(node: fx.Node) -> Mapping[str, float]:
    return _add(*_norm_and_rotary(arguments(node)))


def _norm_and_rotary(a: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """RMSNorm and rotary of x; nothing for an attention that reads its k."""
    if "x" not in a:
        return ()
    return (("fp32", (_norm_operations("rms", {"weight": a["weight"]}) + _ROPE * bool(a["cos"])) * a["x"].numel()),)


@_counts(
    "turbocompile::adaln", "turbocompile::adaln_quantize", "turbocompile::residual_norm",
    "turbocompile::residual_norm_quantize", "turbocompile::norm_quantize", "turbocompile::gated_residual",
)  # fmt: skip
def _fused_norm(node: fx.Node) -> Mapping[str, float]:
    name, a = schema_name(node), arguments(node)
    each = 0
    if "residual" in name:
        each += 1 + (a["gate"] is not None)
    if name != "turbocompile::gated_residual":
        each += _norm_operations(a.get("norm", "layer"), a)
    if name.endswith("_quantize"):
        each += _QUANTIZE
    return {"fp32": each * a["x"].numel()}
