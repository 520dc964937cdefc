"""A file is there whole or not at all."""

from pathlib import Path

import pytest

from hpc.rundir import atomic


def test_a_written_file_has_its_text_in_utf_8(tmp_path: Path) -> None:
    atomic.write(tmp_path / "state", "é€\n")
    assert (tmp_path / "state").read_bytes() == "é€\n".encode()


def test_nothing_else_is_left_beside_a_written_file(tmp_path: Path) -> None:
    atomic.write(tmp_path / "state", "done\n")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_who_has_the_old_file_open_goes_on_reading_the_old_file(tmp_path: Path) -> None:
    atomic.write(tmp_path / "state", "old")
    with open(tmp_path / "state") as old:
        atomic.write(tmp_path / "state", "new")
        assert (old.read(), (tmp_path / "state").read_text()) == ("old", "new")


def test_what_is_being_written_does_not_stand_under_its_name(tmp_path: Path) -> None:
    atomic.aside(tmp_path / "out").write_text("half")
    assert not (tmp_path / "out").exists()


def test_what_is_finished_stands_under_its_name_alone(tmp_path: Path) -> None:
    atomic.aside(tmp_path / "out").write_text("whole")
    atomic.finish(tmp_path / "out")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "whole")]


def test_where_nothing_was_written_aside_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileNotFoundError):
        atomic.finish(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"
