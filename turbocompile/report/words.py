"""A report's figures as text: bytes, times, sizes of attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from turbocompile.report.rows import AttentionSite, PassReport, ShapeReport

SHOWN_SITES = 3


def size(count: float) -> str:
    """Bytes in decimal units, as in "1.39 GB"."""
    return f"{scaled(count)}B"


def duration(seconds: float) -> str:
    """As in "1.2 s", "13.3 ms", "12 µs"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)):
        scaled = seconds * factor
        if scaled >= 1.0:
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{seconds * 1e9:.2g} ns" if seconds else "0"


def scaled(count: float) -> str:
    """A number with a decimal prefix, as in "1.39 G"."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.4g} {prefix}"
    return f"{count:g} "


def with_article(name: str) -> str:
    """As in "an H100"."""
    return f"{'an' if name[0] in 'AEFHILMNORSX' else 'a'} {name}"  # read letter by letter: an H100, an RTX 4090


def error_text(error: Mapping[str, float] | None) -> str:
    """The relative L1 of an error, "" for None."""
    return "" if error is None else f"{error['rel_l1']:.2g}"


def why_no_error(done: PassReport) -> str:
    """Why an error of a pass is missing, "" if none is missing."""
    return (done.error_reason or "") if done.error is None or done.error_output is None else ""


def shape_line(shape: ShapeReport) -> str:
    """A shape's inputs, operations and activations in one line."""
    inputs = ", ".join(f"{path} {'x'.join(map(str, dims)) or 'scalar'}" for path, dims in shape.inputs.items())
    return f"{inputs}: {scaled(shape.flops)}FLOPs, {size(shape.activation_bytes)} of activations"


def parameters_line(parameters: Mapping[str, int]) -> str:
    """Bytes of the stored weights, by dtype."""
    kinds = ", ".join(f"{name} {size(n)}" for name, n in parameters.items())
    return f"{size(sum(parameters.values()))} ({kinds})" if parameters else ""


def engine_line(built: int | None, predicted: int | None) -> str:
    """The bytes of an engine, built and predicted; either may be None."""
    parts = [
        f"{size(built)}" if built is not None else "",
        f"{size(predicted)} predicted" if predicted is not None else "",
    ]
    return ", ".join(p for p in parts if p)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN_SITES
    return ", ".join(names[:SHOWN_SITES]) + (f" and {more} more" if more > 0 else "")


def optional_duration(seconds: float | None) -> str:
    """A duration, "" for None."""
    return "" if seconds is None else duration(seconds)


def attention_kind(a: AttentionSite) -> str:
    """As in "sage fp8"."""
    return a.kind if a.pv in (None, "none") else f"{a.kind} {a.pv}"


def attention_size(a: AttentionSite) -> str:
    """As in "self, 32,760 x 32,760 tokens, 12 x 128"."""
    batch = f"{a.batch} x " if a.batch > 1 else ""
    return f"{a.role}, {batch}{a.queries:,} x {a.keys:,} tokens, {a.heads} x {a.head_dim}"


def keys_read(a: AttentionSite) -> str:
    """How many key blocks each query block reads, as in "51 of 512 blocks of 64 (top-k 0.1)"; "all" without an SLA."""
    s = a.sparsity
    return "all" if s is None else f"{s.kept} of {s.blocks} blocks of {s.block_k} (top-k {s.topk:g})"
