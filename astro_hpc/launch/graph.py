"""The graph of jobs as pure data: what a run needs done, in which order, and what is still to be submitted.

warmup -> search -> gather -> clone -> per arm: sft -> select -> rl -> eval -> report

search is an array of jobs, one a shard; clone, select and eval are where the cluster file gives them several shards,
each with a job behind it that gathers them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.launch.cluster import STAGES, ClusterConfig, StageConfig
from astro_hpc.search.shards import SHARD_FOLDERS


@dataclass(frozen=True)
class Engines:
    """The part of a job that serves.

    Attributes:
        nodes: of the job's nodes, the last so many.
        servers: vLLM servers on each.
    """

    nodes: int
    servers: int


@dataclass(frozen=True)
class Job:
    """One job of the graph, or one array of them.

    Attributes:
        name: unique in the run, for instance `sft-astro`.
        stage: which part of the run it belongs to, as `--stages` names it.
        command: arguments of astro-hpc; CONFIG, RUN, SHARD, NUM_SHARDS and ARM stand for values of its script.
        after: names of the jobs whose results it reads.
        resources: nodes, GPUs, time and so on.
        output: folder of a task's results, relative to the run folder, with `{shard}`, `{num_shards}` and `{arm}`.
        marker: the file in it that says the task is done.
        num_tasks: size of the array; None: no array.
        throttle: tasks of the array at the same time.
        arm: whose models it makes; None: it serves all.
        engines: servers that it starts on nodes of their own.
    """

    name: str
    stage: str
    command: tuple[str, ...]
    after: tuple[str, ...]
    resources: StageConfig
    output: str
    marker: str = "manifest.json"
    num_tasks: int | None = None
    throttle: int | None = None
    arm: str | None = None
    engines: Engines | None = None

    @property
    def train_nodes(self) -> int:
        """Nodes that its command runs on."""
        return self.resources.nodes - (self.engines.nodes if self.engines else 0)

    @property
    def tasks(self) -> range:
        """Numbers of its tasks; one of number 0 where it is no array."""
        return range(self.num_tasks or 1)

    def output_of(self, task: int) -> str:
        """Folder of one task's results."""
        return self.output.format(shard=f"{task:05d}", num_shards=f"{self.num_tasks or 1:05d}", arm=self.arm)


def build_graph(cfg: RunConfig, cluster: ClusterConfig) -> list[Job]:
    """All jobs of a run, each behind those that it waits for.

    Raises:
        ConfigError: the ranks of a training stage can't hold the model as `parallel` splits it, or can't share their
            nodes with the servers.
    """
    jobs: list[Job] = []

    def add(
        name: str, command: str, after: Collection[str], output: str, stage: str = "", like: str = "", arm: str = ""
    ) -> list[str]:
        stage = stage or name
        resources, words = cluster.stage(like or stage), tuple(command.split())
        marker = {"gather": "gather.json", "report": "index.html"}.get(name, "manifest.json")
        jobs.append(Job(name, stage, words, tuple(after), resources, output, marker, arm=arm or None))
        return [name]

    def add_array(stage: str, after: Collection[str], arm: str = "") -> list[str]:
        section = getattr(cluster.stages, stage)
        name, of_arm = (f"{stage}-{arm}", " --arm ARM") if arm else (stage, "")
        command = f"{stage} CONFIG{of_arm} --shard SHARD --num-shards NUM_SHARDS".split()
        output = f"{SHARD_FOLDERS[stage]}/shard-{{shard}}-of-{{num_shards}}"
        array = {"num_tasks": section.shards, "throttle": section.throttle, "arm": arm or None}
        jobs.append(Job(name, stage, tuple(command), tuple(after), cluster.stage(stage), output, **array))
        return [name]

    def add_sharded(stage: str, after: Collection[str], output: str, arm: str = "") -> list[str]:
        """The stage as one job, or as an array and the job that gathers it."""
        command, of_arm = (f"{stage} CONFIG --arm ARM", f"-{arm}") if arm else (f"{stage} CONFIG", "")
        if getattr(cluster.stages, stage).shards == 1:
            return add(stage + of_arm, command, after, output, stage=stage, arm=arm)
        array = add_array(stage, after, arm)
        return add(f"{stage}-gather{of_arm}", f"{command} --gather", array, output, stage=stage, like="gather", arm=arm)

    last = add("warmup", "warmup CONFIG", [], "warmup") if cfg.warmup.enabled else []
    last = add_array("search", last)
    last = add("gather", "search CONFIG --gather", last, "search")
    last = add_sharded("clone", last, "traces")
    ends: list[str] = []
    for arm in cfg.arms:
        sft = add(f"sft-{arm}", "sft CONFIG --arm ARM", last, "sft/{arm}", stage="sft", arm=arm)
        select = add_sharded("select", sft, "select/{arm}", arm)
        ends += add(f"rl-{arm}", "rl CONFIG --arm ARM", [*sft, *select], "rl/{arm}", stage="rl", arm=arm)
        jobs[-1] = replace(jobs[-1], engines=_engines(cfg, cluster))
    if cfg.evaluates:
        ends = add_sharded("eval", ends, "eval")
    add("report", "report RUN", ends, "report")
    for job in jobs:
        _check_ranks(job, cfg)
    return jobs


