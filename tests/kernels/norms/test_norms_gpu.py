"""The kernels of the norms, of quantization and of the rotation on a GPU, against the references.

Every test compiles kernels, which is what its time goes to: all shapes run in bf16, two in the other dtypes.

Two bounds. What rounds no sum is the reference bit by bit: r, and data and scales of `quantize`. (The reference runs
on the CPU there: on a GPU torch divides by a constant through its reciprocal.) What contains a norm or a GELU is
compared with the reference in float64: 1e-6 of the largest value of a row for the float32 inside, and one rounding to
x's dtype; quantized, half a step of the format more.
"""

from __future__ import annotations

import pytest
import torch
from turbocompile.kernels import ops
from turbocompile.kernels.norms import adaln, norm_quantize, residual_norm
from turbocompile.kernels.quantize import gelu_quantize, quantize
from turbocompile.kernels.quantize.quantize import FORMATS, LIMIT, dequantize
from turbocompile.kernels.rotary import qk_norm_rope

from turbocompile.errors import UnsupportedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, F32]
SHAPES = [(1, 777, 1536), (2, 301, 5120), (3, 50, 1000), (2, 9, 40), (1, 33, 13824), (5, 1, 1536)]
PLACES = [
    *((shape, BF16) for shape in SHAPES),
    ((1, 777, 1536), FP16), ((2, 301, 5120), F32), ((3, 50, 1000), FP16), ((3, 50, 1000), F32),
]  # fmt: skip
EPS = 1e-6


