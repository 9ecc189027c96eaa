"""Capture: what a Program holds, that it equals eager, and what is said where a model cannot be captured."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib.util
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from turbocompile.backends.triton import compile_program

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import CaptureError
from turbocompile.ir import signature as sig
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import SHELL, call
from turbocompile.ir.serialize import _signature, _signature_json
from turbocompile.ir.weights import Load


def run(program, model, args=(), kwargs=None):
    """The Program's answer to a call, with the module's weights."""
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    weights = {name: evaluate(e.expr, e.prefix) for name, e in weight_plan({"call": program}).items()}
    tensors, wrapped = sig.bind(program.signature, args, kwargs or {})
    flat = compile_program(program, weights, torch.device("cpu"))(*sig.cast(program.signature, tensors))
    return sig.wrap_output(program.signature, flat, wrapped)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y)


class Small(nn.Module):
    """A model with nothing of Wan's: options in kwargs, a dataclass result."""

    @dataclasses.dataclass
    class Result:
        sample: torch.Tensor
        extra: torch.Tensor | None = None

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(depth))
        self.register_buffer("table", torch.randn(8, 32), persistent=False)

    def forward(self, x, t=None, *, options=None, return_dict=True):
        x = x + self.table[: x.shape[1]]
        if t is not None:
            x = x + t.float().sin()[:, None, None]
        if options is not None:
            x = x * options["gain"]
        for block in self.blocks:
            x = block(x)
        return Small.Result(x) if return_dict else (x,)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_blocks_are_cut_once_per_kind_and_the_answer_is_the_models_to_the_bit(wan, wan_call, depth):
    model, inputs = wan(num_layers=depth), wan_call()
    program = capture(model, kwargs=inputs)
    assert list(program.graphs) == [SHELL, "blocks"]
    assert [c.prefix for c in program.calls()] == [f"blocks.{i}." for i in range(depth)]
    assert {c.phase for c in program.calls()} == {"step"}
    assert torch.equal(run(program, model, kwargs=inputs).sample, model(**inputs).sample)


def test_rope_tables_move_into_the_block_by_their_own_name(wan, wan_call):
    program = capture(wan(), kwargs=wan_call())
    weights = program.graphs["blocks"].weights
    assert {"rope.freqs_cos", "rope.freqs_sin"} <= set(weights)
    assert set(program.constants) == {"rope.freqs_cos", "rope.freqs_sin"}
    assert weights["attn1.to_q.weight"] == Load(".attn1.to_q.weight", (128, 128), torch.float32)
    assert len(program.graphs["blocks"].inputs()) == 3  # tokens, modulation, text: no table comes from the shell


def test_no_device_is_left_in_the_graph(wan, wan_call):
    program = capture(wan(), kwargs=wan_call())
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            assert not any(isinstance(a, torch.device) for a in [*node.args, *node.kwargs.values()])


