"""Rewrites of a Program, one file each, and what the author of a further pass needs.

A pass of another package is written with the names of this module and given to `register`, or named by an entry point
of the group `turbocompile.passes` of its package. examples/quick_gelu_pass is such a package.
"""

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.rewrite.match import (
    LAST,
    Match,
    Pass,
    gelu,
    layer_norm,
    linear,
    matches,
    matmul,
    mean,
    op,
    rewrite,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softmax,
    uncast,
    variables,
)
from turbocompile.rewrite.pipeline import PASSES, register, unregister

__all__ = [
    "LAST",
    "PASSES",
    "Match",
    "Pass",
    "Subgraph",
    "dtype",
    "gelu",
    "is_op",
    "layer_norm",
    "linear",
    "matches",
    "matmul",
    "mean",
    "op",
    "register",
    "rewrite",
    "rms_norm",
    "scaled_dot_product_attention",
    "shape",
    "silu",
    "softmax",
    "uncast",
    "unregister",
    "variables",
]
