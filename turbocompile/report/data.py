"""A report as data: what each pass did, why not more, its error and its time; what the engine costs on paper.

It is read from engine folders that anyone may have made, so that nothing in it is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.hardware import DEFAULT_GPU, GPUS, TARGETS, Gpu, find_gpu, gpu_of_target
from turbocompile.ir import reading
from turbocompile.ir.cost import OpCost, natural
from turbocompile.report.rows import AttentionSite, PassReport, ShapeReport, read_seconds


@dataclass(frozen=True, repr=False)
class ReportData:
    """What was built, as data. `Report` shows it.

    passes: by name, in the order they ran. ops: equal ops together, at the first shape. attention: one row a site, at
    the first shape. measured_on: the card on which attentions were timed, empty where none was. parameters: bytes of
    the stored weights by dtype. stages: seconds by stage. engine_bytes: of the engine folder; predicted_bytes: what it
    should come to, known without building. weights: where they come from ("checkpoint", "synthetic"). others: the
    reports of further modules of the same engine (a second expert). compared: how the captured graph stood beside the
    module's own calls.
    """

    passes: dict[str, PassReport]
    ops: tuple[OpCost, ...]
    attention: tuple[AttentionSite, ...] = ()
    measured_on: str = ""
    shapes: tuple[ShapeReport, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    module: str = "transformer"
    model: str = ""
    target: str = "cpu"
    dtype: str = "float32"
    backend: str = "triton"
    weights: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    engine_bytes: int | None = None
    predicted_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    compared: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops(self) -> int:
        """Of one forward at the first shape."""
        return sum(op.flops for op in self.ops)

    # ------------------------------------------------------------------------------------------------------------ data

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "module": self.module, "model": self.model, "target": self.target, "dtype": self.dtype,
            "backend": self.backend, "weights": self.weights, "stages": dict(self.stages),
            "passes": {name: p.to_dict() for name, p in self.passes.items()},
            "ops": [op.to_dict() for op in self.ops],
            "attention": [{**a.to_dict(), "least_seconds": least_seconds(a.cost, self.gpu())} for a in self.attention],
            "measured_on": self.measured_on,
            "shapes": [s.to_dict() for s in self.shapes],
            "parameter_bytes": self.parameter_bytes, "parameters": dict(self.parameters),
            "activation_bytes": self.activation_bytes, "flops": self.flops,
            "engine_bytes": self.engine_bytes, "predicted_bytes": self.predicted_bytes,
            "compared": self.compared, "warnings": list(self.warnings), "versions": dict(self.versions),
            "others": {name: report.to_dict() for name, report in self.others.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`. Raises EngineError in one sentence for anything else."""
        try:
            made = cls._from_dict(reading.table(data, "the report"), nested=False)
            _check_agrees(made.to_dict(), data, "the report")
            return made
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise EngineError(
                f"the engine's report is damaged ({type(error).__name__}: {str(error)[:80]}); build the engine again"
            ) from error

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], nested: bool) -> Self:
        others = data.get("others", {})
        if nested and others:
            raise ValueError("reports nested in reports")
        return cls(
            passes={str(k): PassReport.from_dict(v) for k, v in data["passes"].items()},
            ops=tuple(OpCost.from_dict(op) for op in data["ops"]),
            attention=tuple(AttentionSite.from_dict(a) for a in data.get("attention", ())),
            measured_on=str(data.get("measured_on", "")),
            shapes=tuple(ShapeReport.from_dict(s) for s in data["shapes"]),
            parameters={str(k): natural(v) for k, v in data["parameters"].items()},
            activation_bytes=natural(data["activation_bytes"]),
            **{k: str(data[k]) for k in ("module", "model", "target", "dtype", "backend", "weights")},  # type: ignore[arg-type]
            stages={str(k): read_seconds(v) for k, v in data["stages"].items()},
            engine_bytes=_optional(data["engine_bytes"]),
            predicted_bytes=_optional(data["predicted_bytes"]),
            warnings=tuple(str(w) for w in data["warnings"]),
            compared=str(data.get("compared", "")),
            versions={str(k): str(v) for k, v in data["versions"].items()},
            others={str(k): cls._from_dict(v, nested=True) for k, v in others.items()},
        )

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises EngineError."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"the report {path} cannot be read ({error}); build the engine again") from error
        return cls.from_dict(data)

    # -------------------------------------------------------------------------------------------------------- roofline

    def gpu(self, name: str | None = None) -> Gpu:
        """The card of that name; by default the one that stands for the target, on a CPU the H100."""
        if name is not None:
            return find_gpu(name)
        own = gpu_of_target(self.target) if self.target in TARGETS else None
        return own or GPUS[DEFAULT_GPU]

    def roofline(self, gpu: str | None = None) -> list[dict[str, Any]]:
        """Per op the least seconds in one forward on a card, and what binds; the slowest first.

        Raises UnsupportedError for an unknown card, or one that lacks the arithmetic.
        """
        card = self.gpu(gpu)
        rows = [{**op.to_dict(), "seconds": op.seconds(card), "bound": op.bound(card)} for op in self.ops]
        return sorted(rows, key=lambda row: -row["seconds"])

    def seconds(self, gpu: str | None = None) -> float:
        """The least seconds that one forward takes on a card: the ops' roofline times, one after the other."""
        card = self.gpu(gpu)
        return sum(op.seconds(card) for op in self.ops)


def least_seconds(op: OpCost, card: Gpu) -> float | None:
    """The roofline time on the card; None where it lacks the arithmetic."""
    try:
        return op.seconds(card)
    except UnsupportedError:
        return None


def _check_agrees(made: Any, data: Any, what: str) -> None:
    """Raises ValueError unless what was read says what the file says: a number is no text, a text no list of letters.

    Keys that the file lacks, or has beside, are as they were in another version.
    """
    if isinstance(made, dict) and isinstance(data, dict):
        for key in made.keys() & data.keys() - _DERIVED:
            _check_agrees(made[key], data[key], f"{key[:40]!r} of {what[:80]}")
    elif isinstance(made, list) and isinstance(data, list) and len(made) == len(data):
        for one, other in zip(made, data, strict=True):
            _check_agrees(one, other, f"an entry of {what[:80]}")
    elif made != data or isinstance(made, bool) != isinstance(data, bool):
        raise ValueError(f"{what} is {reading.shown(data)}, which is not of its type")


_DERIVED = {"least_seconds"}  # of the table of cards, which may know better by now


def _optional(value: Any) -> int | None:
    return None if value is None else natural(value)
