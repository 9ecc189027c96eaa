"""`turbocompile explain`: reads the report, graphs and records of an engine's folder without opening its weights."""

from __future__ import annotations

from pathlib import Path

from turbocompile.errors import UnsupportedError
from turbocompile.files import inside
from turbocompile.ir.graph_view import GraphView, read_views
from turbocompile.report.report import Report
from turbocompile.report.timings import Bench
from turbocompile.runtime.folder import check_files, read_json, read_manifest
from turbocompile.tools.bench import read_record


def read_report(folder: Path) -> Report:
    """The report of an engine's folder. Raises EngineError if the folder is damaged."""
    name = "report.json"
    check_files(folder, read_manifest(folder), [name])
    return Report.from_dict(read_json(inside(folder, name)))


def read_records(folder: Path) -> dict[str, Bench]:
    """By module, the last `bench` of an engine on this machine; modules without a bench are left out."""
    manifest = read_manifest(folder)
    found = {module: read_record(module, str(manifest["digest"])) for module in manifest["modules"]}
    return {module: record for module, record in found.items() if record is not None}


def read_graph_views(folder: Path) -> dict[str, dict[str, GraphView]]:
    """By module, the graphs before and after the passes; an older engine has none. Raises EngineError if damaged."""
    manifest = read_manifest(folder)
    names = {module: f"graphs/{module}.json" for module in manifest["modules"]}
    known = {module: name for module, name in names.items() if name in manifest["files"]}
    check_files(folder, manifest, list(known.values()))
    return {module: read_views(read_json(inside(folder, name))) for module, name in known.items()}


def read_graph_text(folder: Path, module: str, stage: str) -> str:
    """A printed graph of an engine, without control characters, because a terminal would obey them.

    stage: the name of a pass, or "normalize". Raises UnsupportedError if the engine has no such graph.
    """
    manifest = read_manifest(folder)
    name = f"graphs/{module}-{stage}.txt"
    if name not in manifest["files"]:
        start = f"graphs/{module}-"
        known = [f.removeprefix(start).removesuffix(".txt") for f in manifest["files"] if f.startswith(start)]
        have = f"it has {', '.join(known)}" if known else f"its modules are {', '.join(manifest['modules'])}"
        raise UnsupportedError(f"the engine {folder} has no graph of {module} after {stage!r}; {have}")
    check_files(folder, manifest, [name])
    text = inside(folder, name).read_text(encoding="utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
