"""The kernel that makes quantized keys of a projection: in Triton's interpreter, on a GPU, and compiled for GPUs.

Three bounds, all against float64 with the centre that the kernel took:
  - a value is off by half a step of its block and what halves round away. A value goes through seven roundings to 11
    bits (the product with the root, the weight, cosine and sine, the two multiply-adds and the factor), each 2^-11 of
    at most the pair's two magnitudes and the centre's.
  - in the mean of squares a step alone gives 1 / sqrt(12) = 0.289 of it; with the halves less than 0.30.
  - k itself and the block means are rounded once more, to x's dtype.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from turbocompile.kernels.rotary import qk_norm_rope

triton = pytest.importorskip("triton")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
HALVES = 7 * 2.0**-11

interpreted = [
    (1, 2, 128, (3, 5, 7), BF16, 64),  # a block and a short one
    (2, 2, 64, (2, 3, 25), FP16, 128),
    (1, 1, 128, (200,), BF16, 128),
    (1, 2, 64, (9, 13), BF16, 64),  # more rows a program than a block has
    (1, 5, 64, (1, 1, 40), FP16, 64),  # a row that no number of threads divides; axes of one position
]
on_the_card = [
    *interpreted,
    (2, 5, 128, (9, 13, 17), BF16, 128),
    (1, 12, 128, (7, 30, 52), BF16, 128),
    (1, 40, 128, (5, 30, 52), FP16, 64),
    (3, 7, 64, (1, 45, 80), BF16, 128),
    (1, 24, 128, (4, 33, 8), BF16, 128),
]
where = [
    *(("cpu", *case) for case in interpreted),
    *(pytest.param("cuda", *case, marks=gpu) for case in on_the_card),
]
either = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True)
def _interpreted_on_the_cpu(request):
    """Tests whose device is the CPU run in the interpreter."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "cpu":
        request.getfixturevalue("interpreted")


def columns(head_dim: int, axes: int) -> tuple[int, ...]:
    """Pairs along the axes, as Wan splits them for three."""
    half, third = head_dim // 2, head_dim // 6
    return {3: (half - 2 * third, third, third), 2: (half - third, third), 1: (half,)}[axes]


class Case:
    """Operands of the kernel, and what they stand for."""

    def __init__(self, device, batch, heads, head_dim, grid, dtype, weight=True, strided=True):
        make = torch.Generator(device).manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=make, device=device)

        self.length, self.heads, self.grid = math.prod(grid), heads, grid
        wide = normal(batch, self.length, 3 if strided else 1, heads * head_dim).to(dtype)
        self.x = wide[:, :, -1]  # as a fused projection leaves it
        self.weight = (3 * normal(heads * head_dim)).to(dtype) if weight else None
        turns = [6 * normal(n, d) for n, d in zip(grid, columns(head_dim, len(grid)), strict=True)]
        self.cos, self.sin = [t.cos() for t in turns], [t.sin() for t in turns]
        self.head_dim = head_dim

    def tables(self):
        from turbocompile.kernels.attention.keys_tables_triton import lay_out

        return lay_out(self.x, self.weight, EPS, self.heads, self.cos, self.sin, self.grid)

    def keys(self, block_k, **options):
        from turbocompile.kernels.attention.keys_triton import norm_keys

        tables = self.tables()
        keys = norm_keys(self.x, EPS, self.heads, tables, block_k, **options)
        return centre(tables, self.heads), keys

    def exact(self):
        """k in float64, (B, L, H, D)."""
        weight = None if self.weight is None else self.weight.double()
        tables = ([t.double() for t in axes] for axes in (self.cos, self.sin))
        return qk_norm_rope.reference(self.x.double(), weight, EPS, False, self.heads, *tables, self.grid, True)


def centre(tables, heads):
    """What the kernel takes from k, (B, 1, H, D) float64.

    Word 2 j + c of a head has minus the elements 4 j + c and 4 j + 2 + c.
    """
    halves = tables.centres.view(torch.float16).double().unflatten(1, (heads, -1, 2, 2))  # B, H, j, c, which
    return -(halves.transpose(-1, -2).flatten(2) * tables.units.double()[:, None])[:, None]


