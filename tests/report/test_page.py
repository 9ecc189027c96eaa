"""The page of an engine, as it is written and as Chromium shows it: its numbers are those of the JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from turbocompile.cli import main
from turbocompile.ir.cost import OpCost
from turbocompile.ir.graph_view import GraphView, NodeView
from turbocompile.ir.site_errors import SiteError
from turbocompile.report.page import page
from turbocompile.report.report import Report
from turbocompile.report.rows import AttentionSite, PassReport, Skip, Sparsity
from turbocompile.report.timings import Bench, OpTime
from turbocompile.report.words import duration, size

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
RECIPE = """\
model: {preset: wan-tiny-i2v-experts}
shapes: [{height: 64, width: 64, num_frames: 5}]
target: sm90
passes: {attention: sage, w8a8: fp8}
components: none
"""
EVIL = "</title></style></script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>\"'&"


def shown(path: Path, profile: Path, fragment: str = "") -> str:
    """The document as it is in Chromium once its script has run."""
    command = (
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=5000", "--dump-dom", f"{path.as_uri()}{fragment}",
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Read(HTMLParser):
    """The data attributes of a page: a dictionary for each row, figure, and node, with the module it is of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.module = ""
        self.found: list[dict[str, str]] = []
        self.row: dict[str, str] | None = None
        self.tags: list[str] = []
        self.classes: dict[str, str] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {k: v or "" for k, v in attrs}
        assert not [k for k in given if k == "style" or k.startswith("on")]
        self.classes[given.get("id", "")] = given.get("class", "")
        data = {k.removeprefix("data-").replace("-", "_"): v for k, v in given.items() if k.startswith("data-")}
        self.module = data.pop("module", self.module)
        if tag == "tr":
            self.row = {}
            self.found.append(self.row)
        if self.row is not None:
            self.row |= {**data, "module": self.module}
        elif data:
            self.found.append({**data, "module": self.module, "id": given.get("id", "")})

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.row = None
        if tag == "section":
            self.module = ""

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def rows(self, key: str, module: str) -> list[dict[str, str]]:
        return [row for row in self.found if key in row and row["module"] == module]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    """Two experts, of which the second was timed."""
    place = tmp_path_factory.mktemp("page")
    (place / "recipe.yaml").write_text(RECIPE)
    call("optimize", place / "recipe.yaml", "-o", place / "engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        call("bench", place / "engine", "--module", "transformer_2", "--calls", "1", "--device", "cpu")
    return place / "engine"


@pytest.fixture(autouse=True)
def cache(engine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(engine.parent / "cache"))


@pytest.fixture(scope="module")
def written(engine) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(engine.parent / "cache"))
        call("explain", engine, "--gpu", "rtx4090", "--html", engine.parent / "page.html")
    return engine.parent / "page.html"


@pytest.fixture(scope="module", params=["as written", pytest.param("in Chromium", marks=in_chromium)])
def read(request, written, tmp_path_factory) -> Read:
    if request.param == "as written":
        return Read(written.read_text(encoding="utf-8"))
    return Read(shown(written, tmp_path_factory.mktemp("profile")))


