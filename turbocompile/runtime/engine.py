"""An engine: compiled Programs and their weights, called like the model they came from; and the folder that holds them.

Loading executes nothing from the folder. File names are plain relative names without links; JSON size and depth are
capped; hashes are compared; programs are checked operator by operator and shape by shape (serialize.py). Hashes show
damage, not origin: load engines only from where you would load weights from.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from turbocompile.backends import BACKENDS, get_backend
from turbocompile.errors import CaptureError, EngineError
from turbocompile.files import MANIFEST
from turbocompile.ir import reading
from turbocompile.ir import signature as sig
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.program import Program
from turbocompile.ir.reading import Unreadable, entry, file_name, items, table, text, texts, whole
from turbocompile.ir.serialize import dtype_name, from_json, parse_dtype
from turbocompile.report.report import Report
from turbocompile.runtime.adapters import FixedWeights
from turbocompile.runtime.cuda_graph import CudaGraph, Pool
from turbocompile.runtime.tuning import FILE as TUNING
from turbocompile.runtime.tuning import Tuning, merge, read_cache, read_tuning, restore
from turbocompile.version import __version__

SCHEMA = 1
CHUNK = 64 << 20  # bytes of a weights file that share one hash, so that files can be checked in parallel
MAX_JSON = 256 << 20
MAX_DEPTH = 96
# Strings are tokens, so that brackets in them do not count; one that does not end goes to the end, and is read once.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character, which no text of UTF-8 has, or one of a pair
_MODULE = re.compile(r"[A-Za-z0-9_-]{1,100}")  # of the engine's modules: a part of file names
_HASH = re.compile(r"[0-9a-f]{64}")
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")  # a folder of the hub's cache


class Config(dict[str, Any]):
    """The model's configuration: a dictionary whose keys are attributes too, as diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's configuration has no {name!r}") from None