def _engines(cfg: RunConfig, cluster: ClusterConfig) -> Engines | None:
    """What serves beside the training."""
    nodes, inference = cluster.stages.rl.engine_nodes, cfg.inference
    if nodes == 0:
        return None
    where = f"stages.rl.engine_nodes={nodes} of the cluster file"
    if inference.num_servers is None:
        raise ConfigError(
            f"{where}: needs inference.engine=vllm-server and inference.num_servers, the servers on each such node"
        )
    if cfg.rl.replay is not None or cfg.rl.rollouts_only:
        raise ConfigError(f"{where}: rl.replay has nothing to serve and rl.rollouts_only nothing to train; set it to 0")
    gpus, wanted = cluster.stage("rl").gpus_per_node, inference.num_servers * inference.tensor_parallel_size
    if gpus and wanted > gpus:
        raise ConfigError(
            f"{where}: inference.num_servers={inference.num_servers} with tensor_parallel_size="
            f"{inference.tensor_parallel_size} needs {wanted} GPUs a node, it has {gpus}; lower one of them"
        )
    return Engines(nodes, inference.num_servers)


def _check_ranks(job: Job, cfg: RunConfig) -> None:
    if job.stage not in ("warmup", "sft", "rl"):
        return
    per_node = job.resources.tasks_per_node or 1
    ranks, parallel = job.train_nodes * per_node, cfg.parallel
    samples = job.stage == "rl" and cfg.rl.replay is None
    if ranks == 1:
        return  # the stage starts its ranks itself
    where = f"{job.train_nodes} nodes x {per_node} ranks (stages.{job.stage} of the cluster file)"
    if job.stage == "rl" and cfg.rl.rollouts_only:
        raise ConfigError(f"{where}: rl.rollouts_only samples in one process; set nodes and tasks_per_node to 1")
    gpus = job.resources.gpus_per_node
    servers = cfg.inference.num_servers if samples and job.engines is None else None
    if gpus and servers and per_node + servers * cfg.inference.tensor_parallel_size > gpus:
        raise ConfigError(
            f"{where}: inference.num_servers={servers} with tensor_parallel_size="
            f"{cfg.inference.tensor_parallel_size} needs {servers * cfg.inference.tensor_parallel_size} of the first "
            f"node's {gpus} GPUs; lower tasks_per_node, or give the servers nodes of their own (engine_nodes)"
        )
    if ranks % parallel.model_parallel_size:
        raise ConfigError(
            f"{where}: parallel needs a multiple of {parallel.model_parallel_size} ranks "
            "(tensor x pipeline x context); change nodes or tasks_per_node"
        )
    if per_node % parallel.tensor_parallel_size and parallel.tensor_parallel_size > 1:
        raise ConfigError(
            f"{where}: tensor_parallel_size {parallel.tensor_parallel_size} would reach over nodes; "
            "make it divide tasks_per_node"
        )


