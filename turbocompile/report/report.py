"""The report of a build: what each pass did, why not, its error and its time; what the engine costs on paper.

It is data (`to_dict`, `from_dict`), and shows itself in a terminal (rich), in a notebook and as a page (`to_html`). It
is read from engine folders that anyone may have made: nothing in it is trusted, and nothing is shown as markup.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.hardware import DEFAULT_GPU, GPUS, TARGETS, Gpu, find_gpu, gpu_of_target
from turbocompile.ir import reading
from turbocompile.ir.cost import OpCost, cost, natural
from turbocompile.ir.memory import activation_bytes, parameters_by_dtype
from turbocompile.ir.program import Program
from turbocompile.ir.site_errors import SiteError, finite
from turbocompile.report.attentions import AttentionSite, attention_sites, with_times
from turbocompile.rewrite.results import PassResult

SHOWN_OPS = 15  # rows of the table of ops; the rest is summed up in one
SHOWN_SITES = 3
_NO_ERROR = "not measured"


@dataclass(frozen=True)
class Skip:
    """Sites that a pass left alone: `count` of them in the whole model go by the name `site`."""

    site: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class PassReport:
    """What one pass did. Counts are over the whole model.

    kind: exact, quantizing or semantic. error: cosine, relative L1 and largest absolute error of the worst site;
    error_output: the same at the output of the block. An error that is None has its reason in error_reason.
    site_errors: of a quantizing pass, each site's, the farthest off first; inputs says on what, where every layer was
    measured.
    """

    kind: str
    sites: int
    rewritten: int
    skipped: tuple[Skip, ...] = ()
    error: dict[str, float] | None = None
    error_output: dict[str, float] | None = None
    error_reason: str | None = None
    seconds: float = 0.0
    site_errors: tuple[SiteError, ...] = ()
    inputs: str = ""

    @classmethod
    def from_result(cls, result: PassResult, unmeasured: str = _NO_ERROR) -> PassReport:
        """unmeasured: the reason where nobody measured and `result` does not say why."""
        error, output = finite(result.error), finite(result.error_output)
        reason = result.error_reason
        if reason is None and (error is None or output is None):
            lost = (result.error is not None and error is None) or (result.error_output is not None and output is None)
            if lost:
                reason = "the error is no finite number: the rewritten graph overflows, or the true values are all zero"
            else:
                reason = unmeasured if result.rewritten else "nothing was rewritten"
        skipped = tuple(Skip(*s) for s in result.skipped)
        measured = ((site, finite(error), budget) for site, (error, budget) in result.site_errors.items())
        errors = sorted(
            (SiteError(site, error, budget) for site, error, budget in measured if error is not None),
            key=lambda e: -e.error["rel_l1"] / e.budget if e.budget else -math.inf,
        )
        rows = result.layers or tuple(errors)
        counts = (result.kind, result.sites, result.rewritten)
        return cls(*counts, skipped, error, output, reason, result.seconds, rows, result.inputs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "sites": self.sites, "rewritten": self.rewritten,
            "skipped": [{"site": s.site, "reason": s.reason, "count": s.count} for s in self.skipped],
            "error": self.error, "error_output": self.error_output, "error_reason": self.error_reason,
            "seconds": self.seconds, "site_errors": [e.to_dict() for e in self.site_errors], "inputs": self.inputs,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassReport:
        skipped = tuple(Skip(str(s["site"]), str(s["reason"]), natural(s.get("count", 1))) for s in data["skipped"])
        reason = data.get("error_reason")
        return cls(
            str(data["kind"]), natural(data["sites"]), natural(data["rewritten"]), skipped, finite(data["error"]),
            finite(data.get("error_output")), None if reason is None else str(reason), _seconds(data["seconds"]),
            tuple(SiteError.from_dict(e) for e in data.get("site_errors", ())), str(data.get("inputs", "")),
        )  # fmt: skip


@dataclass(frozen=True)
class ShapeReport:
    """One shape of the engine: its inputs; operations, bytes moved and most activation bytes alive of one forward."""

    name: str
    inputs: dict[str, tuple[int, ...]]
    flops: int
    bytes: int
    activation_bytes: int

    @classmethod
    def from_program(cls, name: str, program: Program) -> ShapeReport:
        whole = cost(program)
        inputs = {i.path: tuple(i.shape) for i in program.signature.inputs}
        return cls(name, inputs, whole.flops, whole.bytes, whole.activations)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "inputs": {k: list(v) for k, v in self.inputs.items()}, "flops": self.flops,
            "bytes": self.bytes, "activation_bytes": self.activation_bytes,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShapeReport:
        inputs = {str(k): tuple(natural(n) for n in v) for k, v in data["inputs"].items()}
        counts = (natural(data[k]) for k in ("flops", "bytes", "activation_bytes"))
        return cls(str(data["name"]), inputs, *counts)


@dataclass(frozen=True, repr=False)
class Report:
    """What was built.

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
    others: dict[str, Report] = field(default_factory=dict)

    @classmethod
    def from_results(
        cls,
        results: Sequence[PassResult],
        programs: Program | Mapping[str, Program],
        *,
        unmeasured: str = _NO_ERROR,
        times: Mapping[str, float] | None = None,
        **fields: Any,
    ) -> Report:
        """The report of one module. programs: the rewritten Program, or several by the names of their shapes.

        unmeasured: why there are no errors, where nothing was verified. times: measured seconds of one run of each
        attention, by its site. fields: any further field of a Report.
        """
        named = programs if isinstance(programs, Mapping) else {"default": programs}
        first = next(iter(named.values()))
        return cls(
            passes={r.name: PassReport.from_result(r, unmeasured) for r in results},
            ops=cost(first).ops,
            attention=with_times(attention_sites(first, results), times or {}),
            shapes=tuple(ShapeReport.from_program(name, p) for name, p in named.items()),
            parameters=parameters_by_dtype(named.values()),
            activation_bytes=max(activation_bytes(p) for p in named.values()),
            **fields,
        )

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
            "attention": [{**a.to_dict(), "least_seconds": _least(a.cost, self.gpu())} for a in self.attention],
            "measured_on": self.measured_on,
            "shapes": [s.to_dict() for s in self.shapes],
            "parameter_bytes": self.parameter_bytes, "parameters": dict(self.parameters),
            "activation_bytes": self.activation_bytes, "flops": self.flops,
            "engine_bytes": self.engine_bytes, "predicted_bytes": self.predicted_bytes,
            "compared": self.compared, "warnings": list(self.warnings), "versions": dict(self.versions),
            "others": {name: report.to_dict() for name, report in self.others.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> Report:
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
    def _from_dict(cls, data: Mapping[str, Any], nested: bool) -> Report:
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
            stages={str(k): _seconds(v) for k, v in data["stages"].items()},
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
    def load(cls, path: str | Path) -> Report:
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

    # --------------------------------------------------------------------------------------------------------- showing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()

    def render(self, gpu: str | None = None, ops: int = SHOWN_OPS) -> RenderableType:
        """For a terminal. gpu: the card of the estimates. ops: how many rows of them. Raises UnsupportedError."""
        parts: list[RenderableType] = []
        for table in self._tables(gpu, ops):
            parts += [_rich_table(table), Text()]
        return Group(*parts[:-1])

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self.render())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return self._html_tables(None, SHOWN_OPS)

    def to_html(self, gpu: str | None = None) -> str:
        """A page that needs nothing else: no script, no link, and every text escaped."""
        title = html.escape(f"turbocompile: {self.model or self.module}")
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            f"{self._html_tables(gpu, len(self.ops))}\n</body>\n</html>\n"
        )

    def _html_tables(self, gpu: str | None, ops: int) -> str:
        return "\n".join(_html_table(table) for table in self._tables(gpu, ops))

    def _tables(self, gpu: str | None, ops: int) -> list[_Table]:
        card = self.gpu(gpu)
        tables = [self._overview(), self._passes_table()]
        if any(p.site_errors for p in self.passes.values()):
            tables.append(self._sensitivity_table())
        if any(p.skipped for p in self.passes.values()):
            tables.append(self._skips_table())
        if self.attention:
            tables.append(self._attention_table(card))
        tables.append(self._ops_table(card, ops))
        tables.append(self._cards_table())
        for name, other in self.others.items():
            for table in (other._passes_table(), *([other._attention_table(card)] if other.attention else [])):
                tables.append(_Table(f"{table.title} of {name}", table.columns, table.rows, table.right))
        return tables

    def _overview(self) -> _Table:
        rows = [
            ("model", self.model or self.module),
            ("target", f"{self.target}, {self.dtype}, {self.backend} backend"),
            ("weights", self.weights),
            ("the model itself", self.compared),
            *((f"shape {s.name}", _shape_line(s)) for s in self.shapes),
            ("parameters", _parameters_line(self.parameters)),
            *((f"parameters of {name}", _parameters_line(other.parameters)) for name, other in self.others.items()),
            ("activations", f"{size(self.activation_bytes)} at most"),
            ("engine", _engine_line(self.engine_bytes, self.predicted_bytes)),
            ("stages", ", ".join(f"{name} {duration(s)}" for name, s in self.stages.items())),
            ("built with", ", ".join(f"{k} {v}" for k, v in self.versions.items())),
            *(("warning", warning) for warning in self.warnings),
        ]
        return _Table("", ("", ""), [row for row in rows if row[1]])

    def _passes_table(self) -> _Table:
        rows = [
            (
                name, p.kind, str(p.sites), str(p.rewritten), str(p.sites - p.rewritten), _error_cell(p.error),
                _error_cell(p.error_output), duration(p.seconds), _why_no_error(p),
            )
            for name, p in self.passes.items()
        ]  # fmt: skip
        columns = ("pass", "kind", "sites", "rewritten", "skipped", "error", "at output", "time", "no error because")
        return _Table("Passes (error: relative L1 at the worst site)", columns, rows, right=(2, 3, 4, 5, 6, 7))

    def _sensitivity_table(self) -> _Table:
        rows = [
            (
                name, e.site, f"{e.error['rel_l1']:.4f}", e.worst or "the first layer",
                "" if e.median is None else f"{e.median:.4f}", f"{e.budget:g}", f"{e.error['cosine']:.6f}",
                "; ".join(filter(None, (e.computed_in(self.dtype), e.why))),
            )
            for name, p in self.passes.items()
            for e in p.site_errors
        ]  # fmt: skip
        columns = ("pass", "site", "relative L1", "in", "median", "at most", "cosine", "computed in")
        return _Table(sensitivity_title(self.passes), columns, rows, right=(2, 4, 5, 6))

    def _skips_table(self) -> _Table:
        rows = []
        for name, p in self.passes.items():
            grouped: dict[str, list[Skip]] = {}
            for skip in p.skipped:
                grouped.setdefault(skip.reason, []).append(skip)
            for reason, skips in grouped.items():
                rows.append((name, str(sum(s.count for s in skips)), reason, _some([s.site for s in skips])))
        return _Table("Left alone", ("pass", "sites", "because", "where"), rows, right=(1,))

    def _attention_table(self, card: Gpu) -> _Table:
        measured = f", and as measured on {_article(self.measured_on)}" if self.measured_on else ""
        title = f"Attention: what each site became, its least time on {_article(card.name)}{measured}"
        columns = ("site", "runs", "kind", "of", "keys read", "at least", "measured", "because")
        rows = [
            (
                a.site, str(a.count), _attention_kind(a), _attention_size(a), _keys_read(a),
                _optional_duration(_least(a.cost, card)), _optional_duration(a.seconds), a.why,
            )
            for a in self.attention
        ]  # fmt: skip
        return _Table(title, columns, rows, right=(1, 5, 6))

    def _ops_table(self, card: Gpu, shown: int) -> _Table:
        title = f"Operations of one forward, and the least time they take on {_article(card.name)}"
        columns = ("op", "where", "shapes", "runs", "FLOPs", "bytes", "time", "bound by")
        try:
            timed = sorted(((op.seconds(card), op.bound(card), op) for op in self.ops), key=lambda t: -t[0])
        except UnsupportedError as error:
            return _Table(title, columns, [(str(error), *[""] * 7)])
        rows = [_op_row(op, seconds, bound) for seconds, bound, op in timed[:shown]]
        rest = timed[shown:]
        if rest:
            rows.append(_total_row(f"{len(rest)} more", [op for *_, op in rest], sum(seconds for seconds, *_ in rest)))
        rows.append(_total_row("all", self.ops, sum(seconds for seconds, *_ in timed)))
        return _Table(title, columns, rows, right=(3, 4, 5, 6))

    def _cards_table(self) -> _Table:
        modules = (self, *self.others.values())  # experts: all weights are there, and one of them runs
        memory = sum(m.parameter_bytes for m in modules) + max(m.activation_bytes for m in modules)
        rows = []
        for card in GPUS.values():
            lacking = sorted({kind for op in self.ops for kind in op.work if not card.has(kind)})
            time = f"no {lacking[0]}" if lacking else duration(self.seconds(card.key))
            fits = "yes" if memory <= card.memory else f"no, it has {size(card.memory)}"
            rows.append((card.name, time, fits, card.source))
        columns = ("card", "least time of a forward", "weights and activations fit", "figures from")
        return _Table("Cards", columns, rows, right=(1,))


