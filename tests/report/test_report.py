"""The report: the data that programs read, and what a person sees."""

import html
import io
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources

import pytest
import torch
from rich.console import Console
from torch import nn

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.hardware import GPUS
from turbocompile.ir.cost import OpCost
from turbocompile.report.collect import collect, pass_report
from turbocompile.report.report import Report
from turbocompile.report.rows import AttentionSite, PassReport, Skip, Sparsity
from turbocompile.report.words import duration, size
from turbocompile.rewrite.results import PassResult, Verdict

ERROR = {"cosine": 0.9999, "rel_l1": 0.0115, "max_abs": 0.04}


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.fixture(scope="module")
def program():
    return capture(Feed(), (torch.randn(2, 3, 8),), {})


def results() -> list[PassResult]:
    norms = PassResult("norms", "exact", 4, 4, seconds=0.25, verdict=Verdict(ERROR, ERROR))
    w8a8 = PassResult(
        "w8a8", "quantizing", 26, 20, (("shell:proj_out", "outside a block", 1), ("block:ffn", "over its budget", 5)),
        verdict=Verdict(
            ERROR, ERROR, site_errors={"block:to_q": (ERROR, 0.05), "block:ffn": ({**ERROR, "rel_l1": 0.0634}, 0.05)}
        ),
    )  # fmt: skip
    return [norms, w8a8, PassResult("rope", "exact")]


@pytest.fixture
def report(program):
    return collect(
        results(), program, model="wan-tiny", target="sm90", dtype="bfloat16", weights="synthetic",
        stages={"capture": 1.5, "rewrite": 0.002}, engine_bytes=1_390_000_000, predicted_bytes=1_391_000_000,
        warnings=("the picture is noise",), versions={"torch": "2.13.0"},
    )  # fmt: skip


