"""slurm/*.sbatch do what `launch` renders, line by line; pipeline.sbatch submits that graph; convert.sbatch runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_box import load_sandbox_module

from astro_hpc.config import load_config
from astro_hpc.launch.cluster import load_cluster
from astro_hpc.launch.graph import Job, build_graph
from astro_hpc.launch.render import Place, render

ROOT = Path(__file__).parent.parent
JOB_OF = {
    "search_array": "search",
    "gather": "gather",
    "clone_array": "clone",
    "clone_gather": "clone-gather",
    "sft": "sft-astro",
    "select_array": "select-astro",
    "select_gather": "select-gather-astro",
    "rl": "rl-astro",
    "eval_array": "eval",
    "eval_gather": "eval-gather",
    "report": "report",
}
NO_JOB = ("pipeline", "convert")  # of a launch
TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sbatch") if path.stem not in NO_JOB)
# What a launch fills in by itself, and what the user of a template edits.
NAMED_BY_LAUNCH = {"chdir", "comment", "job-name", "output"}
EDITED = {"RUN", "CONFIG", "CODE", "PYTHON", "ARM"}


@pytest.fixture(scope="module")
def graph() -> dict[str, Job]:
    cluster = load_cluster(Path("h100-example"))
    return {job.name: job for job in build_graph(load_config(ROOT / "configs/llama3.1-70b.yaml"), cluster)}


def options_of(text: str) -> dict[str, str]:
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^#SBATCH (.*)$", text, re.M)]
    pairs = [word.removeprefix("--").partition("=")[::2] for words in lines for word in words]
    assert len(dict(pairs)) == len(pairs), "an option given twice"
    return {name: value for name, value in pairs if name not in NAMED_BY_LAUNCH}


def script_of(text: str) -> list[str]:
    """The commands: comments and blank lines dropped, edited values blanked."""
    lines = []
    for line in text.splitlines():
        name = line.partition("=")[0]
        line = re.sub(r"(^|\s+)# .*$", "", line).rstrip()
        if line and not line.startswith("#") and line != "export SUBMITIT_EXECUTOR=slurm":
            lines.append(f"{name}=..." if name in EDITED else line)
    return lines


def test_every_job_of_a_run_has_its_template(graph):
    assert {path.stem for path in TEMPLATES} == set(JOB_OF)
    assert set(JOB_OF.values()) == {name for name in graph if not name.endswith("-direct")}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_what_launch_renders(path, graph):
    cluster = load_cluster(Path("h100-example")).model_copy(update={"container": None})
    rendered = render(graph[JOB_OF[path.stem]], cluster, Place(Path("/r"), Path("/f"), Path("/w"), "k"))
    text = path.read_text()
    assert options_of(text) == options_of(rendered)
    assert script_of(text) == script_of(rendered)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert len(edited_lines(text)) == 5


def test_the_script_that_every_job_sources_is_sound_and_lies_in_the_package():
    path = ROOT / "astro_hpc" / "launch" / "job.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert all(path.read_text().count(f"${name}") for name in ("OUTPUT", "WORK", "MAX_REQUEUES", "MAX_FAILURES"))


def edited_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.partition("# EDIT")[1]]


def test_the_conversion_template_with_five_lines_edited_imports_verifies_and_exports(slurm, tiny_llama, tmp_path):
    text = (ROOT / "slurm" / "convert.sbatch").read_text()
    assert len(edited_lines(text)) == 5
    values = {"HF_MODEL": tiny_llama, "MEGATRON": tmp_path / "megatron", "PYTHON": sys.executable}
    for line in edited_lines(text):
        name = line.partition("=")[0]
        new = f"{name}={values[name]}" if name in values else "#SBATCH --partition=batch" if "partition" in line else ""
        text = text.replace(line, new)
    script = tmp_path / "convert.sbatch"
    script.write_text(text)
    logs = []
    for what in ("import", "verify", "export"):
        out = tmp_path / f"{what}.out"
        slurm.run("sbatch", "--wait", "--chdir", ROOT, "--mem=0", "-o", out, script, what, timeout=180)
        logs.append(out.read_text())
    assert json.loads((tmp_path / "megatron" / "certificate.json").read_text())["passed"], logs
    names = {path.name for path in (tmp_path / "megatron-hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names, logs


def test_slurm_takes_the_templates_and_the_pipeline_is_the_graph(graph):
    module = load_sandbox_module()
    box = module.Sandbox(Path(tempfile.mkdtemp(prefix="slurm-")), num_nodes=8, die_with_parent=True)
    try:
        module.check_installed()
        box.up()
        box.run("scontrol", "update", "nodename=n[1-8]", "state=drain", "reason=nothing is to start")
        environment = {**os.environ, **box.env, "SBATCH_PARTITION": "batch"}
        command = ["bash", ROOT / "slurm" / "pipeline.sbatch"]
        result = subprocess.run(command, env=environment, cwd=box.dir, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        rows = [line.split("|") for line in box.run("squeue", "-h", "-o", "%F|%j|%E").splitlines()]
    finally:
        box.down()
    names: dict[str, str] = {}
    for number, (job_id, name, _) in enumerate(sorted(rows, key=lambda row: int(row[0]))):
        template = name.removeprefix("astro-").replace("-", "_")
        of_arm = template in ("sft", "select_array", "select_gather", "rl")
        arm = "direct" if number > 7 and of_arm else "astro"
        names[job_id] = JOB_OF[template].replace("astro", arm)
    after = {names[job_id]: {names[each] for each in re.findall(r"afterok:(\d+)", deps)} for job_id, _, deps in rows}
    assert after == {name: set(job.after) for name, job in graph.items()}
