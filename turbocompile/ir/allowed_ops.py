"""The operators, dtypes and memory formats that a saved graph may hold, by their names in JSON."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch

from turbocompile import kernels
from turbocompile.errors import EngineError
from turbocompile.ir.program import call

# What a graph in a saved engine may call: pure tensor mathematics and the in-place writes that captured models do to
# tensors of their own. Nothing here reads files, runs code, or reinterprets memory.
_PACKETS = """
abs abs_ acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d
adaptive_avg_pool3d adaptive_max_pool2d add add_ addcdiv addcmul addmm addmv addr alias all amax amin __and__ any arange
argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors bucketize cat
cdist _cdist_forward ceil celu channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clone col2im
complex concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution copy copy_ copysign cos cos_ cosh cosine_similarity count_nonzero cummax cummin cumprod cumsum deg2rad
detach detach_ diag diag_embed diagonal diff digamma div div_ dot dropout einsum elu embedding empty empty_like eq erf
erfc erfinv exp exp_ exp2 expand expand_as expm1 eye fill fill_ flatten flip floor floor_divide fmax fmin fmod frac full
full_like gather ge gelu gelu_ glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt hardshrink hardsigmoid
hardswish hardtanh heaviside hypot i0 im2col imag index index_add index_add_ index_copy index_copy_ index_fill
index_fill_ index_put index_put_ index_select inner instance_norm isclose isfinite isinf isnan kron kthvalue layer_norm
ldexp le leaky_relu lerp lgamma lift_fresh_copy linalg_cross linalg_inv linalg_inv_ex linalg_matrix_exp linalg_qr
linalg_solve _linalg_solve_ex linalg_vector_norm linear linspace log log1p log2 log_sigmoid _log_softmax log_softmax
logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp __lshift__ lt masked_fill
masked_fill_ masked_scatter masked_scatter_ matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices maximum mean median meshgrid min minimum mish mm movedim msort mul mul_ mv nan_to_num nanmean
nansum narrow native_group_norm native_layer_norm ne neg neg_ new_empty new_full new_ones new_zeros norm numpy_T one_hot
ones ones_like __or__ outer pad pad_sequence permute pixel_shuffle pixel_unshuffle polar pow pow_ prod rad2deg real
reciprocal reciprocal_ relu relu_ relu6 remainder repeat repeat_interleave reshape reshape_as rms_norm roll rot90 round
__rshift__ rsqrt rsqrt_ rsub scalar_tensor scaled_dot_product_attention scatter scatter_ scatter_add scatter_add_
scatter_reduce searchsorted select select_scatter selu sgn sigmoid sigmoid_ sign silu silu_ sin sin_ sinc sinh slice
slice_scatter _softmax softmax softplus softshrink sort special_i0 split split_with_sizes sqrt sqrt_ square squeeze
stack std std_mean sub sub_ sum t take take_along_dim tan tanh tanh_ tensor_split tensordot threshold tile to topk trace
transpose tril tril_indices triu triu_indices trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split
_unsafe_view unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d var var_mean vector_norm view view_as
view_as_complex view_as_real _weight_norm where xlogy __xor__ zero_ zeros zeros_ zeros_like
"""


def _allowed() -> dict[str, Any]:
    table: dict[str, Any] = {"getitem": operator.getitem, "call": call}
    for name in _PACKETS.split():
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if _computes_tensors(op):
                table[f"aten.{name}.{overload}"] = op
    for name in kernels.OPS:
        table[f"turbocompile.{name}.default"] = getattr(torch.ops.turbocompile, name).default
    return table


def _computes_tensors(op: Any) -> bool:
    """Whether an overload returns new tensors. The other overloads are TorchScript's, on numbers, texts and lists.

    They are refused, because one of them multiplies a list by a number, which takes memory without bound.
    """
    gives = [str(r.type) for r in op._schema.returns]
    return bool(gives) and set(gives) <= {"Tensor", "List[Tensor]"} and not any(a.is_out for a in op._schema.arguments)


ALLOWED = _allowed()
OP_NAMES = {op: name for name, op in ALLOWED.items()}
# dtypes of tensors that hold more than numbers (quantized ones), or parts of bytes
_NO_ARRAYS = re.compile(r"q|bits|u?int[1-7]$|float4")
DTYPES = {
    name: d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype) and not _NO_ARRAYS.match(name := str(d).removeprefix("torch."))
}
MEMORY_FORMATS = {
    str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise EngineError(f"the engine names a dtype {name!r} that this torch does not have; build it again")
    return DTYPES[name]
