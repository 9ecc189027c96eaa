"""Every site is found and rewritten: counted from the modules of a model, not from the matcher.

Wan in its forms, and hand-written transformers in every style of tests/zoo.py.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from torch import nn
from turbocompile.passes import adaln

PASSES = Path(adaln.__file__).parent
INT8 = {"w8a8": {"format": "int8"}}


def wan_sites(model: nn.Module) -> dict[str, int]:
    """The sites of a WanTransformer3DModel by the names of its modules."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        inside = re.fullmatch(r"blocks\.\d+\.(.*)", name)
        here = inside.group(1) if inside else None
        if here in ("attn1", "attn2"):
            image = getattr(module, "add_k_proj", None) is not None
            found["attention"] += 1 + image
            found["qk_norm_rope"] += 1 + image
            found["fuse_qkv"] += 1 + image  # q, k, v; k and v of the text; k and v of the image
        if here in ("attn1", "attn2", "ffn"):
            found["residual_norm"] += 1
        found["gelu_quant"] += here == "ffn"
        found["adaln"] += here in ("norm1", "norm3") or name == "norm_out"
        if isinstance(module, nn.Linear):
            found["w8a8" if inside else "shell linears"] += 1
    return dict(found)


def check_sums(results) -> None:
    """Each site is rewritten or skipped with a reason."""
    for result in results.values():
        assert result.sites == result.rewritten + sum(count for _, _, count in result.skipped), result.name
        assert all(reason for _, reason, _ in result.skipped)


def check_wan(done) -> None:
    expected = wan_sites(done.model)
    assert {name: done.results[name].rewritten for name in expected if name in done.results} == {
        name: count for name, count in expected.items() if name in done.results
    }
    linears = done.results["w8a8"]
    assert linears.sites - linears.rewritten == expected["shell linears"]
    assert {site.split(":")[0] for site, _, _ in linears.skipped} == {"shell"}
    for name, result in done.results.items():
        if name in ("sla", "smooth"):  # nobody asked for them, which they say of each attention and each linear
            assert result.sites == sum(count for _, _, count in result.skipped) > 0
        elif name != "w8a8":
            assert result.sites == result.rewritten, (name, result.skipped)
    check_sums(done.results)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_wan_text_to_video(blocks, head_dim, wan, wan_call, rewrite):
    model = wan(num_layers=blocks, attention_head_dim=head_dim)
    done = rewrite(model, (), wan_call(), options=INT8)
    n = blocks
    assert {name: r.rewritten for name, r in done.results.items()} == {
        "norms": 0, "rope": 2 * n, "sla": 0, "smooth": 0, "attention": 2 * n, "fuse_qkv": 2 * n,
        "w8a8": 10 * n, "qk_norm_rope": 2 * n, "adaln": 2 * n + 1, "residual_norm": 3 * n, "gelu_quant": n,
        "norm_attention": 0,
    }  # fmt: skip
    assert sum(count for _, _, count in done.results["w8a8"].skipped) == 6
    check_wan(done)


def test_wan_rotates_self_attention_alone_and_gates_two_of_three_residuals(wan, wan_call, rewrite):
    done = rewrite(wan(), (), wan_call())
    (graph,) = [name for name in done.program.graphs if name != "shell"]
    assert [len(node.args[5]) for node in done.nodes("qk_norm_rope", graph)] == [3, 3, 0, 0]
    gates = [node.args[2] for op in ("residual_norm", "gated_residual") for node in done.nodes(op, graph)]
    assert [gate is not None for gate in gates] == [True, False, True]
    assert done.results["adaln"].rewrites[0].graph == "shell"


def image_call(wan_call, **more):
    call = wan_call(channels=36, text=512)
    return {**call, "encoder_hidden_states_image": torch.randn(1, 9, 24), **more}


def test_wan_image_to_video_with_image_tokens(wan, wan_call, rewrite, assert_same):
    model = wan(in_channels=36, image_dim=24, added_kv_proj_dim=128)
    call = image_call(wan_call)
    done = rewrite(model, (), call, options=INT8)
    for name in ("attention", "qk_norm_rope", "fuse_qkv"):
        assert done.results[name].rewritten == 3 * 2
    check_wan(done)
    exact = rewrite(model, (), call)
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    assert_same(exact.run(*(call[n] for n in names)), model(**call)[0])


def test_wan_image_to_video_by_channels(wan, wan_call, rewrite):
    check_wan(rewrite(wan(in_channels=36), (), wan_call(channels=36), options=INT8))


@pytest.mark.parametrize("kept", [True, False])
def test_wan_in_bfloat16_with_and_without_float32_parts(kept, wan, wan_call, rewrite):
    model = wan().to(torch.bfloat16)
    if kept:  # as from_pretrained(torch_dtype=bfloat16) loads it
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("time_embedder", "scale_shift_table", "norm2")):
                parameter.data = parameter.data.float()
    call = wan_call(dtype=torch.bfloat16)
    done = rewrite(model, (), call, options=INT8)
    check_wan(done)
    exact = rewrite(model, (), call)
    check_sums(exact.results)
    found, truth = exact.run(*call.values()), model(**call)[0]
    # Both round to bf16 (2^-9) some thirty times a block, at different places: their difference is random, of
    # sqrt(2 blocks * 30 * 2) roundings of 2^-9 / sqrt(3) each, 1.2% of the values; twice that is the bound.
    assert float((found.float() - truth.float()).norm() / truth.float().norm()) < 0.025


def test_wan_with_a_timestep_for_each_token(wan, wan_call, rewrite, assert_same):
    call = {**wan_call(), "timestep": torch.rand(1, 48) * 1000}
    model = wan()
    done = rewrite(model, (), call)
    assert {name: done.results[name].rewritten for name in ("adaln", "residual_norm")} == {
        "adaln": 5,
        "residual_norm": 6,
    }
    check_sums(done.results)
    assert_same(done.run(*call.values()), model(**call)[0])


def check_zoo(style, rewrite, assert_same) -> None:
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args)
    check_sums(done.results)
    expected = {**zoo.expected_sites(model), "w8a8": 0, "gelu_quant": 0}
    assert {name: done.results[name].rewritten for name in expected} == expected
    assert_same(done.run(*args), model(*args))


@pytest.mark.parametrize("name", zoo.GALLERY)
def test_hand_written_transformers(name, rewrite, assert_same):
    check_zoo(zoo.GALLERY[name], rewrite, assert_same)


@settings(max_examples=18, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(style=zoo.styles(depth=1))
def test_transformers_of_any_style(style, rewrite, assert_same):
    check_zoo(style, rewrite, assert_same)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(style=zoo.styles(depth=1))
def test_quantized_transformers_of_any_style(style, rewrite):
    model = zoo.build(style)
    done = rewrite(model, zoo.example(style), options={**INT8, "attention": {"kind": "sage"}})
    check_sums(done.results)
    expected = zoo.expected_sites(model)
    assert {name: done.results[name].rewritten for name in expected} == expected


def test_the_passes_know_no_model_by_name():
    names = (
        r"\bwan(?![a-z])|\bdit\b|flux|mochi|hunyuan|sd3|cogvideo|ltx|attn\d|blocks\.|to_[qkv]\b|to_out|ffn|diffusers"
    )
    for file in PASSES.glob("*.py"):
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", file.read_text())
        assert not re.search(names, code, re.IGNORECASE), file.name
