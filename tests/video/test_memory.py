"""Videos under a memory plan: the same bits, parts that are where the plan wants them, sentences for a full GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import UnsupportedError
from turbocompile.recipe.presets import Geometry
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.runtime import planned
from turbocompile.runtime.cuda_allocator import MIB
from turbocompile.runtime.memory_plan import MemoryPlan
from turbocompile.video import memory
from turbocompile.video.components import borrowed, layers_streamed, where
from turbocompile.video.memory import part_needs
from turbocompile.video.session import generate

SIZE = {"height": 64, "width": 64, "num_frames": 5}
PROMPT = "a cat walking on the beach"
pytestmark = pytest.mark.filterwarnings("ignore:the weights are synthetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engines") / "experts"
    fields = {"target": "cpu", "passes": "off", "verify": "off"}
    model = {"preset": "wan-tiny-i2v-experts", "config": {"num_layers": 4}}
    optimize_recipe(Recipe.from_dict({"model": model, "shapes": [SIZE], **fields}), made)
    return made


@pytest.fixture(scope="module")
def picture():
    from PIL import Image

    return Image.new("RGB", (64, 64), (200, 60, 10))


@pytest.fixture
def on_cpu(monkeypatch):
    """Plans are made for the CPU as if it were a GPU of the asked size."""
    monkeypatch.setattr(planned, "memory_budget", lambda vram, device: vram)
    monkeypatch.setattr(planned, "host_bandwidth", lambda device: 25e9)


@pytest.mark.parametrize("size", [600 * MIB, 420 * MIB])
def test_a_planned_video_has_the_bits_of_an_unplanned_one(folder, picture, on_cpu, size, monkeypatch):
    expected = generate(folder, PROMPT, image=picture, seed=3, device="cpu")
    engine, said = turbocompile.load(folder), []
    made = generate(engine, PROMPT, image=picture, seed=3, vram=size, say=said.append)
    assert torch.equal(made.video, expected.video)
    assert said == made.memory.sentences()
    assert made.memory.peak <= size
    assert "plan" in made.timings
    first = engine.memory
    again = generate(engine, PROMPT, image=picture, seed=3)
    assert torch.equal(again.video, expected.video)
    assert engine.memory is first  # the plan is kept
    assert set(engine.kept) == {"tokenizer", "text_encoder", "vae"}  # and the models, in host memory


def test_the_needs_of_the_parts_are_those_of_their_files(folder):
    engine = turbocompile.load(folder)
    table = engine.manifest["components"]
    needs = part_needs(folder / "components", table, Geometry(), Shape(**SIZE), True, False)
    assert set(needs) == {"vae", "text_encoder"}
    for name, need in needs.items():
        stored = sum(p.stat().st_size for p in (folder / "components" / name).glob("*.safetensors"))
        assert need.weights == pytest.approx(stored, rel=0.1)
        assert need.working > 0
    assert needs["vae"].stages == ("image", "decode")
    assert needs["text_encoder"].block < needs["text_encoder"].weights


def test_layers_that_pass_through_a_device_give_the_same_bits():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=5, num_heads=4)
    encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    tokens = torch.randint(0, 100, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    expected = encoder(tokens, mask).last_hidden_state
    own = {name: p.data_ptr() for name, p in encoder.named_parameters()}
    with layers_streamed(encoder, torch.device("cpu")):
        for _ in range(2):
            assert torch.equal(encoder(tokens, mask).last_hidden_state, expected)
    assert {name: p.data_ptr() for name, p in encoder.named_parameters()} == own
    assert not hasattr(encoder, "runs_on")
    assert torch.equal(encoder(tokens, mask).last_hidden_state, expected)


def test_what_is_borrowed_comes_back_after_an_error():
    part = torch.nn.BatchNorm1d(4)
    own = [t.data_ptr() for t in (*part.parameters(), *part.buffers())]
    with contextlib.suppress(ZeroDivisionError), borrowed(list(part.parameters()), [part], torch.device("cpu")):
        part.weight.data = torch.zeros(4)
        part.running_mean = torch.zeros(4)
        raise ZeroDivisionError
    assert [t.data_ptr() for t in (*part.parameters(), *part.buffers())] == own


def test_a_tokenizer_is_nowhere():
    with where(object(), "", MemoryPlan(0, {}, True), torch.device("cpu")):
        pass


def test_a_decoder_that_finds_no_memory_works_in_tiles(folder, picture, on_cpu, monkeypatch):
    engine, calls = turbocompile.load(folder), []
    decode = memory.wan_vae.decode

    def full(vae, latents):
        calls.append(vae.use_tiling)
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(vae, latents)

    monkeypatch.setattr(memory.wan_vae, "decode", full)
    with pytest.warns(RuntimeWarning, match="works in tiles of 256 pixels"):
        made = generate(engine, PROMPT, image=picture, vram=600 * MIB)
    assert calls == [False, False, True]
    assert made.video.shape == (1, 5, 64, 64, 3)


def test_a_full_gpu_is_a_sentence_and_the_next_video_is_made(folder, picture, on_cpu, monkeypatch):
    engine = turbocompile.load(folder)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(memory.wan_vae, "decode", full)
        with pytest.raises(UnsupportedError, match="the VAE ran out of the GPU's memory, even in tiles"):
            generate(engine, PROMPT, image=picture, vram=600 * MIB)
    assert generate(engine, PROMPT, image=picture).video.shape == (1, 5, 64, 64, 3)


def test_too_little_memory_says_what_would_do_before_any_step(folder, picture, on_cpu):
    with pytest.raises(UnsupportedError, match=r"needs .* on the card at this size.* may take 0\.1 GB.*--vram"):
        generate(folder, PROMPT, image=picture, vram=100 * MIB, device="cpu")


def test_a_size_without_a_unit_is_told_before_the_engine_is_read(tmp_path):
    with pytest.raises(UnsupportedError, match="vram: 12 has no unit"):
        generate(tmp_path / "none", PROMPT, vram="12")