def assert_keys(case, block_k, taken, keys):
    """keys, as prepare_triton.Keys, stand for the case's k minus `taken`."""
    batch, length, heads, dim = case.x.shape[0], case.length, case.heads, case.head_dim
    n = -(-length // block_k)
    exact = case.exact()
    k = exact - taken
    pairs = exact.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    halves = HALVES * (math.sqrt(2) * pairs + taken.abs())
    assert keys.k8.shape == (batch * heads, n, block_k, dim)
    k8 = keys.k8.view(batch, heads, n * block_k, dim).transpose(1, 2).double()
    assert (k8[:, length:] == 0).all()
    step = keys.k_scale.double().view(batch, heads, n).repeat_interleave(block_k, 2)[:, :, :length].transpose(1, 2)
    off = k8[:, :length] * step[..., None] - k
    assert (off.abs() <= step[..., None] / 2 + halves).all()
    assert (off / step[..., None]).square().mean().sqrt() < 0.30
    largest = F.pad(k, (0, 0, 0, 0, 0, n * block_k - length)).unflatten(1, (n, block_k)).abs().amax((2, 4))  # B, n, H
    near = keys.k_scale.double().view(batch, heads, n).transpose(1, 2) * 127
    # the factor is cut to 11 bits, so that nothing is above 127: a step is at most 2^-10 larger than it has to be
    assert ((near >= largest * (1 - 2**-8)) & (near <= largest * (1 + 2**-8 + 2**-10))).all()
    return exact, halves


def assert_kept(case, block_k, taken, keys, exact, halves, unit):
    """k and the block means, where they were asked for."""
    assert (keys.k.shape, keys.k.dtype) == (exact.shape, case.x.dtype)
    assert ((keys.k.double() - exact).abs() <= unit * exact.abs() + 2 * halves).all()
    batch, length, heads, dim = exact.shape
    n = -(-length // block_k)
    padded = F.pad(exact - taken, (0, 0, 0, 0, 0, n * block_k - length)).unflatten(1, (n, block_k))
    count = torch.tensor([min(block_k, length - i * block_k) for i in range(n)], device=exact.device)
    means = (padded.sum(2) / count[None, :, None, None]).transpose(1, 2)
    room = F.pad(halves, (0, 0, 0, 0, 0, n * block_k - length)).unflatten(1, (n, block_k)).amax(2).transpose(1, 2)
    assert keys.pooled.dtype == case.x.dtype
    pooled = keys.pooled.double().view(batch, heads, n, dim)
    assert ((pooled - means).abs() <= unit * means.abs() + room).all()


@pytest.mark.parametrize(("device", "batch", "heads", "head_dim", "grid", "dtype", "block_k"), where)
def test_keys_are_the_quantized_norm_turned(unit, device, batch, heads, head_dim, grid, dtype, block_k):
    case = Case(device, batch, heads, head_dim, grid, dtype)
    if device == "cuda" or head_dim == 128:  # the interpreter takes its time, and makes those of 64 in the tests below
        assert_keys(case, block_k, *case.keys(block_k))
    taken, keys = case.keys(block_k, pool=True, keep=True)
    exact, halves = assert_keys(case, block_k, taken, keys)
    assert_kept(case, block_k, taken, keys, exact, halves, unit[dtype])


@pytest.mark.parametrize("device", either)
def test_the_centre_is_the_mean_of_tokens_all_over_the_video(device):
    case = Case(device, 2, 1, 64, (2, 8, 16), BF16)  # 256 tokens: 64 of them, and no column of the video alone
    case.x[1] += 2  # each batch item has its own
    exact = case.exact()
    taken, keys = case.keys(128)
    wanted = exact[:, ::3][:, :64].mean(1, keepdim=True)
    assert (taken - wanted).abs().max() <= (2.0**-8 + HALVES) * exact.abs().max()
    assert_keys(case, 128, taken, keys)
    few = Case(device, 1, 1, 64, (1, 2, 9), BF16)
    exact = few.exact()
    assert (few.keys(128)[0] - exact.mean(1, keepdim=True)).abs().max() <= 2.0**-7 * exact.abs().max()


@pytest.mark.parametrize("device", either)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e3])
def test_weights_and_rows_of_any_size(unit, device, size):
    """Halves hold 6e-8 to 65504: weights come divided by a power of two, rows by their root."""
    case = Case(device, 1, 2, 64, (2, 5, 13), BF16)
    case.weight = (case.weight.float() * size).bfloat16()
    case.x[0, 3] = 0
    case.x[0, 4] *= 1e6
    case.x[0, 5] *= 1e-2
    taken, keys = case.keys(64, pool=True, keep=True)
    exact, halves = assert_keys(case, 64, taken, keys)
    assert_kept(case, 64, taken, keys, exact, halves, unit[BF16])
    assert (keys.k[0, 3].double().abs() <= halves[0, 3]).all()  # what was taken from zeros and is given back


@pytest.mark.parametrize("device", either)
def test_no_weight_and_rows_of_their_own(device):
    case = Case(device, 1, 3, 64, (3, 3, 9), BF16, weight=False, strided=False)
    assert_keys(case, 64, *case.keys(64))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["sage", "sla"])
