"""Engines with random edits of their JSON, every hash repaired: each is refused in one sentence, or runs.

`python tests/fuzz_engines.py 10000` builds small engines once and edits copies of them. An edit replaces, removes,
moves, repeats or renames values of the manifest, the programs, the report, the graphs or the tuning. Then the folder is
verified, explained, opened and called as its model is. The command prints how many ran and were refused, and every case
that ended otherwise with its seed; tests/test_hostile.py does some hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import turbocompile
from turbocompile.errors import TurbocompileError
from turbocompile.files import MANIFEST
from turbocompile.ir.allowed_ops import ALLOWED
from turbocompile.report.page import page
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import canonical, check_files, file_entry, read_manifest
from turbocompile.tools.explain import read_graph_views, read_report

SECONDS = 600  # after which a case counts as one that never ends, also on a slow and busy machine; most take 0.1
MEMORY = 12 << 30  # bytes of addresses that the process may take beyond what it has
REFUSED, RAN = "refused", "ran"
EXTREMES = [
    None, True, False, "", 0, -1, 1, 7, 1 << 31, -(1 << 31), (1 << 63) - 1, 1 << 63, -(1 << 63) - 1, 1 << 64, 10**400,
    1e308, -1e308, 1e-308, float("nan"), float("inf"), 0.5, "../../x", "/etc/passwd", "a" * 20_000, "\x1b[31m",
    "nodes", "float32", "int64", "float8_e4m3fn", "qint8", "placeholder", "output", "call", "blocks", [], [[]], {},
    [None], [-1], [0], [1 << 40], [1 << 20, 1 << 20], [0] * 40, list(range(2000)), {"a": {"b": []}}, {"node": "x"},
    {"float": "inf"}, {"float": "nan"}, {"dtype": "float64"}, {"dtype": "bool"}, {"complex": [1, 2]},
    {"container": "default", "keys": []}, {"container": "tuple", "keys": [0, 1]},
]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A small engine: its folder, the documents of it that are edited, and a call that its model takes."""

    folder: Path
    call: dict[str, Any]

    def documents(self) -> list[str]:
        found = [p.relative_to(self.folder).as_posix() for p in sorted(self.folder.rglob("*.json"))]
        return [name for name in found for _ in range(4 if name.startswith("programs/") else 1)]


# ----------------------------------------------------------------------------------------------------------- the models


class Attends(nn.Module):
    """A block of attention and an MLP, with a rotation, indices, a mask and arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("turn", torch.polar(torch.ones(8), torch.arange(8.0)), persistent=False)

    def forward(
        self, x: torch.Tensor, tokens: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0, more: Any = None
    ) -> dict[str, Any]:
        h = x + self.embed(tokens) * scale + timestep.sin()[:, None, None]
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        q = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (8, 2))) * self.turn).flatten(-2)
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        a = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        h = h + self.out(a)
        one, other = nn.functional.gelu(self.up(h)).chunk(2, -1)
        h = h + self.down(torch.cat([other, one], -1)).clamp(max=5.0)
        return {"sample": h, "pair": [h.mean(-1), torch.full((2,), 3.0) + torch.arange(2)]}


def attends(folder: Path, quantized: str = "off") -> Subject:
    """The small model as an engine; its linears in 8 bits where a format is given."""
    torch.manual_seed(0)
    call = {
        "x": torch.randn(2, 6, 32), "tokens": torch.randint(0, 16, (2, 6)), "timestep": torch.rand(2), "scale": 0.5,
        "more": {"a": (1, 2.0)},
    }  # fmt: skip
    passes: Any = "off" if quantized == "off" else {"w8a8": quantized}
    recipe = {"passes": passes, "verify": "off"}
    turbocompile.optimize(Attends().eval(), kwargs=call, recipe=recipe).save(folder)
    tuned = {"linears": {"NVIDIA H200: fp8 12x32 to 96, float32": {"kernel": "triton", "warps": 4, "promote": True}}}
    (folder / "tuning.json").write_text(json.dumps(tuned), encoding="utf-8")
    repair(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")), {"tuning.json"})
    return Subject(folder, call)


def wan(folder: Path, width: int = 32) -> Subject:
    """A Wan of two blocks with all rewrites, as a module."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=width, text_dim=32, freq_dim=64, ffn_dim=128,
        num_layers=2, rope_max_seq_len=64, cross_attn_norm=True,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.rand(1) * 1000,
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    turbocompile.optimize(model, kwargs=call, recipe={"verify": "off", "passes": {"w8a8": "int8"}}).save(folder)
    return Subject(folder, call)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "attends": attends,
    "fp8": lambda folder: attends(folder, "fp8"),
    "wan": wan,
}


