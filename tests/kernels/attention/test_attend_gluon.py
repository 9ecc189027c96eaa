"""The Hopper kernel of the attention, compiled without a GPU by the Triton that is installed: Gluon renames things."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
attend_gluon = pytest.importorskip("turbocompile.kernels.attention.attend_gluon")

SHARED = 227 << 10  # bytes that the programs of a Hopper multiprocessor share
PROGRAMS = 3  # at a time


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that calls made instead of running them."""
    from triton.runtime import driver

    kernel, found = attend_gluon._attend_hopper, []
    compile_or_run = kernel.run

    def run(*args, warmup, **options):
        found.append(compile_or_run(*args, warmup=True, **options))

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(kernel, "run", run)
    return found


@pytest.mark.parametrize(
    ("head_dim", "block_k", "is_causal", "sparse", "feature_map"),
    [
        (128, 128, False, False, "softmax"),
        (128, 128, True, False, "softmax"),
        (128, 128, False, True, "softmax"),
        (96, 64, False, True, "elu"),
        (64, 64, False, True, "relu"),  # the state is smaller than the ring: Triton 3.8 reinterprets equal sizes alone
        (64, 128, False, True, "softmax"),
    ],
)
def test_the_hopper_kernel_compiles(compiled, head_dim, block_k, is_causal, sparse, feature_map):
    from turbocompile.kernels.attention.attend_triton import HOPPER_CONFIGS, attend
    from turbocompile.kernels.attention.prepare_triton import Prepared, padded

    tokens, heads, d = 300, 2, padded(head_dim)
    blocks = -(-tokens // block_k)
    q = torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16)
    kv = Prepared(
        k8=torch.zeros(heads, blocks, block_k, d, dtype=torch.int8),
        k_scale=torch.ones(heads, blocks),
        v8=torch.zeros(heads, blocks, d, block_k, dtype=torch.float8_e4m3fn),
        v_scale=torch.ones(heads, d),
        pooled=None,
        phi_sum=torch.ones(heads, d) if sparse else None,
        folded=torch.zeros(heads, d, d, dtype=torch.bfloat16) if sparse else None,
        block_k=block_k,
        permuted=True,
    )
    linear = {
        "lut": torch.zeros(heads, -(-tokens // 64), 2, dtype=torch.int32),
        "bias": torch.zeros(head_dim, dtype=torch.bfloat16),
        "feature_map": feature_map,
    }
    config = HOPPER_CONFIGS[block_k == 64]
    attend(q, kv, tokens, 0.1, config, kv_heads=heads, is_causal=is_causal, **(linear if sparse else {}))
    (kernel,) = compiled
    assert kernel.asm["cubin"]
    assert f".maxnreg {config.registers}" in kernel.asm["ptx"]
    assert PROGRAMS * kernel.metadata.shared <= SHARED
