"""Engine folders that somebody changed with every hash repaired; and whatever is around a `load`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import turbocompile
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.files import MANIFEST
from turbocompile.ir.allowed_ops import ALLOWED
from turbocompile.ir.deserialize import from_json
from turbocompile.ir.deserialize_weights import expr_from_json
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import read_json, read_manifest
from turbocompile.tools.verify_folder import verify_folder


def _script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz_engines = _script("fuzz_engines")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    return [make(root / name) for name, make in fuzz_engines.SUBJECTS.items()]


@pytest.fixture(scope="module")
def subject(subjects):
    return subjects[0]


@pytest.fixture
def folder(subject, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(subject.folder, tmp_path / "engine")


def test_engines_with_random_edits_are_refused_in_one_sentence_or_run(subjects, tmp_path):
    assert [fuzz_engines.use(s.folder, s.call) for s in subjects] == [fuzz_engines.RAN] * len(subjects)
    ended, others = fuzz_engines.run(subjects, range(200), tmp_path)
    assert not others
    assert ended[fuzz_engines.RAN] > 10  # edits of what nothing reads
    assert ended[fuzz_engines.REFUSED] > 100


def change(folder, name, edit):
    """Edits one document of an engine and repairs the hashes."""
    data = json.loads((folder / name).read_text())
    edit(data)
    manifest = data if name == MANIFEST else json.loads((folder / MANIFEST).read_text())
    if name != MANIFEST:
        (folder / name).write_text(json.dumps(data))
    fuzz_engines.repair(folder, manifest, {name} - {MANIFEST})


def module(data):
    return data["modules"]["transformer"]


FIELDS = {
    "a file outside, which nothing reads": (
        lambda m: m["files"].update({"../../x": m["files"]["report.html"]}),
        "../x",
    ),
    "a file by its absolute name": (lambda m: m["files"].update({"/etc/passwd": m["files"]["report.html"]}), "passwd"),
    "a component outside": (lambda m: m["components"].update(vae={"folder": "../vae"}), "no plain relative name"),
    "a module that is a path": (lambda m: m["modules"].update({"../a": module(m)}), "a module is named"),
    "a module without programs": (lambda m: module(m).update(programs={}), "no program"),
    "a program without a hash": (lambda m: module(m)["programs"].update(b="b.json"), "not among the engine's files"),
    "weights that are a number": (lambda m: module(m).update(weights=7), "a list"),
    "a backend that is a list": (lambda m: module(m).update(backend=["triton"]), "a text"),
    "a configuration that is a list": (lambda m: module(m).update(config=[]), "an object"),
    "a size that is no number": (lambda m: m["files"]["report.html"].update(size="1"), "the size of report.html"),
    "hashes that are one": (lambda m: m["files"]["report.html"].update(sha256="0" * 64), "a list"),
    "a version that is a number": (lambda m: m["versions"].update(torch=2), "the version of 'torch'"),
    "a recipe that is a list": (lambda m: m.update(recipe=[]), "'recipe'"),
    "a boundary that is a text": (lambda m: m.update(boundary_ratio="0.9"), "a finite number"),
    "a schema that is true": (lambda m: m.update(schema=True), "no manifest"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_manifest_has_its_type_for_load_and_verify_alike(folder, name):
    edit, message = FIELDS[name]
    change(folder, MANIFEST, edit)
    for look in (load, verify_folder, read_manifest):
        with pytest.raises(EngineError, match=message):
            look(folder)


def test_a_file_of_the_engine_is_no_onnx_model_because_its_name_ends_in_json(subject, folder):
    pytest.importorskip("onnxruntime")
    change(folder, MANIFEST, lambda m: module(m).update(backend="onnx", files={"call": ["report.json"]}))
    with pytest.raises(EngineError, match="no ONNX file"):
        load(folder)(**subject.call)


def program(folder):
    return next((folder / "programs").iterdir()).relative_to(folder).as_posix()


def signature(**fields):
    return lambda d: d["signature"].update(fields)


def weight(expr):
    """Replaces the expression of the first weight."""

    def edit(data):
        exprs = next(g["weights"] for g in data["graphs"].values() if g["weights"])
        exprs[next(iter(exprs))] = expr

    return edit


def first(op, **fields):
    """Changes the first node of a kind."""
    return lambda d: next(n for n in d["graphs"]["shell"]["nodes"] if n["op"] == op).update(fields)


LOAD = {"expr": "Load", "name": "a", "shape": [4, 4], "dtype": "float32"}
PROGRAMS = {
    "a parameter that is a number": (signature(parameters=[1 << 63]), "a parameter is"),
    "a parameter of no kind": (signature(parameters=[["x", "ANY", False, None]]), "the kind of the parameter"),
    "a parameter that is no name": (signature(parameters=[["x y", "KEYWORD_ONLY", False, None]]), "is named 'x y'"),
    "a parameter without a name": (signature(parameters=[["", "KEYWORD_ONLY", False, None]]), "a parameter is named"),
    "a parameter twice": (signature(parameters=[["x", "KEYWORD_ONLY", False, None]] * 2), "of no function"),
    "a default that is no tree": (
        signature(parameters=[["x", "KEYWORD_ONLY", True, {"container": "tuple", "keys": [0], "items": []}]]),
        "1 keys of 0 items",
    ),
    "a guard that is a list": (signature(guards={"scale": [1]}), "a plain value"),
    "a guard of no container": (signature(guards={"more": {"container": "set", "keys": []}}), "the container"),
    "a result beyond the outputs": (signature(output={"kind": "tensor", "index": 99}), "the place of a tensor"),
    "a result before the outputs": (signature(output={"kind": "tensor", "index": -1}), "the place of a tensor"),
    "a result of a class that is no name": (
        signature(output={"kind": "class", "name": "a.b c", "keys": [], "items": []}),
        "the class of the result",
    ),
    "diffusers' result with other fields": (
        signature(
            output={
                "kind": "class", "name": "diffusers.models.modeling_outputs.Transformer2DModelOutput",
                "keys": ["x"], "items": [{"kind": "none"}],
            }
        ),
        "one field, 'sample'",
    ),
    "more inputs than the graph has": (
        lambda d: d["signature"]["inputs"].append({"path": "y", "shape": [1], "dtype": "int64", "cast": False}),
        "fewer tensors",
    ),
    "fewer inputs than the graph has": (lambda d: d["signature"]["inputs"].pop(), "more tensors"),
    "an input of quantized numbers": (lambda d: d["signature"]["inputs"][0].update(dtype="quint4x2"), "a dtype"),
    "a weight named by a number": (weight({**LOAD, "name": 7}), "name of a Load is 7"),
    "a weight of no kind": (weight({**LOAD, "expr": "Exec"}), "the kind of a weight"),
    "a weight times a text": (weight({"expr": "Mul", "of": LOAD, "by": "2"}), "by of a Mul"),
    "a slice beyond its weight": (
        weight({"expr": "Slice", "of": LOAD, "dim": 0, "start": 0, "stop": 1 << 40}),
        "do not fit",
    ),
    "a quantized weight of no format": (
        weight({"expr": "Quantize", "of": LOAD, "format": "int2", "part": "data"}),
        "do not fit",
    ),
    "a node that is a number": (lambda d: d["graphs"]["shell"]["nodes"].insert(0, 7), "a node is 7"),
    "a node named twice": (
        lambda d: d["graphs"]["shell"]["nodes"].insert(0, d["graphs"]["shell"]["nodes"][0]),
        "a node named",
    ),
    "a node after the output": (
        lambda d: d["graphs"]["shell"]["nodes"].append({**d["graphs"]["shell"]["nodes"][0], "name": "z"}),
        "of kind 'output'",
    ),
    "an output that is a text": (first("output", args=[["x"]]), "no list of tensors"),
    "a node that comes later": (first("call_function", args=[{"node": "output"}]), "does not come before"),
    "a device": (first("call_function", target="aten.zeros.default", args=[[2]], kwargs={"device": "cuda"}), "device"),
    "a dtype that is a number": (
        first("call_function", target="aten.zeros.default", args=[[2]], kwargs={"dtype": 1 << 31}),
        "dtype",
    ),
    "an argument that there is not": (
        first("call_function", target="aten.zeros.default", args=[[2]], kwargs={"file": "x"}),
        "does not take",
    ),
    "a module that is a number": (first("call_function", module=7), "the module of a node"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_field_of_a_program_has_its_type(subject, name):
    edit, message = PROGRAMS[name]
    data = json.loads((subject.folder / program(subject.folder)).read_text())
    from_json(data)
    edit(data)
    with pytest.raises(EngineError, match=message) as caught:
        from_json(data)
    assert "\n" not in str(caught.value)


def nested(levels):
    expr = LOAD | {"shape": [2, 2, 2, 2]}
    for _ in range(levels):
        expr = {"expr": "Permute", "of": {"expr": "Cat", "of": [expr], "dim": 0}, "dims": [3, 2, 1, 0]}
    return expr


def makes(target, args, shape=(1 << 30,)):
    """A program of one input and one operator on it."""
    given = [{"node": "x"} if a == "x" else a for a in args]
    nodes = [
        {"op": "placeholder", "name": "x", "val": [[list(shape), "float32"]]},
        {"op": "call_function", "name": "y", "target": target, "args": given, "val": [[[1], "float32"]]},
        {"op": "output", "name": "output", "args": [[{"node": "x"}]]},
    ]
    return {
        "version": 1,
        "signature": {
            "parameters": [["x", "POSITIONAL_OR_KEYWORD", False, None]],
            "inputs": [{"path": "x", "shape": list(shape), "dtype": "float32", "cast": False}],
            "guards": {}, "output": {"kind": "tensor", "index": 0}, "return_dict": False,
        },
        "graphs": {"shell": {"nodes": nodes, "weights": {}}},
    }  # fmt: skip


LABOURS = {
    "a tensor cut into each of its elements": makes("aten.unbind.int", ["x"]),
    "a tensor cut into pieces of one": makes("aten.split.Tensor", ["x", 1]),
    "a tensor cut into more pieces than it has elements": makes("aten.tensor_split.sections", ["x", 1 << 40]),
    "a list of texts, many times over": makes("aten.mul.left_t", [["x"], 1 << 40]),
    "blocks of a thousand million tokens": makes(
        "turbocompile.sla_attention.default",
        [*["x"] * 5, 0.5, 1 << 30, 1 << 30, "softmax", "none"], (1, 8, 2, 16),
    ),
    "an image shrunk to nothing": makes("aten.upsample_nearest1d.default", ["x", [8], 1e-300], (1, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LABOURS)
def test_what_would_take_for_ever_or_all_memory_is_refused_before_it_is_done(name):
    with fuzz_engines.deadline(), pytest.raises(EngineError, match=r"more than|operator that an engine|scales"):
        from_json(LABOURS[name])


def test_the_shape_of_a_nested_weight_takes_time_in_proportion_to_its_depth():
    """Each level asked the one below five times: 14 levels were 6e9 questions."""
    with fuzz_engines.deadline():
        assert expr_from_json(nested(14)).shape == (2, 2, 2, 2)


def test_an_operator_that_torch_lacks_for_a_dtype_is_one_sentence_at_the_call(subject):
    data = makes("aten.bitwise_right_shift.Tensor", ["x", "x"], (2,))
    data["graphs"]["shell"]["nodes"][1]["val"] = [[[2], "float32"]]
    data["graphs"]["shell"]["nodes"][2]["args"] = [[{"node": "y"}]]
    engine = load(subject.folder)
    engine.programs = {"call": from_json(data)}
    with pytest.raises(UnsupportedError, match=r"rshift.* not implemented for 'Float'"):
        engine(torch.ones(2))


@pytest.mark.parametrize(
    ("target", "args", "dtype"),
    [
        ("aten.minimum.default", ["x", "x"], "complex64"),
        ("aten.clamp.default", ["x", -1e300], "float32"),
        ("aten.floor_divide.Scalar", ["x", 0], "int64"),
    ],
)
def test_an_operator_that_every_call_would_refuse_is_refused_when_the_engine_is_read(target, args, dtype):
    data = makes(target, args, (2,))
    data["signature"]["inputs"][0]["dtype"] = dtype
    for node in data["graphs"]["shell"]["nodes"][:2]:
        node["val"] = [[[2], dtype]]
    with pytest.raises(EngineError, match="does not compute"):
        from_json(data)


def test_every_operator_that_an_engine_may_hold_gives_tensors_alone():
    for name, op in ALLOWED.items():
        if name not in ("getitem", "call"):
            assert {str(r.type) for r in op._schema.returns} <= {"Tensor", "List[Tensor]"}, name


def test_json_of_any_bytes_is_read_or_refused_in_proportion_to_its_size(tmp_path):
    path = tmp_path / "a.json"
    for data in (b'"' + b'\\"' * 1_000_000, b'{"a":"\\ud800"}', '{"a": 1}'.encode("utf-16"), b"\xff", b"9" * 5000):
        path.write_bytes(data)
        # Were each quote followed to the end of the file, reading would take 10^12 steps.
        with fuzz_engines.deadline(), pytest.raises(EngineError, match="not valid JSON"):
            read_json(path)
    path.write_bytes(b'{"a":"\\ud83d\\ude00"}')
    assert read_json(path) == {"a": "\U0001f600"}


# -------------------------------------------------------------------------------------- a cache of the Hugging Face hub


@pytest.fixture
def snapshot(subject, tmp_path):
    """The engine as the hub's cache holds it: links to blobs."""
    repository = tmp_path / "hub" / "models--owner--engine"
    root, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    for path in (p for p in subject.folder.rglob("*") if p.is_file()):
        place, blob = root / path.relative_to(subject.folder), blobs / f"{abs(hash(path)):x}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return root