# ------------------------------------------------------------------------------------------------------------ the edits


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """All (container, key) of a document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _places(value[key], found)
    return found


def edit(data: Any, rng: random.Random) -> str:
    """Changes one thing of a parsed document, in place; what was done."""
    places = _places(data, [])
    if not places:
        return "nothing"
    box, key = rng.choice(places)
    if rng.random() < 0.3:  # leaves are many, and containers matter as much
        inner = [(b, k) for b, k in places if isinstance(b[k], (dict, list))]
        box, key = rng.choice(inner or places)
    value = box[key]
    kind = rng.choice(EDITS)
    kind(box, key, value, places, rng)
    return f"{kind.__name__} at {key!r}"


def _extreme(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    box[key] = copy.deepcopy(rng.choice(EXTREMES))


def _near(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    """A value of the same type, a little or much off."""
    if isinstance(value, bool):
        box[key] = not value
    elif isinstance(value, int):
        box[key] = rng.choice([value + 1, value - 1, -value, value * 2, value << 20, value << 40, 0, float(value)])
    elif isinstance(value, float):
        box[key] = rng.choice([-value, value * 1e30, 0.0, 1e39, 7, str(value)])
    elif isinstance(value, str):
        box[key] = rng.choice([value + "x", value[:-1], value.upper(), value + "/../" + value, [value], len(value)])
    else:
        _extreme(box, key, value, places, rng)


def _another(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    other, place = rng.choice(places)
    box[key] = copy.deepcopy(other[place])


def _alike(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    """Another value that stands under the same key: an operator, a node, a dtype, a shape of another node."""
    same = [b[k] for b, k in places if k == key and type(b[k]) is type(value)]
    box[key] = copy.deepcopy(rng.choice(same))


def _operator(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    calls = [b for b, k in places if k == "target" and b.get("op") == "call_function"]
    if calls:
        rng.choice(calls)["target"] = rng.choice(list(ALLOWED))
    else:
        _near(box, key, value, places, rng)


def _argument(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    """Another value among an operator's arguments."""
    calls = [b for b, k in places if k == "args" and isinstance(b, dict) and b.get("op") == "call_function"]
    inner = _places(rng.choice(calls)["args"], []) if calls else []
    if not inner:
        _another(box, key, value, places, rng)
        return
    box, key = rng.choice(inner)
    _near(box, key, box[key], places, rng) if rng.random() < 0.6 else _extreme(box, key, box[key], places, rng)


