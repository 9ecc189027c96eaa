"""The quantized attentions, by kind: the operator that reads k, and the operator that makes k itself.

The first and the third operand of each are q and v.
"""

from __future__ import annotations

from turbocompile.kernels import ops

SAGE = (ops.sage_attention, ops.norm_sage_attention)
SLA = (ops.sla_attention, ops.norm_sla_attention)
