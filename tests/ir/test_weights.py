"""Weight expressions: shapes, values and names."""

from __future__ import annotations

import pytest
import torch
from turbocompile.kernels.quantize.quantize import dequantize, quantize

from turbocompile.errors import EngineError
from turbocompile.ir.deserialize_weights import expr_from_json
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.reading import Unreadable
from turbocompile.ir.serialize import expr_json
from turbocompile.ir.weights import (
    AddDiff,
    AddLora,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Dora,
    Load,
    Mul,
    Permute,
    Quantize,
    Reshape,
    Slice,
    Zeros,
    is_relative,
    leaves,
    nbytes,
    stacked,
)

F32 = torch.float32


class Table:
    """Tensors by name; counts how often each is read."""

    def __init__(self, **tensors):
        self.tensors, self.reads = tensors, []

    def keys(self):
        return self.tensors

    def spec(self, name):
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def get(self, name):
        self.reads.append(name)
        return self.tensors[name]


def load(name, *shape, dtype=F32):
    return Load(name, shape, dtype)


@pytest.fixture
def table():
    torch.manual_seed(0)
    return Table(
        q=torch.randn(6, 8),
        k=torch.randn(4, 8),
        a=torch.randn(2, 8),
        b=torch.randn(6, 2),
        **{"blocks.1.w": torch.randn(6, 8)},
    )


def test_every_expression_has_the_shape_dtype_and_value_it_says(table):
    q, k = table.tensors["q"], table.tensors["k"]
    constant = torch.arange(3.0)
    evaluate = Evaluator(table, {"c": constant})
    x = load("q", 6, 8)
    # float32 throughout, one operation each: equal to the bit.
    for expr, value in [
        (x, q),
        (load("q", 6, 8, dtype=torch.bfloat16), q.bfloat16()),
        (Constant("c", (3,), F32), constant),
        (Zeros((2, 3), torch.float16), torch.zeros(2, 3, dtype=torch.float16)),
        (Reshape(x, (3, 16)), q.reshape(3, 16)),
        (Cast(x, torch.float16), q.half()),
        (Permute(x, (1, 0)), q.T),
        (Slice(x, 0, 2, 5), q[2:5]),
        (Cat((x, load("k", 4, 8)), 0), torch.cat([q, k])),
        (Mul(x, 0.5), q * 0.5),
        (Mul(x, Slice(x, 0, 0, 1)), q * q[:1]),
        (AddLora(x, load("a", 2, 8), load("b", 6, 2), 0.5), q + 0.5 * (table.tensors["b"] @ table.tensors["a"])),
    ]:
        found = evaluate(expr)
        assert tuple(expr.shape) == tuple(value.shape) == tuple(found.shape)
        assert expr.dtype == value.dtype == found.dtype
        assert torch.equal(found, value)
        assert nbytes(expr) == value.nbytes
        assert expr_from_json(expr_json(expr)) == expr


def test_a_difference_and_a_magnitude_are_added_as_in_float64(table):
    q, a, b = (table.tensors[n].double() for n in "qab")
    rows, columns = torch.rand(6, 1) + 0.5, torch.rand(1, 8) + 0.5
    table.tensors |= {"rows": rows, "columns": columns, "nothing": torch.zeros(6, 8)}
    x, low_rank, v = load("q", 6, 8), (load("a", 2, 8), load("b", 6, 2)), q + 0.5 * b @ a
    evaluate = Evaluator(table, {})
    for expr, truth in [
        (AddDiff(x, load("q", 6, 8), -0.3), 0.7 * q),
        (AddDiff(Cast(x, torch.bfloat16), load("q", 6, 8), 0.3), q.bfloat16().double() + 0.3 * q),
        (Dora(x, *low_rank, load("rows", 6, 1), 0.5), rows.double() * v / v.norm(dim=1, keepdim=True)),
        (Dora(x, *low_rank, load("columns", 1, 8), 0.5), columns.double() * v / v.norm(dim=0, keepdim=True)),
        (Dora(load("nothing", 6, 8), *low_rank, load("rows", 6, 1), 0.0), 0 * q),  # rows without a direction
    ]:
        found = evaluate(expr)
        assert (found.shape, found.dtype) == (expr.shape, expr.dtype)
        eps = 2.0**-8 if expr.dtype == torch.bfloat16 else 2.0**-22  # rounded once; a few roundings of 2^-24
        assert (found.double() - truth).abs().max() <= eps * truth.abs().max()
        assert expr_from_json(expr_json(expr)) == expr


