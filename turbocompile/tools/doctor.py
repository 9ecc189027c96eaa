"""`turbocompile doctor`: what this machine can run, and which packages it lacks for the rest.

Versions are read from the metadata of the installed packages, because an import is slow, may print (torchao), and fails
if a package is broken. Only torch and triton are imported: torch, because only torch knows the GPU, and triton, because
only an import shows whether triton works.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from turbocompile import hardware
from turbocompile.version import __version__

OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclass(frozen=True)
class Row:
    """One package or device that turbocompile uses. status: "ok", "missing" or "broken".

    found: its version or figures. purpose: the features that need it. mend: how to install or repair it, if the status
    is not "ok". needed: whether turbocompile cannot work without it.
    """

    name: str
    status: str
    found: str
    purpose: str
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Doctor:
    """The rows in the order in which they are shown. target: of a build for this machine. summary: what runs here."""

    rows: tuple[Row, ...]
    target: str
    summary: str

    @property
    def healthy(self) -> bool:
        """Whether every row that is needed is "ok"."""
        return all(row.status == OK for row in self.rows if row.needed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "healthy": self.healthy, "target": self.target, "summary": self.summary,
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False)
        for column in ("", "", "version", "for", "how to mend it"):
            table.add_column(column, overflow="fold")
        signs = {OK: Text("ok", "green"), MISSING: Text("missing", "yellow"), BROKEN: Text("broken", "red")}
        for row in self.rows:
            table.add_row(signs[row.status], *(Text(t) for t in (row.name, row.found, row.purpose, row.mend)))
        yield table
        yield Text()
        yield Text(self.summary)


@dataclass(frozen=True)
class _Package:
    """A package by its distribution name, or by several names of which any one is enough."""

    names: tuple[str, ...]
    purpose: str
    install: str
    needed: bool = False


_PACKAGES = (
    _Package(("diffusers",), "reading Wan pipelines; the VAE and the teachers' samplers", "diffusers", True),
    _Package(("transformers",), "the text encoder", "transformers", True),
    _Package(("safetensors",), "weights", "safetensors", True),
    _Package(("av",), "writing mp4", "av", True),
    _Package(("onnx",), "backend: onnx", "'turbocompile[onnx]'"),
    _Package(("onnxscript",), "backend: onnx", "'turbocompile[onnx]'"),
    _Package(("onnxruntime", "onnxruntime-gpu"), "running exported ONNX", "'turbocompile[onnx]'"),
    _Package(("tensorrt-rtx", "tensorrt_rtx"), "backend: tensorrt, plans for RTX cards", "'turbocompile[tensorrt]'"),
    _Package(("tensorrt",), "plans for data-centre cards", "tensorrt"),
    _Package(("cuda-bindings",), "CUDA graphs that cost the CPU less; torch for CUDA brings it", "cuda-bindings"),
    _Package(("gguf",), "reading GGUF checkpoints", "'turbocompile[gguf]'"),
    _Package(("torchao",), "reading models that torchao quantized", "'turbocompile[torchao]'"),
)


def collect() -> Doctor:
    """Examines this machine. Never raises: a probe that fails becomes a row that says so."""
    rows = [_guarded(name, probe) for name, probe in _PROBES.items()]
    rows += [_package(p) for p in _PACKAGES]
    target, summary = _verdict({row.name: row for row in rows})
    return Doctor(tuple(rows), target, summary)


def _guarded(name: str, probe: Callable[[], Row]) -> Row:
    """A probe's row, or a row that says how the probe failed. Probes run other libraries, which may raise any error."""
    try:
        return probe()
    except Exception as error:  # a broken driver or package is itself what is reported
        return Row(name, BROKEN, _one_line(error), "this could not be looked at", "see the message")


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def version_of(names: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed; "" if its metadata has none, None for none."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name) or ""
    return None


def _package(package: _Package) -> Row:
    name, mend = package.names[0], f"pip install {package.install}"
    try:
        version = version_of(package.names)
    except (OSError, ValueError, KeyError, UnicodeError) as error:
        return Row(name, BROKEN, _one_line(error), package.purpose, f"{mend} --force-reinstall", package.needed)
    if version is None:
        return Row(name, MISSING, "", package.purpose, mend, package.needed)
    if not version:  # a metadata folder without its file
        return Row(name, BROKEN, "no version", package.purpose, f"{mend} --force-reinstall", package.needed)
    return Row(name, OK, str(version), package.purpose, "", package.needed)


def _python() -> Row:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, turbocompile {__version__}"
    return Row("python", OK, found, "everything", needed=True)


def _torch() -> Row:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Row("torch", OK, f"{torch.__version__} ({built})", "everything", needed=True)


def _triton() -> Row:
    purpose = "kernels on a GPU"
    version = version_of(("triton", "pytorch-triton", "triton-windows"))
    if version is None:
        return Row("triton", MISSING, "", purpose, "pip install triton (Linux); without it the plain references run")
    try:
        with _silence():
            importlib.import_module("triton.language")
    except Exception as error:  # triton loads a compiler, which fails in many ways
        return Row("triton", BROKEN, f"{version}: {_one_line(error)}", purpose, "pip install --force-reinstall triton")
    return Row("triton", OK, version, purpose)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides what an import prints and its warnings, because they would stand in the middle of the table."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _gpu() -> Row:
    purpose = "running engines fast; a CPU runs them exactly and slowly"
    if not torch.cuda.is_available():
        if torch.version.cuda is None and _driver() is not None:
            return Row("GPU", MISSING, f"driver {_driver()}, but torch has no CUDA", purpose, "install torch with CUDA")
        if torch.version.cuda is not None and _driver() is None:
            return Row("GPU", MISSING, "no NVIDIA driver", purpose, "install the NVIDIA driver, if there is a card")
        return Row("GPU", MISSING, "none that torch can use", purpose, "an NVIDIA card from Ampere on")
    names = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        names.append(f"{card.name}, sm{card.major}{card.minor}, {_gigabytes(card.total_memory)}")
    found = "; ".join(names) + (f"; driver {_driver()}" if _driver() else "")
    if hardware.target_of(torch.cuda.get_device_capability()) is None:
        return Row("GPU", BROKEN, found, purpose, f"turbocompile runs on {', '.join(hardware.TARGETS[1:])}")
    return Row("GPU", OK, found, purpose)


def _driver() -> str | None:
    """The NVIDIA driver's version as its kernel module states it; None without a driver."""
    path = Path("/sys/module/nvidia/version")
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return None


def _memory() -> Row:
    pages, page = (os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{_gigabytes(pages * page)} of memory, {os.cpu_count()} cores, {_gigabytes(free)} free on disk here"
    return Row("machine", OK, found, "reading, verifying and writing weights")


def _compiler() -> Row:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    purpose = "triton builds its launchers with it"
    if found is None:
        return Row("C compiler", MISSING, "", purpose, "install gcc (apt-get install gcc), for GPU use only")
    return Row("C compiler", OK, found, purpose)


_PROBES: dict[str, Callable[[], Row]] = {
    "python": _python, "torch": _torch, "triton": _triton, "C compiler": _compiler, "GPU": _gpu, "machine": _memory,
}  # fmt: skip


def _verdict(rows: dict[str, Row]) -> tuple[str, str]:
    """The target of a build for this machine, and one sentence about the engines that run here."""
    target = hardware.CPU
    if rows["GPU"].status == OK:
        target = hardware.target_of(torch.cuda.get_device_capability()) or hardware.CPU
    if target == hardware.CPU:
        return target, (
            "Engines for this machine run on the CPU, in float32 and without quantization; "
            "engines for a GPU can be built here with target: sm80 ... sm120."
        )
    triton = "" if rows["triton"].status == OK else " once triton works"
    linear = {"fp8": "FP8", "int8": "INT8", "off": "16-bit"}[hardware.choose_linear_format(target)]
    attention = "8-bit attention where it is faster" if hardware.has_sage(target) else "16-bit attention"
    return target, f"Engines for this machine run on the GPU ({target}) with {linear} linears and {attention}{triton}."
