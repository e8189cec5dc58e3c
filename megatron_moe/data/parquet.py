"""Texts from Parquet files, through the optional package pyarrow: streamed, some rows of one row group at a time.

A file is never in memory as a whole, and of a row group only the columns that are wanted are decompressed. pyarrow is imported when
the first such file is met.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

MAGIC = b"PAR1"
MOST_ROWS = 1 << 14  # of a batch, however short the texts are


class BadRecordError(ValueError):
    """A line, row or file that cannot become a document; the message is the reason alone, the reader knows the place."""


def batches(path: str, keys: tuple[str, ...], batch_bytes: int) -> Iterator[tuple[Any, int]]:
    """(pyarrow.RecordBatch with the columns `keys` and about `batch_bytes` of text, bytes of the file that are behind us).

    ValueError, naming the file, without pyarrow, for a file that is damaged, and for a column that is not there or no text.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is Parquet, and that needs the Python package pyarrow; pip install pyarrow") from None
    size, rows = os.path.getsize(path), 0
    try:
        with ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path, keys)
            for number in range(file.metadata.num_row_groups):
                for batch in file.iter_batches(_batch_rows(file.metadata.row_group(number), batch_bytes), [number], list(keys)):
                    rows += batch.num_rows
                    yield batch, size * rows // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet data ({str(error).splitlines()[0]}); fetch or make the file again") from None


def _check_columns(schema: Any, path: str, keys: tuple[str, ...]) -> None:
    from pyarrow import types

    for key in keys:
        if key not in schema.names:
            raise ValueError(f"{path}: no column {key!r}; it has {', '.join(map(repr, schema.names[:8]))} (--json-keys chooses)")
        kind = schema.field(key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise ValueError(f"{path}: column {key!r} holds {kind}, not text (--json-keys chooses another column)")


def _batch_rows(group: Any, batch_bytes: int) -> int:
    """Rows that have about `batch_bytes` in them, all columns counted."""
    return min(max(group.num_rows * batch_bytes // max(group.total_byte_size, 1), 1), MOST_ROWS)


def records_of(batch: Any, keys: tuple[str, ...]) -> Iterator[list[str] | BadRecordError]:
    """Of each row: the text under each key, or the reason why there is none."""
    try:
        columns = [batch.column(key).to_pylist() for key in keys]
    except UnicodeDecodeError:  # nothing checks the text of a Parquet file before it is read
        columns = [[_text_or_reason(value) for value in batch.column(key)] for key in keys]
    for row in zip(*columns):
        bad = next((_reason(key, value) for key, value in zip(keys, row) if not isinstance(value, str)), None)
        yield bad or list(row)


def _text_or_reason(value: Any) -> str | BadRecordError | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRecordError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})")


def _reason(key: str, value: BadRecordError | None) -> BadRecordError:
    return value or BadRecordError(f"{key!r} is null")
