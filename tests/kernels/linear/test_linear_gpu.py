"""The 8-bit linears on a GPU: the Triton kernel and the library's products against the reference in float64.

Compiling is what the tests' time goes to: N is a multiple of 16 where it does not matter, so that tests share kernels,
and what does not depend on a configuration runs on the first of each path.
"""

from __future__ import annotations

import pytest
import torch
from turbocompile.kernels import ops
from turbocompile.kernels.linear.w8a8_linear import reference
from turbocompile.kernels.quantize.quantize import FORMATS, dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROWS = 32760
SHAPES = [(1536, 1536), (1536, 8960), (8960, 1536), (5120, 5120), (5120, 13824), (13824, 5120)]  # K, N of Wan
# What tensor cores of Hopper cut off a sum of e4m3 products with 32 more of K, relative to it: 8,192 products of one
# sign came out 10% short, so 256 cuts of a sum that is half as large on the average: 2^-10.4 each.
CUT = 2.0**-10


@pytest.fixture
def make():
    """make(*shape, dtype=bfloat16): N(0, 1) on the GPU, another tensor at each call."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape, dtype=BF16: torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def configurations(format):
    """The declared ones that this card runs."""
    from turbocompile.kernels.linear.linear_triton import configs

    return configs(format, torch.device("cuda", 0)) if torch.cuda.is_available() else ()


def runs(format):
    return bool(configurations(format))


EVERY = [pytest.param(f, c, id=f"{f}-{i}") for f in FORMATS for i, c in enumerate(configurations(f))]
FIRST = [
    pytest.param(f, c, id=f"{f}-{c.path}")
    for f in FORMATS
    for c in {c.path: c for c in reversed(configurations(f))}.values()
]


def operands(make, format, shape, n, biased=True):
    """Arguments of the linear up to the format: x N(0, 1) of `shape`, weights N(0, 0.05^2)."""
    bias = make(n) if biased else None
    return (*quantize(make(*shape), format), *quantize(make(n, shape[-1]) * 0.05, format), bias, format)


def magnitudes(args):
    data, scale, weight, weight_scale, bias, format = args
    a, b = (dequantize(*q, format, FP64).abs() for q in ((data, scale), (weight, weight_scale)))
    return a @ b.T + (0 if bias is None else bias.double().abs())


def bound(args, dtype, unit, promote=True):
    """How far a result in dtype may be from the reference in float64.

    float32 sums of K products, in any order, of the scales and of the bias: K + 5 roundings at most, each of the sum of
    magnitudes; FP8: and the cuts, of 128 of K where they are promoted, of all of K otherwise; int8_block rounds to
    dtype before the bias and after it, the others after it.
    """
    k, format, size = args[0].shape[-1], args[-1], magnitudes(args)
    inner = unit[FP32] * (k + 5) * size
    if format == "fp8":
        inner = inner + CUT * (min(k, 128) if promote else k) / 32 * size
    return inner + 2 * unit[dtype] * (size + inner) + (2.0**-25 if dtype == FP16 else 0)


def relative_l2(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# --- every configuration


def assert_near(args, dtype, unit, config):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    rows, n, format = args[0].shape[0], args[2].shape[0], args[-1]
    y = launch_linear(*args, dtype, config)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((rows, n), dtype, True)
    exact = reference(*args, FP64)
    assert ((y.double() - exact).abs() <= bound(args, dtype, unit, config.promote)).all()
    if format == "int8":  # sums are exact; the bias may be added with a multiplication or after it
        ours, theirs = relative_l2(y, exact), relative_l2(reference(*args, dtype), exact)
        assert ours <= theirs + 4 * unit[FP32]


@pytest.mark.parametrize(("format", "config"), EVERY)
@pytest.mark.parametrize(("rows", "k", "n"), [(1111, 1536, 1104), (70, 128, 272), (2000, 3200, 144)])
def test_every_configuration_is_the_reference(make, unit, format, config, rows, k, n):
    assert_near(operands(make, format, (rows, k), n), BF16, unit, config)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("format", "config"), FIRST)
def test_every_dtype_with_and_without_a_bias(make, unit, format, config, dtype):
    for n in (272, 264):  # the second is no multiple of 16
        for biased in (True, False):
            assert_near(operands(make, format, (333, 1536), n, biased), dtype, unit, config)


@pytest.mark.parametrize(("format", "config"), [p for p in EVERY if p.values[0] != "int8_block"])
@pytest.mark.parametrize("k", [16, 304])  # int8_block has multiples of 128 alone
def test_any_multiple_of_16(make, unit, format, config, k):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    for rows, n in ((1, 16), (300, 400)):
        args = operands(make, format, (rows, k), n)
        y = launch_linear(*args, BF16, config)
        assert ((y.double() - reference(*args, FP64)).abs() <= bound(args, BF16, unit, config.promote)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "n"), [(1, 8), (257, 17), (512, 1536), (4099, 1001)])
def test_the_default_for_any_rows_and_columns(make, unit, format, rows, n):
    from turbocompile.kernels.linear.linear_triton import default_config, launch_linear

    if not runs(format):
        pytest.skip("no FP8 on this card")
    if format == "int8_block":
        n = -(-n // 8) * 8
    args = operands(make, format, (rows, 256), n)
    y = launch_linear(*args, BF16)
    promote = default_config(format, rows, n, 256, y.device).promote
    assert ((y.double() - reference(*args, FP64)).abs() <= bound(args, BF16, unit, promote)).all()


# --- values


@pytest.mark.parametrize(("format", "config"), EVERY)
def test_zeros_and_large_values(make, format, config):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    x, w, bias = make(700, 512, dtype=FP32), make(272, 512, dtype=FP32), make(272)
    x[100:500] = 0
    data, scale = quantize(x * 0, format)
    assert torch.equal(
        launch_linear(data, scale, *quantize(w, format), bias, format, BF16, config), bias.expand(700, 272)
    )
    args = (*quantize(x * 1e15, format), *quantize(w * 1e15, format), None, format)
    y = launch_linear(*args, FP32, config)
    assert y.isfinite().all()
    assert (y[100:500] == 0).all()
    # random signs: of the 16 cuts of CUT only a few add up
    assert relative_l2(y, reference(*args, FP64)) < (2.0**-18 if format != "fp8" else 8 * CUT)


def test_integers_at_their_limits_are_exact(make):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    data = torch.full((300, 13824), -128, dtype=torch.int8, device="cuda")
    weight = torch.full((272, 13824), 127, dtype=torch.int8, device="cuda")
    weight[::2] = -128  # sums of 2^14 K and nearly -2^14 K
    for format in ("int8", "int8_block"):
        if format == "int8":
            scales = (torch.ones(300, 1, device="cuda"), torch.ones(272, 1, device="cuda"))
        else:
            scales = (torch.ones(3, 108, device="cuda"), torch.ones(3, 108, device="cuda"))
        args = (data, scales[0], weight, scales[1], None, format)
        for config in configurations(format):
            y = launch_linear(*args, FP32, config)
            assert torch.equal(y, reference(*args, FP32))  # multiples of 2^7 below 2^31: every sum fits float32


@pytest.mark.parametrize(("format", "config"), EVERY)
def test_long_sums_lose_nothing(make, format, config):
    """Values with a mean add up over K = 13,824: sums that are cut come out short."""
    from turbocompile.kernels.linear.linear_triton import launch_linear

    args = (*quantize(make(300, 13824) + 2, format), *quantize(make(256, 13824) + 2, format), None, format)
    y, exact = launch_linear(*args, FP32, config).double(), reference(*args, FP64)
    short = 1 - ((y * exact).sum() / exact.square().sum()).item()
    if format != "fp8":
        assert abs(short) < 2.0**-20
    elif config.promote:
        assert abs(short) < 4 * CUT  # the cuts of 128 of K
    else:
        assert abs(short) < 13824 / 32 * CUT  # what `promote` is for


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("path", ["descriptor", "pointer"])
def test_rows_that_are_not_contiguous(make, format, path):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    config = next((c for c in configurations(format) if c.path == path), None)
    if config is None:
        pytest.skip("not on this card")
    data, scale, weight, weight_scale, bias, _ = operands(make, format, (3, 333, 512), 272)
    expected = launch_linear(data, scale, weight, weight_scale, bias, format, BF16, config)

    def padded(rows, columns, offset):
        wide = torch.full((*rows.shape[:-1], columns), 0x7F, dtype=torch.int8, device="cuda")  # NaN in e4m3
        wide[..., offset : offset + 512] = rows.view(torch.int8)
        return wide.view(rows.dtype)[..., offset : offset + 512]

    for columns, offset in ((544, 16), (544, 8), (517, 5)):  # the first is read in place
        given = padded(data, columns, offset), scale, padded(weight, columns, offset), weight_scale
        assert torch.equal(launch_linear(*given, bias, format, BF16, config), expected)
    turned = weight.view(torch.int8).t().contiguous().t().view(weight.dtype)
    assert torch.equal(launch_linear(data, scale, turned, weight_scale, bias, format, BF16, config), expected)


# --- options


# --- the library's products


def test_the_library_is_a_configuration(make, unit):
    from turbocompile.kernels.linear import linear_triton as t

    found = t.library("fp8", 272, 512, BF16, torch.device("cuda", 0))
    if not found:
        pytest.skip("not on this card")
    args = operands(make, "fp8", (2, 333, 512), 272)
    wide = torch.zeros(2, 333, 517, dtype=torch.int8, device="cuda")
    wide[..., 5:] = args[0].view(torch.int8)
    apart = wide.view(args[0].dtype)[..., 5:]  # rows that start anywhere
    for config in found:
        y = t.launch_linear(*args, BF16, config)
        assert ((y.double() - reference(*args, FP64)).abs() <= bound(args, BF16, unit, promote=False)).all()
        assert torch.equal(y, t.launch_linear(apart, *args[1:], BF16, config))
        with pytest.raises(ValueError, match="no such product"):
            t.launch_linear(*args, FP32, config)


@pytest.mark.parametrize("format", FORMATS)
def test_the_fastest_is_chosen_and_then_runs(make, format):
    from turbocompile.kernels.linear import linear_choice, linear_triton, w8a8_linear
    from turbocompile.kernels.linear.linear_triton import launch_linear

    if not runs(format):
        pytest.skip("no FP8 on this card")
    args = operands(make, format, (2, 333, 512), 272)
    times = linear_choice.measure(format, 666, 272, 512, BF16, args[0].device)
    assert set(times) == set(linear_triton.candidates(format, 272, 512, BF16, args[0].device))
    winner = min(times, key=times.get)
    assert next(iter(times)) == winner
    assert torch.equal(w8a8_linear.on_cuda(*args, BF16, config=winner), launch_linear(*args, BF16, winner))


# --- as a program runs them


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_the_shapes_of_wan(make, format, k, n):
    """M = 32,760: the first and last rows and some between, all columns."""
    from turbocompile.kernels.linear.linear_triton import launch_linear

    if not runs(format):
        pytest.skip("no FP8 on this card")
    data, scale, weight, weight_scale, bias, _ = operands(make, format, (ROWS, k), n)
    y = launch_linear(data, scale, weight, weight_scale, bias, format, BF16)
    for first in (0, 128 * 101, 128 * 255):
        part = slice(first, first + 128)
        rows = scale[first // 128 : first // 128 + 1] if format == "int8_block" else scale[part]
        expected = reference(data[part], rows, weight, weight_scale, bias, format, FP64)
        # two roundings to bf16, of at most 2^-8 each and about a third in the norm; FP8's cuts of 128 of K
        assert relative_l2(y[part], expected) < 2.0**-8 + (4 * CUT if format == "fp8" else 0)


@pytest.mark.parametrize(("format", "config"), EVERY)
def test_repeated_calls_are_equal_bit_by_bit(make, format, config):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    args = operands(make, format, (5000, 1536), 1536)
    first = launch_linear(*args, BF16, config)
    for _ in range(5):
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # what freed memory holds must not matter
        assert torch.equal(launch_linear(*args, BF16, config), first)


@pytest.mark.parametrize("format", FORMATS)
def test_a_captured_graph_replays_on_new_operands(make, format):
    if not runs(format):
        pytest.skip("no FP8 on this card")
    data, *rest = operands(make, format, (1000, 512), 272)
    other = operands(make, format, (1000, 512), 272)[0]
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.w8a8_linear(data, *rest, BF16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.w8a8_linear(data, *rest, BF16)
    data.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, ops.w8a8_linear(data, *rest, BF16))


@pytest.mark.parametrize("format", FORMATS)
def test_a_new_number_of_rows_compiles_nothing(make, format):
    from turbocompile.kernels.linear import linear_triton as t

    if not runs(format):
        pytest.skip("no FP8 on this card")
    kernels = t._linear.device_caches[torch.cuda.current_device()][0]
    config = next(c for c in configurations(format) if c.path == "pointer")
    for rows in (2000, 1999, 1, 16, 1000):
        args = operands(make, format, (1, rows, 512), 272)
        t.launch_linear(*args, BF16, config)
        if rows == 2000:
            before = len(kernels)
    assert len(kernels) == before


# --- the op


@pytest.mark.parametrize("format", FORMATS)
def test_the_op_runs_the_kernel(make, unit, format, monkeypatch):
    from turbocompile.kernels.linear import linear_triton

    if not runs(format):
        pytest.skip("no FP8 on this card")
    args = operands(make, format, (2, 333, 512), 272)
    y = ops.w8a8_linear(*args, BF16)
    assert torch.equal(y, linear_triton.launch_linear(*args, BF16))
    assert relative_l2(y, reference(*args, FP64)) < 2.0**-8 + (4 * CUT if format == "fp8" else 0)

    def ran(*args):
        raise RanError

    monkeypatch.setattr(linear_triton, "launch_linear", ran)
    with pytest.raises(RanError):
        ops.w8a8_linear(*args, BF16)


class RanError(Exception):
    """The kernel ran."""


@pytest.mark.parametrize("format", FORMATS)
def test_the_op_falls_back_to_the_reference(make, format, monkeypatch):
    """For float64, and K that is no multiple of 16 or too deep for int32."""
    from turbocompile.kernels.linear import linear_triton

    def ran(*args):
        raise RanError

    monkeypatch.setattr(linear_triton, "launch_linear", ran)
    others = () if format == "int8_block" else ((24, FP32), (2**17, BF16))
    for k, dtype in ((128, FP64), *others):
        args = operands(make, format, (5, k), 16)
        assert torch.equal(ops.w8a8_linear(*args, dtype), reference(*args, dtype))
    args = operands(make, format, (0, 128), 16)
    monkeypatch.undo()
    assert ops.w8a8_linear(*args, BF16).shape == (0, 16)


def test_the_op_refuses_what_the_reference_refuses(make):
    data, scale, weight, weight_scale, bias, _ = operands(make, "int8", (5, 128), 16)
    with pytest.raises(ValueError, match="fp8 does not fit"):
        ops.w8a8_linear(data, scale, weight, weight_scale, bias, "fp8", BF16)
    with pytest.raises(ValueError, match="channels"):
        ops.w8a8_linear(data[:, :64], scale, weight, weight_scale, bias, "int8", BF16)


@pytest.mark.parametrize("format", FORMATS)
def test_the_op_is_sound_and_compiles_whole(make, sound, format):
    if not runs(format):
        pytest.skip("no FP8 on this card")
    args = operands(make, format, (2, 333, 512), 272)
    sound(ops.w8a8_linear.default, *args, BF16)
    torch.compiler.reset()
    whole = torch.compile(lambda data: ops.w8a8_linear(data, *args[1:], BF16) * 2, fullgraph=True)
    assert torch.equal(whole(args[0]), ops.w8a8_linear(*args, BF16) * 2)


def test_every_path_for_the_sanitizer(make):
    """Small, so that compute-sanitizer gets through it: `-k sanitizer`."""
    from turbocompile.kernels.linear.linear_triton import launch_linear

    for format in FORMATS:
        for config in configurations(format):
            for n in (272, 17) if config.path == "pointer" and format != "int8_block" else (272,):
                args = operands(make, format, (200, 384), n)
                y = launch_linear(*args, BF16, config)
                assert y.isfinite().all()
