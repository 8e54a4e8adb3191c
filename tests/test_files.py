import os

import pytest

from vmamba.errors import UserError
from vmamba.files import remove_leftovers, replace_text, replaced


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "before")
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left; the previous one is intact"):
        write_half(path, OSError(28, "No space left"))
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def write_half(path, error):
    with replaced(path) as temporary:
        temporary.write_text("half")
        raise error


def test_the_name_is_taken_once_the_content_is_on_disk(tmp_path, monkeypatch):
    steps = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    with replaced(tmp_path / "a.txt") as temporary:
        temporary.write_text("text")
    assert steps == [str(temporary), "replace", str(tmp_path)]


def test_the_ending_is_kept_for_those_who_look_at_it(tmp_path):
    with replaced(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.touch()
        assert [entry.name for entry in tmp_path.glob(".*")] == [temporary.name]
    temporary.touch()
    assert remove_leftovers(tmp_path) == [temporary]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    replace_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