def test_an_attention_reads_them(kind):
    """In float16, whose product with V the interpreter computes: no further off than from a k in between."""
    from turbocompile.kernels.attention.attend_triton import sage_forward
    from turbocompile.kernels.attention.keys_triton import quantized_keys
    from turbocompile.kernels.attention.sla_triton import sla_forward

    case = Case("cpu", 2, 2, 64, (2, 5, 9), FP16)
    q, v = (torch.randn(2, case.length, 2, 64, generator=torch.Generator().manual_seed(i)).half() for i in (1, 2))
    exact = case.exact()
    rotary = (case.weight, EPS, 2, case.cos, case.sin, case.grid)
    keys = quantized_keys(case.x, *rotary, 64, linear=kind == "sla")
    if kind == "sla":
        weight, bias = torch.eye(64).half(), torch.ones(64).half()
        got, two = (sla_forward(q, k, v, weight, bias, 2, 64, 64, "softmax", "fp16")[0] for k in (keys, exact.half()))
    else:
        got, two = (sage_forward(q, k, v, 0.1, False, "fp16", block_k=64) for k in (keys, exact.half()))
    heads = [t.double().transpose(1, 2) for t in (q, exact, v)]
    expected = F.scaled_dot_product_attention(*heads, scale=0.125 if kind == "sla" else 0.1)
    if kind == "sla":  # all blocks are read, and the linear branch is added
        phi, psi = (t.softmax(-1) for t in heads[:2])
        expected += (
            phi @ (psi.transpose(-1, -2) @ heads[2]) / (1e-5 + (phi * psi.sum(2, keepdim=True)).sum(-1))[..., None]
        )
        expected += 1
    errors = [(t.double().transpose(1, 2) - expected).norm() / expected.norm() for t in (got, two)]
    assert errors[0] <= 1.1 * errors[1] < 0.05


@pytest.mark.parametrize("device", either)
def test_how_it_is_launched_does_not_matter(device):
    """Tiles that wait for their rows, tiles behind all rows, more and fewer threads: the same bits but for k8, whose
    roots are sums in another order.
    """
    from turbocompile.kernels.attention.keys_tables_triton import KeysConfig

    case = Case(device, *((2, 5, 128, (2, 7, 25)) if device == "cuda" else (1, 1, 64, (1, 5, 27))), BF16)
    _, expected = case.keys(64, pool=True, keep=True)
    launches = ((8, 48, 80, 0), (8, 48, 80, 99), (16, 24, 64, 2), (4, 12, None, 1))
    for config in (KeysConfig(*launch) for launch in launches):
        _, keys = case.keys(64, pool=True, keep=True, config=config)
        assert (keys.k8.int() - expected.k8.int()).abs().max() <= 1
        assert (keys.k8 != expected.k8).float().mean() < 1e-3
        assert ((keys.k.float() - expected.k.float()).abs() <= 2.0**-7 * expected.k.float().abs() + 1e-3).all()


@pytest.mark.parametrize("device", either)
def test_a_grid_whose_tables_are_too_large_is_refused(device):
    case = Case(device, 1, 1, 64, (1, 1, 40), BF16)
    case.grid, case.cos, case.sin = (1, 300, 300), case.cos, case.sin
    with pytest.raises(ValueError, match="places of the tables"):
        case.tables()


# --- on a card alone


