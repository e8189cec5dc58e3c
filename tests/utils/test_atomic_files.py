"""Files that appear whole or not at all, and who speaks in the log."""

import logging
import os

import pytest

from megatron_moe.utils.atomic import atomic_write, remove_if_there
from megatron_moe.utils.logging import is_rank_zero, logger, setup_logging


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "state.bin"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_an_old_file_stays_and_nothing_is_left_when_the_block_raises(tmp_path):
    path = tmp_path / "state.txt"
    path.write_text("old")

    def interrupted():
        with atomic_write(path, "w") as file:
            file.write("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.txt"]


def test_text_is_written_as_utf8(tmp_path):
    with atomic_write(tmp_path / "t", "w") as file:
        file.write("\u00e9")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9"


def test_removing_a_file_that_is_not_there_is_fine_and_a_folder_is_not(tmp_path):
    remove_if_there(tmp_path / "none")
    with pytest.raises(OSError):
        remove_if_there(tmp_path)


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("3", logging.ERROR)])
def test_rank_zero_informs_and_the_others_only_complain(monkeypatch, rank, level):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    before = logger.handlers, logger.propagate, logger.level
    try:
        setup_logging()
        setup_logging()  # twice: still one line per message
        assert (logger.level, len(logger.handlers), is_rank_zero()) == (level, 1, rank != "3")
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
