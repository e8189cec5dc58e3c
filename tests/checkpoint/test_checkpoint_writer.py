"""Sizes and checksums of shards are known when they are written, and are those that a reading of the files gives."""

from __future__ import annotations

import os
import zlib
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.checkpoint import files, writer
from megatron_moe.checkpoint.files import CheckpointError, describe_file, problems_in, read_manifest
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.one_by_one import save_one_by_one
from megatron_moe.checkpoint.writer import BESIDE_FROM, CountedFile

SIZES = (0, 1, 5, BESIDE_FROM - 1, BESIDE_FROM, BESIDE_FROM + 3)


def tensors(kind: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Below and above the size from which a thread makes the checksum."""
    return {f"model.{i}": torch.randn(n // 2 + 1).to(kind) for i, n in enumerate(SIZES)} | {"model.slice": torch.randn(700, 700)[:, :300]}


def save(directory, iteration: int) -> None:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    CheckpointManager(directory).save(
        iteration, {**tensors(), f"model.own{rank}": torch.ones(300_000), "model.half": torch.ones(9).half()}, {}
    )


@pytest.mark.distributed
def test_the_manifest_has_what_a_reading_gives(tmp_path):
    save(tmp_path, 1)
    run_distributed(save, 2, tmp_path, 2)
    for path, shards in ((tmp_path / "iter_0000001", 1), (tmp_path / "iter_0000002", 2)):
        found = read_manifest(path).files
        assert found == {name: describe_file(path / name) for name in os.listdir(path) if name != files.MANIFEST}
        assert len([name for name in found if name.endswith(".distcp")]) == shards


def test_shards_are_not_read_back(tmp_path):
    read, original = [], files.crc32
    with mock.patch.object(files, "crc32", lambda path: (read.append(path.name), original(path))[1]):
        save(tmp_path, 1)
        content = {"a": {"shape": [4], "dtype": "float32"}}
        save_one_by_one(tmp_path / "one", 1, content, {}, lambda name: torch.ones(4), {}, lambda *_: None)
    assert read == [".metadata", ".metadata"]
    assert problems_in(tmp_path / "iter_0000001", "crc") == problems_in(tmp_path / "one" / "iter_0000001", "crc") == []


def test_a_file_that_is_shorter_than_what_was_written_is_no_checkpoint(tmp_path):
    close = CountedFile.close

    def cut(self):
        close(self)
        os.truncate(self._file.name, max(self.size - 5, 0))

    with (
        mock.patch.object(CountedFile, "close", cut),
        pytest.raises(CheckpointError, match=r"\d+ bytes were written, and the file has \d+"),
    ):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_a_byte_that_changes_on_its_way_is_found_when_the_checkpoint_is_verified(tmp_path):
    """A checksum of what can be read would be right."""
    close = CountedFile.close

    def change(self):
        is_first = not self._file.closed  # torch closes it, and then its context
        close(self)
        if is_first and str(self._file.name).endswith(".distcp"):
            with open(self._file.name, "rb+") as file:
                file.seek(self.size // 2)
                byte = file.read(1)[0]
                file.seek(self.size // 2)
                file.write(bytes([byte ^ 1]))

    with mock.patch.object(CountedFile, "close", change):
        save(tmp_path, 1)
    (problem,) = problems_in(tmp_path / "iter_0000001", "crc")
    assert "__0_0.distcp: CRC-32 mismatch" in problem


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]])
def test_a_file_counts_what_it_is_given_and_a_sync_has_all_of_it(tmp_path, sizes):
    parts = [os.urandom(n) for n in sizes]
    file = CountedFile(tmp_path / "file")
    for i, part in enumerate(parts):
        assert file.write(memoryview(part) if i % 2 else part) == len(part)
        assert file.tell() == os.fstat(file.fileno()).st_size == sum(sizes[: i + 1]), "fsync knows nothing of a buffer"
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert file.entry == {"size": sum(sizes), "crc32": zlib.crc32(b"".join(parts))} == describe_file(tmp_path / "file")


def test_numbers_are_counted_in_bytes(tmp_path):
    file = CountedFile(tmp_path / "file")
    file.write(memoryview(torch.ones(BESIDE_FROM, dtype=torch.float64).numpy()))
    file.close()
    assert file.entry == describe_file(tmp_path / "file") and file.size == 8 * BESIDE_FROM


def test_a_write_that_fails_is_heard_of(tmp_path):
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed below
    file = CountedFile(tmp_path / "file")
    file._file.close()
    file._file = full
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(2 * BESIDE_FROM))
    file.close()


def test_the_disk_is_given_each_part_of_a_long_file_once_while_more_is_copied(tmp_path):
    asked, part = [], bytes(3 << 20)
    with (
        mock.patch.object(writer, "ON_ITS_WAY_FROM", 8 << 20),
        mock.patch.object(
            os, "posix_fadvise", create=True, new=lambda fd, first, length, what: asked.append((first, length, os.fstat(fd).st_size))
        ),
    ):
        file = CountedFile(tmp_path / "file")
        for _ in range(8):
            file.write(part)
        file.close()
    assert asked == [(0, 9 << 20, 9 << 20), (9 << 20, 9 << 20, 18 << 20)], "in one piece after another, and nothing of it in a buffer"
    assert file.entry == describe_file(tmp_path / "file")