@pytest.mark.parametrize("form", ["keep_in_float32", "all"])
def test_both_bf16_forms_are_equal_to_eager(wan, wan_call, form):
    model, inputs = wan().to(torch.bfloat16), wan_call(dtype=torch.bfloat16)
    if form == "keep_in_float32":  # what from_pretrained(torch_dtype=bfloat16) gives
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in model._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == ({torch.bfloat16, torch.float32} if form == "keep_in_float32" else {torch.bfloat16})
    program = capture(model, kwargs=inputs)
    assert torch.equal(run(program, model, kwargs=inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize(
    ("changes", "channels", "image"), [({"in_channels": 36}, 36, False), ({"in_channels": 36}, 36, True)]
)
def test_image_to_video_models_are_equal_to_eager(wan, wan_call, changes, channels, image):
    if image:
        changes = {**changes, "image_dim": 24, "added_kv_proj_dim": 128, "pos_embed_seq_len": None}
    model = wan(**changes)
    inputs = wan_call(channels=channels, text=512)
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 257, 24)
    program = capture(model, kwargs=inputs)
    assert program.count("blocks") == 2
    assert torch.equal(run(program, model, kwargs=inputs).sample, model(**inputs).sample)


def test_image_tokens_beside_another_text_length_than_512_are_refused(wan, wan_call):
    model = wan(in_channels=36, image_dim=24, added_kv_proj_dim=128, pos_embed_seq_len=None)
    inputs = {**wan_call(channels=36, text=256), "encoder_hidden_states_image": torch.randn(1, 257, 24)}
    with pytest.raises(CaptureError, match="exactly 512 text tokens, and the call has 256"):
        capture(model, kwargs=inputs)


def test_parameters_need_no_memory(wan, wan_call):
    with torch.device("meta"):
        model = wan()
    model.rope = wan().rope  # buffers that are in no checkpoint must be real
    program = capture(model, kwargs={k: v.to("meta") for k, v in wan_call().items()})
    assert program.count("blocks") == 2


def test_meta_buffers_that_are_in_no_checkpoint_are_named(wan, wan_call):
    with torch.device("meta"):
        model = wan()
    with pytest.raises(CaptureError, match=r"freqs_cos.*meta device"):
        capture(model, kwargs=wan_call())


def test_a_two_dimensional_timestep_is_captured_per_token(wan, wan_call):
    model, inputs = wan(), wan_call()
    tokens = 3 * 4 * 4
    inputs["timestep"] = torch.rand(1, tokens) * 1000
    program = capture(model, kwargs=inputs)
    assert torch.equal(run(program, model, kwargs=inputs).sample, model(**inputs).sample)


def test_any_spelling_of_the_call_and_any_timestep_dtype(wan, wan_call):
    model, inputs = wan(), wan_call()
    inputs["timestep"] = torch.tensor([500])
    program = capture(model, kwargs=inputs)
    expected = model(**inputs).sample
    latents, t, text = inputs.values()
    assert program.signature.inputs[1].dtype == torch.float32
    for args, kwargs in [
        ((latents, t, text), {}),
        ((latents,), {"encoder_hidden_states": text, "timestep": t.float()}),
        ((), {"timestep": t.double(), "encoder_hidden_states": text, "hidden_states": latents}),
        ((latents, t, text, None, True), {}),
    ]:
        assert torch.equal(run(program, model, args, kwargs).sample, expected)
    as_tuple = run(program, model, (latents, t, text), {"return_dict": False})
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected)


def test_a_hand_written_model_with_options_and_a_dataclass_result():
    model = Small().eval()
    args, kwargs = (torch.randn(2, 8, 32),), {"t": torch.tensor([3, 4]), "options": {"gain": 0.5}}
    program = capture(model, args, kwargs)
    result = run(program, model, args, kwargs)
    assert isinstance(result, Small.Result)
    assert result.extra is None
    assert torch.equal(result.sample, model(*args, **kwargs).sample)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"gain": 2.0}}, "captured with options.gain=0.5, and got 2.0"),
        ({"options": None}, "captured with options="),
        ({"options": {"gain": 0.5}, "t": torch.ones(2)}, "captured without the tensor 't'"),
        ({"options": {"gain": 0.5}, "colour": 1}, "does not fit .*colour"),
    ],
)
def test_a_call_that_differs_from_the_captured_one_is_refused(kwargs, message):
    program = capture(Small(), (torch.randn(2, 8, 32),), {"options": {"gain": 0.5}})
    with pytest.raises(CaptureError, match=message):
        sig.bind(program.signature, (torch.randn(2, 8, 32),), kwargs)


def test_another_dtype_is_refused_and_named():
    program = capture(Small(), (torch.randn(2, 8, 32),))
    tensors, _ = sig.bind(program.signature, (torch.randn(2, 8, 32).half(),), {})
    with pytest.raises(CaptureError, match=r"'x' in torch.float32, and got torch.float16"):
        sig.cast(program.signature, tensors)


