"""Where an engine's files on this machine lie, and that they appear whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbocompile.cache import cache_path, keep_json, write_json
from turbocompile.runtime.tuning import read_cache
from turbocompile.tools.bench import read_record


def test_the_users_cache_is_where_the_desktop_standard_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("bench", "ab") == tmp_path / "turbocompile" / "bench" / "ab.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path("tuning", "ab") == tmp_path / "home" / ".cache" / "turbocompile" / "tuning" / "ab.json"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = write_json(tmp_path / "new" / "a.json", {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": Path})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not kept in the cache"):
        assert keep_json("bench", "ab", {}) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_json("bench", "ab", {}) == tmp_path / "turbocompile" / "bench" / "ab.json"


def test_a_user_without_a_home_has_no_records(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert read_record("transformer", "ab") is None
    assert read_cache("ab") == {}
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME"):
        assert keep_json("bench", "ab", {}) is None