@pytest.fixture
def make():
    """make(*shape, dtype=bfloat16): N(0, 1) on the GPU, another tensor at each call."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape, dtype=BF16: torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def slack(expected, unit):
    subnormal = 2.0**-25 if unit == 2.0**-11 else 0.0  # half a step of float16 near zero
    return 1e-6 * expected.abs().amax(-1, keepdim=True) + unit * expected.abs() + subnormal


def assert_near(got, expected, unit):
    assert got.is_contiguous()
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= slack(expected, unit)).all()


def assert_quantized(found, format, expected, unit):
    """data and scale stand for expected (float64) within half a step of the format, on top of the slack."""
    data, scale = found
    assert (data.dtype, scale.dtype, data.is_contiguous()) == (FORMATS[format], F32, True)
    got = dequantize(data, scale, format, torch.float64)
    each = dequantize(torch.ones(data.shape, device="cuda"), scale, format, torch.float64)  # a step
    if format == "fp8":  # 3 bits of mantissa: 2^-4 of a value, and half of the smallest subnormal, 2^-9
        half = torch.maximum(2.0**-4 * expected.abs(), 2.0**-10 * each)
    elif format == "int8_block":  # +amax saturates, a step short
        half = torch.where(expected > 127 * each, each, each / 2)
    else:
        half = each / 2
    room = (1 + 2.0**-4) * slack(expected, unit) + 1e-6 * each * LIMIT[format]  # the last: scale and factor, rounded
    assert ((got - expected).abs() <= half + room).all()
    if format != "int8_block":
        amax = expected.abs().amax(-1, keepdim=True)
        assert ((scale * LIMIT[format] - amax).abs() <= (unit + 2e-6) * amax + 1e-8).all()


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def modulation(make, shape, dtype):
    """gate, scale, shift by batch item, weight and bias."""
    batch, _, width = shape
    return [make(batch, 1, width, dtype=dtype) for _ in range(3)] + [make(width, dtype=dtype) for _ in range(2)]


def views(make, dtype):
    """Activations (2, 65, 1536) that are not contiguous."""
    return {
        "fused": make(2, 65, 3, 1536, dtype=dtype)[:, :, 1],
        "part of a row": make(2, 65, 2000, dtype=dtype)[..., 200:1736],
        "odd start": make(2, 65, 1601, dtype=dtype)[..., 1:1537],
        "tokens first": make(65, 2, 1536, dtype=dtype).transpose(0, 1),
        "channels first": make(2, 1536, 65, dtype=dtype).transpose(1, 2),
        "expanded": make(1, 65, 1536, dtype=dtype).expand(2, 65, 1536),
    }


# --- quantization


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(("shape", "dtype"), [*PLACES, ((300,), BF16), ((2, 3, 5, 130), FP16)])
def test_quantize_bit_by_bit(make, same, shape, dtype, format):
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    for factor in (1.0, 1e4, 1e-6, 0.0):
        x = make(*shape, dtype=dtype) * factor
        x[..., :3] = 0
        data, scale = launch_quantize(x, format)
        expected = quantize.reference(x.cpu(), format)
        same((data.view(torch.int8).cpu(), scale.cpu()), (expected[0].view(torch.int8), expected[1]))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_of_any_strides(make, same, dtype, format):
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    for x in views(make, dtype).values():
        data, scale = launch_quantize(x, format)
        expected = quantize.reference(x.cpu(), format)
        assert data.is_contiguous()
        same((data.view(torch.int8).cpu(), scale.cpu()), (expected[0].view(torch.int8), expected[1]))


def test_every_quotient_rounds_as_in_the_reference(same):
    """Halves of int8 and of e4m3 and their neighbours: a fused multiply-add or a cast that truncates would show."""
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    x = torch.arange(-(2**15), 2**15, device="cuda", dtype=torch.int32).to(torch.int16).view(FP16)
    x = torch.where(x.isfinite(), x, 0).reshape(64, 1024)
    for rows in (x, x.float() * 0.37):
        for format in FORMATS:
            data, scale = launch_quantize(rows, format)
            expected = quantize.reference(rows.cpu(), format)
            same((data.view(torch.int8).cpu(), scale.cpu()), (expected[0].view(torch.int8), expected[1]))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 300, 8960), BF16), ((2, 77, 13824), BF16), ((3, 50, 1000), FP16), ((3, 50, 1000), F32)],
)
def test_gelu_quantize(make, unit, shape, dtype, approximate, format):
    from turbocompile.kernels.quantize.quantize_triton import launch_gelu_quantize

    for factor in (3.0, 1e4, 1e-3, 0.0):
        x = make(*shape, dtype=dtype) * factor
        expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
        assert_quantized(launch_gelu_quantize(x, approximate, format), format, expected, unit[dtype])


# --- norms


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [(*place, "batch") for place in PLACES]
    + [(shape, BF16, form) for shape in SHAPES[:3] for form in ("vector", "token", "column")],
)
def test_adaln(make, unit, shape, dtype, form):
    from turbocompile.kernels.norms.norms_triton import launch_adaln

    batch, tokens, width = shape
    sizes = {"batch": (batch, 1, width), "vector": (width,), "token": shape, "column": (batch, tokens, 1)}[form]
    x = make(*shape, dtype=dtype) * 3 + 1
    vectors = [make(width, dtype=dtype), make(width, dtype=F32)] if form in ("batch", "column") else [None, None]
    args = (x, make(*sizes, dtype=F32), make(*sizes, dtype=dtype), *vectors)
    assert_near(launch_adaln(*args, EPS), adaln.reference(*double(*args), EPS), unit[dtype])


@pytest.mark.parametrize(
    ("shape", "dtype", "norm", "parts"),
    [(*place, norm, parts) for place in PLACES for norm, parts in (("layer", "all"), ("rms", "none"))]
    + [(SHAPES[2], BF16, n, p) for n in ("layer", "rms") for p in ("all", "none", "norm", "modulation")],
)
def test_residual_and_its_norm(make, unit, shape, dtype, norm, parts):
    from turbocompile.kernels.norms.norms_triton import launch_gated_residual, launch_residual_norm

    x, y = make(*shape, dtype=dtype) * 3, make(*shape, dtype=BF16)
    gate, scale, shift, weight, bias = modulation(make, shape, F32)
    gate, scale, shift = (gate, scale, shift) if parts in ("all", "modulation") else (None, None, None)
    weight, bias = (weight, bias) if parts in ("all", "norm") else (None, None)
    r, n = launch_residual_norm(x, y, gate, scale, shift, weight, bias, EPS, norm)
    assert torch.equal(r, residual_norm.gated(x, y, gate))
    assert torch.equal(launch_gated_residual(x, y, gate), r)
    zero = torch.zeros_like(r).double()
    expected = residual_norm.reference(r.double(), zero, None, *double(scale, shift, weight, bias), EPS, norm)[1]
    assert n.dtype == dtype
    assert_near(n, expected, unit[dtype])


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(("shape", "dtype"), PLACES)
def test_norms_quantized(make, unit, shape, dtype, format):
    from turbocompile.kernels.norms.norms_triton import (
        launch_adaln_quantize,
        launch_norm_quantize,
        launch_residual_norm_quantize,
    )

    x, y = make(*shape, dtype=dtype), make(*shape, dtype=dtype)
    gate, scale, shift, weight, bias = modulation(make, shape, dtype)
    expected = adaln.reference(*double(x, scale, shift, weight, bias), EPS)
    found = launch_adaln_quantize(x, scale, shift, weight, bias, EPS, format)
    assert_quantized(found, format, expected, unit[dtype])
    zero = torch.zeros_like(x).double()
    for norm in ("layer", "rms"):
        expected = residual_norm.reference(x.double(), zero, None, None, None, *double(weight, bias), EPS, norm)[1]
        found = launch_norm_quantize(x, weight, bias, EPS, norm, format)
        assert_quantized(found, format, expected, unit[dtype])
        args = (scale, shift, weight, None)
        r, *found = launch_residual_norm_quantize(x, y, gate, *args, EPS, norm, format)
        assert torch.equal(r, residual_norm.gated(x, y, gate))
        expected = residual_norm.reference(r.double(), zero, None, *double(*args), EPS, norm)[1]
        assert_quantized(found, format, expected, unit[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_any_strides(make, unit, dtype):
    from turbocompile.kernels.norms.norms_triton import launch_adaln, launch_adaln_quantize, launch_residual_norm

    _, scale, shift, weight, bias = modulation(make, (2, 65, 1536), F32)
    table = make(2, 6, 1536, dtype=F32)  # how a block's modulations come: rows of one tensor
    others = list(views(make, dtype).values())[::-1]
    for x, y in zip(views(make, dtype).values(), others, strict=True):
        expected = adaln.reference(*double(x, table[:, 1:2], table[:, 4:5], None, None), EPS)
        args = (x, table[:, 1:2], table[:, 4:5], None, None, EPS)
        assert_near(launch_adaln(*args), expected, unit[dtype])
        for format in FORMATS:
            assert_quantized(launch_adaln_quantize(*args, format), format, expected, unit[dtype])
        r, n = launch_residual_norm(x, y, table[:, 2:3], scale, shift, weight, bias, EPS, "layer")
        assert torch.equal(r, residual_norm.gated(x, y, table[:, 2:3]))
        assert r.is_contiguous()
        zero = torch.zeros_like(r).double()
        assert_near(
            n,
            residual_norm.reference(r.double(), zero, None, *double(scale, shift, weight, bias), EPS, "layer")[1],
            unit[dtype],
        )


@pytest.mark.parametrize(("width", "dtype"), [(1000, F32), (1536, FP16), (1536, BF16), (5120, BF16), (13824, BF16)])
def test_zeros_and_large_values(make, unit, dtype, width):
    from turbocompile.kernels.norms.norms_triton import launch_adaln, launch_adaln_quantize, launch_norm_quantize

    scale, shift = make(1, 1, width, dtype=F32), make(1, 1, width, dtype=F32)
    for value in (0.0, 1e4):  # constant rows: the mean has to be exact
        x = torch.full((1, 9, width), value, device="cuda", dtype=dtype)
        assert torch.equal(launch_adaln(x, scale, shift, None, None, EPS), shift.to(dtype).expand(1, 9, width))
    x = make(1, 40, width, dtype=dtype) * 1e4
    x[:, 3] = 0
    expected = adaln.reference(*double(x, scale, shift, None, None), EPS)
    assert_near(launch_adaln(x, scale, shift, None, None, EPS), expected, unit[dtype])
    for format in FORMATS:
        assert_quantized(launch_adaln_quantize(x, scale, shift, None, None, EPS, format), format, expected, unit[dtype])
        data, unit_scale = launch_norm_quantize(torch.zeros_like(x), None, None, EPS, "rms", format)
        assert (data.view(torch.int8) == 0).all()
        assert unit_scale.isfinite().all()


# --- rotation


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(
    ("heads", "half", "dtype"),
    [(12, 64, BF16), (40, 64, BF16), (3, 48, F32), (5, 20, FP16), (1, 5, BF16)],
)
def test_qk_norm_rope(make, unit, dtype, interleaved, per_head, heads, half):
    from turbocompile.kernels.rotary.rotary_triton import launch_qk_norm_rope

    channels = 2 * half * heads
    x = make(2, 3 * 7 * 11, 3, channels, dtype=dtype)[:, :, 1]  # as a fused projection leaves it
    x[0, 3] = 0
    x[0, 4] *= 1e4
    weight = make(2 * half if per_head else channels, dtype=F32) + 1
    widths = (half - 2 * (half // 3), half // 3, half // 3)
    for grid in ([3, 7, 11], [21, 11], [231], []):
        columns = {3: widths, 2: (half - 2, 2), 1: (half,), 0: ()}[len(grid)]
        turns = [make(n, d, dtype=F32) for n, d in zip(grid, columns, strict=True)]
        tables = [[f(t) for t in turns] for f in (torch.cos, torch.sin)]
        for given in (weight, None) if len(grid) in (0, 3) else (weight,):
            args = (EPS, per_head, heads)
            got = launch_qk_norm_rope(x, given, *args, *tables, grid, interleaved)
            exact = [double(*axes) for axes in tables]
            expected = qk_norm_rope.reference(x.double(), *double(given), *args, *exact, grid, interleaved)
            assert got.dtype == dtype
            assert_near(got.flatten(2), expected.flatten(2), unit[dtype])


# --- all, as a program runs them


def calls(make):
    """Each kernel as a function of x (B, L, 1536)."""
    from turbocompile.kernels.norms import norms_triton as n
    from turbocompile.kernels.quantize import quantize_triton as q
    from turbocompile.kernels.rotary.rotary_triton import launch_qk_norm_rope

    gate, scale, shift, weight, bias = modulation(make, (1, 1, 1536), F32)
    result = {
        "adaln": lambda x: n.launch_adaln(x, scale, shift, None, None, EPS),
        "gated_residual": lambda x: n.launch_gated_residual(x, x, gate),
        "residual_norm": lambda x: n.launch_residual_norm(x, x, gate, scale, shift, weight, bias, EPS, "layer"),
        "qk_norm_rope": lambda x: launch_qk_norm_rope(x, weight, EPS, False, 12, [], [], [], True),
    }
    for f in FORMATS:
        result |= {
            f"adaln {f}": lambda x, f=f: n.launch_adaln_quantize(x, scale, shift, None, None, EPS, f),
            f"norm {f}": lambda x, f=f: n.launch_norm_quantize(x, weight, None, EPS, "rms", f),
            f"residual {f}": lambda x, f=f: n.launch_residual_norm_quantize(
                x, x, gate, scale, shift, None, None, EPS, "layer", f
            ),
            f"quantize {f}": lambda x, f=f: q.launch_quantize(x, f),
            f"gelu {f}": lambda x, f=f: q.launch_gelu_quantize(x, "tanh", f),
        }
    return result


def as_bits(found):
    return [
        t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t
        for t in ([found] if isinstance(found, torch.Tensor) else found)
    ]


def test_repeated_calls_are_equal_bit_by_bit(make):
    x = make(1, 3000, 1536)
    for name, call in calls(make).items():
        first = as_bits(call(x))
        for _ in range(3):
            torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # what freed memory holds must not matter
            assert all(map(torch.equal, as_bits(call(x)), first)), name


def test_the_declared_configurations_agree(make, unit):
    from turbocompile.kernels._rows import ROW_CONFIGS, RowConfig
    from turbocompile.kernels.norms.norms_triton import launch_adaln
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    for shape in ((2, 101, 1536), (1, 50, 5120)):
        x, scale = make(*shape), make(1, 1, shape[-1], dtype=F32)
        expected = adaln.reference(*double(x, scale, scale, None, None), EPS)
        data, _ = launch_quantize(x, "int8")
        for config in [*ROW_CONFIGS.values(), RowConfig(4, 1), RowConfig(4, 16)]:
            assert torch.equal(launch_quantize(x, "int8", config)[0], data)
            assert_near(launch_adaln(x, scale, scale, None, None, EPS, config), expected, unit[BF16])


def test_what_rounds_to_128_is_cut():
    """The bfloat16s below a tile's largest magnitude, at each of its mantissas and of both signs: as the reference."""
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    for exponent in (-20, 0, 90):
        top = (exponent + 127 << 7) + torch.arange(128, dtype=torch.int32)
        bits = (top[:, None] - torch.arange(128)).clamp(min=0)  # a tile's row of a mantissa: 128 neighbours
        x = bits.to(torch.int16).view(torch.bfloat16).repeat_interleave(128, 0)
        x = (x * torch.tensor([1.0, -1.0]).repeat(64 * 128)[:, None]).bfloat16()
        expected = quantize.reference(x, "int8_block")
        found = launch_quantize(x.cuda(), "int8_block")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        assert expected[0].max() == 127
        assert expected[0].min() == -128


