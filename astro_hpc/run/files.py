"""Files that are either whole or absent: atomic writes, hashes, locks, and a journal that survives kill -9."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from astro_hpc.config.base import ConfigError

_WHOLE_FILE_BYTES = 512 << 20
_SAMPLE_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InUse(ConfigError):
    """Another process has what this one needs; it passes when that one ends."""


def no_room(error: BaseException) -> bool:
    """Whether a full disk, a quota or a file-size limit is behind `error`.

    Libraries that write in native code or in processes of their own keep no errno: of those the text is looked at.
    """
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return True
        if any(text in str(seen) for text in texts):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A temporary binary file that becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 `text`: readers see the old file or the new one, also after a crash."""
    with _replacing(path) as handle:
        handle.write(text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl_atomic(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, atomically, without holding them all; returns how many."""
    count = 0
    with _replacing(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file.

    Raises:
        ConfigError: the file is missing, or a line is not a JSON object; file and line are named.
    """
    try:
        handle = open(path, encoding="utf-8")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); check the path") from None
    with handle:
        number = 0
        try:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}:{number}: expected a JSON object a line, found {type(row).__name__}")
                yield row
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: after line {number}: not UTF-8 ({error.reason})") from None


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` (replacing an old one) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            fsync_dir(Path(folder))
        if path.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.rename(path, stale / "was")
            os.rename(temporary, path)
            shutil.rmtree(stale)
        else:
            os.rename(temporary, path)
        fsync_dir(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_half_written(folder: Path) -> None:
    """Remove what a killed process left of unfinished atomic writes below `folder`, which nobody else may be using."""
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A hash that changes when a file or folder does.

    Files up to 512 MiB are hashed whole; of larger ones the size and three samples are, because reading a
    70B checkpoint takes minutes. Hidden files are left out.

    Raises:
        ConfigError: nothing is there.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; the stage that makes it has not run")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    for file in files:
        size = file.stat().st_size
        name = "" if file == path else str(file.relative_to(path))
        digest.update(f"{name}\0{size}\0".encode())
        if size <= _WHOLE_FILE_BYTES:
            digest.update(sha256_file(file).encode())
        else:
            with open(file, "rb") as handle:
                for offset in (0, size // 2, size - _SAMPLE_BYTES):
                    handle.seek(offset)
                    digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class Lock:
    """Exclusive use of a folder or file, for as long as the owner lives.

    The kernel drops the lock with its owner, so a killed process never blocks the next one.
    """

    def __init__(self, path: Path, what: str = "") -> None:
        """`what` is in use, for the error message; the lock's folder when absent."""
        self.path, self._what = path, what or str(path.parent)
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 200).decode(errors="replace").strip()
            os.close(self._descriptor)
            self._descriptor = None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    f"{self.path}: can't be locked ({error.strerror}); use a file system that can"
                ) from None
            raise InUse(f"{self._what}: in use by {owner or 'another process'}; wait for it or stop it") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Journal:
    """Append-only JSON lines, each with a checksum and on disk before `append` returns.

    A line is `CRC32-hex SPACE JSON`. A process killed while appending leaves a torn last line: opening for
    writing cuts it, reading stops before it. Damage anywhere else is an error.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handle = open(path, "ab")  # noqa: SIM115 - held until close
        try:
            whole = _whole_bytes(path)
            if whole < path.stat().st_size:
                self._handle.truncate(whole)
            os.fsync(self._handle.fileno())
            fsync_dir(path.parent)
        except BaseException:
            self._handle.close()
            raise

    def append(self, value: Any) -> None:
        """Write one value and wait until it is durable."""
        body = json.dumps(value, ensure_ascii=False).encode()
        self._handle.write(b"%08x %s\n" % (zlib.crc32(body), body))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file; twice is harmless."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def read(path: Path) -> Iterator[Any]:
        """Yield the whole lines' values in order, one at a time; a missing file has none.

        Raises:
            ConfigError: a line other than the last is damaged.
        """
        for _, value in Journal.read_with_offsets(path):
            yield value

    @staticmethod
    def read_with_offsets(path: Path) -> Iterator[tuple[int, Any]]:
        """As `read`, each value with its place for `read_at`."""
        if not path.exists():
            return
        start = 0
        for end, body in _journal_lines(path):
            yield start, json.loads(body)
            start = end

    @staticmethod
    def read_at(path: Path, offset: int) -> Any:
        """The value at a place that `read_with_offsets` gave."""
        with open(path, "rb") as handle:
            handle.seek(offset)
            return json.loads(handle.readline().partition(b" ")[2])


def _journal_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset after the line, JSON bytes) of each whole line."""
    with open(path, "rb") as handle:
        offset = 0
        for number, line in enumerate(handle, 1):
            offset += len(line)
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(body):
                yield offset, body
                continue
            # Without its end it is the last line: torn, or being written right now.
            if line.endswith(b"\n") and handle.read(1):
                raise ConfigError(f"{path}:{number}: damaged line inside the journal; restore the file from a copy")
            return


def _whole_bytes(path: Path) -> int:
    """Length of the journal up to its last whole line."""
    offset = 0
    for offset, _ in _journal_lines(path):  # noqa: B007 - the last value is wanted
        pass
    return offset