def _remove(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    del box[key]


def _repeat(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    if isinstance(box, list):
        box.insert(rng.randrange(len(box) + 1), copy.deepcopy(value))
    else:
        box[str(key) + rng.choice(["_", "2", "/../x", "\x00"])] = copy.deepcopy(value)


def _reorder(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    if isinstance(value, list):
        rng.shuffle(value)
    elif isinstance(value, dict):
        found = list(value.items())
        rng.shuffle(found)
        value.clear()
        value.update(found)
    else:
        _near(box, key, value, places, rng)


def _swap(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    other, place = rng.choice(places)
    box[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(value)


def _rename(box: Any, key: Any, value: Any, places: Any, rng: random.Random) -> None:
    if isinstance(box, dict):
        box[rng.choice(["x", "", "forward", "class", "shell", "../../x", "2", "\ud800", key.upper()])] = box.pop(key)
    else:
        _remove(box, key, value, places, rng)


EDITS = [_extreme, _near, _near, _another, _alike, _alike, _operator, _argument, _argument]
EDITS += [_remove, _repeat, _reorder, _swap, _rename]


def repair(folder: Path, manifest: Any, changed: set[str]) -> None:
    """Writes the manifest with the hashes of the changed files and its digest, whatever it has become."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if isinstance(files, dict):
        files.update({name: file_entry(folder / name) for name in changed if (folder / name).is_file()})
    if isinstance(manifest, dict):
        import hashlib

        with contextlib.suppress(UnicodeEncodeError):  # half a character has no bytes, so there is no hash to repair
            manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def damaged(subject: Subject, target: Path, rng: random.Random) -> tuple[list[str], bool]:
    """A copy of the engine with one to three edits: what was done, and whether `explain` reads any of it.

    Files that stay as they are are links to them.
    """
    shutil.copytree(subject.folder, target, copy_function=os.link)
    done, parsed = [], {MANIFEST: json.loads((target / MANIFEST).read_text(encoding="utf-8"))}
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(subject.documents())
        if name not in parsed:
            parsed[name] = json.loads((target / name).read_text(encoding="utf-8"))
        root = [parsed[name]]  # the document itself may be replaced, too
        done.append(f"{name}: {edit(root if rng.random() < 0.02 else root[0], rng)}")
        parsed[name] = root[0] if root else None
    for name, data in parsed.items():
        (target / name).unlink()  # the link, not what it shares
        if name != MANIFEST:
            (target / name).write_text(json.dumps(data), encoding="utf-8")
    repair(target, parsed[MANIFEST], set(parsed) - {MANIFEST})
    return done, not all(d.startswith(("programs/", "tuning.json")) for d in done)


# ----------------------------------------------------------------------------------------------------------- the cases


class TooLong(BaseException):
    """A case that hangs."""


@contextlib.contextmanager
def deadline(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooLong inside after some seconds: a guard against work without end, and no measure of speed."""

    def late(signum: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use(folder: Path, call: dict[str, Any], explained: bool = True) -> str:
    """What `verify`, `explain`, `load` and a call do with a folder: RAN, or REFUSED where one of them says why not."""
    refused = False
    run = lambda f: load(f, check=False)(**copy.deepcopy(call))  # noqa: E731 (`_verify` compared the hashes)
    for step in (_verify, _explain, run) if explained else (_verify, run):
        try:
            step(folder)
        except TurbocompileError as error:
            if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2000:
                raise AssertionError(f"the message is no sentence: {str(error)[:300]!r}") from error
            refused = True
    return REFUSED if refused else RAN


def _verify(folder: Path) -> None:
    check_files(folder, read_manifest(folder))


def _explain(folder: Path) -> None:
    from rich.console import Console

    report = read_report(folder)
    Console(file=io.StringIO(), width=120).print(report.render())
    json.dumps(report.to_dict(), allow_nan=False).encode("utf-8")
    page(report, read_graph_views(folder), {}, None).encode("utf-8")


def case(subject: Subject, seed: int, scratch: Path) -> tuple[str, str]:
    """One edited engine: RAN, REFUSED or the kind of what it ended in otherwise; and what was done to it."""
    target = scratch / f"case-{seed}"
    done, explained = damaged(subject, target, random.Random(seed))
    try:
        with warnings.catch_warnings(), deadline(SECONDS):
            warnings.simplefilter("ignore")
            return use(target, subject.call, explained), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        last = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
        return last, f"seed {seed}: {'; '.join(done)}: {str(error)[:300]}"
    finally:
        shutil.rmtree(target, ignore_errors=True)


def run(subjects: list[Subject], seeds: range, scratch: Path) -> tuple[Counter[str], list[str]]:
    """How the cases ended, in turns on the subjects, and a line for each that neither ran nor was refused."""
    ended: Counter[str] = Counter()
    others = []
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        for seed in seeds:
            how, what = case(subjects[seed % len(subjects)], seed, scratch)
            ended[how] += 1
            if how not in (RAN, REFUSED):
                others.append(f"{how}: {what}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return ended, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        subjects = [make(root / name) for name, make in SUBJECTS.items()]
        ended: Counter[str] = Counter()
        last = options.first + options.cases
        for first in range(options.first, last, 100):
            some, others = run(subjects, range(first, min(first + 100, last)), root)
            ended += some
            print(*others, dict(ended), sep="\n", flush=True)


if __name__ == "__main__":
    main()