def terminal(renderable, width=160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------------------------------- data


def test_json_has_what_programs_read(report):
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for done in data["passes"].values():
        assert isinstance(done["sites"], int)
        assert isinstance(done["rewritten"], int)
        assert isinstance(done["seconds"], float)
        assert all(isinstance(s["site"], str) and isinstance(s["reason"], str) for s in done["skipped"])
        assert done["sites"] == done["rewritten"] + sum(s["count"] for s in done["skipped"])
        for key in ("error", "error_output"):
            assert (done[key] is None) <= isinstance(done["error_reason"], str)
            assert done[key] is None or set(done[key]) == {"cosine", "rel_l1", "max_abs"}
    assert list(data["passes"]) == ["norms", "w8a8", "rope"]
    for op in data["ops"]:
        assert [type(op[k]) for k in ("name", "count", "flops", "bytes")] == [str, int, int, int]
    linear = next(op for op in data["ops"] if op["name"] == "aten.linear")
    assert linear["flops"] == 2 * 6 * 8 * 16
    assert data["parameter_bytes"] == (8 * 16 + 16) * 4
    assert data["shapes"] == [
        {"name": "default", "inputs": {"x": [2, 3, 8]}, "flops": data["flops"], "bytes": data["shapes"][0]["bytes"],
         "activation_bytes": data["activation_bytes"]}
    ]  # fmt: skip


def test_a_report_survives_json_and_files(report, tmp_path):
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_each_quantized_site_has_its_error_and_its_budget(report):
    """The farthest off first, those that were refused for it included; figures that are no numbers are left out."""
    first, second = report.passes["w8a8"].site_errors
    assert (first.site, first.kept, second.site, second.kept) == ("block:ffn", False, "block:to_q", True)
    data = report.to_dict()["passes"]["w8a8"]["site_errors"]
    assert data[0] == {"site": "block:ffn", "cosine": 0.9999, "rel_l1": 0.0634, "max_abs": 0.04, "budget": 0.05}
    text = terminal(report)
    (line,) = [line for line in text.splitlines() if "block:ffn " in line and "0.0634" in line]
    assert line.split() == ["w8a8", "block:ffn", "0.0634", "the", "first", "layer", "0.05", "0.999900", "bfloat16"]
    unmeasurable = Verdict(site_errors={"a": ({**ERROR, "cosine": float("nan")}, 0.05)})
    lost = PassResult("w8a8", "quantizing", 1, 1, verdict=unmeasurable)
    assert pass_report(lost).site_errors == ()
    before = {k: v for k, v in report.passes["w8a8"].to_dict().items() if k != "site_errors"}
    assert PassReport.from_dict(before).site_errors == ()  # written before there were such rows
    with pytest.raises(ValueError):
        PassReport.from_dict({**before, "site_errors": [{**data[0], "rel_l1": float("inf")}]})


def test_attentions_survive_json_with_their_least_time():
    report = Report({}, (), attention=(SLA, NATIVE), measured_on="NVIDIA H100 80GB HBM3", target="sm90")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert Report.from_dict(data) == report
    first, second = data["attention"]
    assert first["least_seconds"] == pytest.approx(COST.seconds(GPUS["h100"]))
    assert (first["seconds"], second["seconds"]) == (0.0375, None)
    assert first["sparsity"] == {"topk": 0.1, "block_q": 128, "block_k": 64, "kept": 51, "blocks": 512, "tuned": True}
    assert second["sparsity"] is None
    on_ampere = Report({}, (), attention=(SLA,), target="sm80").to_dict()["attention"][0]
    assert on_ampere["least_seconds"] is None  # which has no FP8
    before = {k: v for k, v in report.to_dict().items() if k not in ("attention", "measured_on")}
    assert Report.from_dict(before).attention == ()  # written before there were such rows


def test_several_shapes_share_parameters(program):
    larger = capture(Feed(), (torch.randn(2, 30, 8),), {})
    one, both = collect([], program), collect([], {"small": program, "large": larger})
    assert both.parameters == one.parameters
    assert [s.name for s in both.shapes] == ["small", "large"]
    assert both.shapes[1].flops == 10 * both.shapes[0].flops
    assert both.ops == one.ops
    assert both.activation_bytes == 10 * one.activation_bytes


class Measured:
    """An error as verify gives it."""

    def to_dict(self):
        return {**ERROR, "max_rel": 0.1}


def test_an_error_is_a_measured_number_or_null_with_the_reason():
    def of(**fields) -> PassReport:
        result = PassResult("w8a8", "quantizing", 3, 3, verdict=Verdict(**fields))
        return pass_report(result, unmeasured="verify: off")

    measured = of(error=Measured(), error_output=ERROR)
    assert (measured.error, measured.error_output, measured.error_reason) == (ERROR, ERROR, None)
    assert (of().error, of().error_reason) == (None, "verify: off")
    assert of(error_reason="another function by intent").error_reason == "another function by intent"
    infinite = of(error={**ERROR, "rel_l1": math.inf}, error_output=ERROR)
    assert infinite.error is None
    assert "no finite number" in infinite.error_reason
    nothing = pass_report(PassResult("rope", "exact"), unmeasured="verify: off")
    assert nothing.error_reason == "nothing was rewritten"


COST = OpCost("turbocompile.sla_attention", "blocks", ("attn1",), "", 30, {"int8": 10**12, "fp8": 10**12}, 10**9)
SLA = AttentionSite(
    "blocks:attn1", 30, "sla", "self", 1, 32760, 32760, 12, 128, "fp8", "the checkpoint was trained with SLA", COST,
    Sparsity(0.1, 128, 64, 51, 512, True), seconds=0.0375,
)  # fmt: skip
NATIVE = AttentionSite(
    "blocks:attn2", 30, "native", "cross", 2, 32760, 512, 12, 128, None, "8-bit attention was not measured on sm90",
    OpCost("aten.scaled_dot_product_attention", "blocks", ("attn2",), "", 30, {"bf16": 10**12}, 10**9),
)  # fmt: skip
ATTENTION = SLA.to_dict()

DAMAGED = [
    None, [], {}, {"passes": []}, {"passes": {"norms": {"kind": "exact"}}}, {"ops": [{}]}, {"ops": "x"},
    {"activation_bytes": -1}, {"activation_bytes": 10**60}, {"engine_bytes": "many"}, {"stages": {"capture": "long"}},
    {"stages": {"capture": 1e300}}, {"shapes": [{"name": "x", "inputs": {"x": [1.5]}}]}, {"parameters": [1]},
    {"others": {"transformer_2": {}}}, {"attention": [{}]}, {"attention": [{**ATTENTION, "count": -1}]},
    {"attention": [{**ATTENTION, "seconds": "long"}]}, {"attention": [{**ATTENTION, "sparsity": {"topk": 0.1}}]},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_damaged_data_is_refused_in_one_sentence(report, change):
    data = {**report.to_dict(), **change} if change else change
    with pytest.raises(EngineError, match=r"report is damaged.*build the engine again") as caught:
        Report.from_dict(data)
    assert "\n" not in str(caught.value)


def test_reports_do_not_nest_without_end(report):
    inner = report.to_dict()
    with pytest.raises(EngineError, match="nested"):
        Report.from_dict({**inner, "others": {"a": {**inner, "others": {"b": inner}}}})


def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{")
    for name in ("report.json", "missing.json"):
        with pytest.raises(EngineError, match=f"{name} cannot be read"):
            Report.load(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- roofline


def test_the_roofline_names_the_slowest_first_and_adds_up(report):
    rows = report.roofline("RTX 4090")
    times = [row["seconds"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(report.seconds("RTX 4090"), rel=1e-12)
    assert {row["bound"] for row in rows} <= {"memory", "bf16", "fp32", "int8", "fp8"}


def test_the_card_is_that_of_the_target(report, program):
    assert report.gpu().key == "h100"
    assert collect([], program, target="sm89").gpu().key == "rtx4090"
    assert collect([], program, target="cpu").gpu().key == "h100"
    with pytest.raises(UnsupportedError, match="choose one of h100"):
        report.render(gpu="V100")


def test_a_card_without_the_arithmetic_says_so_in_the_table(program):
    op = OpCost("turbocompile.w8a8_linear", "blocks", ("ffn",), "", 1, {"fp8": 10**12}, 10)
    report = Report({}, (op,), target="sm90")
    lines = {line.split("  ")[0]: line for line in terminal(report).splitlines()}
    assert "  no fp8  " in lines["A100 80GB SXM"]
    assert "  no fp8  " not in lines["H100 SXM"]
    assert "A100 80GB SXM has no fp8 arithmetic" in terminal(report.render(gpu="a100"))


# ---------------------------------------------------------------------------------------------------------- showing


def test_a_terminal_shows_every_pass_reason_and_figure(report):
    text = terminal(report)
    for expected in (
        "wan-tiny", "sm90, bfloat16, triton backend", "norms", "w8a8", "rope", "outside a block", "over its budget",
        "block:ffn", "0.011", "nothing was rewritten", "the picture is noise", "1.39 GB, 1.391 GB predicted",
        "capture 1.5 s", "rewrite 2 ms", "linear", "2x3x8 fp32", "H100 SXM", "RTX 5090", "torch 2.13.0",
    ):  # fmt: skip
        assert expected in text, expected
    assert repr(report) in terminal(report, width=120)


def test_a_terminal_and_a_page_show_each_attention():
    report = Report({}, (), attention=(SLA, NATIVE), measured_on="NVIDIA H100 80GB HBM3", target="sm90")
    text, page = terminal(report, width=240), parser_text(report.to_html())
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for expected in (
        "sla fp8",
        "self, 32,760 x 32,760 tokens, 12 x 128",
        "51 of 512 blocks of 64 (top-k 0.1)",
        "37.5 ms",
    ):
        assert expected in lines["blocks:attn1"]
        assert expected in page
    for expected in ("native", "cross, 2 x 32,760 x 512 tokens", " all ", "8-bit attention was not measured on sm90"):
        assert expected in lines["blocks:attn2"]
    title = (
        "Attention: what each site became, its least time on an H100 SXM, and as measured on an NVIDIA H100 80GB HBM3"
    )
    assert title in text
    assert title in page
    both = Report({}, (), others={"transformer_2": report})
    assert f"{title} of transformer_2" in terminal(both, width=240)
    assert "as measured" not in terminal(Report({}, (), attention=(NATIVE,)), width=240)


def test_the_skipped_column_counts_sites_not_names(report):
    row = next(line for line in terminal(report).splitlines() if line.startswith("w8a8") and "quantizing" in line)
    assert row.split()[2:5] == ["26", "20", "6"]


def test_rows_beyond_the_limit_are_summed_up():
    ops = tuple(OpCost(f"aten.op{i}", "blocks", (), "", 2, {"fp32": 10}, 10**6 * (i + 1)) for i in range(9))
    text = terminal(Report({}, ops).render(ops=4))
    assert "5 more" in text
    assert "op8" in text
    assert "op1 " not in text
    total = next(line for line in text.splitlines() if line.startswith("all "))
    assert "18" in total.split()  # runs
    assert "45 MB" in total


def test_nothing_in_a_report_is_terminal_markup():
    skip = Skip("[red]block[/red]", "\x1b[31mbecause :smile: [link=x]y[/link]", 1)
    report = Report({"[b]norms": PassReport("exact", 1, 0, (skip,))}, (), model="[blink]x")
    text = terminal(report)
    for literal in ("[red]block[/red]", "[31mbecause :smile: [link=x]y[/link]", "[b]norms", "[blink]x"):
        assert literal in text
    assert "\x1b" not in text


ATTRIBUTES = {
    "aria-label", "charset", "class", "colspan", "content", "height", "http-equiv", "lang", "name", "role", "rx",
    "scope", "width", "x", "y",
}  # fmt: skip


class _Balanced(HTMLParser):
    """Fails on a tag that is not closed, and keeps the tags and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        unknown = {k for k, _ in attrs if not k.startswith("data-")} - ATTRIBUTES
        assert not unknown, (tag, attrs)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_is_complete_and_escapes_everything(report):
    evil = "<script>alert(1)</script>\"'&"
    passes = {evil: PassReport(evil, 1, 0, (Skip(evil, evil),), error_reason=evil)}
    op = OpCost(evil, evil, (evil,), evil, 1, {"fp32": 1}, 1)
    bad = Report(
        passes, (op,), module=evil, model=evil, target=evil, dtype=evil, backend=evil, weights=evil,
        stages={evil: 1.0}, warnings=(evil,), versions={evil: evil}, parameters={evil: 1},
        others={evil: Report(passes, ())}, measured_on=evil,
        attention=(AttentionSite(evil, 1, evil, evil, 1, 1, 1, 1, 1, evil, evil, op),),
    )  # fmt: skip
    own = (resources.files("turbocompile.report") / "page.js").read_text().strip()
    for page in (bad.to_html(), bad._repr_html_(), report.to_html(), report._repr_html_()):
        whole = page.startswith("<!doctype html>")
        assert page.count("<script>") == page.count(f"<script>{own}</script>") == whole  # tests/report/test_page.py
        page = page.replace(f"<script>{own}</script>", "")
        page = re.sub(r'<meta http-equiv="Content-Security-Policy" content="[^"]*">', "", page)
        page = re.sub(r'<meta name="viewport" content="[^"]*">', "", page)
        parser = _Balanced()
        parser.feed(page)
        assert parser.open == []
        assert "script" not in parser.tags
        assert "http" not in page
    assert evil in parser_text(bad.to_html())
    assert "block:ffn" in parser_text(report.to_html())


def parser_text(page: str) -> str:
    parser = _Balanced()
    parser.feed(page)
    return parser.text


def test_sla_and_smooth_say_why_they_rewrote_nothing(wan, wan_call):
    """In the terminal and on the page, though the recipe asks for neither: every site is skipped, with its reason."""
    recipe = {"passes": {"attention": "native", "w8a8": "fp8"}, "target": "sm90", "verify": "off"}
    report = turbocompile.optimize(wan(num_layers=1), kwargs=wan_call(), recipe=recipe).report
    lines, page = terminal(report, width=400).splitlines(), report.to_html()
    left_alone = lines[[line.strip() for line in lines].index("Left alone") :]
    for name in ("sla", "smooth"):
        done = report.passes[name]
        assert done.rewritten == 0
        assert done.sites == sum(skip.count for skip in done.skipped) > 0
        for reason in {skip.reason for skip in done.skipped}:
            assert any(line.startswith(f"{name} ") and reason in line for line in left_alone)
            assert f'data-skip="{name}" data-reason="{html.escape(reason)}"' in page


def test_a_second_module_shows_its_passes(report):
    both = Report(report.passes, report.ops, others={"transformer_2": report})
    assert Report.from_dict(both.to_dict()) == both
    assert "of transformer_2" in terminal(both)
    assert '<section data-module="transformer_2">' in both.to_html()


def test_cards_say_whether_the_weights_fit():
    report = Report({}, (), parameters={"bfloat16": 28_000_000_000}, activation_bytes=1)
    lines = {line.split("  ")[0]: line for line in terminal(report).splitlines()}
    assert "  yes  " in lines[GPUS["h100"].name]
    assert "no, it has 25.77 GB" in lines[GPUS["rtx4090"].name]
    # Two experts are both in memory; the second fits beside the first on the H100 alone.
    both = Report({}, (), parameters=report.parameters, others={"transformer_2": report})
    lines = {line.split("  ")[0]: line for line in terminal(both).splitlines()}
    assert "  yes  " in lines[GPUS["h100"].name]
    assert "no, it has 34.36 GB" in lines[GPUS["rtx5090"].name]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0"), (3e-8, "30 ns"), (12e-6, "12 µs"), (0.0133, "13.3 ms"), (1.5, "1.5 s"), (2065.0, "2,065 s")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (512, "512 B"), (1.392e9, "1.392 GB"), (28_577e6, "28.58 GB")])
def test_sizes_read_well(count, text):
    assert size(count) == text
