"""An adapter (LoRA) as a recipe, a command or a call names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from turbocompile.recipe.fields import FieldError, Section, described


@dataclass(frozen=True)
class LoraSpec(Section):
    """An adapter (LoRA) that is added to the weights before anything else is done to them."""

    path: str = field(
        metadata={"help": "a LoRA's file (.safetensors, .pth), or its folder (PEFT's, diffusers')", "path": True}
    )
    weight: float = described(1.0, "how much of it is added; 0 adds nothing")
    expert: str = described(
        "both",
        "of two experts the one that gets it: high (transformer), low (transformer_2); both: each, and of a file that "
        "holds a LoRA for each, its own",
        choices=("both", "high", "low", "transformer", "transformer_2"),
    )

    mode: str = described(
        "merge",
        "merge: into the weights, before they are quantized; branch: a LoRA of a linear stays beside it, in the "
        "engine's dtype, and is computed in each call (anything else is merged)",
        choices=("merge", "branch"),
    )

    def check(self) -> None:
        if not self.path:
            raise FieldError("path", "is empty; name the LoRA's file or folder")
        self._resolve("expert", {"transformer": "high", "transformer_2": "low"}.get(self.expert, self.expert))

    @classmethod
    def of_text(cls, text: str) -> dict[str, str]:
        """`PATH[:WEIGHT]`: what follows the last colon is the weight where it is a number and no file has that name."""
        path, colon, weight = text.rpartition(":")
        try:
            float(weight)
        except ValueError:
            return {"path": text}
        if not colon or not path or Path(text).expanduser().exists():
            return {"path": text}
        return {"path": path, "weight": weight}
