"""The kernels of the norms, of quantization and of the rotation in Triton's interpreter, at small ragged shapes.

The interpreter cuts bf16
off instead of rounding and is wrong on casts to e4m3: inputs are float32 and float16, and for fp8 the values before
the cast are compared; the rest is for the GPU.
"""

from __future__ import annotations

import pytest
import torch
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import LIMIT, dequantize, empty_quantized, encode

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
F32, F16 = torch.float32, torch.float16
WIDTHS = [40, 300]  # one piece with padding; 256 + 64


@pytest.fixture
def config():
    """Two rows a program, so that odd numbers of rows leave a program with one."""
    from turbocompile.kernels._rows import RowConfig

    return RowConfig(warps=1, rows=2)


@pytest.fixture
def block_config():
    """Eight rows a program, so that row blocks have several, and tiles two row blocks behind."""
    from turbocompile.kernels.norms.norms_triton import BlockConfig

    return BlockConfig(warps=8, elements=48, lag=20)


def slack(expected, unit):
    """Float32 inside: mean, variance, root, products and sums within 1e-6 of the row's largest; then one rounding."""
    subnormal = 2.0**-25 if unit == 2.0**-11 else 0.0  # half a step of float16 near zero
    return 1e-6 * expected.abs().amax(-1, keepdim=True) + unit * expected.abs() + subnormal


def assert_quantized(data, scale, format, expected, unit):
    """data and scale stand for expected (float64) within half a step of the format, on top of the slack."""
    got = dequantize(data, scale, format, torch.float64)
    each = dequantize(torch.ones_like(data), scale, format, torch.float64)  # a step
    half = torch.where(expected > 127 * each, each, each / 2) if format == "int8_block" else each / 2
    largest = expected.abs().max()
    assert ((got - expected).abs() <= half + slack(expected, unit) + 1e-6 * largest).all()
    assert abs(scale.max() * LIMIT[format] / largest - 1) <= unit + 2e-6


@pytest.mark.parametrize(
    ("width", "least", "expected"),
    [
        (1536, 256, (1024, 512)),
        (5120, 256, (4096, 1024)),
        (8960, 256, (8192, 1024)),
        (13824, 256, (16384, 0)),
        (4096, 256, (4096, 0)),
        (200, 256, (256, 0)),
        (12, 4, (8, 4)),
        (40, 4, (32, 8)),
        (1, 4, (1, 0)),
        (13824, 256, (8192, 4096, 2048)),
        (8960, 256, (8192, 1024, 0)),
        (1536, 256, (1024, 512, 0)),
        (1792, 256, (1024, 512, 256)),
    ],
)
def test_pieces_hold_a_width_with_little_padding(width, least, expected):
    from turbocompile.kernels._rows import pieces

    assert pieces(width, least, len(expected)) == expected


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("format", ["int8", "int8_block"])
def test_quantize_bit_by_bit(normal, same, config, dtype, format):
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    shapes = [(1, 9, 300), (3, 2, 2, 130), (17,), (3, 1000), (3, 1700), (5, 1)] + [(2, 70, 40)] * (
        format == "int8_block"
    )
    for shape in shapes:
        x = (normal(*shape) * 1e4).to(dtype)
        x[..., :3] = 0
        x[:1] = 0 if len(shape) > 1 else 1
        same(launch_quantize(x, format, config), ops.quantize(x, format))
    x = normal(5, 2, 300, dtype=dtype)
    for view in (x.transpose(0, 1), x[..., 7:140], x[:, :, :4].transpose(1, 2)):
        same(launch_quantize(view, format, config), ops.quantize(view, format))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_fp8_before_its_cast(normal, same, config, dtype):
    from turbocompile.kernels.quantize.quantize_triton import quantize_into

    x = normal(2, 5, 300, dtype=dtype) * 100
    x[0, 1] = 0
    values, scale = torch.empty(x.shape), torch.empty(2, 5, 1)
    quantize_into(x, values, scale, "fp8", config=config)
    same((encode(values, "fp8"), scale), ops.quantize(x, "fp8"))