class Caching(nn.Module):
    """Keeps a table in a helper that is no module, made at the first call: capture must not leave a fake one in it."""

    class Table:
        value: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = Caching.Table()

    def forward(self, x):
        if self.table.value is None:
            self.table.value = torch.arange(4, dtype=torch.float32)
        return self.linear(x) + self.table.value


def test_the_source_model_is_left_as_it_was():
    model, x = Caching(), torch.randn(2, 4)
    state = copy.deepcopy(model.state_dict())
    program = capture(model, (x,))
    assert model.table.value is None
    assert all(
        torch.equal(v, state[k]) and v.requires_grad == state[k].requires_grad for k, v in model.state_dict().items()
    )
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(run(program, model, (x,)), model(x))


class Branching(nn.Module):
    def forward(self, x):
        if bool(x.sum() > 0):
            return x
        return -x


class Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x):
        return x * self.inner(x).tolist()[0]


@pytest.mark.parametrize("model", [Branching(), Listing()])
def test_a_model_that_cannot_be_captured_names_the_module_and_the_line(model):
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(3),))
    message = str(caught.value)
    assert "\n" not in message
    assert "Branching" in message
    assert "test_export.py:" in message
    assert "value" in message


def test_a_line_is_named_wherever_the_models_file_lies(tmp_path):
    """torch's own files are those of its package, not of every folder of that name."""
    path = tmp_path / "torch" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "import torch\n\n\nclass Mine(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x if x.sum() > 0 else -x\n"
    )
    spec = importlib.util.spec_from_file_location("mine", path)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    with pytest.raises(CaptureError, match=r"at Mine, .*torch/mine\.py:6"):
        capture(mine.Mine(), (torch.randn(3),))


def test_autocast_around_the_capture_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="autocast"):
        capture(Small(), (torch.randn(2, 8, 32),))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


def test_a_model_that_changes_its_own_buffers_is_refused():
    with pytest.raises(CaptureError, match="count"):
        capture(InPlace(), (torch.randn(3),))


class NoGradInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            return self.linear(x).relu()


def test_regions_without_gradients_are_inlined():
    model, x = NoGradInside(), torch.randn(2, 8)
    assert torch.equal(run(capture(model, (x,)), model, (x,)), model(x))


class Unlike(nn.Module):
    """Nothing repeats: the shell is the whole graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return {"y": x}


def test_where_nothing_repeats_the_shell_is_the_whole_graph():
    model, x = Unlike(), torch.randn(2, 8)
    program = capture(model, (x,))
    assert list(program.graphs) == [SHELL]
    assert torch.equal(run(program, model, (x,))["y"], model(x)["y"])


class TwoStreams(nn.Module):
    """Two lists of blocks of different kinds, and one block that is larger than its siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(32, 2) for _ in range(3))
        self.second = nn.ModuleList([Block(32, 4), Block(32, 4), Block(32, 2)])

    def forward(self, x):
        for block in [*self.first, *self.second]:
            x = block(x)
        return x


def test_every_kind_of_block_has_one_graph():
    model, x = TwoStreams(), torch.randn(1, 6, 32)
    program = capture(model, (x,))
    assert [program.count(g) for g in program.graphs if g != SHELL] == [3, 2, 1]
    assert all(n.target is not call for g, s in program.graphs.items() if g != SHELL for n in s.graph.nodes)
    assert torch.equal(run(program, model, (x,)), model(x))


class Mode(enum.Enum):
    HALF = 0.5
    DOUBLE = 2.0


class Defaults(nn.Module):
    def forward(self, x, gains=(3.0, 2.0), mode=Mode.DOUBLE, *, skip=[1], options={"shift": 1.0}):  # noqa: B006
        for i, gain in enumerate(gains):
            if i not in skip:
                x = x * gain
        return x * mode.value + options["shift"]