def blocks(x, gate, config=None):
    """The three kernels over row blocks, and what they give for x."""
    from turbocompile.kernels.norms import norms_triton as n

    form = "int8_block"
    return [
        *n.launch_adaln_quantize(x, gate, gate, None, None, EPS, form, config),
        *n.launch_norm_quantize(x, None, None, EPS, "rms", form, config),
        *n.launch_residual_norm_quantize(x, x, gate, gate, gate, None, None, EPS, "layer", form, config),
    ]


def test_configurations_over_row_blocks_agree(make):
    """Within a step: they sum a row in other orders. Without a lag tiles wait for the rows of the next row block."""
    from turbocompile.kernels.norms.norms_triton import BlockConfig, block_config

    configs = [BlockConfig(8, 48, 128, 0), BlockConfig(16, 48, 64, 40), BlockConfig(8, 24, None, 2.5)]
    for shape in ((2, 4001, 1536), (1, 3000, 5120), (1, 129, 1000)):
        x, gate = make(*shape), make(1, 1, shape[-1], dtype=F32)
        expected = blocks(x, gate, block_config(8192, True))
        for config in configs:
            for a, b in zip(blocks(x, gate, config), expected, strict=True):
                if a.dtype == torch.int8:
                    off = (a.int() - b.int()).abs()
                    assert off.max() <= 1, config
                    assert off.count_nonzero() <= 1e-3 * off.numel(), config
                else:
                    assert ((a.double() - b.double()).abs() <= 2.0**-7 * b.double().abs()).all(), config