def sensitivity_title(passes: Mapping[str, PassReport]) -> str:
    """What the errors of the sites are, and on what they were measured."""
    measured = [f"{name} in every layer on {p.inputs}" for name, p in passes.items() if p.inputs]
    rest = [name for name, p in passes.items() if p.site_errors and not p.inputs]
    measured += [f"{', '.join(rest)} in the first layer"] if rest else []
    return f"What 8 bits do to each site ({'; '.join(measured)})"


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


def _seconds(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise ValueError(f"{str(value)[:20]!r} is no time")
    return float(value)


# ------------------------------------------------------------------------------------------------------------- wording


def size(count: float) -> str:
    """Bytes in decimal units, as in "1.39 GB"."""
    return f"{_scaled(count)}B"


def duration(seconds: float) -> str:
    """As in "1.2 s", "13.3 ms", "12 µs"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)):
        scaled = seconds * factor
        if scaled >= 1.0:
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{seconds * 1e9:.2g} ns" if seconds else "0"


def _scaled(count: float) -> str:
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.4g} {prefix}"
    return f"{count:g} "


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEFHILMNORSX' else 'a'} {name}"  # read letter by letter: an H100, an RTX 4090


def _error_cell(error: Mapping[str, float] | None) -> str:
    return "" if error is None else f"{error['rel_l1']:.2g}"


def _why_no_error(done: PassReport) -> str:
    return (done.error_reason or "") if done.error is None or done.error_output is None else ""


def _shape_line(shape: ShapeReport) -> str:
    inputs = ", ".join(f"{path} {'x'.join(map(str, dims)) or 'scalar'}" for path, dims in shape.inputs.items())
    return f"{inputs}: {_scaled(shape.flops)}FLOPs, {size(shape.activation_bytes)} of activations"


def _parameters_line(parameters: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{name} {size(n)}" for name, n in parameters.items())
    return f"{size(sum(parameters.values()))} ({kinds})" if parameters else ""


def _engine_line(built: int | None, predicted: int | None) -> str:
    parts = [
        f"{size(built)}" if built is not None else "",
        f"{size(predicted)} predicted" if predicted is not None else "",
    ]
    return ", ".join(p for p in parts if p)


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_SITES
    return ", ".join(names[:SHOWN_SITES]) + (f" and {more} more" if more > 0 else "")


def _least(op: OpCost, card: Gpu) -> float | None:
    """The roofline time on the card; None where it lacks the arithmetic."""
    try:
        return op.seconds(card)
    except UnsupportedError:
        return None


def _optional_duration(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _attention_kind(a: AttentionSite) -> str:
    return a.kind if a.pv in (None, "none") else f"{a.kind} {a.pv}"


def _attention_size(a: AttentionSite) -> str:
    batch = f"{a.batch} x " if a.batch > 1 else ""
    return f"{a.role}, {batch}{a.queries:,} x {a.keys:,} tokens, {a.heads} x {a.head_dim}"


def _keys_read(a: AttentionSite) -> str:
    s = a.sparsity
    return "all" if s is None else f"{s.kept} of {s.blocks} blocks of {s.block_k} (top-k {s.topk:g})"


def _op_row(op: OpCost, seconds: float, bound: str) -> tuple[str, ...]:
    where = f"{op.graph} {_some([path for path in op.where if path])}".strip()
    name = op.name.removeprefix("aten.")
    counts = (str(op.count), _scaled(op.flops).strip(), size(op.bytes))
    return (name, where, op.shapes, *counts, duration(seconds), bound)


def _total_row(name: str, ops: Iterable[OpCost], seconds: float) -> tuple[str, ...]:
    ops = tuple(ops)
    flops, moved = sum(op.flops for op in ops), sum(op.bytes for op in ops)
    return (name, "", "", str(sum(op.count for op in ops)), _scaled(flops).strip(), size(moved), duration(seconds), "")


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Table:
    """Text for a terminal or a page. right: columns of numbers, aligned right. A title or a header may be empty."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[int, ...] = ()


def _rich_table(table: _Table) -> Table:
    """Cells are `Text`, which rich prints as it is: a site named "[red]" is no markup."""
    title = Text(table.title, style="bold") if table.title else None
    made = Table(title=title, title_justify="left", show_header=any(table.columns), box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        made.add_column(Text(_plain(column)), justify="right" if i in table.right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(_plain(cell)) for cell in row))
    return made


def _plain(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _html_table(table: _Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        right = ' style="text-align:right"'
        made = (f"<{tag}{right if i in table.right else ''}>{html.escape(c)}</{tag}>" for i, c in enumerate(row))
        return f"<tr>{''.join(made)}</tr>"

    head = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    header = f"<thead>{cells('th', table.columns)}</thead>\n" if any(table.columns) else ""
    body = "\n".join(cells("td", row) for row in table.rows)
    return f"{head}<table>\n{header}<tbody>\n{body}\n</tbody>\n</table>"


_CSS = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:100em;padding:0 1em;color:#222;background:#fff}"
    "h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .4em}table{border-collapse:collapse}"
    "th,td{text-align:left;vertical-align:top;padding:.2em .8em .2em 0;border-bottom:1px solid #ddd}"
    "td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}"
)
