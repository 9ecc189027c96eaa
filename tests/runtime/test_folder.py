"""Engine folders: their digest, and folders that are damaged or hostile."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbocompile.errors import EngineError
from turbocompile.files import MANIFEST
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import canonical, read_manifest, seal


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    subprocess.run(["cp", "-r", str(saved), str(tmp_path / "engine")], check=True)
    return tmp_path / "engine"


def reseal(folder, change=lambda m: None):
    """Makes a changed folder consistent again, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    for key in ("digest", "files"):
        manifest.pop(key, None)
    seal(folder, manifest)


def test_the_digest_is_that_of_the_canonical_manifest(saved):
    import hashlib

    manifest = json.loads((saved / MANIFEST).read_text())
    body = {k: v for k, v in manifest.items() if k != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert canonical(manifest) == text
    assert manifest["digest"] == hashlib.sha256(text).hexdigest()
    files = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}


def damage(folder, name, at=-3):
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


def program_file(folder):
    return next(iter(read_manifest(folder)["modules"]["transformer"]["programs"].values()))


def edit_program(folder, change):
    """Changes the program's JSON and makes the hashes agree."""
    path = folder / program_file(folder)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    reseal(folder)


def first_call(data):
    return next(n for n in data["graphs"]["shell"]["nodes"] if n["op"] == "call_function")


def truncate(folder):
    path = next(folder.glob("weights-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def link_out(folder):
    path = folder / program_file(folder)
    outside = folder.parent / "outside.json"
    path.rename(outside)
    path.symlink_to(outside)


def rename_program(name):
    def change(folder):
        reseal(folder, lambda m: m["modules"]["transformer"]["programs"].update(call=name))

    return change


def deep(folder):
    (folder / program_file(folder)).write_text("[" * 100_000 + "]" * 100_000)
    reseal(folder)


def alter_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("cpu", "sm90"))


def newer(folder):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"schema": 99}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def weights_of_another_shape(folder):
    path = next(folder.glob("weights-*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, path)
    reseal(folder)


def weights_missing(folder):
    path = next(folder.glob("weights-*.safetensors"))
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    reseal(folder)


HOSTILE = {
    "truncated weights": (truncate, "bytes and should have"),
    "altered weights": (lambda f: damage(f, next(f.glob("weights-*")).name), "was altered"),
    "altered program": (lambda f: damage(f, program_file(f)), "was altered"),
    "altered manifest": (alter_manifest, "was altered after the build"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json"),
    "manifest is a list": (lambda f: (f / MANIFEST).write_text("[]"), "no manifest of an engine"),
    "manifest is no JSON": (lambda f: (f / MANIFEST).write_text("{"), "not valid JSON"),
    "newer schema": (newer, "upgrade turbocompile"),
    "missing file": (lambda f: (f / program_file(f)).unlink(), "lacks the file"),
    "link": (link_out, "is a link"),
    "path out": (rename_program("../../secret.json"), "no plain relative name"),
    "absolute path": (rename_program("/etc/passwd"), "no plain relative name"),
    "absurd depth": (deep, "nested more than"),
    "weights of another shape": (weights_of_another_shape, r"'proj_out.bias' is \[3\]"),
    "weights missing": (weights_missing, "lacks the weight 'proj_out.bias'"),
    "foreign operator": (
        lambda f: edit_program(f, lambda d: first_call(d).update(target="aten.from_file.default")),
        "not an operator that an engine may hold",
    ),
    "Python operator": (
        lambda f: edit_program(f, lambda d: first_call(d).update(target="os.system")),
        "not an operator that an engine may hold",
    ),
    "other shapes": (
        lambda f: edit_program(f, lambda d: first_call(d).update(val=[[[1, 2, 3], "float32"]])),
        "and the engine records",
    ),
    "huge tensor": (
        lambda f: edit_program(f, lambda d: first_call(d).update(val=[[[1 << 40, 1 << 10], "float32"]])),
        "absurdly large",
    ),
    "arguments that do not compute": (
        lambda f: edit_program(f, lambda d: first_call(d).update(args=["x", {"dtype": "float32"}])),
        "does not compute",
    ),
    "unknown dtype": (
        lambda f: edit_program(f, lambda d: first_call(d).update(val=[[[1], "float4096"]])),
        "a dtype 'float4096'",
    ),
    "program is a list": (lambda f: edit_program(f, lambda d: d.clear()), "not readable"),
    "unknown backend": (
        lambda f: reseal(f, lambda m: m["modules"]["transformer"].update(backend="os")),
        "no backend 'os'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_folder_gets_one_sentence_and_is_left_as_it_is(folder, name):
    change, message = HOSTILE[name]
    change(folder)
    before = {p: os.stat(p, follow_symlinks=False).st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(EngineError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert {p: os.stat(p, follow_symlinks=False).st_mtime_ns for p in folder.rglob("*")} == before
