"""The process of one vLLM server: `python -m astro_hpc.inference.server_process JSON`, started by `local_server`.

vLLM's own server with the settings of the in-process engine. It and the processes that it starts end with their
parent, kill -9 included.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.settings import engine_settings, prepare_environment
from astro_hpc.run.process import die_with_parent

_PLUGINS = "astro_hpc.inference.server_plugins"

if __name__ == "__mp_main__":  # a process that vLLM spawned: it imports its parent's main module first
    die_with_parent()


def server_arguments(spec: dict[str, Any]) -> list[str]:
    """vLLM's command line.

    Args:
        spec: `model_dir`, `inference` (a dumped InferenceConfig), `names` (served model names), `host`, `port`,
            `seed`.
    """
    settings = engine_settings(Path(spec["model_dir"]), InferenceConfig.model_validate(spec["inference"]), spec["seed"])
    del settings["disable_log_stats"]  # /metrics of a server is worth having
    settings |= {
        "host": spec["host"],
        "port": spec["port"],
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        "enable_prompt_tokens_details": True,  # cache hits are counted
        "disable_uvicorn_access_log": True,
        "middleware": f"{_PLUGINS}.GuardAllPaths",
        "worker_extension_cls": f"{_PLUGINS}.WeightUpdates",
    }
    arguments = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            arguments += [flag, str(value)]
    return [*arguments, "--served-model-name", *spec["names"]]


def main() -> None:
    """Serve until told to end."""
    # Slurm sends it to a whole step before the time limit, so that stages save; what this starts inherits it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = os.environ.pop("ASTRO_HPC_PARENT", None)
    if parent is not None:
        die_with_parent(int(parent))
    prepare_environment()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    spec = json.loads(sys.argv[1])

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(server_arguments(spec))
        validate_parsed_serve_args(arguments)
        uvloop.run(run_server(arguments))
    except (ConfigError, ValueError) as error:
        print(f"astro-hpc serve: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # how vLLM answers to SIGTERM while it loads
        sys.exit(130)


if __name__ == "__main__":
    main()
