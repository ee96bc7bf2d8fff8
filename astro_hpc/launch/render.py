"""A job as the text that sbatch takes: options through submitit, then a short shell script.

The script is the same for every stage: it says what runs, sets the environment, runs the command as an srun step, and
decides by the exit code what becomes of the job. slurm/*.sbatch are these texts for people who write their own.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.graph import Job, as_ranges

TRAINING = ("warmup", "sft", "rl")


@dataclass(frozen=True)
class Place:
    """Where a launch's jobs find things.

    Attributes:
        run: the run folder.
        frozen: the copy of code and configuration that the jobs use; later edits don't reach them.
        workdir: the folder that relative paths of the configuration start from.
        key: names the run in Slurm's comments.
    """

    run: Path
    frozen: Path
    workdir: Path
    key: str


PREPARE = """\
# --- run it: as one srun step, a log for each rank and attempt ---
TASK=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # requeue a task, not its array
TASK=${TASK:-$SLURM_JOB_ID}
ATTEMPT=${SLURM_RESTART_COUNT:-0}
LOG=$RUN/logs/$WORK/job-$SLURM_JOB_ID.attempt-$ATTEMPT
ENDED=$RUN/jobs/ended/$WORK
EXCLUDE=$RUN/jobs/exclude
end() {  # a record for `astro-hpc status`
    printf '%s\\n' "$1" "$code" "$ATTEMPT" "$SLURMD_NODENAME" "$TASK" "$LOG" "$reason" > "$ENDED.$SLURM_JOB_ID.tmp" &&
        mv "$ENDED.$SLURM_JOB_ID.tmp" "$ENDED"
    echo "$WORK: $1 (exit code $code, attempt $ATTEMPT) $reason"
}
requeue() {  # with what else is to change about the job, if anything
    [ "$ATTEMPT" -lt "$MAX_REQUEUES" ] || return
    trap '' TERM USR1  # of the job's end, which this asks for
    end requeued
    scontrol requeue "$TASK" || return
    [ $# = 0 ] || scontrol update jobid="$TASK" "$@"  # Slurm takes it from now on, and no earlier
    [ -z "$step" ] || wait $step
    exit $code
}
try_again() {  # unless it failed so often without progress, or twice the same way
    # Files written since the start are progress; a failure that comes back without any is not transient.
    if [ "$(find -H "$OUTPUT" -type f -newer "$LOG/started" ! -name '.*' ! -name state.json ! -name '*.log' \\
        ! -name metrics.jsonl ! -name 'events.*' -print -quit 2>/dev/null)" ]; then rm -f "$ENDED.failures"; fi
    before=$(tail -n 1 "$ENDED.failures" 2>/dev/null)
    echo "$code $reason" >> "$ENDED.failures"
    [ "$before" != "$code $reason" ] || [ "$1" = passing ] || return
    [ "$(wc -l < "$ENDED.failures")" -ge "$MAX_FAILURES" ] || requeue
}
ended_by_slurm() {  # TERM; the step has it too, and saves
    trap '' TERM USR1
    facts=$(scontrol show job "$SLURM_JOB_ID") code=143
    [[ $facts =~ Restarts=([0-9]+) ]] && restarts=${BASH_REMATCH[1]}
    [[ $facts =~ RunTime=([-0-9:]+)\\ TimeLimit=([-0-9:]+) ]] && ran=${BASH_REMATCH[1]} limit=${BASH_REMATCH[2]}
    if [[ $facts =~ PreemptTime=[0-9] ]]; then
        reason=preempted
        requeue  # or PreemptMode=CANCEL would drop it; with REQUEUE it is queued again already
    elif [ "${restarts:-0}" -gt "$ATTEMPT" ]; then
        reason="requeued by hand"
        end requeued
    elif [ -n "$limit" ] && { [ ${#ran} -gt ${#limit} ] || [[ ! $ran < $limit ]]; }; then
        reason="the time limit came before it had saved"
        try_again
        end failed
    else
        reason=cancelled
        end cancelled
    fi
    [ -z "$step" ] || wait $step
    exit $code
}
decide() {  # by the exit code, what becomes of the job
    last_lines=$(tail -qn 3 "$LOG"/nodes.txt "$LOG"/rank-*.log 2>/dev/null | grep '[[:alnum:]]' | grep -v '^.── ')
    reason=$(grep -m 1 -i -e '^astro-hpc: ' -e '^bad ' -e '^[a-z_.]*Error' -e '^[a-z_.]*Exception' -e killed \\
        <<< "$last_lines")
    reason=${reason:-$(tail -n 1 <<< "$last_lines")}
    case $code in
    0) end done; exit 0 ;;
    2 | 78) end refused; exit 78 ;;  # wrong input: never again
    75) rm -f "$ENDED.failures"; requeue ;;  # saved
    73 | 74) try_again passing ;;  # in use, disk full
    71)  # bad nodes: without them
        while read -r node why; do
            grep -qs "^$node " "$EXCLUDE" || echo "$node $why" >> "$EXCLUDE"
        done < <(sed -n 's/^bad //p' "$LOG/nodes.txt")
        own=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=//p' | grep -v null)
        bad=$(cut -d ' ' -f 1 "$EXCLUDE" | paste -sd,)
        [ "$(wc -l < "$EXCLUDE")" -gt "$MAX_BAD_NODES" ] || requeue ExcNodeList="${own:+$own,}$bad"
        ;;
    *) try_again ;;
    esac
    end failed
    exit $code
}
follow() {  # the step that was just started, to its end
    step=$!
    told=
    wait $step; code=$?
    while [ "$told" ]; do told=; wait $step; code=$?; done  # a signal ends `wait`, not the step
}
trap 'told=1; kill -USR1 $step' USR1  # the time limit is near: the stage saves and ends with 75
trap ended_by_slurm TERM

