"""The error of each quantized site, layer by layer: the rows of the report's sensitivity table, as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ERROR_KEYS = ("cosine", "rel_l1", "max_abs")
EIGHT_BITS = "8 bits"


def finite(error: Any) -> dict[str, float] | None:
    """The three figures of an error (a mapping, or an object with to_dict); None where a figure is not finite."""
    if error is None:
        return None
    given = error if isinstance(error, Mapping) else error.to_dict()
    found = {k: float(given[k]) for k in ERROR_KEYS}
    return found if all(map(math.isfinite, found.values())) else None


@dataclass(frozen=True)
class LayerError:
    """A site in one layer. error: its error when it is quantized. quantized: whether the engine quantizes it there.

    alpha: the exponent that smooths its input; None without smoothing. unsmoothed: the relative L1 without smoothing.
    """

    layer: str
    error: dict[str, float]
    quantized: bool
    alpha: float | None = None
    unsmoothed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        smoothed = {"alpha": self.alpha, "unsmoothed": self.unsmoothed} if self.alpha is not None else {}
        return {"layer": self.layer, **self.error, "quantized": self.quantized, **smoothed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerError:
        error = finite(data)
        if error is None or not isinstance(data["quantized"], bool):
            raise ValueError(f"the error of the layer {str(data['layer'])[:40]!r} is no number")
        more = [None if data.get(k) is None else float(data[k]) for k in ("alpha", "unsmoothed")]
        if any(v is not None and not math.isfinite(v) for v in more) or (more[0] is None) != (more[1] is None):
            raise ValueError(f"the smoothing of the layer {str(data['layer'])[:40]!r} is no number")
        return cls(str(data["layer"]), error, data["quantized"], *more)


@dataclass(frozen=True)
class SiteError:
    """How far quantizing a site moves its value, on exact inputs.

    error: cosine, relative L1 and largest absolute error, in the worst layer or, without `layers`, in the first call of
    the site's block. budget: the largest relative L1 allowed; a site above it stays as it was. layers: in the order
    in which they run. note: another reason for the decision.
    """

    site: str
    error: dict[str, float]
    budget: float
    layers: tuple[LayerError, ...] = ()
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the site is quantized in at least one layer."""
        return any(e.quantized for e in self.layers) if self.layers else self.error["rel_l1"] <= self.budget

    @property
    def worst(self) -> str:
        """The layer of the largest error; empty where the error was not measured by layer."""
        return max(self.layers, key=lambda e: e.error["rel_l1"]).layer if self.layers else ""

    @property
    def median(self) -> float | None:
        """The median of the relative L1 over the layers; None where the error was not measured by layer."""
        return statistics.median(e.error["rel_l1"] for e in self.layers) if self.layers else None

    def computed_in(self, dtype: str) -> str:
        """As in "8 bits", "bfloat16", "8 bits, bfloat16 in blocks 0, 3-5"; dtype: the model's."""
        wide = [e.layer for e in self.layers if not e.quantized]
        if not self.kept:
            return dtype
        return f"{EIGHT_BITS}, {dtype} in {ranges(wide)}" if wide else EIGHT_BITS

    @property
    def smoothing(self) -> str:
        """As in "smoothed (alpha 0.3 to 0.5) in blocks 3-5: 0.0299 to 0.0170", of the worst of these layers."""
        done = [e for e in self.layers if e.alpha is not None]
        if not done:
            return ""
        alphas = sorted({e.alpha for e in done if e.alpha is not None})
        said = " to ".join(f"{a:g}" for a in dict.fromkeys((alphas[0], alphas[-1])))
        where = f" in {ranges([e.layer for e in done])}" if len(done) < len(self.layers) else ""
        before, after = max(e.unsmoothed or 0.0 for e in done), max(e.error["rel_l1"] for e in done)
        return f"smoothed (alpha {said}){where}: {before:.4f} to {after:.4f}"

    @property
    def why(self) -> str:
        """The smoothing of the site and the other reason for the decision, in words."""
        return "; ".join(filter(None, (self.smoothing, self.note)))

    def to_dict(self) -> dict[str, Any]:
        layers: dict[str, Any] = {"layers": [e.to_dict() for e in self.layers]} if self.layers else {}
        return {"site": self.site, **self.error, "budget": self.budget, **layers} | (
            {"note": self.note} if self.note else {}
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteError:
        error, budget = finite(data), float(data["budget"])
        if error is None or not math.isfinite(budget):
            raise ValueError(f"the error of {str(data['site'])[:40]!r} is no number")
        layers = tuple(LayerError.from_dict(e) for e in data.get("layers", ()))
        return cls(str(data["site"]), error, budget, layers, str(data.get("note", "")))


def ranges(layers: Sequence[str]) -> str:
    """Layers in short: ["blocks.0", "blocks.3", "blocks.4"] is "blocks 0, 3-4"."""
    found: dict[str, list[list[int]]] = {}
    for layer in layers:
        path, _, number = layer.rpartition(".")
        counted = number.isdecimal() and len(number) < 10  # a name from a file may end in what int() refuses
        runs = found.setdefault(path if counted else layer, [])
        if counted:
            if runs and runs[-1][1] == int(number) - 1:
                runs[-1][1] = int(number)
            else:
                runs.append([int(number), int(number)])
    texts = []
    for path, runs in found.items():
        numbers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        texts.append(f"{path} {numbers}".strip())
    return ", ".join(texts)