def test_an_engine_in_a_cache_of_the_hub_is_opened_verified_and_copied(subject, snapshot, tmp_path):
    expected = load(subject.folder)(**subject.call)["sample"]
    assert torch.equal(load(snapshot)(**subject.call)["sample"], expected)
    assert verify_folder(snapshot).good
    copied = load(snapshot).save(tmp_path / "copy")
    assert not any(p.is_symlink() for p in copied.rglob("*"))


@pytest.mark.parametrize("place", ["report.json", "programs"])
def test_a_link_out_of_a_cache_of_the_hub_is_refused_with_how_to_copy_it(snapshot, tmp_path, place):
    outside = tmp_path / "hub" / "models--other--engine" / "blobs" / "x"
    outside.parent.mkdir(parents=True)
    shutil.move((snapshot / place).resolve(), outside)
    if (snapshot / place).is_symlink():
        (snapshot / place).unlink()
    (snapshot / place).symlink_to(outside)
    with pytest.raises(EngineError, match=r"is a link, .*cp -rL"):
        load(snapshot)


def test_a_link_to_a_blob_that_is_a_link_is_refused(snapshot, tmp_path):
    blob = (snapshot / "report.json").resolve()
    outside = tmp_path / "secret"
    shutil.move(blob, outside)
    blob.symlink_to(outside)
    with pytest.raises(EngineError, match="is a link"):
        load(snapshot)


