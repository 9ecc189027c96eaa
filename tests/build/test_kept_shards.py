"""The shards of a build that was killed: the next build takes them, and every other end leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from turbocompile.build import kept_shards, write
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError
from turbocompile.ir import shards
from turbocompile.ir.evaluate import Evaluator
from turbocompile.recipe.schema import Recipe
from turbocompile.runtime.folder import read_manifest

LIMIT = 60_000  # bytes of a shard, of which the tiny model has several
FIELDS = {
    "model": {"preset": "wan-tiny"},
    "components": "none",
    "shapes": [{"height": 64, "width": 64, "num_frames": 5}],
    "target": "cpu",
    "verify": "off",
}
KILLED = """
import os, signal, sys
from pathlib import Path
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.ir import shards
from turbocompile.recipe.schema import Recipe
made, write = [], shards._write_shard

def killed(shard, path):
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(path)
    write(shard, path)

shards._write_shard = killed
real = shards._grouped
shards._grouped = lambda plan, size: real(plan, %d)
optimize_recipe(Recipe.from_dict(%r), Path(sys.argv[1]))
"""


@pytest.fixture
def small(monkeypatch):
    """Shards of LIMIT bytes; the names of those that are written."""
    grouped, one, made = shards._grouped, shards._write_shard, []
    monkeypatch.setattr(shards, "_grouped", lambda plan, size: grouped(plan, LIMIT))
    monkeypatch.setattr(shards, "_write_shard", lambda shard, path: (made.append(path.name), one(shard, path)))
    return made


def build(out, **changes):
    optimize_recipe(Recipe.from_dict({**FIELDS, **changes}), out)
    return {name: entry["sha256"] for name, entry in read_manifest(out)["files"].items() if name.endswith("tensors")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder in which a build of `engine` was killed behind its second shard."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED % (LIMIT, FIELDS), str(folder / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(p.name for p in folder.iterdir()) == [".engine.shards"]
    return folder


def copied(folder, target):
    subprocess.run(["cp", "-a", str(folder), str(target)], check=True)
    return target


def test_a_build_goes_on_from_the_shards_of_a_killed_one(killed, small, tmp_path):
    fresh = build(tmp_path / "fresh")
    count = len(small)
    assert count > 3
    small.clear()
    folder = copied(killed, tmp_path / "again")
    assert build(folder / "engine") == fresh
    assert len(small) == count - 2
    assert [p.name for p in folder.iterdir()] == ["engine"]


def test_shards_of_another_build_are_not_taken(killed, small, tmp_path):
    folder = copied(killed, tmp_path / "again")
    other = build(folder / "engine", model={"preset": "wan-tiny", "seed": 1})
    assert other == build(tmp_path / "fresh", model={"preset": "wan-tiny", "seed": 1})
    assert len(small) == 2 * len(other)
    assert [p.name for p in folder.iterdir()] == ["engine"]


def test_a_checkpoint_that_changed_is_another_build(tmp_path):
    item = SimpleNamespace(plan={}, constants={}, source=None)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1")
    recipe = Recipe.from_dict(FIELDS)
    before = kept_shards.fingerprint(recipe, {"transformer": item}, {"transformer": str(file)})
    assert before == kept_shards.fingerprint(recipe, {"transformer": item}, {"transformer": str(file)})
    os.utime(file, ns=(1, 1))
    assert before != kept_shards.fingerprint(recipe, {"transformer": item}, {"transformer": str(file)})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_nothing(tmp_path, monkeypatch, small, error):
    one = shards._write_shard

    def failing(shard, path):
        if small:
            raise error
        one(shard, path)

    monkeypatch.setattr(shards, "_write_shard", failing)
    with pytest.raises(type(error)):
        build(tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_two_builds_of_one_engine_do_not_share_a_folder(tmp_path):
    with kept_shards.kept_shards(tmp_path / "engine", "a") as first:
        (first / "x.safetensors").write_bytes(b"1")
        with kept_shards.kept_shards(tmp_path / "engine", "a") as second:
            assert second != first
            assert not list(second.glob("*.safetensors"))
        assert (first / "x.safetensors").exists()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_named_before_any_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(Evaluator, "__call__", lambda *a: pytest.fail("a weight was read"))
    monkeypatch.setattr(write, "write_shards", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(EngineError, match=r"takes 0\.1 GB more, and the disk has 0\.0 GB free"):
        build(tmp_path / "engine")
    assert not list(tmp_path.iterdir())
