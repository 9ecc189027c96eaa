"""What the package exports, and that it travels with torch and triton alone."""

from __future__ import annotations

import subprocess
import sys

import torch

from turbocompile import kernels

SCHEMAS = {
    "rope": "(Tensor x, Tensor[] cos, Tensor[] sin, int[] grid, bool interleaved) -> Tensor",
    "quantize": "(Tensor x, str format) -> (Tensor data, Tensor scale)",
    "w8a8_linear": "(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str format,"
    " ScalarType dtype) -> Tensor",
    "sage_attention": "(Tensor q, Tensor k, Tensor v, float scale, bool is_causal, str pv) -> Tensor",
    "sla_attention": "(Tensor q, Tensor k, Tensor v, Tensor proj_weight, Tensor proj_bias, float topk, int block_q,"
    " int block_k, str feature_map, str pv) -> Tensor",
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


def test_the_package_imports_without_the_rest():
    """It is what travels to a GPU: torch and triton are there, and nothing else of ours or of others."""
    code = (
        "import sys; import turbocompile.kernels; "
        "heavy = {'diffusers', 'transformers', 'safetensors', 'networkx', 'rich', 'yaml', 'click'} & set(sys.modules); "
        "ours = {m for m in sys.modules if m.startswith('turbocompile.') and 'kernels' not in m}; "
        "assert not heavy, heavy; assert ours <= {'turbocompile.errors', 'turbocompile.version'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