code=74 step= reason="$RUN can't be written"
if ! mkdir -p "$LOG" "$RUN/jobs/ended" || ! touch "$LOG/started"; then
    [ "$ATTEMPT" -ge "$MAX_FAILURES" ] || requeue
    exit $code
fi
[ "$ATTEMPT" = 0 ] && rm -f "$ENDED.failures"

if [ ${#NODE_CHECK[@]} -gt 0 ]; then  # a bad node is found before the stage starts on it
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    srun "${STEP[@]}" --nodes="$SLURM_JOB_NUM_NODES" --relative=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \\
        --wait=600 --output="$LOG/nodes.txt" "${INSIDE[@]}" \\
        "$PYTHON" -m astro_hpc doctor --node "${NODE_CHECK[@]}" --nodes "$nodes" --folder "$LOG/nodes" &
    follow
    if [ $code != 0 ]; then
        grep -q '^bad ' "$LOG/nodes.txt" && code=71 || code=1
        decide
    fi
fi
"""
SERVE_STEP = """\
# --- the engines: a step beside the training, a log for each server and attempt ---
# A server that ends is started again, three times; what it was at is tried elsewhere, and it is given the weights.
SERVER='trap told=1 TERM; port=$((SLURM_PROCID + $1)); log=$2; shift 2; for start in 1 2 3 4; do
    "$@" --port $port --index $SLURM_LOCALID; code=$?; [ "$told" ] && exit 0; done
    : > "$log/engine-$SLURM_PROCID.gone"; exit $code'
srun --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$LOG/engine-%N-%t.log" "${SERVE_STEP[@]}" \\
    bash -c "$SERVER" server "$PORT" "$LOG" "${INSIDE[@]}" "$PYTHON" -m astro_hpc "${SERVE[@]}" &
engines=$!
(until [ "$(ls "$LOG"/*.gone 2>/dev/null | wc -l)" = $((ENGINE_NODES * SERVERS)) ]; do sleep 3; done; kill -USR2 $$) &
watcher=$!
no_engines() {  # the training would wait in vain
    told=1
    echo "RuntimeError: all engines have ended: $(tail -qn 1 "$LOG"/engine-*.log | head -n 1)" >> "$LOG/rank-0.log"
    kill $step
}
trap no_engines USR2
trap 'trap "" USR2; kill $watcher $engines 2>/dev/null; wait $engines' EXIT  # they end with the training
train_on=$(IFS=,; echo "${NODES[*]:0:TRAIN_NODES}")
serve_on=$(IFS=,; echo "${NODES[*]:TRAIN_NODES}")
echo "trainer: $train_on; engines: $serve_on" > "$LOG/parts"  # for `astro-hpc status`
"""
RUN_STEP = """\
# srun tells the highest code, which may be a killed neighbour's: a rank leaves a mark for a code that says more.
# One that saved ends with 0, so that --kill-on-bad-exit spares ranks that are still saving.
RANK='trap : USR1 TERM; log=$1; shift; "$@"; code=$?
    case $code in 2 | 73 | 74 | 75 | 78) : > "$log/code-$code" ;; esac; [ $code != 75 ] || exit 0; exit $code'
srun --kill-on-bad-exit=1 --open-mode=append --output="$LOG/rank-%t.log" "${STEP[@]}" \\
    bash -c "$RANK" rank "$LOG" "${INSIDE[@]}" "$PYTHON" -m astro_hpc "${COMMAND[@]}" &
follow
if [ $code = 0 ]; then marks=75; else marks="2 78 73 74"; fi
for mark in $marks; do [ ! -e "$LOG/code-$mark" ] || code=$mark; done
decide"""


def render(job: Job, cluster: ClusterConfig, place: Place, offset: int = 0, size: int | None = None) -> str:
    """The sbatch text of a job, or of the chunk of an array that begins at task `offset` and has `size` tasks."""
    resources = job.resources
    log_name = "%A_%a" if job.num_tasks else "%j"
    options: dict[str, Any] = {
        **cluster.options,
        "chdir": place.workdir,
        "comment": comment(place.key, job, offset),
        "kill-on-invalid-dep": "yes",
        "ntasks-per-node": resources.tasks_per_node,
        "open-mode": "append",
        "output": place.run / "logs" / job.name / f"{log_name}.out",
        "requeue": True,
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "time": resources.time,
    }
    if job.num_tasks:
        throttle = f"%{job.throttle}" if job.throttle else ""
        options["array"] = as_ranges(range(size or job.num_tasks)) + throttle
    if cluster.exclude:
        options["exclude"] = ",".join(cluster.exclude)
    given = {
        "account": cluster.account,
        "constraint": cluster.constraint,
        "cpus_per_task": resources.cpus_per_task,
        "exclusive": resources.exclusive or None,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": resources.memory,
        "nodes": resources.nodes,
        "partition": resources.partition,
        "qos": resources.qos,
    }
    return _make_sbatch_string(
        command="\n".join(body(job, cluster, place, offset)),
        folder=place.run / "logs" / job.name,
        job_name=f"{_safe(place.run.name)}.{job.name}",
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={name: value for name, value in options.items() if value is not None},
        **{name: value for name, value in given.items() if value is not None},
    )


def body(job: Job, cluster: ClusterConfig, place: Place, offset: int = 0) -> list[str]:
    """The script below the options, line by line."""
    return [
        *_what_runs(job, cluster, place, offset),
        "",
        *_environment(job, cluster),
        "",
        *_parts(job),
        *PREPARE.split("\n"),
        *(SERVE_STEP.split("\n") if job.engines else ()),
        *RUN_STEP.split("\n"),
    ]


def _parts(job: Job) -> list[str]:
    """Which nodes train and which serve, where both do; the servers' addresses, which the training is told."""
    if job.engines is None:
        return []
    ranks = job.resources.tasks_per_node or 1
    return [
        "# --- who does what: the first nodes train, the last ones serve ---",
        f"ENGINE_NODES={job.engines.nodes}",
        f"SERVERS={job.engines.servers}  # on each of them",
        'NODES=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))',
        "TRAIN_NODES=$((${#NODES[@]} - ENGINE_NODES))",
        'SERVE_STEP=("${STEP[@]}" --nodes=$ENGINE_NODES --relative=$TRAIN_NODES --ntasks=$((ENGINE_NODES * SERVERS))',
        "    --ntasks-per-node=$SERVERS --overcommit --cpus-per-task=$((1 + (SLURM_CPUS_ON_NODE - 1) / SERVERS)))",
        f"STEP+=(--nodes=$TRAIN_NODES --relative=0 --ntasks=$((TRAIN_NODES * {ranks})) --ntasks-per-node={ranks})",
        "PORT=$((20000 + SLURM_JOB_ID * 16 % 12000))  # of the first server; the others' follow",
        "ASTRO_HPC_SERVERS=",
        "for ((number = 0; number < ENGINE_NODES * SERVERS; number++)); do",
        '    address="http://${NODES[TRAIN_NODES + number / SERVERS]}:$((PORT + number))"',
        '    ASTRO_HPC_SERVERS="$ASTRO_HPC_SERVERS${ASTRO_HPC_SERVERS:+,}$address"',
        "done",
        "ASTRO_HPC_SERVERS_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')  # nobody else is to use them",
        "export ASTRO_HPC_SERVERS ASTRO_HPC_SERVERS_KEY",
        'SERVE=(serve "$CONFIG" inference.server_api_key_env=ASTRO_HPC_SERVERS_KEY --model "$RUN/sft/$ARM/hf"',
        "    --host 0.0.0.0 --allow-weight-updates)",
        "",
    ]


def command_words(job: Job, shard: str = '"$SHARD"') -> list[str]:
    """The job's arguments of astro-hpc as words of its script."""
    num_shards = str(job.num_tasks) if shard.isdigit() else '"$NUM_SHARDS"'
    arm = shlex.quote(job.arm or "") if shard.isdigit() else '"$ARM"'
    meant = {"CONFIG": '"$CONFIG"', "RUN": '"$RUN"', "SHARD": shard, "NUM_SHARDS": num_shards, "ARM": arm}
    return [meant.get(word) or shlex.quote(word) for word in job.command]


def comment(key: str, job: Job, offset: int) -> str:
    """By this squeue's answer is known again: which run, job, and the array's first task."""
    return f"astro-hpc:{key}:{job.name}:{offset}"


def parse_comment(text: str, key: str) -> tuple[str, int] | None:
    """(job's name, offset) of a job of this run; None for all others."""
    match = re.fullmatch(r"astro-hpc:([^:]+):([^:]+):(\d+)", text)
    return (match[2], int(match[3])) if match and match[1] == key else None


def _what_runs(job: Job, cluster: ClusterConfig, place: Place, offset: int) -> list[str]:
    step, inside = _container(cluster, place)
    if job.stage in TRAINING and job.resources.nodes * (job.resources.tasks_per_node or 1) > 1:
        step = ["--distribution=block", *step]  # the ranks of a tensor-parallel group on one node
    lines = [
        "# --- what runs, and where ---",
        f"RUN={_quote(place.run)}",
        f"CONFIG={_quote(place.frozen / 'config.yaml')}",
        f"CODE={_quote(place.frozen)}  # the folder that holds the package astro_hpc",
        f"PYTHON={_quote(python_of(cluster))}",
        f"STEP=({_words(step)})  # options of srun",
        f"INSIDE=({_words(inside)})  # what the command runs in",
    ]
    work = job.name
    if job.arm:
        lines.append(f"ARM={job.arm}")
        work = f"{job.name.removesuffix(job.arm)}$ARM"
    if job.num_tasks:
        lines.append(f"NUM_SHARDS={job.num_tasks}")
        lines.append(f"SHARD=$((SLURM_ARRAY_TASK_ID + {offset}))  # an array's indices begin at 0")
        work += "-$(printf %05d $SHARD)"
    output = job.output.format(shard="$(printf %05d $SHARD)", num_shards="$(printf %05d $NUM_SHARDS)", arm="$ARM")
    return [
        *lines,
        f"WORK={work}  # names its logs",
        f"OUTPUT=$RUN/{output}  # what it writes",
        f"COMMAND=({' '.join(command_words(job))})",
        f"MAX_REQUEUES={cluster.max_requeues}",
        f"MAX_FAILURES={cluster.max_failures}",
        f"NODE_CHECK=({_words(_node_check(job, cluster))})  # options of astro-hpc doctor --node; none: no check",
        f"MAX_BAD_NODES={cluster.node_check.max_bad_nodes}",
    ]


def _node_check(job: Job, cluster: ClusterConfig) -> list[str]:
    """Options of the node check; none where a job has neither GPUs nor several nodes, or it is switched off."""
    check = cluster.node_check
    if not check.enabled or not (job.resources.gpus_per_node or job.resources.nodes > 1):
        return []
    options = [f"--disk={check.disk}", f"--min-disk-gb={check.min_disk_gb:g}"]
    options += [f"--min-free-gpu-memory={check.min_free_gpu_memory:g}"]
    options += [f"--max-clock-skew={check.max_clock_skew_seconds:g}", f"--wait={check.wait_seconds:g}"]
    return [*options, *([] if check.all_reduce else ["--no-all-reduce"])]


def _environment(job: Job, cluster: ClusterConfig) -> list[str]:
    resources = job.resources
    lines = ["# --- environment ---", *cluster.setup]
    if resources.cpus_per_task:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun doesn't take it from sbatch by itself")
    if resources.nodes * (resources.tasks_per_node or 1) > 1:
        lines += [
            '[ -n "$SLURM_JOB_NODELIST" ] && MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # jobs may share a node; below what kernels hand out",
            "export MASTER_ADDR MASTER_PORT",
        ]
    if resources.gpus_per_node and job.stage in TRAINING:
        lines += [
            "export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron overlaps communication in launch order",
            "export NCCL_NVLS_ENABLE=0  # its buffers cost GPU memory",
            "export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_FR_BUFFER_SIZE=2000  # a hang ends, and tells where it was",
        ]
        if job.stage != "rl":  # vLLM's memory pool can't live with it
            lines.append("export PYTORCH_ALLOC_CONF=expandable_segments:True")
    if cluster.network_interface:
        lines += [f"export {library}_SOCKET_IFNAME={cluster.network_interface}" for library in ("NCCL", "GLOO")]
    lines += [f"export {name}={_quote(value)}" for name, value in resources.environment.items()]
    # Last: whatever sets it above is kept, for functions of the user's own.
    lines.append('export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1  # this code before any other')
    return lines


def _container(cluster: ClusterConfig, place: Place) -> tuple[list[str], list[str]]:
    """(options of srun, words before the command)."""
    container = cluster.container
    if container is None:
        return [], []
    own = [f"{folder}:{folder}" for folder in dict.fromkeys([place.run, place.workdir])]
    mounts = ",".join([*own, *container.mounts])
    if container.runtime == "pyxis":
        workdir = f"--container-workdir={place.workdir}"
        return [f"--container-image={container.image}", f"--container-mounts={mounts}", workdir], []
    return [], ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(place.workdir), container.image]


def python_of(cluster: ClusterConfig) -> Path | str:
    """The interpreter of the jobs."""
    if cluster.container is not None:
        return "python3"
    return cluster.venv / "bin" / "python" if cluster.venv is not None else sys.executable


def _words(words: Iterable[str]) -> str:
    return " ".join(map(_quote, words))


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
