"""The cut: which blocks are found, that each layer keeps what is its own, and that the answer stays the model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.execute import Runner
from turbocompile.ir.program import SHELL
from turbocompile.ir.weights import Constant
from turbocompile.rewrite.normalize import normalize

DIM, HEADS = 32, 2


def halves_rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    """An attention block that has a constant of its own in one of the ways that models have them."""

    def __init__(self, kind: str, i: int) -> None:
        super().__init__()
        self.kind, half = kind, DIM // HEADS // 2
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        steps, reach = torch.arange(16.0), (torch.arange(16)[:, None] - torch.arange(16)[None]).abs()
        if kind in ("rotary", "alternating"):  # a base for each layer, or a local and a global one in turn
            base = 100.0 * (i + 1 if kind == "rotary" else 1 + 9 * (i % 2))
            self.register_buffer("frequencies", base ** (-torch.arange(half) / half), persistent=False)
        elif kind == "tables":
            angles = torch.outer(steps, (10.0 + i) ** (-torch.arange(half) / half))
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        elif kind == "complex":
            angles = torch.outer(steps, (10.0 + i) ** (-torch.arange(half) / half))
            self.register_buffer("cis", torch.polar(torch.ones_like(angles), angles), persistent=False)
        elif kind == "alibi":
            self.register_buffer("slopes", 2.0 ** -(torch.arange(HEADS) + i + 1.0), persistent=False)
        elif kind == "window":
            self.register_buffer("mask", reach <= i + 1, persistent=False)
        elif kind == "index":
            self.register_buffer("order", torch.randperm(DIM), persistent=False)
        elif kind == "scale":
            self.register_buffer("scale", torch.tensor(float(i + 1)), persistent=False)
        elif kind == "attribute":
            self.gain = torch.linspace(0.5, 1.5, DIM) * (i + 1)
        elif kind == "literal":
            self.i = i

    def rotary(self, n):
        if self.kind == "tables":
            return self.cos[:n], self.sin[:n]
        angles = torch.outer(torch.arange(n, dtype=torch.float32), self.frequencies)
        return angles.cos(), angles.sin()

    def forward(self, x):
        n, mask = x.shape[1], None
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.kind in ("rotary", "alternating", "tables"):
            q, k = (halves_rotated(t, *self.rotary(n)) for t in (q, k))
        elif self.kind == "complex":
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * self.cis[:n]).flatten(-2)
                for t in (q, k)
            )
        elif self.kind == "alibi":
            places = torch.arange(n, dtype=torch.float32)
            mask = -self.slopes[:, None, None] * (places[:, None] - places[None]).abs()
        elif self.kind == "window":
            mask = self.mask[:n, :n]
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if self.kind == "index":
            y = y[..., self.order]
        elif self.kind == "scale":
            y = y * self.scale
        elif self.kind == "attribute":
            y = y * self.gain
        elif self.kind == "literal":
            y = y * torch.tensor([1.0 + self.i, 2.0] * (DIM // 2)) + torch.tensor(float(n * self.i))
        return x + self.out(y)


class Stack(nn.Module):
    def __init__(self, kind: str, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(kind, i) for i in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


KINDS = ["rotary", "tables", "complex", "alibi", "window", "index", "scale", "attribute", "literal"]
EPS = 2.0**-23


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 8, DIM), torch.randn(1, 12, DIM)


def run(program, model, args):
    """The Program's one output, with the module's weights."""
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    weights = {name: evaluate(e.expr, e.prefix) for name, e in weight_plan({"call": program}).items()}
    return Runner(program, weights, torch.device("cpu"))(*args)[0]


@torch.no_grad()
def error(found, truth):
    """The largest difference, in parts of the largest value."""
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("passes", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_keeps_its_own_constants_at_two_shapes_and_from_a_folder(tmp_path, kind, passes):
    model, (a, b) = Stack(kind).eval(), inputs()
    recipe = {"passes": "off"} if passes == "off" else None
    engine = turbocompile.optimize(model, [((a,), {}), ((b,), {})], recipe=recipe)
    assert list(engine.programs["call"].graphs) == [SHELL, "blocks"]
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    for x in (a, b):
        truth = model(x)
        # off: the same operations on the same numbers; on: some 50 of them in another order, each with its rounding
        assert error(engine(x), truth) <= (0 if passes == "off" else 50 * EPS)
        assert torch.equal(loaded(x), engine(x))


def test_a_local_and_a_global_constant_in_turn_are_two_kinds_of_block_that_store_it_once():
    model, (x, _) = Stack("alternating", depth=4).eval(), inputs()
    engine = turbocompile.optimize(model, (x,))
    program = engine.programs["call"]
    assert [call.graph for call in program.calls()] == ["blocks", "blocks_1", "blocks", "blocks_1"]
    assert sum(name.startswith("constants.") for name in engine.weights) == 2
    assert error(engine(x), model(x)) <= 50 * EPS


def test_constants_that_are_equal_in_all_layers_are_one_whoever_holds_them():
    model, (x, _) = Stack("scale").eval(), inputs()
    for i, block in enumerate(model.blocks):  # equal, and in the last two the same tensor
        block.scale = torch.tensor(2.0) if i < 2 else model.blocks[1].scale
    program = capture(model, (x,))
    assert program.graphs["blocks"].weights["blocks.0.scale"] == Constant("blocks.0.scale", (), torch.float32)
    assert list(program.constants) == ["blocks.0.scale"]


def test_a_rotation_is_found_where_each_layer_has_its_base_and_its_tables_are_made_once_a_layer():
    model, (x, _) = Stack("rotary").eval(), inputs()
    engine = turbocompile.optimize(model, (x,))
    assert engine.report.passes["rope"].rewritten == 6
    runner = Runner(engine.programs["call"], engine.weights, torch.device("cpu"))
    code = runner.blocks["blocks"].code.code
    assert "cos" not in code
    assert "sin" not in code


def test_tables_that_are_equal_in_the_first_layer_alone_are_not_taken_for_one():
    class Twice(Layer):
        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            other = self.cos if self.first is None else self.first
            q, k = halves_rotated(q, self.cos[:8], self.sin[:8]), halves_rotated(k, other[:8], self.sin[:8])
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, (x, _) = Stack("tables").eval(), inputs()
    for i, block in enumerate(model.blocks):
        block.__class__ = Twice
        block.register_buffer("first", block.cos * (1 + i), persistent=False)
    engine = turbocompile.optimize(model, (x,))
    assert error(engine(x), model(x)) <= 50 * EPS


def test_the_normal_form_keeps_what_the_layers_own():
    program = capture(Stack("complex").eval(), inputs()[:1])
    normalize(program)
    own = [e.key for e in program.graphs["blocks"].weights.values() if isinstance(e, Constant)]
    assert own == [".cis.pairs"]
    assert {f"blocks.{i}.cis.pairs" for i in range(3)} == set(program.constants)
    assert {f"constants.blocks.{i}.cis.pairs" for i in range(3)} <= set(weight_plan({"call": program}))


class Places(nn.Module):
    """Four blocks, standing where `place` says."""

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = place
        blocks = [Layer("plain", i) for i in range(4)]
        self.head = nn.Linear(DIM, DIM)
        if place == "dict":
            self.blocks = nn.ModuleDict(dict(zip(("first", "b", "c-3", "last"), blocks, strict=True)))
        elif place == "dict of lists":
            self.streams = nn.ModuleDict({"a": nn.ModuleList(blocks[:2]), "b": nn.ModuleList(blocks[2:])})
        elif place == "attributes":
            for i, block in enumerate(blocks):
                setattr(self, f"layer{i + 1}", block)
        elif place == "stages":  # each followed by a linear of its own shape
            self.stages = nn.ModuleList(Stage(blocks[2 * i : 2 * i + 2], DIM * (i + 1)) for i in range(2))
        elif place == "three deep":
            deep = nn.ModuleList(Stage(blocks[2 * i : 2 * i + 2], DIM * (i + 1)) for i in range(2))
            self.groups = nn.ModuleList([Stage(deep, 3 * DIM)])
        elif place == "named sequence":
            self.blocks = nn.Sequential()
            for name, block in zip("abcd", blocks, strict=True):
                self.blocks.add_module(name, block)

    def forward(self, x):
        held = next(m for name, m in self.named_children() if name != "head")
        if self.place == "attributes":
            held = [self.layer1, self.layer2, self.layer3, self.layer4]
        elif self.place == "dict":
            held = list(held.values())
        elif self.place == "dict of lists":
            held = [*held["a"], *held["b"]]
        for block in held:
            x = block(x)
        return self.head(x)


class Stage(nn.Module):
    def __init__(self, blocks, width: int) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(blocks), nn.Sequential(nn.Linear(DIM, width), nn.Linear(width, DIM))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x + self.out(x)


PLACES = {
    "dict": ("blocks", ["blocks.first.", "blocks.b.", "blocks.c-3.", "blocks.last."]),
    "dict of lists": ("streams_a", ["streams.a.0.", "streams.a.1.", "streams.b.0.", "streams.b.1."]),
    "attributes": ("layer", ["layer1.", "layer2.", "layer3.", "layer4."]),
    "stages": ("stages_0_blocks", [f"stages.{i}.blocks.{j}." for i in (0, 1) for j in (0, 1)]),
    "three deep": ("groups_0_blocks_0_blocks", [f"groups.0.blocks.{i}.blocks.{j}." for i in (0, 1) for j in (0, 1)]),
    "named sequence": ("blocks", ["blocks.a.", "blocks.b.", "blocks.c.", "blocks.d."]),
}


@pytest.mark.parametrize("place", PLACES)
def test_blocks_are_found_wherever_they_stand(place):
    model, (x, _) = Places(place).eval(), inputs()
    program = capture(model, (x,))
    name, prefixes = PLACES[place]
    assert [(c.graph, c.prefix) for c in program.calls()] == [(name, prefix) for prefix in prefixes]
    assert torch.equal(run(program, model, (x,)), model(x))


def test_blocks_that_are_the_children_of_the_model_itself_are_found_and_saved(tmp_path):
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(DIM, DIM), *(Layer("scale", i) for i in range(12))).eval(), inputs()
    engine = turbocompile.optimize(model, (x,))
    program = engine.programs["call"]
    assert [(c.graph, c.prefix) for c in program.calls()] == [("blocks", f"{i}.") for i in range(1, 13)]
    assert error(engine(x), model(x)) <= 100 * EPS
    assert torch.equal(turbocompile.load(engine.save(tmp_path / "engine"))(x), engine(x))


def test_alike_stages_are_taken_whole_and_the_blocks_of_another_stage_beside_them():
    model, (x, _) = Places("stages").eval(), inputs()
    model.stages.insert(0, Stage([Layer("plain", i) for i in range(2)], DIM))
    program = capture(model.eval(), (x,))
    assert [c.prefix for c in program.calls()] == ["stages.0.", "stages.1.", "stages.2.blocks.0.", "stages.2.blocks.1."]
    assert torch.equal(run(program, model, (x,)), model(x))


def test_a_lone_attention_block_stays_whole_beside_what_repeats_in_it():
    class Experts(Layer):
        def __init__(self):
            super().__init__("plain", 0)
            parts = [nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM), nn.Sigmoid(), nn.LayerNorm(DIM), nn.Tanh()]
            self.experts = nn.ModuleList(nn.Sequential(*parts, *parts[1:4]) for _ in range(8))

        def forward(self, x):
            x = super().forward(x)
            return x + sum(expert(x) for expert in self.experts)

    torch.manual_seed(0)
    model, x = Places("none"), inputs()[0]
    model.blocks = nn.ModuleList([Experts()])
    assert [c.prefix for c in capture(model.eval(), (x,)).calls()] == ["blocks.0."]


def test_two_attributes_with_a_number_that_are_a_small_part_of_a_model_are_no_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1, self.attn2 = Layer("plain", 0), Layer("plain", 1)
            self.rest = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(40)))

        def forward(self, x):
            return self.rest(self.attn2(self.attn1(x)))

    assert list(capture(Two().eval(), inputs()[:1]).graphs) == [SHELL]


class Shifted(nn.Module):
    """Positions that are made of constants and then written to through a view, as LTX-2 makes them for its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attended() for _ in range(2))

    def forward(self, x):
        positions = torch.arange(x.shape[1] * 2, dtype=x.dtype).reshape(x.shape[1], 2)
        positions[:, 0] = (positions[:, 0] - 3).clamp(min=0)
        for block in self.blocks:
            x = block(x, positions)
        return x


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, positions):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q = q * positions.sum(-1).cos()[:, None]
        return x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_what_is_written_to_through_a_view_does_not_move_into_the_blocks():
    torch.manual_seed(0)
    model, x = Shifted().eval().requires_grad_(False), torch.randn(2, 6, 16)
    engine = turbocompile.optimize(model, (x,), recipe={"passes": "off"})
    assert "blocks" in engine.programs["call"].graphs
    assert torch.equal(engine(x), model(x))
