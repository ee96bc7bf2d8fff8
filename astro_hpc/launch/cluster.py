"""Cluster files: what a cluster is like and what each stage gets of it. Typed; unknown keys fail with the nearest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from astro_hpc.config.base import ConfigError, Section
from astro_hpc.config.loading import load_section
from astro_hpc.config.schema import PositiveInt

STAGES = ("warmup", "search", "gather", "clone", "sft", "select", "rl", "eval", "report")
"""Stages that become jobs, in the order of the run."""
_SHIPPED = Path(__file__).resolve().parent.parent.parent / "configs" / "clusters"


def _time_limit(text: str) -> str:
    if re.fullmatch(r"(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d", text) is None:
        raise ValueError("write a time limit as hours:minutes:seconds or days-hours:minutes:seconds, in quotes")
    return text


def _no_newline(text: str) -> str:
    if "\n" in text or "\0" in text:
        raise ValueError("must be one line")
    return text


def _as_text(value: Any) -> Any:
    """YAML reads `10` and `true` as numbers and truth values; as an environment variable's value they are text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


TimeLimit = Annotated[str, AfterValidator(_time_limit)]
Line = Annotated[str, BeforeValidator(_as_text), AfterValidator(_no_newline)]
Word = Annotated[str, Field(pattern=r"^[^\s'\"\\$`;&|<>]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ContainerConfig(Section):
    """An image that the commands run in; it holds Python and the dependencies, the code comes from the run folder."""

    runtime: Literal["pyxis", "apptainer"]
    image: Line
    """For pyxis an enroot image or registry address, for apptainer a .sif file."""
    mounts: list[Word] = Field(default_factory=list)
    """`host:container` pairs besides the run folder and the launch's working folder, which are always there."""


class NodeCheckConfig(Section):
    """`astro-hpc doctor --node` at the start of every job that has GPUs or several nodes. All values are ours."""

    enabled: bool = True
    disk: Annotated[str, Field(pattern=r"^[/$][A-Za-z0-9_./${}-]*$")] = "/tmp"
    """Folder on a node's own disk; variables are put in on the node, for instance `/scratch/$SLURM_JOB_ID`."""
    min_disk_gb: Annotated[float, Field(ge=0)] = 1.0
    """Free there, in 1e9 bytes."""
    min_free_gpu_memory: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of each GPU's memory."""
    max_clock_skew_seconds: Annotated[float, Field(gt=0)] = 10.0
    wait_seconds: Annotated[float, Field(gt=0)] = 120.0
    """For the other nodes of the job, and for the all-reduce."""
    all_reduce: bool = True
    """Where a job has several nodes: a small all-reduce over all of them."""
    max_bad_nodes: Annotated[int, Field(ge=0)] = 8
    """A job goes on without bad nodes until the run's exclude list is longer."""


class StageConfig(Section):
    """What one stage gets. Whatever is left out comes from the cluster."""

    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt | None = None
    """Processes a node: ranks of a training stage. None: one a GPU for warmup, sft, and rl with engine nodes; else
    1, which starts its ranks itself."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: PositiveInt | None = None
    memory: Word | None = None
    time: TimeLimit | None = None
    partition: Word | None = None
    qos: Word | None = None
    exclusive: bool | None = None
    environment: dict[Variable, Line] = Field(default_factory=dict)
    """Over the cluster's."""


class ArrayStageConfig(StageConfig):
    """A stage whose work is split into shards: one array task each."""

    shards: Annotated[int, Field(gt=0, le=99_999)] = 1
    throttle: PositiveInt | None = None
    """At most this many tasks of an array at the same time; None: as many as Slurm will. Shards beyond MaxArraySize
    are several arrays, and each has its own limit."""


class RLStageConfig(StageConfig):
    """Reinforcement learning: on one machine, or with nodes that train and nodes that serve in one allocation."""

    engine_nodes: Annotated[int, Field(ge=0)] = 0
    """So many of `nodes`, the last, run `inference.num_servers` vLLM servers each; the others train, with
    `tasks_per_node` ranks each. 0: the stage starts its servers itself."""

    @model_validator(mode="after")
    def _some_train(self) -> RLStageConfig:
        if self.engine_nodes >= self.nodes:
            raise ValueError(
                f"engine_nodes: {self.engine_nodes} of {self.nodes} nodes would serve and none train; "
                f"lower it, or set nodes to {self.engine_nodes + 1} or more"
            )
        return self


class LightStageConfig(StageConfig):
    """A stage of file work: no GPU, a part of a node."""

    gpus_per_node: Annotated[int, Field(ge=0)] | None = 0
    exclusive: bool | None = False
    memory: Word | None = "16G"
    time: TimeLimit | None = "01:00:00"


class StagesConfig(Section):
    """By stage."""

    warmup: StageConfig = StageConfig()
    search: ArrayStageConfig = ArrayStageConfig()
    gather: LightStageConfig = LightStageConfig()
    clone: ArrayStageConfig = ArrayStageConfig()
    sft: StageConfig = StageConfig()
    select: ArrayStageConfig = ArrayStageConfig()
    rl: RLStageConfig = RLStageConfig()
    eval: ArrayStageConfig = ArrayStageConfig()
    report: LightStageConfig = LightStageConfig()


class ClusterConfig(Section):
    """A cluster, or this machine."""

    executor: Literal["slurm", "local"] = "slurm"
    """`local`: one background process here carries out the jobs one after the other."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: list[Word] = Field(default_factory=list)
    """Nodes that no job is to use."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    cpus_per_task: PositiveInt | None = None
    """None: what the partition gives."""
    memory: Word | None = "0"
    """Of a node; `0`: all of it."""
    exclusive: bool = True
    """Whole nodes."""
    time: TimeLimit = "24:00:00"
    """Limit of a job; one that isn't done by then saves, is requeued and goes on."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], Line | Literal[True]] = Field(
        default_factory=dict
    )
    """Any other sbatch option by its long name, for instance `{reservation: maths}`."""
    venv: Path | None = None
    """Virtual environment on a shared file system; None: the Python that launches (in a container: its python3)."""
    container: ContainerConfig | None = None
    setup: list[Line] = Field(default_factory=list)
    """Shell lines at the start of every job, for instance `module load cuda`."""
    environment: dict[Variable, Line] = Field(default_factory=dict)
    """Environment variables of every job; they win over those that the job sets by itself."""
    network_interface: Word | None = None
    """For NCCL and gloo, for instance `ib0`."""
    max_array_size: PositiveInt | None = None
    """Slurm's MaxArraySize; None: asked from it, 1001 where there is none to ask."""
    signal_seconds: PositiveInt = 300
    """So long before the time limit the job is told to save: at least twice the time of a checkpoint."""
    max_requeues: Annotated[int, Field(ge=0)] = 50
    """A job that saved and wants to go on is requeued at most so often."""
    max_failures: PositiveInt = 3
    """A job that failed is requeued until it failed so often without progress, or twice with the same last line."""
    node_check: NodeCheckConfig = NodeCheckConfig()
    stages: StagesConfig = StagesConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        if self.venv is not None and self.container is not None:
            raise ValueError("venv and container are both given; the container brings its own Python, drop one")
        if self.venv is not None and not self.venv.is_absolute():
            raise ValueError(f"venv: {self.venv} must be an absolute path, the same on every node")
        return self

    def stage(self, name: str) -> StageConfig:
        """A stage's section with the cluster's values filled in."""
        own: StageConfig = getattr(self.stages, name)
        filled = {
            key: getattr(self, key)
            for key in ("gpus_per_node", "cpus_per_task", "memory", "time", "partition", "qos", "exclusive")
            if getattr(own, key) is None
        }
        merged = own.model_copy(update={**filled, "environment": {**self.environment, **own.environment}})
        if merged.tasks_per_node is None:
            by_gpu = name in ("warmup", "sft") or getattr(own, "engine_nodes", 0) > 0
            ranks = merged.gpus_per_node if by_gpu else None
            merged = merged.model_copy(update={"tasks_per_node": ranks or 1})
        return merged


def load_cluster(name: Path) -> ClusterConfig:
    """Read a cluster file: a path, or the name of one in configs/clusters.

    Raises:
        ConfigError: it can't be read or used.
    """
    if not name.exists() and len(name.parts) == 1:
        shipped = _SHIPPED / f"{name.name.removesuffix('.yaml')}.yaml"
        if shipped.exists():
            return load_section(ClusterConfig, shipped)
        known = ", ".join(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))
        raise ConfigError(f"--cluster {name}: no such file; give a path, or one of configs/clusters: {known}")
    return load_section(ClusterConfig, name)
