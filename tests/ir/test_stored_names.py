"""The names under which an engine stores weights."""

from __future__ import annotations

import torch

from turbocompile.capture.export import capture
from turbocompile.ir.program import SHELL
from turbocompile.ir.stored_names import stored_name, stored_weights
from turbocompile.ir.weights import Cat, Constant, Load

F32 = torch.float32


def test_a_weight_is_stored_once_a_call_or_once_for_all():
    own, shared = Load(".w", (6, 8), F32), Load("q", (6, 8), F32)
    assert stored_name("blocks", "w", own, "blocks.1.") == "blocks.1.w"
    assert stored_name("blocks", "w", shared, "blocks.1.") == "q"
    assert stored_name("blocks", "w", Cat((shared, shared), 0), "blocks.1.") == "shared.blocks.w"
    assert stored_name(SHELL, "w", Cat((shared, shared), 0), "") == "w"
    assert stored_name("blocks", "w", Constant("c", (3,), F32), "blocks.1.") == "constants.c"
    assert stored_name("blocks", "w", Constant(".c", (3,), F32), "blocks.1.") == "constants.blocks.1.c"


def test_a_captured_model_stores_its_parameters_under_their_names(wan, wan_call):
    model = wan()
    names = {w.name for w in stored_weights(capture(model, (), wan_call()))}
    assert {n for n in names if not n.startswith("constants.")} == set(dict(model.named_parameters()))
