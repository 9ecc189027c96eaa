"""The 8-bit linears in Triton's interpreter, at small ragged shapes, against the op's reference.

The interpreter is wrong on
casts to bfloat16 and e4m3: results are float16 and float32, and torch makes the FP8 operands; the rest is for the GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from turbocompile.kernels.linear.w8a8_linear import reference
from turbocompile.kernels.quantize.quantize import dequantize, quantize

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
FORMATS = ["int8", "int8_block", "fp8"]
FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64


def configurations(format):
    """Each declared one, without those that compute as another does: stages and warps mean nothing here."""
    from turbocompile.kernels.linear.linear_triton import CONFIGS

    plain = {"warps": 4, "stages": 1, "programs": 1, "registers": None, "flatten": False, "group": 2}
    return sorted({replace(c, **plain) for c in CONFIGS[format]}, key=str)


CASES = [(format, config) for format in FORMATS for config in configurations(format)]


def operands(normal, format, shape, n, biased=True):
    """Arguments of the linear up to the format: x N(0, 1) of `shape`, weights N(0, 0.2^2)."""
    bias = normal(n, dtype=FP16) if biased else None
    return (*quantize(normal(*shape), format), *quantize(normal(n, shape[-1]) * 0.2, format), bias, format)


def bound(args, dtype, unit):
    """How far a result in dtype may be from the reference in float64.

    float32 sums of K products, in any order, of the scales and of the bias: K + 5 roundings at most, each of the sum of
    magnitudes; int8_block rounds to dtype before the bias and after it, the others after it.
    """
    data, scale, weight, weight_scale, bias, format = args
    a, b = (dequantize(*q, format, FP64).abs() for q in ((data, scale), (weight, weight_scale)))
    size = a @ b.T + (0 if bias is None else bias.double().abs())
    inner = unit[FP32] * (data.shape[-1] + 5) * size
    # 2^-25: half the distance of float16's numbers below 2^-14
    return inner + 2 * unit[dtype] * (size + inner) + (2.0**-25 if dtype == FP16 else 0)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("format", "config"), CASES)
def test_every_configuration_is_the_reference(normal, unit, format, config, dtype):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    args = operands(normal, format, (2, 70, 384 if format == "int8_block" else 304), 136)
    y = launch_linear(*args, dtype, config)
    assert (y.shape, y.dtype) == ((2, 70, 136), dtype)
    assert ((y.double() - reference(*args, FP64)).abs() <= bound(args, dtype, unit)).all()
    if format != "fp8":  # integers are exact, and numpy contracts nothing: the same roundings in the same order
        assert torch.equal(y, reference(*args, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_more_tiles_than_programs_and_groups_cut_short(normal, format):
    """9 x 3 tiles of 128 and 18 x 3 of 64 rows over 2 programs: groups of 8 rows of tiles and one more."""
    from turbocompile.kernels.linear import linear_triton as t

    args = operands(normal, format, (1100, 128), 264, biased=False)
    expected = reference(*args, FP32)
    for config in (t.SINGLE, t.SMALL, t.AMPERE_TILES):
        y = t.launch_linear(*args, FP32, config)
        # K = 128, one dot: the sums of numpy and torch may differ in order
        assert torch.allclose(y, expected, rtol=0, atol=0 if format != "fp8" else 128 * 2.0**-24 * 128)


@pytest.mark.parametrize(("format", "k"), [("int8", 16), ("fp8", 16), ("int8", 208), ("int8_block", 128)])
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("n", [8, 17])
def test_the_default_at_ragged_sizes(normal, unit, format, k, rows, n):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    if format == "int8_block" and n % 8:
        n = 24
    args = operands(normal, format, (rows, k), n)
    y = launch_linear(*args, FP16)
    assert ((y.double() - reference(*args, FP64)).abs() <= bound(args, FP16, unit)).all()


def test_the_default_follows_shape_and_card(monkeypatch):
    from turbocompile.kernels.linear import linear_triton as t

    cpu = torch.device("cpu")
    cards = {"h100": ((9, 0), 132, 228), "rtx5090": ((12, 0), 170, 100), "rtx4090": ((8, 9), 128, 100)}
    for card, format, rows, n, k, expected in (
        ("h100", "fp8", 32760, 1536, 1536, t.FAST_FLAT),
        ("h100", "fp8", 32760, 5120, 5120, t.FAST_FLAT),
        ("h100", "fp8", 32760, 5120, 13824, t.FAST),
        ("h100", "fp8", 8000, 512, 1536, t.PAIR),
        ("h100", "int8", 32760, 8960, 1536, t.WIDE_FLAT),
        ("h100", "int8", 32760, 5120, 5120, t.WIDE),
        ("h100", "int8_block", 32760, 5120, 13824, t.PAIR),
        ("h100", "fp8", 512, 1536, 4096, t.SMALL),
        ("rtx5090", "fp8", 32760, 1536, 1536, t.AMPERE),
        ("rtx4090", "int8_block", 32760, 1536, 1536, t.AMPERE_TILES),
        ("rtx4090", "int8", 512, 1536, 1536, t.AMPERE_SMALL),
    ):
        capability, processors, kib = cards[card]
        found = t.Card(capability, processors, kib << 10)
        monkeypatch.setattr(t, "card", lambda device, found=found: found)
        assert t.default_config(format, rows, n, k, cpu) == expected
        assert expected in t.configs(format, cpu)
        assert t.default_config(format, rows, n + 1, k, cpu).path == "pointer"


def test_cublas_competes_where_it_has_the_product(monkeypatch):
    from turbocompile.kernels.linear import linear_triton as t

    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(t, "card", lambda device: t.Card((9, 0), 132, 228 << 10))
    fast = t.LIBRARY["fp8"][1]
    own = {t.PAIR, t.SINGLE, t.SMALL, t.FAST, t.FAST_FLAT}
    assert set(t.candidates("fp8", 1536, 1536, bf16, cuda)) == own | set(t.LIBRARY["fp8"])
    assert set(t.candidates("fp8", 1536, 1536, FP32, cuda)) == own
    assert fast not in t.candidates("fp8", 1544, 1536, bf16, cuda)
    assert all(c.path == "descriptor" for c in t.candidates("int8", 1536, 1536, bf16, cuda))
    assert all(c.path == "pointer" for c in t.candidates("int8", 1537, 1536, bf16, cuda))
    assert fast.fits("fp8")
    assert not fast.fits("int8")
    assert not t.LIBRARY["fp8"][0].fits("int8_block")


def test_the_fastest_comes_first_and_only_declared_choices_are_read(monkeypatch):
    from turbocompile.kernels.linear import linear_choice as choice
    from turbocompile.kernels.linear import linear_triton as t

    device = torch.device("cpu")
    name = choice.key("int8", 40, 24, 128, FP32, device)
    assert name == "cpu: int8 40x128 to 24, float32"
    monkeypatch.setattr(choice, "_milliseconds", lambda calls, device: list(range(len(calls), 0, -1)))
    times = choice.measure("int8", 40, 24, 128, FP32, device)
    assert list(times.values()) == sorted(times.values())
    assert set(times) == set(t.candidates("int8", 24, 128, FP32, device))
    winner = next(iter(times))
    kept = json.loads(json.dumps(asdict(winner)))
    assert choice.declared(name, kept) == winner
    for wrong in ({"stages": 7}, {"path": "library"}):
        with pytest.raises(ValueError, match="no declared configuration"):
            choice.declared(name, kept | wrong)


def test_exact_sums_can_be_asked_for(monkeypatch):
    from turbocompile.kernels.linear import linear_choice as choice

    monkeypatch.setattr(choice, "_milliseconds", lambda calls, device: [1.0] * len(calls))
    found = choice.measure("fp8", 40, 272, 128, FP32, torch.device("cpu"), promote=True)
    assert found
    assert all(c.promote for c in found)


def test_the_conversion_by_an_addition_is_exact(normal, monkeypatch):
    from turbocompile.kernels.linear import linear_triton as t

    args = [*operands(normal, "int8_block", (130, 256), 24, biased=False)]
    args[0][:2], args[2][:2] = -128, -128  # the largest sum there is, 2^21
    args[2][1] = 127  # and nearly the smallest
    monkeypatch.setattr(t, "card", lambda device: t.Card((8, 0), 3, 164 << 10))
    assert t.default_config("int8_block", 130, 24, 256, args[0].device) == t.AMPERE_TILES_SMALL
    assert torch.equal(t.launch_linear(*args, FP32), reference(*args, FP32))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_give_the_bias_and_large_values_stay_finite(normal, format):
    from turbocompile.kernels.linear.linear_triton import launch_linear

    x, w, bias = normal(80, 128), normal(24, 128), normal(24)
    x[3:70] = 0
    weight = quantize(w, format)
    data, scale = quantize(torch.zeros_like(x), format)
    assert torch.equal(launch_linear(data, scale, *weight, bias, format, FP32), bias.expand(80, 24))
    args = (*quantize(x * 1e15, format), *quantize(w * 1e15, format), None, format)
    y, expected = launch_linear(*args, FP32), reference(*args, FP32)
    assert y.isfinite().all()
    assert (y[3:70] == 0).all()
    assert ((y - expected).norm() / expected.norm()) < 128 * 2.0**-24


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("descriptor", [True, False])
def test_rows_that_are_not_contiguous(normal, format, descriptor):
    from turbocompile.kernels.linear import linear_triton as t

    data, scale, weight, weight_scale, bias, _ = operands(normal, format, (70, 128), 24)
    config = t.SMALL if descriptor else t.AMPERE_TILES_SMALL
    expected = t.launch_linear(data, scale, weight, weight_scale, bias, format, FP16, config)

    def padded(rows, columns, offset):
        bytes_ = torch.full((rows.shape[0], columns), 0x7F, dtype=torch.int8)  # NaN in e4m3
        bytes_[:, offset : offset + 128] = rows.view(torch.int8)
        return bytes_.view(rows.dtype)[:, offset : offset + 128]

    turned = scale.t().contiguous().t()
    for columns, offset in ((160, 16), (160, 8), (133, 5)):  # the first is read in place
        y = t.launch_linear(
            padded(data, columns, offset), turned, padded(weight, columns, offset), weight_scale,
            bias.repeat_interleave(2)[::2], format, FP16, config,
        )  # fmt: skip
        assert torch.equal(y, expected)


def test_what_the_kernel_cannot_do_is_refused(normal, monkeypatch):
    from turbocompile.kernels.linear import linear_triton as t

    from turbocompile.errors import UnsupportedError

    args = operands(normal, "int8", (4, 128), 24)
    short = operands(normal, "int8", (4, 100), 24)
    odd = operands(normal, "int8", (4, 128), 17)
    cases = [
        (lambda: t.launch_linear(*short, FP16), "multiple of 16"),
        (lambda: t.launch_linear(*operands(normal, "int8", (1, 1 << 17), 8), FP16), "below 131072"),
        (lambda: t.launch_linear(*args, FP64), "float64"),
        (lambda: t.launch_linear(*odd, FP16, t.PAIR), "N is 17"),
        (lambda: t.launch_linear(*operands(normal, "int8_block", (4, 128), 24), FP16, t.WIDE), "is not for int8_block"),
        (lambda: t.LinearConfig("hopper", 128, 128), "no path"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    monkeypatch.setattr(t, "card", lambda device: t.Card((8, 6), 3, 100 << 10))
    with pytest.raises(UnsupportedError, match="no fp8"):
        t.launch_linear(*operands(normal, "fp8", (4, 128), 24), FP16)
    assert t.launch_linear(*operands(normal, "int8", (0, 128), 24), FP16).shape == (0, 24)
