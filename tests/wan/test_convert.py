"""convert writes a folder that diffusers and turbocompile open, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from original_wan import random_state
from safetensors import safe_open
from safetensors.torch import load_file
from wan_files import WRITERS, with_projections

from turbocompile.cli import main
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.wan.convert import convert
from turbocompile.wan.keys import diffusers_name
from turbocompile.wan.opening import open_checkpoint
from turbocompile.wan.tensors import INDEX, SINGLE


@pytest.fixture(scope="module")
def state():
    return random_state(channels=128, ffn=256, text=256)


@pytest.fixture
def checkpoint(state, tmp_path):
    torch.save(state, tmp_path / "wan.pth")
    return tmp_path / "wan.pth"


def test_shards_are_of_the_size_asked_for_and_listed(checkpoint, state, tmp_path):
    from diffusers import WanTransformer3DModel

    whole = convert(checkpoint, tmp_path / "whole", "float32")
    parts = convert(checkpoint, tmp_path / "parts", "float32", shard=500_000)
    assert sorted(p.name for p in whole.folder.iterdir()) == ["config.json", SINGLE]
    index = json.loads((parts.folder / INDEX).read_text())
    files = sorted(parts.folder.glob("*.safetensors"))
    assert {p.name for p in files} == set(index["weight_map"].values())
    largest = max(4 * t.numel() for t in state.values())
    for path in files:
        with safe_open(path, "pt") as opened:
            held = sum(4 * opened.get_tensor(n).numel() for n in opened.keys())  # noqa: SIM118
        assert held <= max(500_000, largest)
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in state.values())
    a, b = (WanTransformer3DModel.from_pretrained(made.folder).state_dict() for made in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("original .pth", "float32"), ("ComfyUI fp8_scaled", "bfloat16"), ("GGUF Q8_0", "bfloat16")],
)
def test_the_dtype_is_the_checkpoints_own_where_none_is_asked_for(format, dtype, state, tmp_path):
    path, meant = WRITERS[format](tmp_path, state)
    done = convert(path, tmp_path / "out")
    assert done.dtype == dtype
    loaded = load_file(done.folder / SINGLE)
    name = "blocks.1.ffn.net.2.weight"
    assert torch.equal(loaded[name], meant["blocks.1.ffn.2.weight"].to(getattr(torch, dtype)))
    assert loaded["scale_shift_table"].dtype == torch.float32  # diffusers keeps it so


def test_projections_and_gates_lie_in_files_of_their_own_and_are_read_again(state, tmp_path):
    torch.save(with_projections(state), tmp_path / "sla.pth")
    done = convert(tmp_path / "sla.pth", tmp_path / "sla", "float32")
    assert dict(done.beside) == {"proj_l.safetensors": "the projections of SLA"}
    projections = load_file(done.folder / "proj_l.safetensors")
    assert set(projections) == {f"blocks.{i}.attn1.proj_l.{leaf}" for i in range(2) for leaf in ("weight", "bias")}
    assert not any("proj_l" in name for name in load_file(done.folder / SINGLE))
    again = open_checkpoint(done.folder, torch.float32).tensors
    assert torch.equal(again.get("blocks.1.attn1.proj_l.weight"), projections["blocks.1.attn1.proj_l.weight"])
    (tmp_path / "v").mkdir()
    path, _ = WRITERS["FastVideo VSA"](tmp_path / "v", state)
    done = convert(path, tmp_path / "vsa", "float32")
    gates = load_file(done.folder / "vsa.safetensors")
    assert torch.equal(gates["blocks.1.to_gate_compress.bias"], torch.full((128,), 1.0))
    assert any("VSA's gates" in note for note in done.notes)
    assert convert(done.folder, tmp_path / "twice").beside == done.beside


def test_a_folder_is_replaced_only_by_force_and_only_if_a_conversion_wrote_it(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(checkpoint, out)
    with pytest.raises(UnsupportedError, match="exists and is not empty; name another folder, or add --force"):
        convert(checkpoint, out)
    convert(checkpoint, out, "bfloat16", force=True)
    assert load_file(out / SINGLE)["blocks.0.ffn.net.2.weight"].dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="holds the checkpoint itself"):
        convert(out, out, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UnsupportedError, match=r"holds notes\.txt, which no conversion writes"):
        convert(checkpoint, out, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "wan.pth"]


def test_nothing_is_left_when_a_conversion_fails(checkpoint, tmp_path):
    def stop(stage: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["wan.pth"]


def test_progress_goes_from_nothing_to_all(checkpoint, tmp_path):
    seen = []
    convert(checkpoint, tmp_path / "out", progress=lambda stage, fraction: seen.append((stage, fraction)))
    assert {stage for stage, _ in seen} == {"convert"}
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_a_pipelines_folder_is_told_to_name_one_transformer(example, tmp_path):
    with pytest.raises(UnsupportedError, match=r"has the transformers transformer, transformer_2, .* name .*/transf"):
        convert(example("i2v-experts"), tmp_path / "out")
    assert convert(example("t2v"), tmp_path / "alone").tensors > 40
    made = convert(example("i2v-experts") / "transformer_2", tmp_path / "out")  # heads of 64, as its config.json says
    assert json.loads((made.folder / "config.json").read_text())["attention_head_dim"] == 64


def test_the_command_says_what_it_wrote_and_ends_with_2_on_bad_input(checkpoint, state, tmp_path):
    run = CliRunner().invoke
    done = run(main, ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.stderr
    assert f"folder: {tmp_path / 'out'} ({len(state)} tensors in bfloat16, 0.00 GB)" in done.stdout
    assert "convert" in done.stderr
    shown = run(main, ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--force", "--json"])
    assert json.loads(shown.stdout)["dtype"] == "float32"
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    for args in ([str(checkpoint), "-o", str(tmp_path / "out")], ["nowhere", "-o", str(tmp_path / "new")],
                 [str(tmp_path / "bad.safetensors"), "-o", str(tmp_path / "new")]):  # fmt: skip
        failed = run(main, ["convert", *args])
        assert failed.exit_code == 2
        assert failed.stderr.startswith("Error: ")
        assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_told_before_anything_is_written(state, tmp_path):
    torch.save({n: t for n, t in state.items() if n != "blocks.1.ffn.2.weight"}, tmp_path / "x.pth")
    with pytest.raises(EngineError, match=f"lacks {diffusers_name('blocks.1.ffn.2.weight')}"):
        convert(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