def test_halves_round_to_even_and_the_largest_of_a_tile_saturates(same):
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    same(launch_quantize(x, "int8"), ops.quantize(x, "int8"))
    x = torch.tensor([[4.0, -4.0, 1.0]])
    assert launch_quantize(x, "int8_block")[0].tolist() == [[127, -128, 32]]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_gelu_quantize(normal, unit, config, dtype, approximate):
    from turbocompile.kernels.quantize.quantize_triton import launch_gelu_quantize

    x = normal(2, 4, 300, dtype=dtype) * 3
    x[0, 0, :4] = torch.tensor([-1e4, 0.0, -30.0, 6e4 if dtype == F16 else 1e30])
    x[0, 1] = 0
    for item in (x[0, 1:], x[1:]):  # the row of 6e4 apart: its steps hide the others
        expected = torch.nn.functional.gelu(item.double(), approximate=approximate)
        for format in ("int8", "int8_block"):
            data, scale = launch_gelu_quantize(item, approximate, format, config)
            assert_quantized(data, scale, format, expected, unit[dtype])
    data, _ = launch_gelu_quantize(x, approximate, "int8")
    assert data[0, 0, :4].tolist() == [0, 0, 0, 127]


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", ["batch", "shared", "vector", "token", "column"])
def test_adaln_over_every_broadcast(normal, unit, config, dtype, width, form):
    from turbocompile.kernels.norms.norms_triton import launch_adaln

    shape = {
        "batch": (2, 1, width),
        "shared": (1, 1, width),
        "vector": (width,),
        "token": (2, 3, width),
        "column": (2, 3, 1),
    }[form]
    weight, bias = (normal(width), normal(width)) if form in ("batch", "column") else (None, None)
    x = (normal(2, 5, width + 3) * 3 + 1).to(dtype)[:, 1:4, :width]
    scale, shift = normal(*shape), normal(*shape, dtype=dtype)
    y = launch_adaln(x, scale, shift, weight, bias, 1e-6, config)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, dtype, True)
    wide = [None if t is None else t.double() for t in (x, scale, shift, weight, bias)]
    expected = ops.adaln(*wide, 1e-6)
    assert ((y.double() - expected).abs() <= slack(expected, unit[dtype])).all()


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 2, 3, 40)])
def test_any_number_of_dimensions(normal, shape):
    from turbocompile.kernels.norms.norms_triton import launch_adaln

    x, scale, shift = normal(*shape), normal(*shape[-2:]), normal(*shape)
    expected = ops.adaln(x.double(), scale.double(), shift.double(), None, None, 1e-6)
    assert ((launch_adaln(x, scale, shift, None, None, 1e-6) - expected).abs() <= slack(expected, 0)).all()


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_rows_give_the_shift(value):
    from turbocompile.kernels.norms.norms_triton import launch_adaln

    for width in (300, 1536):
        x, shift = torch.full((1, 3, width), value), torch.arange(float(width))
        assert torch.equal(launch_adaln(x, torch.ones(width), shift, None, None, 1e-6), shift.expand(1, 3, width))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("parts", ["all", "none", "norm", "modulation"])
def test_residual_and_its_norm(normal, unit, config, norm, dtype, parts):
    from turbocompile.kernels.norms.norms_triton import launch_gated_residual, launch_residual_norm

    x, y = (normal(2, 3, 300) * 3).to(dtype), normal(2, 300, 3).transpose(1, 2)
    gate = normal(2, 1, 300) if parts in ("all", "modulation") else None
    scale, shift = (normal(2, 1, 300), normal(300)) if parts in ("all", "modulation") else (None, None)
    weight, bias = (normal(300), normal(300, dtype=dtype)) if parts in ("all", "norm") else (None, None)
    args = (gate, scale, shift, weight, bias)
    r, n = launch_residual_norm(x, y, *args, 1e-6, norm, config)
    assert (r.dtype, n.dtype, n.is_contiguous()) == (dtype, dtype, True)
    expected, _ = ops.residual_norm(x, y, *args, 1e-6, norm)
    assert torch.equal(r, expected)
    assert torch.equal(launch_gated_residual(x, y, gate, config), expected)
    wide = [None if t is None else t.double() for t in args]
    zero = torch.zeros_like(r).double()
    expected = ops.residual_norm(r.double(), zero, None, *wide[1:], 1e-6, norm)[1]
    assert ((n.double() - expected).abs() <= slack(expected, unit[dtype])).all()


