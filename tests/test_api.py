"""The Python interface: engines in diffusers' pipelines, lazy capture, torch.compile."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

import turbocompile
from turbocompile.build.inputs import calibration_inputs
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import CaptureError, EngineError, RecipeError, UnsupportedError, VerificationError
from turbocompile.wan.example import write_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("example") / "wan").parent


@pytest.fixture
def pipe(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **changes):
    """Latents of a guided call: the conditional and the unconditional forward at each step."""
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="latent", **{**options, **changes}).frames


def example_call(pipe, latents=(2, 4, 4)):
    channels = pipe.transformer.config.in_channels
    return {
        "hidden_states": torch.zeros(1, channels, *latents),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 512, pipe.transformer.config.text_dim),
    }


@pytest.fixture
def compiled(pipe):
    return turbocompile.optimize(pipe.transformer, kwargs=example_call(pipe), recipe={"passes": "off"})


def test_a_guided_pipeline_with_the_engine_is_eager_to_the_bit(pipe, compiled):
    expected = generate(pipe)
    pipe.transformer = compiled
    assert torch.equal(generate(pipe), expected)


def test_exact_rewrites_leave_a_guided_pipeline_at_rounding(pipe):
    expected = generate(pipe)
    pipe.transformer = turbocompile.optimize(pipe.transformer, kwargs=example_call(pipe))
    found = generate(pipe)
    # Two steps of two forwards of two layers, each within 1e-5 of its maximum, amplified by guidance 3: under 1e-4.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_casting_the_pipeline_does_not_change_the_engines_weights(pipe, compiled):
    before = {k: v.dtype for k, v in compiled.weights.items()}
    pipe.transformer = compiled
    pipe.to(torch.bfloat16)
    assert {k: v.dtype for k, v in pipe.transformer.weights.items()} == before
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16


def test_save_pretrained_says_that_it_leaves_the_engine_out_and_how_to_keep_it(pipe, compiled, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils

    said = []
    monkeypatch.setattr(pipeline_utils.logger, "warning", lambda text, *args: said.append(text))
    expected = generate(pipe)
    pipe.transformer = compiled
    pipe.save_pretrained(tmp_path / "saved")
    assert any("cannot be saved" in text and "engine.save(folder)" in text for text in said)
    pipe.transformer.save_pretrained(tmp_path / "engine")
    engine = turbocompile.load(tmp_path / "engine")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", transformer=engine)
    again.set_progress_bar_config(disable=True)
    # Weights that diffusers maps from a file start at other addresses than an engine's, and CPU matrix products sum in
    # another order then: two steps of rounding, amplified by guidance, instead of equal bits.
    assert (generate(again) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("lazy", [False, True])
def test_adapters_of_a_pipeline_with_an_engine_are_refused_in_a_sentence(pipe, compiled, lazy):
    """diffusers passes over what is no model of its own without a word."""
    pipe.transformer = turbocompile.optimize(pipe.transformer) if lazy else compiled
    for use in (
        pipe.disable_lora,
        pipe.enable_lora,
        lambda: pipe.fuse_lora(components=["transformer"]),
        lambda: pipe.delete_adapters("default"),
        pipe.unload_lora_weights,
        lambda: pipe.transformer.set_adapters("default"),
        lambda: pipe.transformer.load_lora_adapter({}),
    ):
        with pytest.raises(UnsupportedError, match="which is an engine: its adapters became part of its weights"):
            use()
    assert isinstance(pipe.transformer, torch.nn.Module)
    assert generate(pipe).shape[1] == 16


def test_model_cpu_offload_says_that_it_needs_an_accelerator_or_works(pipe, compiled):
    """On a machine without a GPU diffusers itself refuses; the engine must not be what fails."""
    expected = generate(pipe)
    pipe.transformer = compiled
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipe.enable_model_cpu_offload()
        assert torch.equal(generate(pipe), expected)


def test_offload_hooks_run_the_engine(pipe, compiled):
    """What enable_model_cpu_offload attaches to each model, on the one device that there is."""
    from accelerate import cpu_offload_with_hook

    expected = generate(pipe)
    pipe.transformer, hook = cpu_offload_with_hook(compiled, execution_device=torch.device("cpu"))
    found = generate(pipe)
    hook.offload()
    assert torch.equal(found, expected)


def test_without_an_example_the_first_call_is_captured_and_new_shapes_are_added(tiny):
    lazy = turbocompile.optimize(tiny)
    assert lazy.report is None
    with pytest.raises(EngineError, match="call the module once"):
        lazy.save("nowhere")
    for n in (8, 12, 8):
        x, t = torch.randn(1, n, 64), torch.rand(1)
        assert torch.allclose(lazy(x, t), tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))
    assert len(lazy.engine.programs) == 2
    assert lazy.report.to_dict()["passes"]


def swapped(model):
    for p in model.parameters():
        p.data = p.data * 2.0


def scaled(model):
    torch._foreach_mul_([p.data for p in model.parameters()], 2.0)


def through_numpy(model):
    for p in model.parameters():
        p.numpy()[...] *= 2.0


def written(model):
    for p in model.parameters():
        p.data.mul_(2.0)


def loaded(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [swapped, scaled, through_numpy, written, loaded])
def test_what_is_written_to_a_module_later_does_not_reach_its_engine(tiny, tmp_path, change):
    """Fused weights are copies anyway; were the others the module's memory, an engine would be of two states of it."""
    tiny.register_buffer("shift", torch.randn(64), persistent=False)
    tiny.forward = lambda x, t: type(tiny).forward(tiny, x + tiny.shift, t)
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    before = tiny(x, t)
    engine = turbocompile.optimize(tiny, (x, t), recipe={"passes": "off"})
    assert torch.equal(engine(x, t), before)
    change(tiny)
    tiny.shift.data.mul_(2.0)
    assert not torch.equal(tiny(x, t), before)
    for one in (engine, copy.copy(engine), copy.deepcopy(engine), turbocompile.load(engine.save(tmp_path / "engine"))):
        assert torch.equal(one(x, t), before)


