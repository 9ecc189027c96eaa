"""The check that the operands of an 8-bit linear fit each other, for the op's reference and for its kernel."""

from __future__ import annotations

import torch
from turbocompile.kernels._registry import check
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS, blocks, check_format


def check_operands(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
) -> None:
    """Raises ValueError unless the operands of w8a8_linear fit each other and the format; shapes as in
    w8a8_linear.py.
    """
    check_format(format)
    check(
        data.dtype == weight.dtype == FORMATS[format],
        f"w8a8_linear: {format} does not fit {data.dtype} data and {weight.dtype} weights",
    )
    check(weight.ndim == 2, f"w8a8_linear: the weight is (N, K), and has {weight.ndim} dimensions")
    m, (n, k) = data.shape[:-1].numel(), weight.shape
    check(data.shape[-1] == k, f"w8a8_linear: data of {data.shape[-1]} channels, weight of {k}")
    check(bias is None or tuple(bias.shape) == (n,), f"w8a8_linear: the bias does not have {n} elements")
    if format == "int8_block":
        check(
            k % BLOCK == 0 and n % 8 == 0,
            f"w8a8_linear: int8_block needs K % 128 == 0 and N % 8 == 0, and the weight is {list(weight.shape)}",
        )
        expected: tuple[tuple[int, ...], ...] = ((blocks(m), blocks(k)), (blocks(n), blocks(k)))
    else:
        expected = ((*data.shape[:-1], 1), (n, 1))
    for name, given, shape in zip(("scale", "weight_scale"), (scale, weight_scale), expected, strict=True):
        check(
            tuple(given.shape) == shape, f"w8a8_linear: {name} is {list(given.shape)}, and {format} needs {list(shape)}"
        )