def test_row_blocks_on_two_streams_and_in_two_graphs_at_once(make):
    """What rows tell tiles belongs to a call: calls beside each other do not meet in it."""
    gate = make(1, 1, 1536, dtype=F32)
    inputs = [make(1, tokens, 1536) for tokens in (20000, 19001)]
    expected = [blocks(x, gate) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(blocks(x, gate))
        torch.cuda.synchronize()
        for got, wanted in zip(found, expected, strict=True):
            assert all(map(torch.equal, got, wanted))
    graphs = [torch.cuda.CUDAGraph() for _ in inputs]
    found = []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            found.append(blocks(x, gate))
    for _ in range(20):
        for t in (t for got in found for t in got):
            t.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for got, wanted in zip(found, expected, strict=True):
            assert all(map(torch.equal, got, wanted))


def test_a_captured_graph_replays_on_new_operands(make):
    x, wide = make(1, 35, 1536), make(1, 35, 8960)
    for name, (op, _, args) in operations(make, x, wide).items():
        with torch.cuda.stream(torch.cuda.Stream()):
            op(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*args)
        x.copy_(make(1, 35, 1536))
        wide.copy_(make(1, 35, 8960))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, as_bits(out), as_bits(op(*args)))), name


def test_a_new_length_compiles_nothing(make):
    from turbocompile.kernels.norms import norms_triton
    from turbocompile.kernels.quantize import quantize_triton
    from turbocompile.kernels.rotary import rotary_triton

    def compiled():
        modules = (norms_triton, quantize_triton, rotary_triton)
        kernels = {id(f): f for m in modules for f in vars(m).values() if hasattr(f, "device_caches")}
        return sum(len(f.device_caches[0][0]) for f in kernels.values())

    functions = calls(make)
    for call in functions.values():
        call(make(1, 20000, 1536))
    before = compiled()
    assert before >= 10
    for tokens in (17777, 21001, 30000):
        for call in functions.values():
            call(make(1, tokens, 1536))
    assert compiled() == before