def test_what_is_no_module_is_refused_in_a_sentence(tiny, folder):
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    scripted = torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4))
    for model, words in (
        (type(tiny), r"is a class: give it \w+\(\.\.\.\)"),
        (scripted, "what TorchScript made of it"),
        (lambda x, t: x, r"takes a torch\.nn\.Module, not function"),
        (str(folder), r"not str; for a folder there is turbocompile\.load"),
    ):
        with pytest.raises(CaptureError, match=words):
            turbocompile.optimize(model, (x, t))
    for wrong in (3, x, (x, t), ((x, t),), (x, {})):
        with pytest.raises(RecipeError, match=r"verify_args=\.\.\.\) is a pair"):
            turbocompile.optimize(tiny, (x, t), verify_args=wrong)


def test_an_engine_is_copied_and_not_pickled(tiny):
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    engine = turbocompile.optimize(tiny, (x, t))
    expected = engine(x, t)
    for twin in (copy.copy(engine), copy.deepcopy(engine)):
        assert torch.equal(twin(x, t), expected)
    with pytest.raises(EngineError, match=r"not pickled: save\(folder\)"):
        pickle.dumps(engine)


@pytest.mark.parametrize("shared", ["weight", "norm", "block"])
def test_blocks_that_share_weights_are_compiled(tiny, shared, tmp_path):
    first, second = tiny.blocks
    if shared == "weight":
        second.out.weight = first.out.weight
    elif shared == "norm":
        second.norm = first.norm
    else:
        tiny.blocks[1] = first
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    engine = turbocompile.optimize(tiny, (x, t))
    assert torch.allclose(engine(x, t), tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))
    assert torch.equal(turbocompile.load(engine.save(tmp_path / "engine"))(x, t), engine(x, t))