@pytest.mark.parametrize(
    ("dtype", "tokens", "form"), [(F32, 3, (1, 1)), (F16, 3, (2, 1)), (F16, 3, (2, 3)), (F16, 66, (2, 1))]
)
def test_norms_quantized(normal, unit, config, block_config, dtype, tokens, form):
    from turbocompile.kernels.norms.norms_triton import (
        launch_adaln_quantize,
        launch_norm_quantize,
        launch_residual_norm_quantize,
    )

    x, y, gate = normal(2, tokens, 300, dtype=dtype), normal(2, tokens, 300, dtype=dtype), normal(*form, 300)
    scale, shift, weight, bias = normal(*form, 300), normal(*form, 300), normal(300), normal(300)
    wide = [t.double() for t in (x, scale, shift, weight, bias)]
    for format in ("int8", "int8_block") if tokens == 3 else ("int8_block",):  # 66: tiles end inside a batch item
        launch = block_config if format == "int8_block" else config
        expected = ops.adaln(*wide, 1e-6)
        found = launch_adaln_quantize(x, scale, shift, weight, bias, 1e-6, format, launch)
        assert_quantized(*found, format, expected, unit[dtype])
        r, *found = launch_residual_norm_quantize(x, y, gate, scale, shift, weight, None, 1e-6, "rms", format, launch)
        assert torch.equal(r, ops.gated_residual(x, y, gate))
        zero = torch.zeros_like(wide[0])
        expected = ops.residual_norm(r.double(), zero, None, *wide[1:4], None, 1e-6, "rms")[1]
        assert_quantized(*found, format, expected, unit[dtype])
        expected = ops.residual_norm(wide[0], zero, None, None, None, *wide[3:], 1e-6, "layer")[1]
        found = launch_norm_quantize(x, weight, bias, 1e-6, "layer", format, launch)
        assert_quantized(*found, format, expected, unit[dtype])


@pytest.mark.parametrize(("warps", "lag"), [(4, 0), (8, 20), (16, 1000)])
def test_a_tile_comes_behind_its_rows(normal, same, warps, lag):
    """By one row block, by two, and behind all rows; before them it would find zeros, and say NaN."""
    from turbocompile.kernels.norms.norms_triton import BlockConfig, Norm, Sum, norm_into

    config = BlockConfig(warps, 48, lag=lag)
    gate, scale, shift = normal(2, 1, 300), normal(2, 1, 300), normal(300)
    for tokens in (1, 64, 193):  # 2 to 386 rows: a row block in part, one, and three with a part
        x, y = (normal(2, tokens + 3, 307, dtype=F16)[:, :tokens, 4:304] for _ in "xy")
        expected = ops.residual_norm_quantize(x, y, gate, scale, shift, None, None, 1e-6, "layer", "int8_block")
        residual = torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
        data, unit = (torch.full_like(t, 99) for t in expected[1:])
        norm = Norm("layer", 1e-6, scale=scale, shift=shift)
        norm_into(x, norm, "int8_block", data, unit, Sum(y, gate, residual), config)
        assert torch.equal(residual, expected[0])
        assert ((unit - expected[2]).abs() <= 2.0**-10 * expected[2]).all()
        assert ((data.int() - expected[1]).abs() <= 1).all()
        again, other = torch.full_like(data, 99), torch.full_like(unit, 99)
        norm_into(residual, norm, "int8_block", again, other, config=BlockConfig(8, 48, lag=1))
        same((again, other), (data, unit))


