"""The doctor: what a machine can run, said even where things are broken."""

import io
import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from turbocompile.tools import doctor
from turbocompile.tools.doctor import BROKEN, MISSING, OK, Doctor


def rows(found: Doctor) -> dict:
    return {row.name: row for row in found.rows}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def h100(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (card.major, card.minor))
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    return card


@pytest.mark.usefixtures("no_gpu")
def test_this_machine_has_what_is_needed_to_test():
    found = doctor.collect()
    assert found.healthy
    assert found.target == "cpu"
    assert "float32" in found.summary
    assert rows(found)["torch"].found.startswith(torch.__version__)
    assert rows(found)["GPU"].status == MISSING


def test_the_gpu_decides_the_verdict(h100):
    found = doctor.collect()
    assert found.target == "sm90"
    assert "FP8 linears" in found.summary
    row = rows(found)["GPU"]
    assert (row.status, row.found) == (OK, "NVIDIA H100 80GB HBM3, sm90, 85.0 GB; driver 570.86")


def test_a_card_that_no_target_fits_is_named(h100):
    h100.major, h100.minor = 7, 5
    found = doctor.collect()
    assert found.target == "cpu"
    assert rows(found)["GPU"].status == BROKEN
    assert "sm80" in rows(found)["GPU"].mend


@pytest.mark.parametrize("error", [RuntimeError("CUDA driver\ninitialization failed"), OSError(), ValueError("x")])
def test_a_broken_driver_is_a_row(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    found = doctor.collect()
    assert found.target == "cpu"
    row = rows(found)["GPU"]
    assert row.status == BROKEN
    assert type(error).__name__ in row.found
    assert "\n" not in row.found
    assert rows(found)["torch"].status == OK


def broken_metadata(monkeypatch, name, answer):
    real = metadata.version

    def version(asked):
        if asked != name:
            return real(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("name", "answer", "status"),
    [("diffusers", metadata.PackageNotFoundError("diffusers"), MISSING), ("av", ValueError("bad metadata"), BROKEN),
     ("av", None, BROKEN), ("transformers", "5.0", OK)],
    ids=str,
)  # fmt: skip
def test_a_needed_package_that_is_missing_or_broken_makes_it_ill(monkeypatch, name, answer, status):
    broken_metadata(monkeypatch, name, answer)
    found = doctor.collect()
    assert rows(found)[name].status == status
    assert found.healthy == (status == OK)
    assert (status == OK) or f"pip install {name}" in rows(found)[name].mend


@pytest.mark.usefixtures("no_gpu")
def test_an_extra_that_is_missing_does_not_make_it_ill(monkeypatch):
    broken_metadata(monkeypatch, "torchao", metadata.PackageNotFoundError("torchao"))
    found = doctor.collect()
    assert found.healthy
    assert rows(found)["torchao"].status == MISSING
    assert rows(found)["torchao"].mend == "pip install 'turbocompile[torchao]'"


@pytest.mark.usefixtures("no_gpu")
def test_a_triton_that_does_not_import_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.language", None)  # import_module raises ImportError
    row = rows(doctor.collect())["triton"]
    assert row.status == BROKEN
    assert "triton.language" in row.found


def test_a_gpu_without_a_working_triton_says_so(h100, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert doctor.collect().summary.endswith("once triton works.")


@pytest.mark.usefixtures("no_gpu")
def test_it_shows_itself_and_is_data():
    found = doctor.collect()
    data = json.loads(json.dumps(found.to_dict()))
    assert {"healthy", "target", "summary", "rows"} == set(data)
    assert all(set(row) == {"name", "status", "found", "purpose", "mend", "needed"} for row in data["rows"])
    console = Console(file=io.StringIO(), width=160)
    console.print(found)
    text = console.file.getvalue()
    assert found.summary.split(";")[0] in text
    assert all(row.name in text and row.status in text for row in found.rows)
    # What is not there says how to get it.
    assert all(row.mend for row in found.rows if row.status != OK)


def test_looking_imports_no_package_that_prints():
    code = (
        "import sys; from turbocompile.tools.doctor import collect; collect();"
        "print({'torchao', 'diffusers', 'transformers', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout == "set()\n"
    assert "torchao" not in done.stderr