def test_offsets_beyond_32_bits(make):
    """2^31 elements: the last rows are wrong, or a fault, where an offset is a 32-bit product."""
    from turbocompile.kernels.norms.norms_triton import launch_adaln
    from turbocompile.kernels.quantize.quantize_triton import launch_quantize

    rows = 2**31 // 5120 + 100
    x = torch.zeros(1, rows, 5120, device="cuda", dtype=BF16)
    x[:, -50:] = make(1, 50, 5120)
    zero = torch.zeros(5120, device="cuda")
    assert torch.equal(launch_adaln(x, zero, zero, None, None, EPS)[:, -50:],
                       launch_adaln(x[:, -50:], zero, zero, None, None, EPS))  # fmt: skip
    for format in ("int8", "fp8"):
        data, _ = launch_quantize(x, format)
        assert torch.equal(as_bits([data[:, -50:]])[0], as_bits(launch_quantize(x[:, -50:], format))[0])


# --- the ops


def operations(make, x, wide):
    """Every op's overload, reference and arguments for x and wide (B, L, 1536 and 8960), with tables for 35 tokens."""
    gate, scale, shift, weight, bias = modulation(make, (1, 1, 1536), F32)
    grid = [1, 5, 7]
    angles = [make(n, d, dtype=F32) for n, d in zip(grid, (22, 21, 21), strict=True)]
    tables = [t.cos() for t in angles], [t.sin() for t in angles]
    modulated, summed = (x, scale, shift, weight, bias, EPS), (x, x, gate, scale, shift, weight, None, EPS, "layer")
    turned = (x, weight, EPS, False, 12, *tables, grid, True)
    found = {
        "adaln": (ops.adaln, adaln.reference, modulated),
        "gated_residual": (ops.gated_residual, residual_norm.gated, (x, x, gate)),
        "residual_norm": (ops.residual_norm, residual_norm.reference, summed),
        "qk_norm_rope": (ops.qk_norm_rope, qk_norm_rope.reference, turned),
    }
    for f in FORMATS:
        found |= {
            f"adaln_quantize {f}": (ops.adaln_quantize, adaln.reference_quantize, (*modulated, f)),
            f"norm_quantize {f}": (ops.norm_quantize, norm_quantize.reference, (x, weight, None, EPS, "rms", f)),
            f"residual_norm_quantize {f}": (
                ops.residual_norm_quantize, residual_norm.reference_quantize, (*summed, f),
            ),
            f"quantize {f}": (ops.quantize, quantize.reference, (x, f)),
            f"gelu_quantize {f}": (ops.gelu_quantize, gelu_quantize.reference, (wide, "tanh", f)),
        }  # fmt: skip
    return found