class Rotated(torch.nn.Module):
    """A mask, positions, and a complex table that is in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.inner, self.blocks = torch.nn.Linear(8, 8), torch.nn.ModuleList(zoo.PlainBlock(64) for _ in range(2))
        self.table = torch.polar(torch.ones(16, 4), torch.arange(64.0).reshape(16, 4))

    def forward(self, x, mask, positions):
        turned = torch.view_as_real(torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2))) * self.table[positions])
        x = torch.cat([turned.flatten(-2), x[..., 8:]], -1)
        score = self.inner(x[..., :8]) @ x[..., :8].transpose(1, 2) + (1 - mask[:, None]) * -10000.0
        x = score.softmax(-1) @ x
        for block in self.blocks:
            x = block(x)
        return x


def test_masks_and_complex_tables_are_verified_with_keys_to_see():
    torch.manual_seed(0)
    model = Rotated().eval().requires_grad_(False)
    given = torch.randn(1, 6, 64), torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.arange(6)[None]
    engine = turbocompile.optimize(model, given)
    assert torch.allclose(engine(*given), model(*given), rtol=0, atol=1e-5 * float(model(*given).abs().max()))


class Folded(torch.nn.Module):
    """Attention by hand with a mask, or by SDPA with heads in the batch and a norm of q and k."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand, self.norm = by_hand, torch.nn.RMSNorm(16)
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2).flatten(0, 1) for f in (self.q, self.k, self.v))
        if self.by_hand:
            q, k, v = (t.unflatten(0, (-1, 4)) for t in (q, k, v))
            y = (q @ k.mT * 0.25 + mask).softmax(-1) @ v
        else:
            y = torch.nn.functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v).unflatten(0, (-1, 4))
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("by_hand", [False, True])
def test_heads_in_the_batch_and_masks_under_sage(by_hand):
    torch.manual_seed(0)
    model = Folded(by_hand).eval().requires_grad_(False)
    given = torch.randn(2, 10, 64), torch.randn(10, 10)
    engine = turbocompile.optimize(model, given)
    assert torch.allclose(engine(*given), model(*given), rtol=0, atol=1e-5 * float(model(*given).abs().max()))
    if by_hand:
        recipe = {"passes": {"attention": "sage"}}
        program = turbocompile.optimize(model, given, target="sm90", recipe=recipe).programs["call"]
        nodes = [n for sub in program.graphs.values() for n in sub.graph.nodes]
        assert any("scaled_dot_product_attention" in str(n.target) for n in nodes)


def test_an_integer_input_takes_no_fractions():
    class Looked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(1000, 4)

        def forward(self, x, t):
            return x * self.table(t)

    engine = turbocompile.optimize(Looked().eval(), (torch.randn(2, 4), torch.tensor([3, 7])))
    x = torch.randn(2, 4)
    assert torch.equal(engine(x, torch.tensor([3.0, 7.0])), engine(x, torch.tensor([3, 7])))
    with pytest.raises(CaptureError, match="numbers that are no integers"):
        engine(x, torch.tensor([3.7, 7.2]))


class Indexed(torch.nn.Module):
    """Rows of tables by indices that the caller gives; of one table there is one row."""

    def __init__(self):
        super().__init__()
        self.style, self.table = torch.nn.Embedding(1, 8), torch.nn.Embedding(6, 8)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, style, rows):
        return self.linear(x) + self.style(style)[:, None] + self.table.weight[rows]


@pytest.mark.parametrize("rows", [[[3, 5], [0, 1]], [[0, 0], [0, 0]]])
def test_rewrites_are_measured_on_the_indices_of_the_example(rows):
    model = Indexed().requires_grad_(False)
    call = (torch.randn(2, 2, 8), torch.zeros(2, dtype=torch.int64), torch.tensor(rows))
    engine = turbocompile.optimize(model, call)
    assert torch.allclose(engine(*call), model(*call), atol=1e-6)
    lazy = turbocompile.optimize(model)
    for length in (1, 2):  # the second compilation measures on the first call's indices
        part = (call[0][:, :length], call[1], call[2][:, :length])
        assert torch.allclose(lazy(*part), model(*part), atol=1e-6)


