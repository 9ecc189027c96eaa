"""Rows of the normal form's table: what they match, what they build, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.ir.program import dtype
from turbocompile.rewrite import normalize
from turbocompile.rewrite.local import DTYPE, SIZES, Maker, Rules, local, overloads, row, to
from turbocompile.rewrite.match import numbers, op, reshape, tensors

aten = torch.ops.aten
x, y = tensors("x y")
(c,) = numbers("c")
relu = op(aten.relu.default)


class Written(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, *given):
        return self.form(*given)


def answer(rule, form, *given):
    """What a rule answers at the last node of a captured function: (its own target and arguments, what it made)."""
    program = capture(Written(form), given)
    graph = program.shell.graph
    node = program.shell.outputs()[0]
    before = list(graph.nodes)
    found = rule.apply(node, Maker(graph, program.fake_mode, node))
    made = [n.target for n in graph.nodes if n not in before]
    return node, found, made


F32, BF16 = torch.randn(2, 3), torch.randn(2, 3).bfloat16()


def test_a_row_builds_the_inner_nodes_and_answers_with_the_outer_call():
    node, (target, args), made = answer(row(x + y, relu(x) * y), lambda a, b: a + b, F32, F32)
    assert target is aten.mul.Tensor
    assert made == [aten.relu.default]
    assert args[1] is node.args[1]


def test_a_variable_alone_is_an_answer_only_in_the_shape_and_dtype_of_the_node():
    rule = row(op(aten.mm.default)(x, y), x)
    node, found, _ = answer(rule, torch.mm, F32, torch.eye(3))
    assert found is node.args[0]
    _, found, _ = answer(rule, torch.mm, F32, torch.eye(4)[:3])
    assert found is None


def test_a_function_computes_with_the_variables_that_it_names():
    _, (_, args), _ = answer(row(x * c, x * (lambda c: -c)), lambda a: a * 3.0, F32)
    assert args[1] == -3.0


def test_a_cast_or_reshape_that_changes_nothing_is_left_out():
    rule = row(relu(x), reshape(to(x, DTYPE), SIZES))
    node, found, made = answer(rule, torch.relu, F32)
    assert found is node.args[0]
    assert made == []


def test_a_replacement_that_is_the_node_itself_is_no_answer():
    """1.0 and 1 are another number each."""
    assert answer(row(x * c, x * c), lambda a: a * 2.0, F32)[1] is None
    assert answer(row(x * c, x * (lambda c: int(c))), lambda a: a * 2.0, F32)[1] is not None


def test_rows_do_not_look_through_casts():
    rule = row(relu(relu(x)), relu(x))
    assert answer(rule, lambda a: torch.relu(torch.relu(a)), F32)[1] is not None
    assert answer(rule, lambda a: torch.relu(torch.relu(a).float()), BF16)[1] is None


def test_a_condition_sees_the_node_and_the_variables():
    rule = row(relu(x), x, where=lambda node, x: dtype(node) == torch.bfloat16 and x.op == "placeholder")
    assert answer(rule, torch.relu, BF16)[1] is not None
    assert answer(rule, torch.relu, F32)[1] is None


def test_a_scaled_sum_is_not_commutative():
    rule = row(op(aten.add.Tensor)(x, y, alpha=c), x + y * c, where=lambda c: c != 1)
    node, (_, args), _ = answer(rule, lambda a, b: torch.add(a, b, alpha=3), F32, F32)
    assert args[0] is node.args[0]


def test_sets_add_up_and_keep_their_order():
    @local(aten.relu)
    def second(node, make):
        return None

    first = row(relu(x), x)
    both = Rules("one", (first,)) + Rules("other", (second,))
    assert both.name == "one, other"
    assert both.by_target[aten.relu.default] == [first.apply, second.apply]
    assert set(overloads(aten.relu)) <= set(both.by_target)


def test_the_scale_of_a_reversed_difference_is_that_of_what_is_taken_away():
    program = capture(Written(lambda a, b: torch.rsub(a, b, alpha=3)), (F32, F32))
    assert normalize.normalize(program) == {}
    scaled = next(n for n in program.shell.graph.nodes if n.target is aten.mul.Tensor)
    assert scaled.args[0] is program.shell.inputs()[0]


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_number_in_front_of_a_sum_is_not_scaled_twice(alpha):
    program = capture(Written(lambda a: torch.add(a, 2.5, alpha=alpha)), (F32,))
    normalize.normalize(program)
    assert program.shell.outputs()[0].args[1] == 2.5 * alpha