def test_tiles_are_at_least_a_row_block_behind(normal):
    from turbocompile.kernels.norms.norms_triton import BlockConfig

    device = torch.device("cpu")
    for lag, programs in ((0, 20), (0.5, 1), (3, 100)):
        assert BlockConfig(8, 48, lag=lag).blocks_between(1000, programs, device) >= 1
    assert BlockConfig(8, 48, lag=1000).blocks_between(1000, 20, device) == 8  # there are no more


def test_a_configuration_of_the_other_kind_is_refused(normal, config, block_config):
    from turbocompile.kernels.norms.norms_triton import launch_norm_quantize

    for format, other in (("int8", block_config), ("int8_block", config)):
        with pytest.raises(ValueError, match="Config"):
            launch_norm_quantize(normal(3, 40), None, None, 1e-6, "rms", format, other)


def test_fp8_of_a_norm_before_its_cast(normal):
    from turbocompile.kernels.norms.norms_triton import Norm, launch_adaln, norm_into

    x, scale, shift = normal(2, 5, 300), normal(2, 1, 300), normal(2, 1, 300)
    values, unit = torch.empty_like(x), empty_quantized(x, "fp8")[1]
    norm_into(x, Norm("layer", 1e-6, scale=scale, shift=shift), "fp8", values, unit)
    n = launch_adaln(x, scale, shift, None, None, 1e-6)
    amax = n.abs().amax(-1, keepdim=True)
    assert torch.equal(unit, amax / 448)
    assert torch.equal(values, n * (torch.full_like(amax, 448.0) / amax))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("heads", "half"), [(1, 5), (5, 8)])
def test_qk_norm_rope(normal, unit, config, dtype, interleaved, per_head, heads, half):
    from turbocompile.kernels.rotary.rotary_triton import launch_qk_norm_rope

    channels = 2 * half * heads
    x = normal(2, 6, 3, channels, dtype=dtype)[:, :, 1]  # as a fused projection leaves it
    weight = normal(2 * half if per_head else channels) + 1
    widths = (half - 2 * (half // 3), half // 3, half // 3)
    for grid in ([1, 3, 2], [3, 2], [6], []):
        columns = {3: widths, 2: (half - 2, 2), 1: (half,), 0: ()}[len(grid)]
        turns = [normal(n, d) for n, d in zip(grid, columns, strict=True)]
        given, args = (weight if len(grid) > 1 else None), (1e-6, per_head, heads)
        tables = [[f(t) for t in turns] for f in (torch.cos, torch.sin)]
        got = launch_qk_norm_rope(x, given, *args, *tables, grid, interleaved, config)
        assert (got.shape, got.dtype, got.is_contiguous()) == ((2, 6, heads, 2 * half), dtype, True)
        tables = [[t.double() for t in axes] for axes in tables]
        exact = None if given is None else given.double()
        expected = ops.qk_norm_rope(x.double(), exact, *args, *tables, grid, interleaved)
        bound = 1e-6 * expected.abs().max() + unit[dtype] * expected.abs()
        assert ((got.double() - expected).abs() <= bound).all()


def test_an_odd_head_that_is_not_turned_and_rows_of_zeros(normal):
    from turbocompile.kernels.rotary.rotary_triton import launch_qk_norm_rope

    x = normal(2, 6, 15)
    x[0, 0] = 0
    for per_head in (True, False):
        args = (x, None, 1e-6, per_head, 3, [], [], [], True)
        got, expected = launch_qk_norm_rope(*args), ops.qk_norm_rope(*args)
        assert (got[0, 0] == 0).all()
        assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_the_kernels_do_not_take_is_refused(normal):
    from turbocompile.kernels.norms.norms_triton import launch_adaln, launch_gated_residual
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    from turbocompile.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="float64"):
        launch_quantize(normal(2, 3, dtype=torch.float64), "int8")
    with pytest.raises(UnsupportedError, match="wider"):
        launch_quantize(torch.zeros(1, 40000), "int8")
    with pytest.raises(ValueError, match="does not broadcast"):
        launch_adaln(normal(2, 5, 16), normal(3, 1, 16), normal(16), None, None, 1e-6)
    with pytest.raises(ValueError, match="is added to"):
        launch_gated_residual(normal(2, 5, 16), normal(2, 4, 16), None)
