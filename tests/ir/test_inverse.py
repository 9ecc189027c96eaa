"""A stored weight is taken apart into what it was made of, and put together again."""

from __future__ import annotations

import pytest
import torch

from turbocompile.errors import UnsupportedError
from turbocompile.ir.inverse import factors, put_together, taken_apart, unit_name, units
from turbocompile.ir.weights import (
    AddLora,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Load,
    Mul,
    Permute,
    Reshape,
    Slice,
    Zeros,
)

F32, BF16 = torch.float32, torch.bfloat16
Q, K = Load("q.weight", (6, 8), F32), Load("k.weight", (4, 8), F32)
S, COLUMN = Load("s", (8,), F32), Load("column", (6,), F32)
SUM = AddLora(Cast(Q, F32), Load("a", (2, 8), F32), Load("b", (6, 2), F32), 0.5)
BOTH = Cat((Q, K), 0)
BY = Reshape(COLUMN, (6, 1))

TREES = {
    "itself": Q,
    "fused": BOTH,
    "fused columns": Cat((Q, Q), 1),
    "smoothed": Mul(BOTH, S),
    "scaled": Mul(Q, 4.0),
    "of v": Cat((Mul(Q, BY), K), 0),
    "cut and scaled": Cat((Slice(BOTH, 0, 0, 4), Mul(Slice(BOTH, 0, 4, 10), BY)), 0),
    "laid out": Permute(Reshape(BOTH, (5, 2, 8)), (2, 0, 1)),
    "a bias without one": Cat((Load("q.bias", (6,), F32), Zeros((4,), F32)), 0),
    "with adapters": Cast(Cat((SUM, Cast(K, F32)), 0), BF16),
    "a table": Constant("table", (3,), F32),
    "nested": Mul(Cat((Mul(Q, BY), Cat((Slice(K, 0, 0, 1), Slice(K, 0, 1, 4)), 0)), 0), S),
}


@pytest.mark.parametrize("name", TREES)
def test_what_is_taken_apart_is_put_together_again(name):
    expr = TREES[name]
    torch.manual_seed(0)
    by = {f: torch.exp2(torch.randint(-3, 4, f.shape).float()) for f in factors(expr)}  # powers of two lose no bit
    values = {u: torch.randn(u.shape).bfloat16().float() for u in units(expr)}
    value = put_together(expr, values, by.__getitem__)
    assert (tuple(value.shape), value.dtype) == (expr.shape, expr.dtype)
    found = taken_apart(expr, value, by.__getitem__)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[u].float(), values[u]) for u in values)
    assert put_together(expr, values, by.__getitem__, wide=True).dtype == F32


def test_units_have_the_name_of_their_checkpoint_tensor():
    data, scale = Load("q.weight.qdata", (6, 8), torch.int8), Load("q.weight.scale", (6, 1), F32)
    for unit in (Q, SUM, data, Dequantize(data, scale, "int8", BF16)):
        assert unit_name(unit) == "q.weight"
        assert units(Cast(unit, BF16)) == [unit]
    assert unit_name(Zeros((4,), F32)) is None
    assert factors(Mul(Cat((Mul(Q, BY), K), 0), S)) == [S, BY]


def test_a_part_of_a_weight_does_not_say_what_the_whole_is():
    part = Slice(BOTH, 0, 2, 10)
    with pytest.raises(UnsupportedError, match="stores a part of a weight"):
        taken_apart(part, torch.zeros(8, 8), lambda e: torch.ones(e.shape))
