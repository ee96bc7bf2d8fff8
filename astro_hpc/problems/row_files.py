"""Rows of problem files: JSON Lines, Parquet and Hugging Face data sets, one at a time and within bounds.

Files are not trusted: lines and texts are bounded, nothing is unpickled, and no code that comes with data is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import HuggingFaceSource, JsonlSource, ParquetSource, ProblemSource
from astro_hpc.problems.rows import UnusableRow, columns_to_read

RowsSource = JsonlSource | ParquetSource | HuggingFaceSource
Row = dict[str, Any] | UnusableRow

_MAX_LINE_BYTES = 8 << 20
_MAX_ROW_GROUP_BYTES = 2 << 30
_BATCH_ROWS = 64
_DATA_FORMATS = ("arrow", "csv", "json", "parquet", "text")


def local_path(source: ProblemSource) -> Path | None:
    """The file or folder that a source reads; None for what is generated or comes from the hub."""
    if isinstance(source, JsonlSource | ParquetSource):
        return source.path
    if isinstance(source, HuggingFaceSource) and (path := Path(source.path)).exists():
        return path
    return None


def source_name(source: RowsSource) -> str:
    """The source's name, as in the ids of its problems."""
    return source.name or (source.path.stem if isinstance(source.path, Path) else Path(source.path).name)


def read_rows(source: RowsSource) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row; a row that can't be read is an `UnusableRow` that says why.

    Raises:
        ConfigError: the source is missing or not of its kind, or the package that reads it is missing.
    """
    if isinstance(source, HuggingFaceSource):
        return _data_set_rows(source)
    if isinstance(source, ParquetSource):
        columns = columns_to_read(source.text_column, source.answer_column)
        return (pair for path in _files(source.path, "parquet") for pair in _parquet_rows(path, columns))
    return ((f"{path}:{number}", row) for path in _files(source.path, "jsonl") for number, row in _json_lines(path))


def read_numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSON Lines file that isn't blank, one at a time.

    Raises:
        ConfigError: the file can't be read, or a line is no JSON object; file and line are named.
    """
    for number, row in _json_lines(path):
        if isinstance(row, UnusableRow):
            raise ConfigError(f"{path}:{number}: {row}; mend or remove the line")
        yield number, row


def _files(path: Path, ending: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob(f"*.{ending}") if not file.name.startswith("."))
    if not files:
        raise ConfigError(f"{path}: no *.{ending} files in this folder; check the path and the source's type")
    return files


# --- JSON Lines -----------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        handle = open(path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); check the path") from None
    with handle:
        number = 0
        while line := handle.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                _skip_line(handle, line)
                yield number, UnusableRow(f"a line of more than {_MAX_LINE_BYTES >> 20} MB")
            elif line.strip():
                yield number, _json_object(line)


def _skip_line(handle: IO[bytes], begun: bytes) -> None:
    while begun and not begun.endswith(b"\n"):
        begun = handle.readline(1 << 20)


def _json_object(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UnusableRow(f"not JSON ({error})")
    if not isinstance(row, dict):
        return UnusableRow(f"expected a JSON object a line, found {type(row).__name__}")
    return row


# --- Parquet --------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, columns: set[str]) -> Iterator[tuple[str, Row]]:
    pyarrow = _optional("pyarrow", "Parquet files")
    parquet = _optional("pyarrow.parquet", "Parquet files")
    row_number = 0
    try:
        with parquet.ParquetFile(path) as file:
            present = [name for name in file.schema_arrow.names if name in columns]
            for group in range(file.num_row_groups):
                _refuse_huge_group(path, file.metadata.row_group(group), present)
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=present, use_threads=False):
                    for index in range(batch.num_rows):
                        row_number += 1
                        yield f"{path}:row {row_number}", {name: batch[name][index].as_py() for name in present}
    except FileNotFoundError:
        raise ConfigError(f"{path}: can't be read (No such file or directory); check the path") from None
    except (pyarrow.ArrowException, OSError) as error:
        where = f" after row {row_number}" if row_number else ""
        raise ConfigError(
            f"{path}: not a sound Parquet file{where} ({_line(error)}); fetch or write it again"
        ) from None


def _refuse_huge_group(path: Path, group: Any, present: list[str]) -> None:
    chunks = [group.column(index) for index in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in present)
    if size > _MAX_ROW_GROUP_BYTES:
        raise ConfigError(
            f"{path}: a row group of {size >> 20} MB (limit {_MAX_ROW_GROUP_BYTES >> 20}); write smaller row groups"
        )


# --- Hugging Face data sets -----------------------------------------------------------------------------------


def _data_set_rows(source: HuggingFaceSource) -> Iterator[tuple[str, Row]]:
    data_set = _data_set(source, _optional("datasets", "Hugging Face data sets"))
    columns = columns_to_read(source.text_column, source.answer_column)
    if names := data_set.column_names:
        data_set = data_set.select_columns([name for name in names if name in columns])
    number = 0
    rows = iter(data_set)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the reader of the format raises
            where = f" after row {number}" if number else ""
            raise ConfigError(
                f"{source.path}: can't be read{where} ({_line(error)}); fetch or write it again"
            ) from None
        if row is None:
            return
        number += 1
        yield f"{source.path}[{source.split}]:row {number}", dict(row)


def _data_set(source: HuggingFaceSource, datasets: Any) -> Any:
    """One split: a folder is streamed, so nothing of it is copied; the hub's files come through its cache."""
    folder = Path(source.path)
    looks_local = source.path.startswith((".", "/", "~")) or source.path.count("/") > 1
    if not folder.exists() and looks_local:
        raise ConfigError(f"{source.path}: no such folder; check the path, or give a name on the hub: owner/name")
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if not hasattr(saved, "keys"):
                return saved
            splits = sorted(saved)
            if source.split in splits:
                return saved[source.split]
        else:
            builder = datasets.load_dataset_builder(source.path, name=source.config, revision=source.revision)
            if (kind := type(builder).__module__.rpartition(".")[2]) not in _DATA_FORMATS:
                raise ConfigError(f"{source.path}: data of the kind {kind!r}; give one of {', '.join(_DATA_FORMATS)}")
            if folder.exists():
                streams = builder.as_streaming_dataset()
                splits = sorted(streams)
                if source.split in splits:
                    return streams[source.split]
            else:
                builder.download_and_prepare()
                splits = sorted(builder.info.splits)
                if source.split in splits:
                    return builder.as_dataset(split=source.split)
    except ConfigError:
        raise
    except Exception as error:  # the library raises a dozen kinds, some of the network's
        what = "folder" if folder.exists() else "name and the network; without one give a local folder"
        raise ConfigError(f"{source.path}: not loaded as a data set ({_line(error)}); check the {what}") from None
    raise ConfigError(f"{source.path}: has no split {source.split!r}; it has {', '.join(splits) or 'none'}")


def _optional(module: str, what: str) -> Any:
    """A package that only some sources need.

    Raises:
        ConfigError: it isn't installed; the extra that brings it is named.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({_line(error)})"
        raise ConfigError(
            f'{what} need the package {package}, which is not there{reason}; pip install "astro-hpc[data]"'
        ) from None


def _line(error: BaseException) -> str:
    """An error's message on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