def test_arguments_left_out_have_the_models_own_defaults():
    """Containers of plain values are data; what is none, as an enum, stays left out."""
    model, x = Defaults(), torch.randn(2, 3)
    program = capture(model, (x,))
    expected = model(x)
    assert torch.equal(expected, x * 6 + 1)
    assert torch.equal(run(program, model, (x,)), expected)
    assert torch.equal(run(program, model, (x, (3.0, 2.0)), {"skip": [1], "options": {"shift": 1.0}}), expected)
    for other in ({"gains": (3.0, 1.0)}, {"gains": [3.0, 2.0]}, {"skip": []}, {"options": {"shift": 0.0}}):
        with pytest.raises(CaptureError, match="compile it for that value"):
            run(program, model, (x,), other)
    with pytest.raises(CaptureError, match="captured with mode=its default"):
        run(program, model, (x,), {"mode": Mode.HALF})
    signature = program.signature
    assert _signature(json.loads(json.dumps(_signature_json(signature)))) == signature


class Returns(nn.Module):
    """`return_dict` of a meaning of its own: more results, and not by default."""

    def __init__(self, default: bool) -> None:
        super().__init__()
        if default:
            self.forward = lambda x, return_dict=True: self.results(x, return_dict)

    def forward(self, x, return_dict=False):
        return self.results(x, return_dict)

    def results(self, x, return_dict):
        return {"sample": x * 2, "more": x * 3} if return_dict else x * 2


@pytest.mark.parametrize("default", [False, True])
def test_a_return_dict_of_another_meaning_is_an_argument_like_any_other(default):
    model, x = Returns(default), torch.randn(2, 3)
    for given in ({}, {"return_dict": True}, {"return_dict": False}):
        program = capture(model, (x,), given)
        found, expected = run(program, model, (x,), given), model(x, **given)
        assert type(found) is type(expected)
        if isinstance(expected, dict):
            assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}
        else:
            assert torch.equal(found, expected)
    program = capture(model, (x,), {"return_dict": True})
    with pytest.raises(CaptureError, match="captured with return_dict=True"):
        run(program, model, (x,), {"return_dict": False})


class Masked(nn.Module):
    """Two equal constants, one of which goes when the block is cut out, and a region without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(2))

    def forward(self, x, mask):
        x = torch.where(mask, x, torch.tensor(-2.0))
        with torch.autocast("cpu", enabled=False):
            x = x.float() * 2
        for block in self.blocks:
            x = block(x)
        return torch.where(mask, x, torch.tensor(-2.0))


def test_equal_constants_and_a_region_without_autocast():
    model, inputs = Masked(), (torch.randn(1, 6, 32), torch.rand(1, 6, 32) > 0.5)
    program = capture(model, inputs)
    assert "blocks" in program.graphs
    assert torch.equal(run(program, model, inputs), model(*inputs))


class Placed(nn.Module):
    """Makes a tensor in its forward and fills it through `.data`, as CogVideoX makes its positions."""

    def forward(self, x):
        rows = torch.arange(x.shape[1], dtype=torch.float32)[:, None] + x[:1, :1, :1].sum()
        made = rows.new_zeros(1, x.shape[1] + 2, x.shape[2])
        made.data[:, 2:].copy_(rows.expand(x.shape[1], x.shape[2]))
        return x + made[:, 2:] + made[:, :1]


def test_a_write_through_data_is_in_the_graph():
    model, x = Placed(), torch.randn(2, 5, 4)
    program = capture(model, (x,))
    y = torch.randn(2, 5, 4)
    assert torch.equal(run(program, model, (y,)), model(y))


class Lengths(nn.Module):
    def forward(self, x, mask):
        return x[:, : max(set(mask.sum(1).tolist()))]


def test_a_length_read_from_a_mask_is_explained_as_a_tensors_value():
    with pytest.raises(CaptureError, match="decides by a tensor's value"):
        capture(Lengths(), (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.int64)))
