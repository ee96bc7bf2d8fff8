# What every job's sbatch script ends with: runs COMMAND as an srun step, a log for each rank and attempt, and decides by
# its exit code what becomes of the job: done, requeued, or failed. Sourced by bash on the job's first node.
#
# Set by the script: RUN, CONFIG, CODE, PYTHON; STEP (options of srun) and INSIDE (words before the command), for
# containers; WORK, OUTPUT, COMMAND; MAX_REQUEUES, MAX_FAILURES, NODE_CHECK, MAX_BAD_NODES; where some of the job's nodes
# serve: ENGINE_NODES, SERVERS, RANKS, ARM.

if [ "${ENGINE_NODES:-0}" -gt 0 ]; then  # the first nodes train; the last ones serve, and the training is told where
    NODES=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    TRAIN_NODES=$((${#NODES[@]} - ENGINE_NODES))
    SERVE_STEP=("${STEP[@]}" --nodes=$ENGINE_NODES --relative=$TRAIN_NODES --ntasks=$((ENGINE_NODES * SERVERS))
        --ntasks-per-node=$SERVERS --overcommit --cpus-per-task=$((1 + (SLURM_CPUS_ON_NODE - 1) / SERVERS)))
    STEP+=(--nodes=$TRAIN_NODES --relative=0 --ntasks=$((TRAIN_NODES * RANKS)) --ntasks-per-node=$RANKS)
    PORT=$((20000 + (SLURM_JOB_ID + RANDOM) * 16 % 12000))  # of the first server; the others' follow
    ASTRO_HPC_SERVERS=
    for ((number = 0; number < ENGINE_NODES * SERVERS; number++)); do
        address="http://${NODES[TRAIN_NODES + number / SERVERS]}:$((PORT + number))"
        ASTRO_HPC_SERVERS="$ASTRO_HPC_SERVERS${ASTRO_HPC_SERVERS:+,}$address"
    done
    ASTRO_HPC_SERVERS_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')  # nobody else is to use them
    export ASTRO_HPC_SERVERS ASTRO_HPC_SERVERS_KEY
    SERVE=(serve "$CONFIG" inference.server_api_key_env=ASTRO_HPC_SERVERS_KEY --model "$RUN/sft/$ARM/hf"
        --host 0.0.0.0 --allow-weight-updates)
fi

TASK=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # requeue a task, not its array
TASK=${TASK:-$SLURM_JOB_ID}
ATTEMPT=${SLURM_RESTART_COUNT:-0}
LOG=$RUN/logs/$WORK/job-$SLURM_JOB_ID.attempt-$ATTEMPT
ENDED=$RUN/jobs/ended/$WORK
EXCLUDE=$RUN/jobs/exclude
end() {  # a record for `astro-hpc status`
    printf '%s\n' "$1" "$code" "$ATTEMPT" "$SLURMD_NODENAME" "$TASK" "$LOG" "$reason" > "$ENDED.$SLURM_JOB_ID.tmp" &&
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
made_progress() {  # journals and checkpoints that this attempt wrote; what every attempt writes anew is none
    [ $code != 73 ] && [[ $WORK != *gather* ]] && [ "$(find -H "$OUTPUT" -type f -newer "$LOG/started" -size +0 \
        \( -name trees.jsonl -o -name records.jsonl -o -name rates.jsonl -o -name graded.jsonl -o -name '*.journal' \
        -o -path '*/checkpoints/step_*' \) -print -quit 2>/dev/null)" ]
}
try_again() {  # unless it failed so often without progress, or twice the same way
    ! made_progress || rm -f "$ENDED.failures"
    before=$(tail -n 1 "$ENDED.failures" 2>/dev/null)
    echo "$code $reason" >> "$ENDED.failures" || requeue  # a full disk: nothing can be counted but the attempts
    [ "$before" != "$code $reason" ] || [ "$1" = passing ] || return
    [ "$(wc -l < "$ENDED.failures")" -ge "$MAX_FAILURES" ] || requeue
}
ended_by_slurm() {  # TERM; the step has it too, and saves
    trap '' TERM USR1
    facts=$(scontrol show job "$SLURM_JOB_ID") code=143
    [[ $facts =~ Restarts=([0-9]+) ]] && restarts=${BASH_REMATCH[1]}
    [[ $facts =~ RunTime=([-0-9:]+)\ TimeLimit=([-0-9:]+) ]] && ran=${BASH_REMATCH[1]} limit=${BASH_REMATCH[2]}
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
    last_lines=$(for log in "$LOG"/nodes.txt "$LOG"/rank-*.log; do  # of anything, of any length
        tail -c 4000 "$log" 2>/dev/null | tr '\r' '\n' | tr -d '\000-\010\013-\037' | tail -n 3 | cut -c 1-500
    done | grep -a '[[:alnum:]]' | grep -av '^.── ')
    reason=$(grep -m 1 -i -e '^astro-hpc: ' -e '^bad ' -e '^[a-z_.]*Error' -e '^[a-z_.]*Exception' -e killed \
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
    requeue
    exit $code
fi
[ "$ATTEMPT" = 0 ] && rm -f "$ENDED.failures"

if [ ${#NODE_CHECK[@]} -gt 0 ]; then  # a bad node is found before the stage starts on it
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    srun "${STEP[@]}" --nodes="$SLURM_JOB_NUM_NODES" --relative=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --wait=600 --output="$LOG/nodes.txt" "${INSIDE[@]}" \
        "$PYTHON" -m astro_hpc doctor --node "${NODE_CHECK[@]}" --nodes "$nodes" --folder "$LOG/nodes" &
    follow
    if [ $code != 0 ]; then
        grep -q '^bad ' "$LOG/nodes.txt" && code=71 || code=1
        decide
    fi
fi

if [ "${ENGINE_NODES:-0}" -gt 0 ]; then
    # The engines: a step beside the training, a log for each server and attempt. A server that ends is started again,
    # three times; what it was at is tried elsewhere, and it is given the weights.
    SERVER='trap told=1 TERM; port=$((SLURM_PROCID + $1)); log=$2; shift 2; for start in 1 2 3 4; do
            "$@" --port $port --index $SLURM_LOCALID; code=$?; [ "$told" ] && exit 0; done
        : > "$log/engine-$SLURM_PROCID.gone"; exit $code'
    srun --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$LOG/engine-%N-%t.log" "${SERVE_STEP[@]}" \
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
fi

# USR1 is ignored until the stage listens: its default would end a rank that is still starting.
# srun tells the highest code, which may be a killed neighbour's: a rank leaves a mark for a code that says more.
# One that saved ends with 0, so that --kill-on-bad-exit spares ranks that are still saving.
RANK='trap "" USR1; trap : TERM; log=$1; shift; "$@"; code=$?
    case $code in 2 | 73 | 74 | 75 | 78) : > "$log/code-$code" ;; esac; [ $code != 75 ] || exit 0; exit $code'
srun --kill-on-bad-exit=1 --open-mode=append --output="$LOG/rank-%t.log" "${STEP[@]}" \
    bash -c "$RANK" rank "$LOG" "${INSIDE[@]}" "$PYTHON" -m astro_hpc "${COMMAND[@]}" &
follow
if [ $code = 0 ]; then marks=75; else marks="2 78 73 74"; fi
for mark in $marks; do [ ! -e "$LOG/code-$mark" ] || code=$mark; done
decide
