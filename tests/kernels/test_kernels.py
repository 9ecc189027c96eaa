"""What the package exports, and that it travels with torch and triton alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turbocompile.kernels import _registry
from turbocompile.kernels.rotary import qk_norm_rope

from turbocompile import kernels

SCHEMAS = {
    "rope": "(Tensor x, Tensor[] cos, Tensor[] sin, int[] grid, bool interleaved) -> Tensor",
    "quantize": "(Tensor x, str format) -> (Tensor data, Tensor scale)",
    "w8a8_linear": "(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str format,"
    " ScalarType dtype) -> Tensor",
    "sage_attention": "(Tensor q, Tensor k, Tensor v, float scale, bool is_causal, str pv) -> Tensor",
    "sla_attention": "(Tensor q, Tensor k, Tensor v, Tensor proj_weight, Tensor proj_bias, float topk, int block_q,"
    " int block_k, str feature_map, str pv) -> Tensor",
    "norm_sage_attention": "(Tensor q, Tensor x, Tensor v, Tensor? weight, float eps, Tensor[] cos, Tensor[] sin,"
    " int[] grid, float scale, bool is_causal, str pv) -> Tensor",
    "norm_sla_attention": "(Tensor q, Tensor x, Tensor v, Tensor? weight, float eps, Tensor[] cos, Tensor[] sin,"
    " int[] grid, Tensor proj_weight, Tensor proj_bias, float topk, int block_q, int block_k, str feature_map, str pv)"
    " -> Tensor",
    "qk_norm_rope": "(Tensor x, Tensor? weight, float eps, bool per_head, int num_heads, Tensor[] cos, Tensor[] sin,"
    " int[] grid, bool interleaved) -> Tensor",
    "adaln": "(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "adaln_quantize": "(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps, str format)"
    " -> (Tensor data, Tensor data_scale)",
    "residual_norm": "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    " float eps, str norm) -> (Tensor residual, Tensor normed)",
    "residual_norm_quantize": "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight,"
    " Tensor? bias, float eps, str norm, str format) -> (Tensor residual, Tensor data, Tensor data_scale)",
    "gated_residual": "(Tensor x, Tensor y, Tensor? gate) -> Tensor",
    "gelu_quantize": "(Tensor x, str approximate, str format) -> (Tensor data, Tensor data_scale)",
    "norm_quantize": "(Tensor x, Tensor? weight, Tensor? bias, float eps, str norm, str format)"
    " -> (Tensor data, Tensor data_scale)",
}


def test_the_schemas_that_stand_in_saved_files_are_these():
    assert set(kernels.OPS) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert str(getattr(kernels.ops, name).default._schema) == f"turbocompile::{name}{schema}"


def test_every_op_has_a_decomposition():
    assert set(kernels.DECOMPOSITIONS) == {getattr(torch.ops.turbocompile, name).default for name in kernels.OPS}


def test_every_op_but_the_plain_rotation_has_a_kernel():
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {n for n in kernels.OPS if not registered(f"turbocompile::{n}", "CUDA")} == {"rope"}


def test_every_launch_says_that_products_and_sums_fuse():
    """Or a user's first call warns of it, from Triton 3.9 on, and from 3.10 on takes more instructions."""
    said = 0
    for file in sorted(Path(_registry.__file__).parent.rglob("*_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # kernel[grid](...)
                unpacked = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                assert any(u == "FUSED" or u.startswith("_launch(") for u in unpacked), f"{file.name}:{node.lineno}"
                said += 1
    assert said >= 18
    from turbocompile.kernels.attention.sla_train_triton import _launch

    assert _launch((4, 2)) == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@pytest.mark.parametrize(
    ("x", "others", "taken"),
    [
        (torch.zeros(2, 5, 40), (), True),
        (torch.zeros(40, dtype=torch.float16), ("int8",), True),
        (torch.zeros(2, 3, 5, 40, dtype=torch.bfloat16), ("int8_block",), True),
        (torch.zeros(2, 5, 40), ([torch.zeros(40)], None, 1e-6), True),
        (torch.zeros(1, 1, 32768), (), True),
        (torch.zeros(1, 1, 32769), (), False),
        (torch.zeros(2, 5, 40, dtype=torch.float64), (), False),
        (torch.zeros(2, 5, 40, dtype=torch.int8), (), False),
        (torch.zeros(0, 40), (), False),
        (torch.zeros(()), (), False),
        (torch.zeros(65535, 1, 1), (), True),
        (torch.zeros(65536, 1, 1), (), False),
        (torch.zeros(1, 1, 1).expand(1, 128 * 65535 + 1, 1), (), False),
        (torch.zeros(2, 5, 40), ("fp8",), False),
        (torch.zeros(2, 5, 40), ([torch.zeros(40, device="meta")],), False),
    ],
)
def test_the_kernels_over_rows_take(monkeypatch, x, others, taken):
    """As on a card of compute capability 8.0, which lacks e4m3."""
    monkeypatch.setattr(_registry, "runs_triton", lambda device, capability=(8, 0): capability <= (8, 0))
    assert _registry.takes_rows(x, *others) == taken


def test_the_rotation_takes_three_axes(monkeypatch):
    monkeypatch.setattr(_registry, "runs_triton", lambda device, capability=(8, 0): True)
    x, table = torch.zeros(1, 16, 64), torch.zeros(2, 8)
    for axes, taken in ((0, True), (3, True), (4, False)):
        assert (
            qk_norm_rope.has_kernel(x, None, 1e-6, False, 1, [table] * axes, [table] * axes, [2] * axes, True) == taken
        )


def test_a_cpu_runs_no_kernel():
    assert not _registry.runs_triton(torch.device("cpu"))


def test_the_package_imports_without_the_rest():
    """It is what travels to a GPU: torch and triton are there, and nothing else of ours or of others."""
    code = (
        "import sys; import turbocompile.kernels; "
        "heavy = {'diffusers', 'transformers', 'safetensors', 'networkx', 'rich', 'yaml', 'click'} & set(sys.modules); "
        "ours = {m for m in sys.modules if m.startswith('turbocompile.') and 'kernels' not in m}; "
        "assert not heavy, heavy; assert ours <= {'turbocompile.errors', 'turbocompile.version'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
