"""Rotary embedding in any style becomes the op with its tables per axis; near misses stay or stay right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from turbocompile.passes.rope import PASS

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import is_op
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.recipe.options import PassOptions
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.run_pass import run_pass

B, L, H, D = 2, 12, 3, 16
GRID, COLUMNS = (2, 3, 2), (4, 2, 2)  # frames, height, width; L tokens, D / 2 columns

# Two products and a sum in float32: three roundings of 2^-24 of terms up to sqrt(2) times the largest value, and tables
# that are rounded to float32 move each product by one more.
FLOAT32 = 8 * 2.0**-24


def angles(columns=D // 2, tokens=L):
    return torch.arange(tokens).double()[:, None] * (0.3 ** torch.arange(columns).double())[None] + 0.1


def expected(x, angle, interleaved):
    """x (B, L, H, D) turned in float64 by complex multiplication."""
    x = x.double()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)


class Rotary(nn.Module):
    """A rotary written as `form(x, module)`; the tables are buffers, so that they are constants."""

    def __init__(self, form):
        super().__init__()
        angle = angles()
        self.form = form
        tables = {
            "cos": angle.cos().float(),
            "sin": angle.sin().float(),
            "angle": angle.float(),
            "cis": torch.polar(torch.ones_like(angle), angle).to(torch.complex64),
            "cos_pairs": angle.cos().float().repeat_interleave(2, -1),
            "sin_pairs": angle.sin().float().repeat_interleave(2, -1),
            "cos_halves": torch.cat([angle, angle], -1).cos().float(),
            "sin_halves": torch.cat([angle, angle], -1).sin().float(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, x):
        return self.form(x, self)


def over_heads(table):
    return table[None, :, None]


def turn(a, b, m):
    """The two sums of a rotation of (a, b)."""
    cos, sin = over_heads(m.cos), over_heads(m.sin)
    return a * cos - b * sin, b * cos + a * sin


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_pairs(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def strided_writes(x, m):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = over_heads(m.cos_pairs)[..., 0::2], over_heads(m.sin_pairs)[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def narrow_writes(x, m):
    out, half = torch.zeros_like(x), D // 2
    out[..., :half] = x[..., :half] * over_heads(m.cos) - x[..., half:] * over_heads(m.sin)
    out[..., half:] = x[..., half:] * over_heads(m.cos) + x[..., :half] * over_heads(m.sin)
    return out


def stacked_pairs(x, m):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (a * over_heads(m.cos) - b * over_heads(m.sin), over_heads(m.sin) * a + over_heads(m.cos) * b), -1
    ).flatten(-2)


def complex_product(x, m):
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * m.cis[:, None]).flatten(3).type_as(x)


def complex_polar(x, m):
    cis = torch.polar(torch.ones_like(m.angle), m.angle)[None, :, None]
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(cis * z).reshape(x.shape).type_as(x)


def complex_double(x, m):
    z = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * m.cis.to(torch.complex128)[:, None]).flatten(3).type_as(x)


def full_width_pairs(x, m):
    turned = rotate_pairs(x)
    return (x.float() * over_heads(m.cos_pairs) + turned.float() * over_heads(m.sin_pairs)).to(x.dtype)


def repeated_in_the_graph(x, m):
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (m.angle.cos(), m.angle.sin()))
    return x * over_heads(cos) + rotate_pairs(x) * over_heads(sin)


def halves(x, m):
    return x * over_heads(m.cos_halves) + rotate_half(x) * over_heads(m.sin_halves)


def halves_from_angles(x, m):
    angle = torch.cat((m.angle, m.angle), -1)[None, :, None]
    return rotate_half(x) * angle.sin() + x * angle.cos()


def halves_as_rows(x, m):
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack(
        (a * over_heads(m.cos) - b * over_heads(m.sin), b * over_heads(m.cos) + a * over_heads(m.sin)), -2
    ).flatten(-2)


def heads_first(x, m):
    x = x.transpose(1, 2)
    return (x * m.cos_halves + rotate_half(x) * m.sin_halves).transpose(1, 2)


def heads_first_pairs(x, m):
    x = x.permute(0, 2, 1, 3)
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * m.cis
    return torch.view_as_real(z).flatten(3).type_as(x).permute(0, 2, 1, 3)


def from_channels(x, m):
    return strided_writes((x.flatten(2) * 1.5).unflatten(2, (H, D)), m) / 1.5


PAIRS = (strided_writes, stacked_pairs, complex_product, complex_polar, complex_double, full_width_pairs,
         repeated_in_the_graph, heads_first_pairs, from_channels)  # fmt: skip
HALVES = (narrow_writes, halves, halves_from_angles, halves_as_rows, heads_first)


def rewritten(model, *inputs):
    """(value of the rewritten program, its nodes, the pass's result)."""
    program = capture(model, inputs)
    normalize(program)
    result = run_pass(program, PASS, PassOptions(True))
    sub = program.shell
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    given = {n.name: x for n, x in zip(sub.inputs(), inputs, strict=True)}
    values = Interpreter(sub, lambda node: evaluate(sub.weights[node.target]), None)(given)
    return values[sub.outputs()[0].name], list(sub.graph.nodes), result


def ropes(nodes):
    return [n for n in nodes if is_op(n, torch.ops.turbocompile.rope)]


def sample(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (B, L, H, D)), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("form", [*PAIRS, *HALVES], ids=lambda f: f.__name__)
def test_each_style_becomes_the_op_and_keeps_its_numbers(form):
    x = sample()
    found, nodes, result = rewritten(Rotary(form), x)
    assert (result.sites, result.rewritten, result.skipped) == (1, 1, ())
    (rope,) = ropes(nodes)
    assert rope.args[3:] == ([L], form in PAIRS)
    assert not any(n.meta["val"].is_complex() for n in nodes if n.op != "output")
    truth = expected(x, angles(), form in PAIRS)
    assert (found.double() - truth).abs().max() <= FLOAT32 * truth.abs().max()


@pytest.mark.parametrize("form", [*PAIRS, *HALVES], ids=lambda f: f.__name__)
def test_in_bfloat16_it_rounds_once(form):
    x = sample(dtype=torch.bfloat16)
    model = Rotary(form)
    found, _, result = rewritten(model, x)
    assert result.rewritten == 1
    truth = expected(x, angles(), form in PAIRS)
    # One rounding to 8 bits by the op, or float32 where promotion makes the result so; from_channels scales twice more.
    rounds = 3 if form is from_channels else 1
    assert (found.double() - truth).abs().max() <= (rounds * 2.0**-8 + FLOAT32) * truth.abs().max()
    assert found.dtype == model(x).dtype


def test_the_layout_changes_around_the_op_cancel():
    _, nodes, _ = rewritten(Rotary(heads_first), sample())
    assert not any(is_op(n, torch.ops.aten.permute) for n in nodes)


class PerAxis(nn.Module):
    """Tables put together from one per axis, expanded over the grid, as video models do."""

    def __init__(self, style, grid=GRID):
        super().__init__()
        self.style, self.grid = style, grid
        self.parts = [angles(n, 8) * (i + 1) for i, n in enumerate(COLUMNS)]
        joined = torch.cat(self.parts, 1)
        self.register_buffer("angle", joined.float(), persistent=False)
        self.register_buffer("cis", torch.polar(torch.ones_like(joined), joined), persistent=False)

    def expanded(self, parts, lead):
        wide = []
        for i, part in enumerate(parts):
            shape = [1, 1, 1, part.shape[-1]]
            shape[i] = self.grid[i]
            wide.append(part[: self.grid[i]].view(shape).expand(*self.grid, part.shape[-1]))
        return torch.cat(wide, -1).reshape(lead)

    def forward(self, x):
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        if self.style == "complex":
            cis = self.expanded(self.cis.split(COLUMNS, 1), (tokens, 1, -1))
            z = torch.view_as_complex(x.to(torch.float64).reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(z * cis).flatten(3).to(x.dtype)
        parts = self.angle.split(COLUMNS, 1)
        if self.style == "pairs":
            wide = [[f(p).repeat_interleave(2, -1) for p in parts] for f in (torch.cos, torch.sin)]
            cos, sin = (self.expanded(w, (1, tokens, 1, -1)) for w in wide)
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = cos[..., 0::2], sin[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        angle = self.expanded(parts, (1, tokens, 1, -1))
        angle = torch.cat((angle, angle), -1)
        return x * angle.cos() + rotate_half(x) * angle.sin()

    def truth(self, x):
        return expected(x, self.expanded(self.parts, (-1, D // 2)), self.style != "halves")


@pytest.mark.parametrize("grid", [GRID, (1, 3, 2), (2, 1, 4), (1, 1, 5), (4, 3, 1)])
@pytest.mark.parametrize("style", ["complex", "pairs", "halves"])
def test_tables_stay_one_per_axis(style, grid):
    model = PerAxis(style, grid)
    x = sample(B, grid[0] * grid[1] * grid[2], H, D)
    found, nodes, result = rewritten(model, x)
    assert result.rewritten == 1
    (rope,) = ropes(nodes)
    _, cos, sin, op_grid, _ = rope.args
    assert op_grid == list(grid)
    for tables in (cos, sin):
        assert [tuple(t.meta["val"].shape) for t in tables] == list(zip(grid, COLUMNS, strict=True))
        assert all(t.meta["val"].dtype == torch.float32 for t in tables)
    # Angles held in float32 are themselves off by 2^-24 of up to 8 * 3.
    truth = model.truth(x)
    assert (found.double() - truth).abs().max() <= (FLOAT32 + 24 * 2.0**-24) * truth.abs().max()


def test_tables_whose_axes_lie_in_another_order_are_one_table():
    class Swapped(PerAxis):
        def expanded(self, parts, lead):
            wide = []
            for i, part in enumerate(parts):
                shape = [1, 1, 1, part.shape[-1]]
                shape[2 - i] = self.grid[2 - i]
                wide.append(part[: self.grid[2 - i]].view(shape).expand(*self.grid, part.shape[-1]))
            return torch.cat(wide, -1).reshape(lead)

    model, x = Swapped("halves"), sample()
    found, nodes, _ = rewritten(model, x)
    assert ropes(nodes)[0].args[3] == [L]
    assert torch.allclose(found, model(x), rtol=0, atol=1e-5)


def test_a_table_cast_to_bfloat16_on_purpose_keeps_its_rounding():
    def rounded(x, m):
        cos, sin = (over_heads(t.to(torch.bfloat16)) for t in (m.cos_halves, m.sin_halves))
        return x * cos + rotate_half(x) * sin

    model, x = Rotary(rounded), sample()
    found, nodes, _ = rewritten(model, x)
    assert len(ropes(nodes)) == 1
    assert torch.allclose(found, model(x), rtol=0, atol=1e-6)  # rounding to float32; without the cast 1e-3


def test_part_of_a_head_may_be_turned():
    def partial(x, m):
        turned = x[..., : D // 2]
        cos, sin = (over_heads(t[:, : D // 4]) for t in (m.cos, m.sin))
        a, b = turned.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., D // 2 :]), -1)

    model, x = Rotary(partial), sample()
    found, nodes, result = rewritten(model, x)
    assert torch.allclose(found, model(x), rtol=0, atol=1e-6)
    assert result.rewritten == len(ropes(nodes))


def swapped_halves(x, m):
    a, b = x.chunk(2, -1)
    return x * over_heads(m.cos_halves) + torch.cat((b, -a), -1) * over_heads(m.sin_halves)


def no_sign(x, m):
    a, b = x.chunk(2, -1)
    return x * over_heads(m.cos_halves) + torch.cat((b, a), -1) * over_heads(m.sin_halves)


def both_signs(x, m):
    a, b = x.chunk(2, -1)
    return x * over_heads(m.cos_halves) + torch.cat((-b, -a), -1) * over_heads(m.sin_halves)


def other_sign(x, m):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (a * over_heads(m.cos) + b * over_heads(m.sin), b * over_heads(m.cos) - a * over_heads(m.sin)), -1
    ).flatten(-2)


def cosine_for_sine(x, m):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (a * over_heads(m.cos) - b * over_heads(m.sin), b * over_heads(m.sin) + a * over_heads(m.cos)), -1
    ).flatten(-2)


def tables_exchanged(x, m):
    return x * over_heads(m.sin_halves) + rotate_half(x) * over_heads(m.cos_halves)


def pairs_written_as_halves(x, m):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat(turn(a, b, m), -1)


def halves_with_tables_of_pairs(x, m):
    return x * over_heads(m.cos_pairs) + rotate_half(x) * over_heads(m.sin_pairs)


def pairs_with_tables_of_halves(x, m):
    return x * over_heads(m.cos_halves) + rotate_pairs(x) * over_heads(m.sin_halves)


def another_tensor_turned(x, m):
    return x * over_heads(m.cos_halves) + rotate_half(x.flip(0)) * over_heads(m.sin_halves)


def halves_of_the_tokens(x, m):
    a, b = x.chunk(2, 1)
    return x * over_heads(m.cos_halves) + torch.cat((-b, a), 1) * over_heads(m.sin_halves)


def other_quarters(x, m):
    a, b, c, d = x.chunk(4, -1)
    return x * over_heads(m.cos_halves) + torch.cat((-torch.cat((d, c), -1), torch.cat((a, b), -1)), -1) * over_heads(
        m.sin_halves
    )


def conjugated(x, m):
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * m.cis[:, None].conj()).flatten(3)


def product_of_conjugate(x, m):
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))).conj()
    return torch.view_as_real(z * m.cis[:, None]).flatten(3)


NEAR_MISSES = (
    swapped_halves, no_sign, both_signs, other_sign, cosine_for_sine, tables_exchanged, pairs_written_as_halves,
    halves_with_tables_of_pairs, pairs_with_tables_of_halves, another_tensor_turned, halves_of_the_tokens,
    other_quarters, conjugated, product_of_conjugate,
)  # fmt: skip
RIGHT_ALL_THE_SAME = (tables_exchanged, conjugated)  # a rotation by other tables: the op may take it


@pytest.mark.parametrize("form", NEAR_MISSES, ids=lambda f: f.__name__)
def test_a_near_miss_keeps_its_numbers(form):
    model, x = Rotary(form), sample()
    found, nodes, result = rewritten(model, x)
    assert torch.allclose(found, model(x), rtol=0, atol=2e-6)
    if form not in RIGHT_ALL_THE_SAME:
        assert not ropes(nodes)
        assert result.rewritten == 0
    for _, reason, _ in result.skipped:
        assert reason


def test_tables_that_differ_between_batch_entries_are_skipped_with_that_reason():
    class Batched(nn.Module):
        def forward(self, x, angle):
            angle = torch.cat((angle, angle), -1)[:, :, None]
            return x * angle.cos() + rotate_half(x) * angle.sin()

    _, _, result = rewritten(Batched(), sample(), torch.rand(B, L, D // 2))
    ((_, reason, _),) = result.skipped
    assert reason == "the tables differ between batch entries or heads"


def test_tables_that_the_call_gives_are_used():
    class Given(nn.Module):
        def forward(self, x, angle):
            angle = torch.cat((angle, angle), -1)[:, :, None]
            return x * angle.cos() + rotate_half(x) * angle.sin()

    x = sample()
    found, nodes, _ = rewritten(Given(), x, angles().float()[None])
    assert len(ropes(nodes)) == 1
    truth = expected(x, angles().float().double(), False)
    assert (found.double() - truth).abs().max() <= FLOAT32 * truth.abs().max()


def test_a_full_width_table_of_the_checkpoint_is_not_trusted_to_repeat():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.cos, self.sin = (nn.Parameter(torch.randn(L, D)) for _ in range(2))

        def forward(self, x):
            return x * over_heads(self.cos) + rotate_half(x) * over_heads(self.sin)

    model, x = Learned().requires_grad_(False), sample()
    found, _, result = rewritten(model, x)
    ((_, reason, _),) = result.skipped
    assert "not seen to be turned by one angle" in reason
    assert torch.allclose(found, model(x), rtol=0, atol=1e-5)


def test_wan_has_two_sites_a_block_with_three_axes(wan, wan_call):
    model, call = wan(), wan_call(frames=3, height=8, width=4)
    program = capture(model, (), call)
    normalize(program)
    result = run_pass(program, PASS, PassOptions(True))
    assert (result.sites, result.rewritten) == (4, 4)
    assert [r.site for r in result.rewrites] == ["blocks:attn1", "blocks:attn1#2"]
    (block,) = [sub for name, sub in program.graphs.items() if name != "shell"]
    for rope in ropes(block.graph.nodes):
        assert rope.args[3:] == ([3, 4, 2], True)
        assert [tuple(t.meta["val"].shape) for t in rope.args[1]] == [(3, 12), (4, 10), (2, 10)]


class Blocks(nn.Module):
    """Blocks that turn what they are given by full-width tables, which `tables(positions)` makes outside of them."""

    def __init__(self, tables, interleaved=True, extra=None):
        super().__init__()
        self.tables, self.extra = tables, extra
        self.blocks = nn.ModuleList(Turned(interleaved) for _ in range(3))

    def forward(self, x, positions):
        cos, sin = self.tables(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin if self.extra is None or i < 2 else self.extra(sin))
        return x


class Turned(nn.Module):
    def __init__(self, interleaved):
        super().__init__()
        self.linear = nn.Linear(H * D, H * D)
        self.rotated = rotate_pairs if interleaved else rotate_half

    def forward(self, x, cos, sin):
        y = self.linear(x).unflatten(2, (H, D))
        return x + (y * cos[None, :, None] + self.rotated(y) * sin[None, :, None]).flatten(2)


def of_axes(positions, widths=(4, 8, 4), double=torch.Tensor.repeat_interleave):
    """Cosines and sines of three axes side by side, each pair's written twice, as Flux writes them."""
    cos, sin = [], []
    for axis, width in enumerate(widths):
        angle = positions[:, axis, None] * 0.3 ** torch.arange(0, width, 2, dtype=torch.float64) / width
        cos.append(double(angle.cos(), 2, 1).float())
        sin.append(double(angle.sin(), 2, 1).float())
    return torch.cat(cos, -1), torch.cat(sin, -1)


def stacked(positions):
    return of_axes(positions, double=lambda t, n, d: torch.stack([t, t], -1).flatten(1))


def of_a_text_and_an_image(positions):
    parts = [of_axes(positions[:5]), of_axes(positions[5:])]
    return [torch.cat(p, 0) for p in zip(*parts, strict=True)]


def of_one_pair(positions):
    return of_axes(positions, (2, 12, 2))


def chosen_rows(positions):
    return [t[torch.arange(L - 1, -1, -1)] for t in of_axes(positions)]


def looked_up(positions):
    return [F.embedding(torch.arange(L - 1, -1, -1), t) for t in of_axes(positions)]


def heads_of_halves(positions):
    cos, sin = (t[:, ::2] for t in of_axes(positions))
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def halves_of_axes(positions):
    cos, sin = (t[:, ::2] for t in of_axes(positions))
    return torch.cat([cos[:, :2], cos[:, 2:]] * 2, -1), torch.cat([sin[:, :2], sin[:, 2:]] * 2, -1)


def in_blocks(tables, interleaved=True, extra=None):
    """(rope ops in the block, reasons of the pass) of three blocks that share tables; their numbers are checked."""
    torch.manual_seed(1)
    model = Blocks(tables, interleaved, extra).requires_grad_(False)
    inputs = torch.randn(B, L, H * D), torch.rand(L, 3, dtype=torch.float64) * 6
    engine = turbocompile.optimize(model, inputs, recipe={"passes": {"w8a8": "off"}})
    # three blocks, each some hundred sums of 2^-24
    assert torch.allclose(engine(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    graph = engine.programs["call"].graphs["blocks"].graph
    return ropes(graph.nodes), [s.reason for s in engine.report.passes["rope"].skipped]


@pytest.mark.parametrize("tables", [of_axes, stacked, of_a_text_and_an_image, of_one_pair, chosen_rows, looked_up])
def test_tables_that_a_block_is_given_are_looked_at_where_they_are_made(tables):
    found, reasons = in_blocks(tables)
    assert len(found) == 1
    assert found[0].args[4] is True
    assert not reasons


@pytest.mark.parametrize("tables", [heads_of_halves, halves_of_axes])
def test_halves_of_tables_that_a_block_is_given(tables):
    found, reasons = in_blocks(tables, interleaved=False)
    assert len(found) == 1
    assert found[0].args[4] is False
    assert not reasons


def other_of_a_pair(positions):
    cos, sin = of_axes(positions)
    return cos * torch.linspace(1, 2, D), sin


def of_odd_widths(positions):
    """Pairs that begin inside of an axis: the last of one and the first of the next are turned as one."""
    cos, sin = of_axes(positions)
    return torch.cat([cos[:, :3], cos[:, 4:], cos[:, :1]], -1), torch.cat([sin[:, :3], sin[:, 4:], sin[:, :1]], -1)


@pytest.mark.parametrize(
    ("tables", "interleaved"),
    [(other_of_a_pair, True), (of_odd_widths, True), (of_axes, False), (heads_of_halves, True)],
)
def test_tables_that_turn_the_two_of_a_pair_by_two_angles_stay(tables, interleaved):
    found, reasons = in_blocks(tables, interleaved)
    assert not found
    assert all("not seen to be turned by one angle" in r for r in reasons)


def test_one_call_with_other_tables_is_enough_to_leave_all_alone():
    found, reasons = in_blocks(of_axes, extra=lambda sin: sin * torch.linspace(1, 2, D))
    assert not found
    assert all("not seen to be turned by one angle" in r for r in reasons)


def test_flux_is_rewritten_as_wan_is():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(2)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).requires_grad_(False)  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.7]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    engine = turbocompile.optimize(model, (), call, recipe={"passes": {"w8a8": "off"}})
    passes = engine.report.passes
    counts = {name: (passes[name].rewritten, passes[name].sites) for name in ("rope", "fuse_qkv", "qk_norm_rope")}
    assert counts == {"rope": (8, 8), "fuse_qkv": (6, 6), "qk_norm_rope": (4, 4)}
    assert torch.allclose(engine(**call).sample, model(**call).sample, rtol=1e-4, atol=1e-4)