def test_the_command_that_the_sentence_names_makes_an_engine_of_links_one(subject, tmp_path):
    linked = shutil.copytree(subject.folder, tmp_path / "linked", copy_function=os.symlink)
    with pytest.raises(EngineError, match="cp -rL"):
        load(linked)
    subprocess.run(["cp", "-rL", linked, tmp_path / "plain"], check=True)
    load(tmp_path / "plain")


# -------------------------------------------------------------------------------------------------------- around a load


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


class Makes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        made = torch.scalar_tensor(0.25) + torch.ones(8) + torch.full((8,), 0.5) + torch.linspace(0, 1, 8)
        return torch.where(x > 0, self.linear(x), made)


@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16])
def test_tensors_that_a_model_makes_keep_their_dtype_under_another_default(tmp_path, default_dtype, built):
    torch.manual_seed(0)
    x = torch.randn(1, 8)
    default_dtype(built)
    model = Makes().to(torch.float32).eval()
    expected = model(x)
    turbocompile.optimize(model, (x,), recipe={"passes": "off", "verify": "off"}).save(tmp_path / "engine")
    for other in (torch.float32, torch.float64, torch.bfloat16):
        default_dtype(other)
        assert torch.equal(load(tmp_path / "engine")(x), expected)


def test_where_only_the_default_dtype_differs_the_sentence_names_the_one_that_fits(default_dtype):
    """Whole numbers that become floating ones take torch's default dtype, and no argument says another."""
    data = makes("aten.sin.default", ["x"], (2,))
    nodes = data["graphs"]["shell"]["nodes"]
    data["signature"]["inputs"][0]["dtype"] = "int64"
    nodes[0]["val"], nodes[1]["val"] = [[[2], "int64"]], [[[2], "float32"]]
    from_json(data)
    default_dtype(torch.float64)
    with pytest.raises(EngineError, match=r"default dtype was torch\.float32, .*set_default_dtype\(torch\.float32\)"):
        from_json(data)
    assert torch.get_default_dtype() == torch.float64
    nodes[1]["val"] = [[[2], "int32"]]
    with pytest.raises(EngineError, match="is damaged"):
        from_json(data)


AROUND = {
    "a device": lambda: torch.device("meta"),
    "a FakeTensorMode": FakeTensorMode,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("around", AROUND)
def test_weights_are_real_whatever_is_around_a_load(subject, around):
    expected = load(subject.folder)(**subject.call)["sample"]
    with AROUND[around]():
        engine = load(subject.folder)
    assert {t.device.type for t in engine.weights.values()} == {"cpu"}
    assert not any(t.is_inference() for t in engine.weights.values())
    assert torch.equal(engine(**subject.call)["sample"], expected)


def test_a_default_device_does_not_reach_into_an_engine(subject):
    expected = load(subject.folder)(**subject.call)["sample"]
    torch.set_default_device("meta")
    try:
        found = load(subject.folder)(**subject.call)["sample"]
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