def call(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def data(engine) -> dict[str, Any]:
    return json.loads(call("explain", engine, "--gpu", "rtx4090", "--json"))


def modules(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {data["module"]: data, **data["others"]}


# ------------------------------------------------------------------------------------------------------- its numbers


def test_each_pass_has_its_counts_reasons_and_errors(read, data):
    assert len(modules(data)) == 2
    for name, report in modules(data).items():
        rows = {row["pass"]: row for row in read.rows("pass", name)}
        assert list(rows) == list(report["passes"])
        for one, done in report["passes"].items():
            row = rows[one]
            assert (int(row["sites"]), int(row["rewritten"])) == (done["sites"], done["rewritten"])
            assert int(row["skipped"]) == sum(s["count"] for s in done["skipped"])
            assert row["kind_of"] == done["kind"]
            assert float(row["seconds"]) == done["seconds"]
            for start, error in (("", done["error"]), ("output_", done["error_output"])):
                assert {k for k in ("rel_l1", "cosine", "max_abs") if start + k in row} == set(error or {})
                assert all(float(row[start + k]) == v for k, v in (error or {}).items())
            assert row.get("error_reason") == done["error_reason"]
            reasons: dict[str, int] = {}
            for skip in done["skipped"]:
                reasons[skip["reason"]] = reasons.get(skip["reason"], 0) + skip["count"]
                assert skip["site"] in read.text
            found = {r["reason"]: int(r["count"]) for r in read.rows("skip", name) if r["skip"] == one}
            assert found == reasons
            assert all(reason in read.text for reason in reasons)


def test_each_quantized_site_has_its_error_and_budget(read, data):
    keys = ("rel_l1", "cosine", "max_abs", "budget")
    for name, report in modules(data).items():
        expected = [
            (one, e["site"], *(e[k] for k in keys)) for one, p in report["passes"].items() for e in p["site_errors"]
        ]
        rows = read.rows("sensitivity", name)
        medians = [SiteError.from_dict(e).median for p in report["passes"].values() for e in p["site_errors"]]
        assert [float(r["median"]) if "median" in r else None for r in rows] == medians
        assert "w8a8 in every layer on random inputs; attention in the first layer" in read.text
        assert [(r["of_pass"], r["sensitivity"], *(float(r[k]) for k in keys)) for r in rows] == expected
        assert {one for one, *_ in expected} == {"attention", "w8a8"}


def test_each_operation_has_bytes_flops_and_its_floor(read, data):
    """The JSON's roofline is of the first module; of the second the same data gives it."""
    for name, report in modules(data).items():
        roofline = data["roofline"] if name == data["module"] else Report.from_dict(report).roofline("rtx4090")
        expected = {(op["graph"], op["name"], " ".join(op["where"]), op["shapes"]): op for op in roofline}
        rows = {(r["graph"], r["op"], r["where"], r["shapes"]): r for r in read.rows("op", name) if "flops" in r}
        assert set(rows) == set(expected)
        for key, op in expected.items():
            row = rows[key]
            assert [int(row[k]) for k in ("count", "flops", "bytes")] == [op[k] for k in ("count", "flops", "bytes")]
            assert (float(row["seconds"]), row["bound"]) == (op["seconds"], op["bound"])
            assert size(op["bytes"]) in read.text
            assert duration(op["seconds"]) in read.text
        (total,) = read.rows("total", name)
        assert int(total["flops"]) == report["flops"]
        assert int(total["bytes"]) == sum(op["bytes"] for op in report["ops"])


def test_measured_times_stand_beside_it_where_a_bench_has_run(read, data):
    assert list(data["measured"]) == ["transformer_2"]
    record = data["measured"]["transformer_2"]
    times = {(t["graph"], t["name"], " ".join(t["where"]), t["shapes"]): t["seconds"] for t in record["ops"]}
    assert times
    rows = [r for r in read.rows("op", "transformer_2") if "flops" in r]
    measured = {(r["graph"], r["op"], r["where"], r["shapes"]): float(r["measured"]) for r in rows if "measured" in r}
    assert measured == times
    assert [float(r["measured"]) for r in rows if "measured" in r] == sorted(times.values(), reverse=True)
    (total,) = read.rows("total", "transformer_2")
    assert float(total["measured"]) == pytest.approx(sum(times.values()), rel=1e-12)
    assert f"the forward took {duration(record['seconds'])}" in read.text
    assert not [r for r in read.rows("op", "transformer") if "measured" in r]


def test_the_figures_at_the_top_are_the_whole(read, data):
    for name, report in modules(data).items():
        tiles = {k: v for row in read.found if row["module"] == name and not row.get("id") for k, v in row.items()}
        for key in ("parameter_bytes", "activation_bytes"):
            assert int(tiles[key]) == report[key]
        found = next(r for r in read.found if r["module"] == name and set(r) == {"rewritten", "sites", "module", "id"})
        done = report["passes"].values()
        assert (int(found["rewritten"]), int(found["sites"])) == tuple(
            sum(p[k] for p in done) for k in ("rewritten", "sites")
        )


def test_attention_cards_and_stages_are_there(read, data):
    for name, report in modules(data).items():
        rows = {row["attention"]: row for row in read.rows("attention", name)}
        assert list(rows) == [a["site"] for a in report["attention"]]
        for a in report["attention"]:
            row = rows[a["site"]]
            assert (row["attention_kind"], int(row["count"])) == (a["kind"], a["count"])
            assert int(row["flops"]) == a["cost"]["flops"]
            assert a["why"] in read.text
    assert {row["stage"]: float(row["seconds"]) for row in read.rows("stage", "")} == data["stages"]
    assert {row["card"] for row in read.rows("card", "")} >= {"h100", "rtx4090", "a100"}


def test_the_drawings_are_the_engines_graphs_and_what_merged_into_what(read, engine, data):
    for number, name in enumerate(modules(data)):
        graphs = json.loads((engine / "graphs" / f"{name}.json").read_text())
        for place, (graph, view) in enumerate(graphs.items()):
            start = f"n{number}-g{place}-"
            nodes = {r["id"]: r for r in read.rows("peers", name) if r["id"].startswith(start)}
            assert len(nodes) == len(view["before"]) + len(view["after"])
            for side, half in (("b", view["before"]), ("a", view["after"])):
                for i, one in enumerate(half):
                    row = nodes[f"{start}{side}{i}"]
                    assert (row["name"], row["op"]) == (one["name"], one["op"])
                    if side == "a":
                        assert row["peers"].split() == [f"{start}b{o}" for o in one.get("origins", [])]
            rows = {int(r["merge"]): r for r in read.rows("merge", name) if r["graph"] == graph}
            made = {i for i, n in enumerate(view["after"]) if n.get("passes") and (n["flops"] or n["bytes"])}
            assert set(rows) == made
            for i, row in rows.items():
                one = view["after"][i]
                assert [int(o) for o in row["origins"].split()] == one.get("origins", [])
                assert set(row["passes"].split()) == set(one["passes"])


# --------------------------------------------------------------------------------------------------------- its safety


def test_it_is_one_file_that_asks_for_nothing(read, written):
    text = written.read_text(encoding="utf-8")
    assert {"link", "img", "iframe", "object", "form", "a"}.isdisjoint(read.tags)
    assert not re.search(r"\b(src|href)\s*=|@import|url\(|fetch\(|eval\(", text)
    assert re.findall(r"https?://[^\"' <]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        ((content),) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def hostile() -> str:
    passes = {EVIL: PassReport(EVIL, 1, 0, (Skip(EVIL, EVIL),), error_reason=EVIL)}
    op = OpCost(EVIL, EVIL, (EVIL,), EVIL, 1, {"fp32": 1}, 1)
    report = Report(
        passes, (op,), module=EVIL, model=EVIL, target=EVIL, dtype=EVIL, backend=EVIL, weights=EVIL,
        stages={EVIL: 1.0}, warnings=(EVIL,), versions={EVIL: EVIL}, parameters={EVIL: 1},
        others={EVIL * 2: Report(passes, ())},
    )  # fmt: skip
    one = NodeView(EVIL, EVIL, EVIL, EVIL, EVIL, 1, 1, (), (), ())
    view = GraphView(2, (one,), (NodeView(EVIL, EVIL, EVIL, EVIL, EVIL, 1, 1, (), (0,), (EVIL,)),))
    record = Bench(
        EVIL, EVIL, EVIL, {EVIL: EVIL}, 1, 1.0, None, None, 1.0, None,
        (OpTime(EVIL, EVIL, (EVIL,), EVIL, 1, 1.0, None),),
    )  # fmt: skip
    return page(report, {EVIL: {EVIL: view}}, {EVIL: record})


def test_nothing_of_an_engine_is_markup():
    text = hostile()
    found = Read(text)
    assert [found.tags.count(tag) for tag in ("script", "style", "img")] == [1, 1, 0]
    assert found.rows("pass", EVIL)[0]["pass"] == EVIL
    assert EVIL in found.text


@in_chromium
def test_nothing_of_an_engine_runs(tmp_path):
    (tmp_path / "page.html").write_text(hostile(), encoding="utf-8")
    text = shown(tmp_path / "page.html", tmp_path / "profile")
    found = Read(text)
    assert [found.tags.count(tag) for tag in ("script", "img")] == [1, 0]
    assert "<title>taken" not in text
    assert re.search(r'<html[^>]* class="js"', text)  # and its own script did run


@in_chromium
def test_a_link_to_a_node_lights_what_it_stands_for(written, engine, tmp_path):
    view = json.loads((engine / "graphs" / "transformer.json").read_text())["blocks"]
    place, node = next((i, n) for i, n in enumerate(view["after"]) if len(n.get("origins", [])) > 3)
    found = Read(shown(written, tmp_path / "profile", f"#n0-g0-a{place}"))
    lit = {name for name, classes in found.classes.items() if "lit" in classes.split()}
    assert lit == {f"n0-g0-a{place}", *(f"n0-g0-b{o}" for o in node["origins"])}
    assert f"{node['code']}\n" in found.text


def test_without_the_script_each_node_says_what_became_of_it(written, engine):
    text = Read(written.read_text(encoding="utf-8")).text
    view = json.loads((engine / "graphs" / "transformer.json").read_text())["blocks"]
    for node in view["after"]:
        for origin in node.get("origins", []) if node.get("passes") else ():
            assert re.search(rf"became [\w, ]*\b{node['name']}\b", text)
            assert re.search(rf"stands for [\w, ]*\b{view['before'][origin]['name']}\b", text)


# ----------------------------------------------------------------------------------------------------- what may lack


def test_an_engine_without_graphs_a_bench_or_passes_has_a_page_too():
    text = page(Report({}, ()), {})
    assert "does not say what merged into what" in text
    assert "No pass ran" in text
    assert "Nothing was measured" in text


def test_a_graph_too_large_for_a_picture_says_so():
    one = NodeView("x", "aten.sin", "x", "", "", 1, 1, ())
    text = page(Report({}, ()), {"transformer": {"shell": GraphView(1, (one,) * 2000, ())}})
    assert "The graph has 2,000 nodes, more than a picture shows" in text


def test_a_sparse_attention_says_what_it_reads_and_a_measured_one_its_time():
    cost = OpCost("turbocompile.sla_attention", "blocks", ("attn1",), "", 30, {"fp8": 10**12}, 10**9)
    sparsity = Sparsity(0.1, 128, 64, 51, 512, True)
    site = AttentionSite(
        "blocks:attn1", 30, "sla", "self", 1, 32_760, 32_760, 12, 128, "fp8", "asked for", cost, sparsity, 0.25
    )
    text = page(Report({}, (cost,), (site,), "NVIDIA H100", target="sm90"), {})
    found = Read(text)
    for part in ("51 of 512 blocks of 64", "sla fp8", "250 ms", "as measured on an NVIDIA H100", "asked for"):
        assert part in found.text
    assert float(found.rows("attention", "transformer")[0]["measured"]) == 0.25


def test_a_card_that_was_measured_shows_the_share_of_its_rate():
    op = OpCost("aten.linear", "blocks", ("up",), "2x3 fp32", 4, {"bf16": 10**12}, 10)
    folded = OpCost("aten.cos", "shell", ("rope",), "3 fp32", 1, {"fp32": 3}, 24)
    time = OpTime("blocks", "aten.linear", ("up",), "2x3 fp32", 4, 0.004, 0.001)
    record = Bench("m", "NVIDIA H100", "1", {}, 3, 0.004, 0.005, 1e-4, 1.0, 10, (time,))
    text = page(Report({}, (op, folded), target="sm90"), {}, {"transformer": record})
    found = Read(text)
    assert "25%" in found.text
    assert "at load" in found.text
    rows = re.findall(r"<tr data-(?:op|total).*?</tr>", text, re.S)
    cells = {sum(int(n or 1) for n in re.findall(r'<td(?: colspan="(\d)")?', row)) for row in rows}
    assert cells == {11}  # as many as columns
    assert len(re.findall(r"<th ", text[text.index("Operations</h3>") : text.index("Cards</h3>")])) == 11
