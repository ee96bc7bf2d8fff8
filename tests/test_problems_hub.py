"""A data set by its name: the real client against a hub of one data set on this machine."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROWS = [{"question": f"What is {i}+1?", "answer": f"We add.\n#### {i + 1:,}"} for i in range(999, 1003)]
COMMIT, FOLDER, FILE = "c" * 40, "main", "main/test-00000-of-00001.parquet"

CHILD = """
import sys
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import HuggingFaceSource
from astro_hpc.problems.sources import read_source
try:
    problems, report = read_source(HuggingFaceSource(type="huggingface", path=sys.argv[1], split=sys.argv[2]))
    print(report, *(problem.answer for problem in problems), sep="|")
except ConfigError as error:
    print(error)
"""


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub, for the public data set `owner/sums`."""

    data = parquet_bytes()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = {"type": "file", "path": FILE, "size": len(self.data), "oid": hashlib.sha1(self.data).hexdigest()}
        if path.startswith("/api/datasets/owner/sums/tree/"):
            self.answer(
                [file] if path.endswith(FOLDER) else [{"type": "directory", "path": FOLDER, "oid": "d", "size": 0}]
            )
        elif path.startswith("/api/datasets/owner/sums"):
            self.answer({"id": "owner/sums", "sha": COMMIT, "tags": [], "siblings": [{"rfilename": FILE}]})
        elif path.endswith(f"/resolve/{COMMIT}/{FILE}"):
            self.answer(self.data)
        elif path.startswith("/datasets/owner/sums/"):
            self.answer({}, 404, "EntryNotFound")
        else:
            self.answer({}, 404, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, value: object, code: int = 200, error: str = "") -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        headers = {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
        }
        for name, text in {**headers, **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def read(hub: str, cache: Path, name: str, split: str) -> str:
    unset = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CHILD, name, split]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_data_set_by_name(hub: str, tmp_path: Path) -> None:
    assert read(hub, tmp_path, "owner/sums", "test") == "sums: 4 of 4 used|1000|1001|1002|1003\n"
    assert "owner/sums: has no split 'train'; it has test\n" in read(hub, tmp_path, "owner/sums", "train")
    missing = read(hub, tmp_path, "owner/nothing", "test")
    assert missing.startswith("owner/nothing: not loaded as a data set")
    assert missing.count("\n") == 1
