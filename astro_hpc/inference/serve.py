"""`astro-hpc serve`: one vLLM server in the foreground."""

from __future__ import annotations

import http.client
import signal
import socket
import sys
import threading
import urllib.request
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.local_server import LocalServer, default_threads, gpu_shares, is_loopback
from astro_hpc.inference.replicas import api_key

_POLL_SECONDS = 0.25


def serve(
    model_dir: Path,
    cfg: InferenceConfig,
    seed: int,
    host: str,
    port: int,
    allow_weight_updates: bool = False,
    index: int | None = None,
) -> int:
    """Serve a model with the settings of the in-process engine, until SIGTERM or Ctrl-C.

    Args:
        index: which of this machine's `inference.num_servers` servers this is: it takes its share of the GPUs, or
            on CPU of the cores. None: it is alone here.

    Returns:
        0 when it was told to end; else the exit code of the server, which has said why.

    Raises:
        ConfigError: the folder is no model, the port is taken, weights could be replaced by anybody, or the GPUs are
            too few.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (model_dir / name).is_file():
            raise ConfigError(f"{model_dir}: no {name}; expected a Hugging Face model folder with its tokenizer")
    key = api_key(cfg)
    if allow_weight_updates and key is None and not is_loopback(host):
        raise ConfigError(
            f"--allow-weight-updates on {host} lets everyone who reaches it replace the weights; "
            "set inference.server_api_key_env to the name of a variable with a key, or use --host 127.0.0.1"
        )
    _check_port(host, port)
    servers = cfg.num_servers or 1
    if index is not None and index >= servers:
        raise ConfigError(f"--index {index}: inference.num_servers is {servers}; count from 0")
    gpus = None if index is None else gpu_shares(servers, cfg.tensor_parallel_size)[index]
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # see server_process.main
    server = LocalServer(
        model_dir,
        cfg,
        seed=seed,
        host=host,
        api_key=key,
        allow_weight_updates=allow_weight_updates,
        threads=None if index is None else default_threads(servers),
        gpus=gpus,
    )
    try:
        server.start(port)
        print(f"serve: loading {model_dir}", file=sys.stderr, flush=True)
        ready = False
        while not stop.wait(_POLL_SECONDS):
            if (code := server.exit_code()) is not None:
                print(f"serve: the server ended with exit code {code}", file=sys.stderr)
                return code if 0 < code < 128 else 1
            if not ready and _answers(server.url):
                ready = True
                print(f"serve: ready at {server.url}", file=sys.stderr, flush=True)
        return 0
    finally:
        server.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Say that a port is taken now, not after the model has been loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


def _answers(url: str) -> bool:
    # 0.0.0.0 is reached at the loopback address
    address = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # URLError is an OSError
        return False
