"""Places of results: looked at before the work, written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from turbocompile.errors import UnsupportedError
from turbocompile.files import check_file, check_folder, replacing


def test_places_that_can_be_written_are_given_back(tmp_path):
    assert check_file(tmp_path / "new" / "a.mp4", ".mp4") == tmp_path / "new" / "a.mp4"
    (tmp_path / "b.MP4").write_text("old")
    assert check_file(tmp_path / "b.MP4", ".mp4") == tmp_path / "b.MP4"
    assert check_folder(tmp_path / "some" / "folder") == tmp_path / "some" / "folder"
    assert check_folder(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == [tmp_path / "b.MP4"]  # nothing was made


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    for place, sentence in (
        (tmp_path / "a.png", "give a name that ends so"),
        (tmp_path / "file" / "a.mp4", "is not a folder"),
        (tmp_path / ("x" * 300) / "a.mp4", "cannot be written"),
        (tmp_path / "a\0b" / "a.mp4", "cannot be written"),
    ):
        with pytest.raises(UnsupportedError, match=sentence):
            check_file(place, ".mp4")
    with pytest.raises(UnsupportedError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(UnsupportedError, match="is not a folder"):
        check_folder(tmp_path / "file")


def test_a_folder_without_the_right_to_write_is_refused():
    """Root may write anywhere, so that a process of root's asks as a user without rights."""
    code = (
        "import os, sys; from turbocompile.files import check_file; from turbocompile.errors import UnsupportedError\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: check_file(sys.argv[1])\n"
        "except UnsupportedError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # not below a folder that is its owner's alone
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", code, f"{folder}/new/a.mp4"], capture_output=True, text=True)
        os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr
    assert f"nothing may be written to {folder}" in done.stdout


def test_the_right_to_write_is_asked_of_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)) or False)
    with pytest.raises(UnsupportedError, match="nothing may be written"):
        check_folder(tmp_path / "new" / "newer")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_nothing_is_written_into_an_engine(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "an app of another kind"}))
    assert check_file(tmp_path / "page.html") == tmp_path / "page.html"
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "modules": {}, "digest": "ab"}))
    for place in (tmp_path / "page.html", tmp_path / "new" / "page.html"):
        with pytest.raises(UnsupportedError, match="is inside the engine"):
            check_file(place)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new" / "page.html"
    with replacing(path) as temporary:
        temporary.write_text("first")

    def stopped():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