def refuse_shared_process(jobs: Sequence[Job], cfg: RunConfig) -> None:
    """See that an engine inside the stage's process is not asked for where several ranks train.

    Raises:
        ConfigError: names the numbers and a remedy.
    """
    if cfg.inference.engine != "vllm" or cfg.rl.replay is not None or cfg.rl.rollouts_only:
        return
    for job in jobs:
        ranks = job.train_nodes * (job.resources.tasks_per_node or 1)
        if ranks == 1:  # the stage starts its ranks itself
            ranks = cfg.parallel.model_parallel_size * (cfg.parallel.data_parallel_size or 1)
        if job.stage == "rl" and ranks > 1:
            raise ConfigError(
                f"{job.name}: {ranks} ranks train, and inference.engine=vllm would sample in one of their processes, "
                "which can't hold two process groups; set inference.engine=vllm-server and num_servers (and "
                "stages.rl.engine_nodes of the cluster file), or choose other --stages"
            )


# --- choosing -------------------------------------------------------------------------------------------------


def choose(jobs: Sequence[Job], stages: Collection[str] | None = None, first: str | None = None) -> list[Job]:
    """The jobs of some stages, or of a stage and everything behind it, in the graph's order.

    Raises:
        ConfigError: a name is no stage of this run.
    """
    known = [stage for stage in STAGES if any(job.stage == stage for job in jobs)]
    for name in [*(stages or []), *([first] if first else [])]:
        if name not in known:
            raise ConfigError(f"{name!r} is no stage of this run; it has {', '.join(known)}")
    chosen = set(stages or known)
    if first:
        chosen &= set(known[known.index(first) :])
    return [job for job in jobs if job.stage in chosen]


# --- what is to be submitted ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LiveJob:
    """A job, or some tasks of an array, that Slurm has: queued or running.

    Attributes:
        slurm_id: the job's or the array's id.
        tasks: the job's tasks in it, by their number in the run.
        pending: none of them has begun.
    """

    slurm_id: str
    tasks: frozenset[int]
    pending: bool = False