def values(found):
    """All that an op gives in float64: data times scale for what is quantized."""
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    if len(parts) > 1 and parts[-1].dtype == F32 and parts[-2].element_size() == 1:
        data, scale = parts[-2:]
        format = "fp8" if data.is_floating_point() else "int8" if scale.shape[-1] == 1 else "int8_block"
        parts[-2:] = [dequantize(data, scale, format, torch.float64)]
    return [p.double() for p in parts]


def close(found, expected):
    """The same but for the rounding of one step: 2^-3 of a value is e4m3's, 2^-6 of the largest an integer's."""
    for a, b in zip(values(found), values(expected), strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs() <= 2.0**-3 * b.abs() + 2.0**-6 * b.abs().amax()).all()
        assert (a - b).norm() <= 2.0**-8 * b.norm()  # few steps differ


class RanError(Exception):
    """A kernel ran."""


def forbid(monkeypatch, module, launch):
    def ran(*args):
        raise RanError(launch)

    monkeypatch.setattr(module, launch, ran)


def test_the_ops_run_the_kernels(make, monkeypatch):
    """Bit by bit what the launchers give, and not without them; the references are near."""
    from turbocompile.kernels.norms import norms_triton
    from turbocompile.kernels.quantize import quantize_triton
    from turbocompile.kernels.rotary import rotary_triton

    for name, (op, reference, args) in operations(make, make(2, 35, 1536), make(2, 35, 8960)).items():
        launch = f"launch_{name.split()[0]}"
        module = next(m for m in (quantize_triton, norms_triton, rotary_triton) if hasattr(m, launch))
        found = op(*args)
        assert all(map(torch.equal, as_bits(found), as_bits(getattr(module, launch)(*args)))), name
        close(found, reference(*args))
        with monkeypatch.context() as patch:
            forbid(patch, module, launch)
            with pytest.raises(RanError):
                op(*args)