def test_what_is_all_zeros_in_the_example_is_measured_as_ones_where_the_model_takes_them():
    class Moved(torch.nn.Module):
        def forward(self, x, positions):
            return x * positions.cos()[..., None]

    call = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)
    program = capture(Moved(), call)
    inputs = calibration_inputs(program, ModuleTensors(Moved()), None, call)
    assert torch.equal(inputs.calls[0][1], torch.ones(1, 4, dtype=torch.int64))
    masked = call[0], torch.tensor([[1, 2, 0, 0]])
    assert torch.equal(calibration_inputs(program, ModuleTensors(Moved()), None, masked).calls[0][1], masked[1])


def test_a_mask_that_hides_all_keys_of_a_token_is_measured_as_ones():
    class Padded(torch.nn.Module):
        def forward(self, x, mask):
            both = mask[:, None, :, None] & mask[:, None, None, :]
            return torch.where(both, x @ x.transpose(-1, -2), -torch.inf).softmax(-1) @ x

    model, call = Padded(), (torch.randn(1, 2, 4, 8), torch.tensor([[True, True, True, False]]))
    program = capture(model, call)
    assert calibration_inputs(program, ModuleTensors(model), None, call).calls[0][1].all()
    engine = turbocompile.optimize(model, call)
    assert torch.allclose(engine(*call), model(*call), atol=1e-6, equal_nan=True)


def test_a_model_that_does_not_take_random_inputs_says_so():
    class Looked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(4, 8)

        def forward(self, x):
            return self.table((x * 1e6).long())

    with pytest.raises(VerificationError, match=r"cannot be computed on random inputs.*verify: off"):
        turbocompile.optimize(Looked(), (torch.zeros(2, 3),))
    engine = turbocompile.optimize(Looked(), (torch.zeros(2, 3),), recipe={"verify": "off"})
    assert engine(torch.zeros(2, 3)).shape == (2, 3, 8)


def test_a_report_says_what_each_pass_did(tiny):
    engine = turbocompile.optimize(tiny, (torch.randn(1, 8, 64), torch.rand(1)))
    passes = engine.report.to_dict()["passes"]
    for row in passes.values():
        assert row["sites"] == row["rewritten"] + sum(s.get("count", 1) for s in row["skipped"])
        assert (row["error"] is None) == (row["error_reason"] is not None)


def test_a_wrong_option_or_call_is_one_sentence(tiny):
    args = (torch.randn(1, 8, 64), torch.rand(1))
    with pytest.raises(RecipeError, match="attention"):
        turbocompile.optimize(tiny, args, recipe={"passes": {"attentoin": "sage"}})
    with pytest.raises(RecipeError, match="backend must be one of triton, onnx, tensorrt"):
        turbocompile.optimize(tiny, args, backend="cuda")
    with pytest.raises(CaptureError, match="does not fit"):
        turbocompile.optimize(tiny, args[:1])


def test_the_custom_dit_example_rewrites_every_block_and_stays_exact(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "custom_dit.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "engine")], capture_output=True, text=True, check=True, timeout=900
    )
    error = float(re.search(r"largest difference to the model: (\S+)", done.stdout)[1])
    assert error <= 1e-5
    passes = turbocompile.load(tmp_path / "engine").report.to_dict()["passes"]
    depth = 4
    assert (
        passes["rope"]["rewritten"] == passes["adaln"]["rewritten"] == passes["residual_norm"]["rewritten"] == 2 * depth
    )
    assert passes["attention"]["rewritten"] == passes["qk_norm_rope"]["rewritten"] == depth
