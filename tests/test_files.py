"""Files appear whole or not at all; progress is a bar on a terminal and lines elsewhere."""

import json

import pytest

import progress
from files import atomic_write, read_json, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1} and read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
        read_json(tmp_path / "a.json")


def test_lines_instead_of_a_bar_where_nobody_looks(capsys, monkeypatch):
    """Output that goes to a file: no bar, no carriage return, a line now and then."""
    assert list(progress.show_progress([1, 2, 3], "reading", "files")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(progress.show_progress(iter([1, 2]), "reading", "files", total=2)) == [1, 2]
    out, error = capsys.readouterr()
    assert out == "" and error.splitlines()[1].startswith("reading: 1 of 2 files, ") and "\r" not in error


def test_silence_is_the_default():
    items = [1, 2]
    assert progress.no_progress(items, "reading", "files") is items