def test_the_ops_fall_back_to_the_references(make, monkeypatch):
    """Where takes_rows and has_kernel say no: bit by bit the reference on this device, and no kernel runs."""
    from turbocompile.kernels.norms import norms_triton
    from turbocompile.kernels.quantize import quantize_triton
    from turbocompile.kernels.rotary import rotary_triton

    for module in (quantize_triton, norms_triton, rotary_triton):
        for launch in [name for name in vars(module) if name.startswith("launch_")]:
            forbid(monkeypatch, module, launch)
    for name, (op, reference, args) in operations(make, make(1, 35, 1536).double(), make(1, 35, 8960).double()).items():
        assert all(map(torch.equal, as_bits(op(*args)), as_bits(reference(*args)))), name
    broad = make(2, 32776)
    many = make(70000, 1, 16)  # batch items, more than a grid's second axis has places
    for x in (broad, many, make(0, 40), make(3, 5, 40).double()):
        zero = torch.zeros(x.shape[-1], device="cuda")
        for format in FORMATS:
            assert all(map(torch.equal, as_bits(ops.quantize(x, format)), as_bits(quantize.reference(x, format))))
        assert torch.equal(ops.adaln(x, zero, zero, None, None, EPS), adaln.reference(x, zero, zero, None, None, EPS))
    x, cos = make(1, 16, 64), [make(2, 8, dtype=F32) for _ in range(4)]
    args = (x, None, EPS, False, 1, cos, cos, [2, 2, 2, 2], True)  # four axes
    assert torch.equal(ops.qk_norm_rope(*args), qk_norm_rope.reference(*args))


def test_the_ops_refuse_what_the_references_refuse(make):
    x = make(2, 5, 40)
    for call in (
        lambda: ops.quantize(x, "int4"),
        lambda: ops.gelu_quantize(x, "sigmoid", "int8"),
        lambda: ops.adaln(x, make(3), make(40), None, None, EPS),
        lambda: ops.residual_norm(x, x[:, :4], None, None, None, None, None, EPS, "layer"),
        lambda: ops.norm_quantize(x, None, None, EPS, "batch", "int8"),
        lambda: ops.qk_norm_rope(x, None, EPS, False, 3, [], [], [], True),
    ):
        with pytest.raises(ValueError):
            call()


def test_the_ops_are_sound(make, sound):
    """Schema, fake implementation, autograd registration, AOT dispatch on the card."""
    for name, (op, _, args) in operations(make, make(1, 35, 1536), make(1, 35, 8960)).items():
        if name.split()[-1] != "fp8":  # torch compares no float8
            sound(op.default, *args)


def test_torch_compile_takes_the_ops_whole(make):
    found = operations(make, make(1, 35, 1536), make(1, 35, 8960))
    for name in ("adaln", "residual_norm_quantize fp8", "qk_norm_rope", "quantize int8_block", "gelu_quantize int8"):
        op, _, args = found[name]
        torch.compiler.reset()
        whole = torch.compile(lambda x, op=op, rest=args[1:]: op(x * 2, *rest), fullgraph=True)
        made, expected = whole(args[0]), op(args[0] * 2, *args[1:])
        assert all(map(torch.equal, as_bits(made), as_bits(expected))), name


def test_a_gradient_is_refused(make):
    x = make(2, 5, 40, dtype=F32).requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradient"):
        ops.gated_residual(x, x, None).sum().backward()


def test_every_path_for_the_sanitizer(make):
    """Small, so that compute-sanitizer gets through it: `-k sanitizer`."""
    from turbocompile.kernels.norms.norms_triton import BlockConfig

    for call in calls(make).values():
        for t in as_bits(call(make(1, 77, 1536))):
            assert t.float().isfinite().all()
    for lag in (0, 9):  # tiles that wait, and tiles behind all rows
        for t in blocks(make(2, 177, 1536), make(1, 1, 1536, dtype=F32), BlockConfig(8, 48, 128, lag)):
            assert t.float().isfinite().all()