def attention_errors(case, call, exact):
    return (call.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=gpu) for k in ("sage", "causal", "sla")])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_attentions_err_no_more_than_with_k_in_between(kind, dtype):
    """Against float64 attention over float64 keys. SLA reads all blocks, or the few that are chosen otherwise where two
    are alike would be all that counts.
    """
    from turbocompile.kernels import ops
    from turbocompile.kernels.attention import keys, norm_attention

    case = Case("cuda", 1, 4, 128, (5, 30, 30), dtype)  # 4,500 tokens: more than LEAST
    assert case.length >= keys.LEAST
    q, v = (torch.randn(1, case.length, 4, 128, device="cuda").to(dtype) for _ in "qv")
    given = (q, case.x, v, case.weight, EPS, case.cos, case.sin, case.grid)
    k = ops.qk_norm_rope(case.x, case.weight, EPS, False, 4, case.cos, case.sin, case.grid, True)
    if kind == "sla":
        weight, bias = torch.randn(128, 128, device="cuda").to(dtype) / 16, torch.randn(128, device="cuda").to(dtype)
        options = (weight, bias, 1.0, 64, 128, "softmax")
        assert norm_attention.takes_sla(*given, *options, "fp8")
        got = ops.norm_sla_attention(*given, *options, "fp8")
        two = ops.sla_attention(q, k, v, *options, "fp8")
        exact = ops.sla_attention(q.float(), case.exact().float(), v.float(), *options, "none").double()
    else:
        options = (128**-0.5, kind == "causal")
        assert norm_attention.takes_sage(*given, *options, "fp8")
        got = ops.norm_sage_attention(*given, *options, "fp8")
        two = ops.sage_attention(q, k, v, *options, "fp8")
        heads = (t.double().transpose(1, 2) for t in (q, case.exact(), v))
        exact = F.scaled_dot_product_attention(*heads, is_causal=kind == "causal").transpose(1, 2)
    fused, apart = (attention_errors(case, t, exact) for t in (got, two))
    assert fused <= 1.05 * apart, (fused, apart)
    assert fused < 0.2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_sla_chooses_the_blocks_that_it_chooses_with_k_in_between(device):
    """Random means of blocks are as alike as can be: one choice in a hundred may be another."""
    from turbocompile.kernels import ops
    from turbocompile.kernels.attention import sla_triton

    case = Case(device, 1, 4, 128, (5, 30, 30), BF16)
    q = torch.randn(1, case.length, 4, 128, device=device).bfloat16()
    k = ops.qk_norm_rope(case.x, case.weight, EPS, False, 4, case.cos, case.sin, case.grid, True)
    means = F.pad(k.float() - k.float().mean(1), (0, 0, 0, 0, 0, 108)).unflatten(1, (36, 128)).mean(2)
    means[:, -1] *= 128 / 20  # of 4,500 tokens the last block has 20
    apart = sla_triton.select_blocks(q, means.transpose(1, 2)[0].bfloat16().contiguous(), 10, 64)
    _, keys = case.keys(128, pool=True)
    fused = sla_triton.select_blocks(q, keys.pooled, 10, 64)
    alike = (fused[..., :, None] == apart[..., None, :]).any(-1).float().mean()
    assert alike >= 0.99


@pytest.mark.parametrize("keep", [pytest.param(k, marks=gpu) for k in (False, True)])
def test_repeated_calls_are_equal_bit_by_bit(keep):
    case = Case("cuda", 1, 12, 128, (7, 30, 17), BF16)
    _, first = case.keys(128, pool=keep, keep=keep)
    for _ in range(5):
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # what freed memory holds must not matter
        _, again = case.keys(128, pool=keep, keep=keep)
        assert torch.equal(again.k8, first.k8)
        assert torch.equal(again.k_scale, first.k_scale)
        assert not keep or (torch.equal(again.k, first.k) and torch.equal(again.pooled, first.pooled))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_new_length_compiles_nothing(device):
    from turbocompile.kernels.attention import keys_tables_triton, keys_triton

    kernels = (keys_triton._keys, keys_tables_triton._lay_out)
    for grid in ((7, 30, 16), (3, 31, 17)):
        Case(device, 1, 12, 128, grid, BF16).keys(128)
        counts = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
    for grid in ((5, 16, 16), (2, 48, 49), (1, 64, 80)):
        Case(device, 1, 12, 128, grid, BF16).keys(128)
    assert counts == [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_every_path_for_the_sanitizer(device):
    """Small, so that compute-sanitizer gets through it: `-k sanitizer`."""
    from turbocompile.kernels.attention.keys_tables_triton import KEYS_CONFIGS, KeysConfig

    for heads, head_dim, dtype in ((12, 128, BF16), (5, 64, FP16)):
        case = Case(device, 2, heads, head_dim, (2, 9, 11), dtype)
        for config in (*KEYS_CONFIGS, KeysConfig(8, 48, 80, 0), KeysConfig(8, 48, 80, 99)):
            for keep in (False, True):
                _, keys = case.keys(128, pool=keep, keep=keep, config=config)
                assert keys.k_scale.isfinite().all()


# --- compiled for cards that are not here


@pytest.mark.parametrize(("capability", "dtype"), [(80, BF16), (89, FP16)])
def test_the_instructions_are_those_of_the_card(fake_card, capability, dtype):
    """Squares by tensor cores, and the larger magnitude in one instruction where the card has it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from turbocompile.kernels.attention.keys_triton import quantized_keys

    card = fake_card(capability)
    with FakeTensorMode():
        x, weight = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((1, 4680, 256), (256,)))
        cos = [torch.empty(n, d, device="cuda") for n, d in zip((3, 30, 52), columns(128, 3), strict=True)]
        quantized_keys(x, weight, EPS, 2, cos, cos, [3, 30, 52], 128)
    codes = {name.split()[0]: kernel.asm["ptx"] for name, kernel in card.launched.items()}
    assert set(codes) == {"_lay_out", "_keys"}
    assert all("m16n8k8" in code for code in codes.values())
    assert ("xorsign" in codes["_keys"]) == (capability >= 86)
