"""A report as data: what each pass did, why it left sites alone, its error and its time; the engine's cost on paper.

Reports are read from engine folders that anyone may have made, so every field is checked.
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
    """The data of a report; `Report` adds the ways to show it.

    passes: by name, in the order in which they ran. ops: at the first shape, one entry for equal operators. attention:
    at the first shape, one row for each site. measured_on: the card on which attentions were timed, empty if none was.
    parameters: bytes of the stored weights by dtype. stages: seconds by stage. engine_bytes: bytes of the engine's
    folder; predicted_bytes: the prediction of that number, made without building. weights: "checkpoint" or "synthetic".
    others: the reports of further modules of the same engine (a second expert). compared: how far the captured graph's
    results were from those of the module's own calls.
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
        """Operations of one forward at the first shape; a multiply-add counts as two."""
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
        """The inverse of `to_dict`. Raises EngineError for any other data."""
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
        """The card of that name; by default the card that stands for the target, and the H100 for a CPU.

        Raises UnsupportedError for an unknown name.
        """
        if name is not None:
            return find_gpu(name)
        own = gpu_of_target(self.target) if self.target in TARGETS else None
        return own or GPUS[DEFAULT_GPU]

    def roofline(self, gpu: str | None = None) -> list[dict[str, Any]]:
        """For each op its least seconds in one forward on a card and the unit that bounds it; the slowest op first.

        Raises UnsupportedError for an unknown card, and for a card that lacks arithmetic that an op needs.
        """
        card = self.gpu(gpu)
        rows = [{**op.to_dict(), "seconds": op.seconds(card), "bound": op.bound(card)} for op in self.ops]
        return sorted(rows, key=lambda row: -row["seconds"])

    def seconds(self, gpu: str | None = None) -> float:
        """The least seconds that one forward takes on a card: the ops' roofline times, one after the other."""
        card = self.gpu(gpu)
        return sum(op.seconds(card) for op in self.ops)


def least_seconds(op: OpCost, card: Gpu) -> float | None:
    """The op's roofline time on the card, in seconds; None if the card lacks arithmetic that the op needs."""
    try:
        return op.seconds(card)
    except UnsupportedError:
        return None


def _check_agrees(made: Any, data: Any, what: str) -> None:
    """Raises ValueError if a value changed when it was read, because the file has another type there.

    Without this check `str` would accept a number, and `tuple` a text. Keys that only one side has are ignored, because
    another version of turbocompile may write other keys.
    """
    if isinstance(made, dict) and isinstance(data, dict):
        for key in made.keys() & data.keys() - _DERIVED:
            _check_agrees(made[key], data[key], f"{key[:40]!r} of {what[:80]}")
    elif isinstance(made, list) and isinstance(data, list) and len(made) == len(data):
        for one, other in zip(made, data, strict=True):
            _check_agrees(one, other, f"an entry of {what[:80]}")
    elif made != data or isinstance(made, bool) != isinstance(data, bool):
        raise ValueError(f"{what} is {reading.shown(data)}, which is not of its type")


_DERIVED = {"least_seconds"}  # computed from the table of cards, which may differ between versions


def _optional(value: Any) -> int | None:
    return None if value is None else natural(value)