class Engine(FixedWeights, nn.Module):
    """A compiled model, at one or several shapes, with its weights.

    Called like the model it came from. `.to(device)` moves the weights; no `.to(dtype)` changes them. `experts` maps
    the names of all modules in the same folder ("transformer", "transformer_2") to their engines.

    On a GPU each shape becomes a CUDA graph at its second call (backend triton); `engine.cuda_graph = False` runs its
    kernels one by one. Moving the engine drops the graphs.
    """

    experts: dict[str, Engine]
    cuda_graph: bool = True
    write: Any = None  # writes the engine into an empty folder; None where it was not built in this process

    def __init__(
        self,
        programs: Mapping[str, Program],
        weights: Mapping[str, torch.Tensor],
        *,
        name: str = "the engine",
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        report: Report | None = None,
        manifest: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        backend: str = "triton",
        files: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.programs = dict(programs)
        self.weights = dict(weights)
        self.model_name = name
        self.config = Config(config or {})
        self._dtype = dtype
        self._device = torch.device("cpu")
        self._device = next((t.device for t in self.weights.values()), self._device)
        self._runners: dict[str, Any] = {}
        self.tuning: Tuning = {}  # which kernels its 8-bit linears run, by card
        self._graphs: dict[str, CudaGraph] = {}
        self._pool: Pool | None = None
        self.report = report
        self.manifest = dict(manifest or {})
        self.folder = folder
        self.backend = backend
        self.files = {k: list(v) for k, v in (files or {}).items()}
        object.__setattr__(self, "experts", {"transformer": self})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """The input shapes that the engine has, in the order they were built."""
        return [{i.path: list(i.shape) for i in p.signature.inputs if not i.number} for p in self.programs.values()]

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What diffusers' pipelines enter around each call; an engine keeps nothing between calls."""
        yield

    def __repr__(self) -> str:
        size = sum(t.nbytes for t in self.weights.values()) / 1e6
        return (
            f"Engine({self.model_name}, {self.backend}, {len(self.programs)} shapes, {size:.1f} MB; "
            "write it with engine.save(folder), open it with turbocompile.load(folder))"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Program that the call is of, by its shapes and plain arguments. CaptureError where there is none."""
        name, given = self._program_of(args, kwargs)
        signature = self.programs[name].signature
        tensors = sig.cast(signature, sig.tensors_of(signature, given), self.model_name)
        flat = self.runner(name)(*(t.to(self._device) for t in tensors))
        return sig.wrap_output(signature, flat, given.wrapped)

    def _program_of(self, args: Any, kwargs: Any) -> tuple[str, sig.Bound]:
        """The name of the Program that a call is of, and the call's arguments. Raises CaptureError in a sentence."""
        known: list[tuple[Any, sig.Bound]] = []  # Programs of one module declare the same parameters
        fitting = None  # a Program of the call's plain arguments, for the message
        reasons: list[tuple[bool, str]] = []
        for name, program in self.programs.items():
            signature = program.signature
            given = next((g for p, g in known if p == signature.parameters), None)
            if given is None:
                given = sig.bound(signature, args, kwargs, self.model_name)
                known.append((signature.parameters, given))
            reason = sig.differs(signature, given)
            if not reason:
                tensors = sig.tensors_of(signature, given)
                if sig.fits(signature, tensors):
                    return name, given
                fitting = fitting or (signature, tensors)
            else:
                reasons.append((sig.same_shapes(signature, given), reason))
        alike = [reason for same, reason in reasons if same]  # of a Program of the call's shapes
        if fitting is not None:
            signature, tensors = fitting
            shown = {i.path: list(t.shape) for i, t in zip(signature.inputs, tensors, strict=True) if not i.number}
            if alike:
                raise CaptureError(f"{self.model_name} with the shapes {shown} {alike[0]}")
            raise CaptureError(f"{self.model_name} has no program for the shapes {shown}; it has {self.shapes}")
        reason = next(iter([*alike, *(r for _, r in reasons)]), "holds no program; build it again")
        raise CaptureError(f"{self.model_name} {reason}")

    def accepts(self, args: Any, kwargs: Any) -> bool:
        """Whether there is a Program of the call's shapes and plain arguments."""
        for program in self.programs.values():
            given = sig.bound(program.signature, args, kwargs, self.model_name)
            if not sig.differs(program.signature, given) and sig.same_shapes(program.signature, given):
                return True
        return False

    def compiled(self, name: str) -> Any:
        """The callable of a shape as its backend made it, over flat tensors on the engine's device."""
        if name not in self._runners:
            if self.tuning and self._device.type == "cuda":
                restore(self.tuning, f"{TUNING} of {self.folder}")
            backend = get_backend(self.backend)
            files = tuple(self.files.get(name, ()))
            self._runners[name] = backend.compile_program(
                self.programs[name], self.weights, self._device, self.folder, files
            )
        return self._runners[name]

    def runner(self, name: str) -> Any:
        """What runs a shape: `compiled`, on a GPU as a CUDA graph."""
        compiled = self.compiled(name)
        if not self.cuda_graph or self._device.type != "cuda" or self.backend != "triton":
            return compiled
        if name not in self._graphs:
            self._graphs[name] = CudaGraph(compiled, self._graph_pool(), self.model_name)
        return self._graphs[name]

    def _graph_pool(self) -> Pool:
        """One for the graphs of all shapes and experts on the device: a step runs one of them."""
        if self._pool is None:
            known = (e._pool for e in self.experts.values() if e._pool is not None)
            self._pool = next((p for p in known if p.device == self._device), None) or Pool(self._device)
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles and records anew."""
        return {**self.__dict__, "_runners": {}, "_graphs": {}, "_pool": None}

    def __copy__(self) -> Engine:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __reduce__(self) -> Any:
        """Graphs hold what no pickle does. Raises EngineError."""
        raise EngineError("an engine is not pickled: save(folder) writes it, and turbocompile.load(folder) reads it")

    def _apply(self, fn: Any, recurse: bool = True) -> Engine:
        """Moves the weights to the device that `fn` moves tensors to; dtype changes do not reach them."""
        probe = fn(torch.empty(0, dtype=torch.int8, device=self._device if self._device.type != "meta" else "cpu"))
        self.move(probe.device)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Engine:
        """Moves the engine to a device; a dtype is ignored, since the weights' formats are the engine's own."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self.move(device)
        return self

    def move(self, device: torch.device) -> None:
        """Puts the weights on `device`. Compiled code is dropped, since it holds tensors of the old one."""
        if device != self._device:
            self.weights = {k: v.to(device) for k, v in self.weights.items()}
            self._device = device
            self._graphs.clear()
            self._pool = None
            self._runners.clear()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The weights by stored name. They are the engine's, not the model's: fused, quantized."""
        return dict(self.weights)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights, for tools that look at devices and sizes; none is trainable."""
        for tensor in self.weights.values():
            yield nn.Parameter(tensor, requires_grad=False)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The same as `save`, under the name that diffusers uses. A pipeline's own `save_pretrained` leaves an engine
        out and says so, since `from_pretrained` could not open it; give it back by `from_pretrained(...,
        transformer=engine)`.
        """
        self.save(save_directory, force=True)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes the engine folder, atomically. force: an empty folder may stand there already.

        Raises EngineError where something is there, UnsupportedError for an engine opened from a folder that is gone.
        """
        target = Path(folder)
        if force and target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        with new_folder(target) as temporary:
            if self.folder is not None:
                shutil.copytree(self.folder, temporary, dirs_exist_ok=True)
            else:
                if self.write is None:
                    raise EngineError(
                        "this engine was not built here, so there is nothing to write; copy its folder instead"
                    )
                self.write(self, temporary)
        return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` that becomes it when the body ends well, and disappears when it does not."""
    if target.exists() or target.is_symlink():
        raise EngineError(
            f"{target} exists already, and an engine is never written over; name another folder or remove it"
        )
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # meanwhile another made it
                raise EngineError(f"{target} was written by another process meanwhile; name another folder") from error
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """The bytes that the digest is of: sorted keys, no spaces, UTF-8, without the digest itself."""
    body = {k: v for k, v in manifest.items() if k != "digest"}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def seal(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the hashes of every file and the digest, and writes the manifest last."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: file_entry(folder / name) for name in names if name != MANIFEST}
    manifest = {**manifest, "schema": SCHEMA, "version": __version__, "files": files}
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, per 64 MiB."""
    return {"size": path.stat().st_size, "sha256": _hashes(path)}


def _hashes(path: Path) -> list[str]:
    def digest(start: int) -> str:
        h = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(start)
            left = CHUNK
            while left and (data := file.read(min(left, 1 << 20))):
                h.update(data)
                left -= len(data)
        return h.hexdigest()

    starts = range(0, max(1, path.stat().st_size), CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, starts))


def read_json(path: Path) -> Any:
    """Parsed JSON of bounded size and depth, in UTF-8. Raises EngineError."""
    if path.stat().st_size > MAX_JSON:
        raise EngineError(f"{path.name} is {path.stat().st_size >> 20} MiB, more than any engine needs; build it again")
    data = path.read_bytes()
    depth = 0
    for token in _BRACKETS.finditer(data):  # before parsing: the parser recurses
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise EngineError(f"{path.name} is nested more than {MAX_DEPTH} deep, so it is no engine file")
    try:
        found = json.loads(data.decode("utf-8"))  # of bytes the parser would guess another encoding
        if _SURROGATE.search(data):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise EngineError(f"{path.name} is not valid JSON ({reason}); the engine is damaged, build it again") from error
    return found


def inside(folder: Path, name: Any) -> Path:
    """The path of a file of the engine; EngineError for a name that leads out, a link, or a missing file.

    In a cache of the Hugging Face hub files are links to the blobs of their repository: these, and no others, serve.
    """
    try:
        file_name(name)
    except Unreadable as error:
        raise EngineError(str(error)) from error
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink() and not _is_blob(folder, path):
            raise EngineError(
                f"{name} in the engine is a link, and an engine holds plain files only; copy the folder with `cp -rL`"
            )
    if not path.is_file():
        raise EngineError(f"the engine lacks the file {name}; copy it again or build it again")
    return path


def _is_blob(folder: Path, link: Path) -> bool:
    """Whether a link in models--OWNER--NAME/snapshots/REVISION is to a plain file of the same repository's blobs."""
    place = folder.resolve()
    for snapshots in place.parents:
        if snapshots.name == "snapshots" and _REPOSITORY.fullmatch(snapshots.parent.name):
            target = Path(os.path.normpath(link.parent.resolve() / os.readlink(link)))
            return target.parent == snapshots.parent / "blobs" and target.is_file() and not target.is_symlink()
    return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with its digest checked and every field of its type. Raises EngineError."""
    if not folder.is_dir():
        raise EngineError(f"{folder} is no folder; `turbocompile optimize RECIPE -o {folder}` makes one")
    if not (folder / MANIFEST).is_file():
        raise EngineError(f"{folder} has no {MANIFEST}, so it is no engine; `turbocompile optimize` makes one")
    manifest = read_json(inside(folder, MANIFEST))
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise EngineError(f"{folder / MANIFEST} is no manifest of an engine; build it again")
    if manifest["schema"] > SCHEMA:
        raise EngineError(
            f"the engine was built by turbocompile {str(manifest.get('version'))[:40]} (schema "
            f"{reading.shown(manifest['schema'])}), and this version reads schema {SCHEMA}; upgrade turbocompile"
        )
    if manifest.get("digest") != hashlib.sha256(canonical(manifest)).hexdigest():
        raise EngineError(f"the manifest of {folder} was altered after the build (its digest differs); build it again")
    try:
        _check_manifest(manifest)
    except Unreadable as error:
        raise EngineError(f"the manifest of {folder} is damaged: {error}; build the engine again") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises Unreadable for a field of another type, and for any name of a file that is not in the folder."""
    whole(manifest["schema"], "schema", 1)
    files, modules, components = (table(entry(manifest, k, "it"), f"{k!r}") for k in ("files", "modules", "components"))
    for name, value in files.items():
        file_name(name)
        row = table(value, f"the entry of {name}")
        whole(entry(row, "size", f"the entry of {name}"), f"the size of {name}", 0)
        if not all(map(_HASH.fullmatch, texts(entry(row, "sha256", f"the entry of {name}"), f"the hashes of {name}"))):
            raise Unreadable(f"a hash of {name} is none")
    for module, value in modules.items():
        if not _MODULE.fullmatch(module):
            raise Unreadable(f"a module is named {reading.shown(module)}, and should have a plain name")
        _check_module(table(value, f"the entry of {module!r}"), f"the entry of {module!r}", files)
    for component, value in components.items():
        file_name(component, "a component")
        row = table(value, f"the component {component!r}")
        for field, found in row.items():
            text(found, f"{field[:40]!r} of the component {component!r}")
        file_name(row.get("folder", component), f"the folder of the component {component!r}")
    for name in ("version", "target", "task"):
        if name in manifest:
            text(manifest[name], f"{name!r}")
    for name in ("versions", "recipe"):
        if name in manifest:
            table(manifest[name], f"{name!r}")
    for name, value in manifest.get("versions", {}).items():
        text(value, f"the version of {name[:40]!r}")
    if manifest.get("boundary_ratio") is not None:
        reading.number(manifest["boundary_ratio"], "'boundary_ratio'")


def _check_module(row: dict[str, Any], what: str, files: Mapping[str, Any]) -> None:
    """Raises Unreadable for a field of a module's entry of another type, or a file that there is no hash of."""
    programs = table(entry(row, "programs", what), f"'programs' of {what}")
    if not programs:
        raise Unreadable(f"{what} has no program")
    groups = table(entry(row, "files", what), f"'files' of {what}")
    named = [*programs.values(), *items(entry(row, "weights", what), f"'weights' of {what}")]
    named += [name for shape, group in groups.items() for name in items(group, f"the files of {shape[:40]!r}")]
    for name in named:
        if file_name(name) not in files:
            raise Unreadable(f"{what} names {name}, which is not among the engine's files")
    for field in ("backend", "dtype"):
        text(entry(row, field, what), f"{field!r} of {what}")
    text(row.get("name", ""), f"'name' of {what}")
    table(row.get("config", {}), f"'config' of {what}")


def check_files(folder: Path, manifest: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
    """Compares size and hashes of the named files (all of them by default) with the manifest. Raises EngineError."""
    for name in names if names is not None else manifest["files"]:
        row = manifest["files"].get(name)
        path = inside(folder, name)
        if not isinstance(row, dict):
            raise EngineError(f"the engine's {name} is not in its manifest; build it again")
        if path.stat().st_size != row.get("size"):
            raise EngineError(
                f"the engine's {name} has {path.stat().st_size} bytes and should have {row.get('size')}; copy it again"
            )
        if _hashes(path) != row.get("sha256"):
            raise EngineError(f"the engine's {name} was altered (its hash differs); copy it again or build it again")


def check_strangers(folder: Path, manifest: Mapping[str, Any], place: str) -> None:
    """Raises EngineError for a file under `place` that the manifest does not name: a loader may look for any file."""
    found = {p.relative_to(folder).as_posix() for p in (folder / place).rglob("*") if not p.is_dir()}
    strangers = sorted(found.difference(manifest["files"]))
    if strangers:
        raise EngineError(f"the engine's {strangers[0]} is not in its manifest; remove it or build again")


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """Tensors are real ones on the CPU inside, whatever the caller set.

    A default device, a FakeTensorMode or inference mode around `load` would make weights without values, or ones that
    nobody can write to.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        yield


def load(folder: str | Path, *, device: torch.device | str | None = None, check: bool = True) -> Engine:
    """Opens an engine folder. Weights are mapped, not copied, until they are moved to a device.

    device: where to run; the CPU where nothing is said. check: compare the hashes of all files read (turn off only for
    a folder that was checked before).

    Raises EngineError in one sentence where the folder is damaged, altered, newer than this version, or hostile.
    """
    with _plain_torch():
        return _load(Path(folder), None if device is None else torch.device(device), check)


def _load(root: Path, device: torch.device | None, check: bool) -> Engine:
    manifest = read_manifest(root)
    report_name = "report.json"
    report = None
    if report_name in manifest["files"]:
        check_files(root, manifest, [report_name])
        report = Report.from_dict(read_json(inside(root, report_name)))
    tuning: Tuning = {}
    if TUNING in manifest["files"]:
        check_files(root, manifest, [TUNING])
        tuning = read_tuning(read_json(inside(root, TUNING)), f"{TUNING} of {root}")
    tuning = merge(tuning, read_cache(str(manifest["digest"])))  # measured on this machine, so it comes last
    engines: dict[str, Engine] = {}
    for module, row in manifest["modules"].items():
        engines[module] = _load_module(root, manifest, module, row, report, check)
    if not engines:
        raise EngineError(f"the engine {root} holds no module; build it again")
    for engine in engines.values():
        object.__setattr__(engine, "experts", engines)
        engine.tuning = tuning
        if device is not None:
            engine.move(device)
    return engines.get("transformer") or next(iter(engines.values()))


def _load_module(
    root: Path, manifest: Mapping[str, Any], module: str, row: Mapping[str, Any], report: Report | None, check: bool
) -> Engine:
    """row: the module's entry of the manifest, which `read_manifest` checked."""
    if row["backend"] not in BACKENDS:
        raise EngineError(f"there is no backend {row['backend'][:40]!r}; choose one of {', '.join(BACKENDS)}")
    dtype = parse_dtype(row["dtype"])
    files = {shape: list(group) for shape, group in row["files"].items()}
    if check:
        read = [*row["programs"].values(), *row["weights"], *(f for group in files.values() for f in group)]
        check_files(root, manifest, read)
    programs = {shape: from_json(read_json(inside(root, name))) for shape, name in row["programs"].items()}
    tensors = _read_weights(root, row["weights"])
    for name, emission in weight_plan(programs).items():
        found = tensors.get(name)
        if found is None:
            raise EngineError(f"the engine lacks the weight {name!r}; it is damaged, build it again")
        if tuple(found.shape) != tuple(emission.expr.shape) or found.dtype != emission.expr.dtype:
            raise EngineError(
                f"the engine's weight {name!r} is {list(found.shape)} {found.dtype}, and its program reads "
                f"{list(emission.expr.shape)} {emission.expr.dtype}; build it again"
            )
    return Engine(
        programs, tensors, name=row.get("name", module), config=row.get("config", {}), dtype=dtype, report=report,
        manifest=manifest, folder=root, backend=row["backend"], files=files,
    )  # fmt: skip


def _read_weights(root: Path, shards: Sequence[str]) -> dict[str, torch.Tensor]:
    """All tensors of the shards, mapped. Raises EngineError."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            with safe_open(inside(root, shard), framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    tensors[key] = file.get_tensor(key)
        except SafetensorError as error:
            raise EngineError(f"the engine's {shard} is no safetensors file ({error}); copy it again") from error
    return tensors


def module_entry(engine: Engine, programs: Mapping[str, str], shards: Sequence[str]) -> dict[str, Any]:
    """The manifest's entry of a module."""
    return {
        "name": engine.model_name,
        "backend": engine.backend,
        "dtype": dtype_name(engine.dtype),
        "programs": dict(programs),
        "weights": list(shards),
        "files": {name: list(files) for name, files in engine.files.items()},
        "config": dict(engine.config),
    }