MISFITS = {
    "ranks": AddLora(load("q", 6, 8), load("a", 2, 8), load("b", 6, 3), 1.0),
    "columns": AddLora(load("q", 6, 8), load("a", 2, 7), load("b", 6, 2), 1.0),
    "rows": Dora(load("q", 6, 8), load("a", 2, 8), load("b", 5, 2), load("m", 6, 1), 1.0),
    "a vector": Dora(load("q", 6, 8), load("a", 2, 8), load("b", 6, 2), load("m", 6), 1.0),
    "a difference": AddDiff(load("q", 6, 8), load("d", 8, 6), 1.0),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_its_weight_is_unreadable(name):
    with pytest.raises(Unreadable, match="parts that do not fit"):
        expr_from_json(expr_json(MISFITS[name]))


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_quantized_parts_are_those_of_the_kernel_and_read_their_operand_once(format):
    table = Table(w=torch.randn(256, 128))
    evaluate = Evaluator(table, {})
    w = load("w", 256, 128)
    data, scale = Quantize(w, format, "data"), Quantize(w, format, "scale")
    expected = quantize(table.tensors["w"], format)
    for expr, value in zip((data, scale), expected, strict=True):
        found = evaluate(expr)
        assert tuple(expr.shape) == tuple(found.shape)
        assert expr.dtype == found.dtype
        assert torch.equal(found.view(torch.uint8), value.contiguous().view(torch.uint8))
    assert table.reads == ["w"]
    back = evaluate(Dequantize(data, scale, format, F32))
    assert torch.equal(back, dequantize(*expected, format, F32))


def test_relative_names_take_the_prefix_of_the_call(table):
    expr = load(".w", 6, 8)
    assert is_relative(Cat((expr, load("q", 6, 8)), 0))
    assert not is_relative(load("q", 6, 8))
    assert torch.equal(Evaluator(table, {})(expr, "blocks.1."), table.tensors["blocks.1.w"])
    assert [leaf.name for leaf in leaves(AddLora(expr, load("a", 2, 8), load("b", 6, 2), 1.0))] == [".w", "a", "b"]


def test_the_tensors_whose_rows_a_weight_holds_are_known_in_their_order():
    q, k = load("q", 6, 8), load("k", 4, 8)
    merged = AddLora(Cast(k, torch.float64), load("a", 2, 8), load("b", 4, 2), 1.0)
    assert stacked(Quantize(Cat((Mul(q, 2.0), merged), 0), "int8", "data")) == [q, k]
    data = load("d", 6, 8, dtype=torch.int8)
    assert stacked(Cast(Dequantize(data, load("s", 6, 1), "int8", F32), torch.bfloat16)) == [data]
    for other in (Slice(q, 0, 0, 3), Cat((q, q), 1), Cat((q, Permute(q, (0, 1))), 0), Zeros((6, 8), F32)):
        assert stacked(other) == []


def test_a_checkpoint_of_another_model_is_named(table):
    with pytest.raises(EngineError, match="no tensor 'v'"):
        Evaluator(table, {})(load("v", 1))
    with pytest.raises(EngineError, match=r"'q' has shape \[6, 8\], and the model's \[8, 8\]"):
        Evaluator(table, {})(load("q", 8, 8))
