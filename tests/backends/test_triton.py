"""The triton backend: a Program runs as eager does, from data alone."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from torch import nn
from turbocompile.backends import get_backend
from turbocompile.backends.triton import compile_program

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.deserialize import from_json
from turbocompile.ir.execute import foldable
from turbocompile.ir.program import SHELL
from turbocompile.ir.serialize import to_json

CPU = torch.device("cpu")


def reread(program):
    """The Program after a round trip through JSON text, which holds no values."""
    return from_json(json.loads(json.dumps(to_json(program))))


def equal(results, expected):
    return len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "bfloat16 with float32 parts"])
@pytest.mark.parametrize("depth", [2, 3])
def test_wan_from_json_is_equal_to_eager_to_the_bit(case, wan, wan_call, form, depth):
    dtype = getattr(torch, form.split()[0])
    model = wan(num_layers=depth).to(dtype)
    if "parts" in form:  # what from_pretrained(torch_dtype=bfloat16) gives
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in model._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
    it = case(model, kwargs=wan_call(dtype=dtype))
    assert equal(compile_program(reread(it.program), it.weights, CPU)(*it.tensors), it.eager())


@pytest.mark.parametrize(
    "style",
    [
        zoo.Style(),
        zoo.Style(qkv="chunk", attention="softmax", rope="complex", norm="written", modulation="linear", cross=True),
        zoo.Style(qkv="unbind", rope="rotate_half", qk_norm="heads", joint=True, depth=3),
    ],
    ids=["plain", "written_out", "joint"],
)
def test_hand_written_models_from_json_are_equal_to_eager_to_the_bit(case, style):
    it = case(zoo.build(style), zoo.example(style))
    assert equal(compile_program(reread(it.program), it.weights, CPU)(*it.tensors), it.eager())


def test_a_model_without_repetition_is_all_shell(case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval().requires_grad_(False)
    it = case(model, (torch.randn(2, 8),))
    assert list(it.program.graphs) == [SHELL]
    assert equal(compile_program(reread(it.program), it.weights, CPU)(*it.tensors), it.eager())


def test_two_calls_do_not_share_memory(case, wan, wan_call):
    it = case(wan(), kwargs=wan_call())
    run = compile_program(it.program, it.weights, CPU)
    (first,) = run(*it.tensors)
    before = first.clone()
    (second,) = run(*(2 * t for t in it.tensors))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


def test_a_block_is_compiled_once_and_shared_by_its_calls(case, wan, wan_call):
    it = case(wan(num_layers=3), kwargs=wan_call())
    run = compile_program(it.program, it.weights, CPU)
    assert list(run.blocks) == ["blocks"]
    calls = list(run.shell.code.children())
    assert len(calls) == 3
    assert {id(c.code) for c in calls} == {id(run.blocks["blocks"].code)}
    weights = [{t.data_ptr() for t in c.operands} for c in calls]
    shared = set.intersection(*weights)
    tables = {t.data_ptr() for k, t in it.weights.items() if k.startswith("constants.")}
    assert shared == tables & weights[0]  # each call has its own weights, and all have the same tables


def test_what_depends_on_constants_alone_is_computed_once(case, wan, wan_call, exact):
    it = case(wan(), kwargs=wan_call(), passes=exact)
    block = it.program.graphs["blocks"]
    folded = foldable(block)
    assert folded, "the rotary tables of a Wan block are cut out of constants"
    run = compile_program(it.program, it.weights, CPU)
    names = {n.name for n in run.blocks["blocks"].code.graph.nodes if n.op != "placeholder"}
    assert names.isdisjoint(n.name for n in folded)
    # 48 tokens: tables of (frames + height + width) rows are held, not the 64 positions that the model stores
    stored = sum(t.nbytes for k, t in it.weights.items() if k.startswith("constants."))
    assert sum(t.untyped_storage().nbytes() for t in run.blocks["blocks"].constants) < stored
    (result,), (expected,) = run(*it.tensors), it.eager()
    # Exact passes in float32: 1e-5 of the maximum for up to 4 layers is what rewrites may move.
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_graphs_that_write_in_place_are_not_folded(case, wan, wan_call):
    block = case(wan(), kwargs=wan_call()).program.graphs["blocks"]
    assert any(getattr(n.target, "_opname", "") == "copy_" for n in block.graph.nodes)
    assert foldable(block) == set()


def test_everything_is_on_the_engines_device(case, wan, wan_call):
    it = case(wan(), kwargs=wan_call())
    meta = torch.device("meta")
    run = compile_program(it.program, {k: v.to(meta) for k, v in it.weights.items()}, meta)
    (result,) = run(*(t.to(meta) for t in it.tensors))
    assert result.device == meta


def test_a_missing_weight_is_named(case, wan, wan_call):
    it = case(wan(), kwargs=wan_call())
    del it.weights["blocks.1.attn1.to_q.weight"]
    with pytest.raises(EngineError, match=r"lacks the weight 'blocks\.1\.attn1\.to_q\.weight'"):
        compile_program(it.program, it.weights, CPU)


def test_an_unknown_backend_is_refused_with_those_there_are():
    with pytest.raises(UnsupportedError, match="no backend 'cuda'; choose one of triton, onnx, tensorrt"):
        get_backend("cuda")