@dataclass(frozen=True)
class Submission:
    """One sbatch: all of a job, or a chunk of an array.

    Attributes:
        tasks: which of the job's tasks; their index in the array is their number less `offset`.
        after_ok: jobs submitted together with it, by name, all of whose tasks must end well.
        after_any: ids of jobs that Slurm had already. Some of their tasks may have failed before this launch and be
            submitted again by it, so their end alone is waited for; the command itself refuses unfinished inputs.
            Both name those too that reach it through jobs which are done, or not asked for.
    """

    job: Job
    tasks: tuple[int, ...]
    offset: int = 0
    after_ok: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rewire:
    """A job of an earlier launch that waits for results which this launch submits again; as in `Submission`."""

    slurm_ids: tuple[str, ...]
    after_ok: tuple[str, ...]
    after_any: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a launch does.

    Attributes:
        submissions: in the order to submit them.
        rewire: jobs that wait in the queue already, and must wait for new submissions too.
    """

    submissions: list[Submission] = field(default_factory=list)
    rewire: list[Rewire] = field(default_factory=list)


def plan(
    jobs: Sequence[Job],
    chosen: Sequence[Job],
    done: Mapping[str, Collection[int]],
    live: Mapping[str, Sequence[LiveJob]],
    max_array_size: int,
) -> Plan:
    """Submit what is neither done nor queued nor running, once; nothing else.

    What is done, but reads results that are on their way (queued, running, or submitted by this launch), is submitted
    again behind them: the command of a stage ends at once where they turn out the same, and needs --redo where not.

    Args:
        jobs: the whole graph, each job behind those that it waits for.
        chosen: the jobs that are asked for.
        done: by job name, the tasks whose results are there.
        live: by job name, what Slurm has.
        max_array_size: indices of an array stay below it.

    Raises:
        ConfigError: a job needs results that are neither there, nor coming, nor asked for; or that others on their way
            will outdate, and which nobody has asked for.
    """
    by_name = {job.name: job for job in jobs}
    names = {job.name for job in chosen}
    found = Plan()
    submitted: set[str] = set()
    absent: set[str] = set()  # some of its tasks are neither done nor on their way
    outdated: set[str] = set()  # not on its way, and behind something that is
    for job in jobs:
        coming = live.get(job.name, [])
        busy = {task for each in coming for task in each.tasks}
        behind = any(name in submitted or live.get(name) for name in job.after)
        ready = () if behind else done.get(job.name, ())
        missing = [task for task in job.tasks if task not in ready and task not in busy]
        after_ok, after_any = _waits_for(job, by_name, live, submitted)
        waiting = tuple(each.slurm_id for each in coming if each.pending)
        if after_ok and waiting:
            found.rewire.append(Rewire(waiting, after_ok, after_any))
        if missing and job.name in names:
            _refuse_missing_inputs(job, by_name, absent, outdated)
            for offset, tasks in chunks(missing, max_array_size):
                found.submissions.append(Submission(job, tasks, offset, after_ok, after_any))
            submitted.add(job.name)
            continue
        if any(task not in done.get(job.name, ()) for task in missing):
            absent.add(job.name)
        if (missing and behind) or (not busy and outdated.intersection(job.after)):
            outdated.add(job.name)
    return found


def _waits_for(
    job: Job, by_name: Mapping[str, Job], live: Mapping[str, Sequence[LiveJob]], submitted: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names to end well, ids to end) of all on their way that reach `job`; what is submitted waits for its own."""
    ok, ids = [], []
    front = list(job.after)
    for name in front:
        ids += [each.slurm_id for each in live.get(name, [])]
        if name in submitted:
            ok.append(name)
        else:
            front += [each for each in by_name[name].after if each not in front]
    return tuple(ok), tuple(dict.fromkeys(ids))


def _refuse_missing_inputs(
    job: Job, by_name: Mapping[str, Job], absent: Collection[str], outdated: Collection[str]
) -> None:
    needed = [name for name in job.after if name in absent or name in outdated]
    if not needed:
        return
    first = needed[0]
    for name in needed:
        needed += [each for each in by_name[name].after if (each in absent or each in outdated) and each not in needed]
    stages = [stage for stage in STAGES if any(by_name[name].stage == stage for name in needed)]
    why = "which is neither done nor queued" if first in absent else "which others that are on their way will outdate"
    more = ",".join(dict.fromkeys([*stages, job.stage]))
    raise ConfigError(f"{job.name}: needs {first}, {why}; add it: --stages {more}, or --from {stages[0]}")


def chunks(tasks: Iterable[int], max_array_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Split task numbers into arrays: (offset, tasks), with every task less its offset below `max_array_size`."""
    groups: dict[int, list[int]] = {}
    for task in sorted(tasks):
        groups.setdefault(task // max_array_size * max_array_size, []).append(task)
    return [(offset, tuple(group)) for offset, group in groups.items()]


def as_ranges(numbers: Iterable[int]) -> str:
    """`0,1,2,5` -> `0-2,5`, as sbatch's --array takes it."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> set[int]:
    """The inverse, of squeue's form: `0-2,5%4` -> {0, 1, 2, 5}; a step (`0-8:4`) too."""
    numbers: set[int] = set()
    for part in text.strip("[]").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return numbers
