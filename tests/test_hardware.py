"""The table of cards, and what it decides."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from asked import sage_speeds

from turbocompile import hardware
from turbocompile.errors import UnsupportedError
from turbocompile.hardware import GPUS, TARGETS, AttentionChoice, AttentionShape


def test_every_gpu_target_has_a_card_and_every_card_a_target():
    assert {hardware.gpu_of_target(t).target for t in TARGETS if t != "cpu"} == set(TARGETS) - {"cpu"}
    assert {gpu.target for gpu in GPUS.values()} <= set(TARGETS)
    assert hardware.gpu_of_target("cpu") is None


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_rates_are_dense_and_say_where_they_come_from(gpu):
    # 8-bit products run at two or four times the 16-bit rate on every tensor core; a sparse figure would double that.
    assert gpu.int8 / gpu.bf16 == pytest.approx(2, rel=0.01) or gpu.int8 / gpu.bf16 == pytest.approx(4, rel=0.01)
    assert gpu.fp8 is None or gpu.fp8 / gpu.bf16 == pytest.approx(2, rel=0.01)
    assert (gpu.fp8 is not None) == hardware.has_fp8(gpu.target)
    assert gpu.fp32 < gpu.bf16
    assert "NVIDIA" in gpu.source


def test_h100_has_the_figures_of_its_datasheet():
    gpu = hardware.find_gpu("h100")
    assert gpu.bf16 == pytest.approx(989e12, rel=1e-3)
    assert gpu.rate("fp8") == gpu.rate("int8") == pytest.approx(1979e12, rel=1e-3)
    assert gpu.bandwidth == pytest.approx(3.35e12)


@pytest.mark.parametrize(
    ("spelling", "key"),
    [("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("RTX 4090", "rtx4090"),
     ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA A100-SXM4-80GB", "a100"), ("rtx-3090", "rtx3090")],
)  # fmt: skip
def test_cards_are_found_in_any_spelling(spelling, key):
    assert hardware.find_gpu(spelling).key == key


@pytest.mark.parametrize(
    "name", ["H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 5090 D", "NVIDIA A100-SXM4-40GB", "V100"]
)
def test_a_card_that_only_shares_a_name_is_not_taken_for_it(name):
    with pytest.raises(UnsupportedError, match="choose one of h100"):
        hardware.find_gpu(name)


def test_fp8_on_ampere_is_refused():
    with pytest.raises(UnsupportedError, match="A100 80GB SXM has no fp8"):
        GPUS["a100"].rate("fp8")
    assert hardware.linear_speedup("sm80", "fp8") is None


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm80"), ((8, 6), "sm86"), ((8, 7), "sm86"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((12, 0), "sm120"),
     ((12, 1), "sm120"), ((7, 5), None), ((10, 0), None)],
)  # fmt: skip
def test_a_capability_runs_the_newest_target_of_its_major_version(capability, target):
    assert hardware.target_of(capability) == target


def test_host_target_is_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.host_target() == "cpu"
    assert hardware.host_gpu() is None


def test_host_target_names_a_card_that_fits_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5"):
        hardware.host_target()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert hardware.host_target() == "sm90"


def test_the_linear_format_that_pays_is_chosen():
    chosen = {t: hardware.choose_linear_format(t) for t in TARGETS}
    assert chosen == {"cpu": "off", "sm80": "int8", "sm86": "int8", "sm89": "int8", "sm90": "fp8", "sm120": "int8"}
    for target, format in chosen.items():
        assert format == "off" or hardware.linear_speedup(target, format) > 1


def choice(queries, keys=None, heads=12, head_dim=128, target="sm90", pv="fp8"):
    return hardware.choose_attention(target, AttentionShape(queries, keys or queries, heads, head_dim), pv)


def test_a_video_of_wan_has_sage_for_its_self_attention_on_cards_where_that_is_known_to_pay():
    for tokens, heads in ((32760, 12), (32760, 40), (75600, 40)):
        assert choice(tokens, heads=heads).kind == "sage"
        assert choice(tokens, heads=heads, target="sm89").kind == choice(tokens, heads=heads, target="sm120").kind
    assert choice(32760).why == (
        "Sage (fp8) has 1.56 times the speed of SDPA at 32,760 x 32,760 tokens, 12 heads of 128, measured on an H100"
    )
    assert choice(32760, pv="fp16").kind == "native"
    assert "0.72 times" in choice(32760, pv="fp16").why


def test_what_nobody_measured_stays_as_it_is_and_says_so():
    assert choice(32760, target="cpu") == AttentionChoice("native", "8-bit attention does not pay on cpu")
    for target in ("sm80", "sm86"):
        assert choice(32760, target=target).why == f"8-bit attention was not measured on {target}"
    small = choice(8, heads=1)
    assert small.kind == "native"
    assert small.why == "8 x 8 tokens, 1 head of 128: smaller than all that Sage (fp8) was measured at on sm90"


def test_the_nearest_smaller_attention_of_the_table_decides(monkeypatch):
    rows = (
        *sage_speeds("fp8", 12, 128, (1000, 1000, 0.8), (2000, 2000, 1.2), (4000, 500, 1.07)),
        *sage_speeds("fp8", 12, 64, (3000, 3000, 1.5)),
    )
    monkeypatch.setattr(hardware, "_SAGE_SPEEDUP", {"sm90": rows})
    kinds = {
        (1000, 1000): "native", (1900, 1900): "sage", (1700, 1700): "native", (9000, 2000): "sage",
        (4000, 500): "native",  # faster, by less than a card drifts
        (4000, 900): "native", (800, 800): "native",
    }  # fmt: skip
    assert {size: choice(*size).kind for size in kinds} == kinds
    assert choice(2000, heads=4).why.startswith("2,000 x 2,000 tokens, 4 heads of 128: smaller than all")
    assert choice(2000, head_dim=96).kind == "sage"  # computed as 128
    assert choice(2000, head_dim=64).kind == "native"
    assert choice(3000, head_dim=40).kind == "sage"  # computed as 64


def test_every_speed_of_the_table_says_where_it_comes_from():
    for target, rows in hardware._SAGE_SPEEDUP.items():
        assert target in TARGETS
        assert hardware.has_sage(target)
        for row in rows:
            assert row.source.startswith(("measured on", "published for"))
            assert row.pv in ("fp8", "fp16")
            assert row.pv == "fp16" or hardware.has_fp8(target)
            assert 0 < row.speedup < 10
    assert not hardware.has_sage("cpu")


def test_the_format_of_the_product_with_v_follows_the_target():
    assert {t: hardware.choose_pv(t) for t in ("sm80", "sm86", "sm89", "sm90", "sm120")} == {
        "sm80": "fp16", "sm86": "fp16", "sm89": "fp8", "sm90": "fp8", "sm120": "fp8"
    }  # fmt: skip
    assert hardware.choose_pv("cpu", "sla") == "none"


def test_dtype_is_float32_on_a_cpu_only():
    assert hardware.choose_dtype("cpu") == torch.float32
    assert {hardware.choose_dtype(t) for t in TARGETS[1:]} == {torch.bfloat16}


def test_an_unknown_target_is_refused():
    with pytest.raises(UnsupportedError, match=r"sm100.*choose one of cpu"):
        hardware.choose_linear_format("sm100")
    with pytest.raises(UnsupportedError, match="no linear format 'int4'"):
        hardware.linear_speedup("sm90", "int4")


def test_a_benchmark_writes_the_speeds_as_they_are_read(tmp_path):
    """What stands in speeds.json is what benchmarks/attention.py --lengths --write leaves there."""
    spec = importlib.util.spec_from_file_location("lengths", Path(__file__).parents[1] / "benchmarks" / "lengths.py")
    lengths = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        patch.setitem(sys.modules, "lengths", lengths)
        spec.loader.exec_module(lengths)
    path = tmp_path / "speeds.json"
    path.write_text(hardware.SPEEDS.read_text())
    groups = [group for group in json.loads(path.read_text())["attentions"] if group["target"] == "sm90"]
    lengths.write_speeds(path, groups)
    assert path.read_text() == hardware.SPEEDS.read_text()
    times = {"SDPA": 2.0, "SDPA cuDNN": 1.0, "Sage fp8": 0.5, "Sage fp16": 2.0}
    rows = [lengths.Row(lengths.Size(256, 512, 12, 128), times, {})]
    lengths.write_speeds(path, lengths.speeds(rows, "sm80", "measured on a card"))
    _, attentions = hardware.read_speeds(path)
    assert attentions["sm90"] == hardware._SAGE_SPEEDUP["sm90"]
    assert [(s.pv, s.shape.queries, s.speedup) for s in attentions["sm80"]] == [("fp8", 256, 2.0), ("fp16", 256, 0.5)]
