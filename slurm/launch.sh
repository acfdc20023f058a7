# shellcheck shell=bash
# Starts the ranks on all nodes of an allocation. The scripts in this folder, which contain the #SBATCH lines, source this file.
#
#   start -> bound -> pre-flight -> srun train.py -> exit code 0 (finished), 2 (bad input)  -> end with this code
#                                                    else (85 stopped, 86 hang, crash)      -> requeue, resume; 87 (full disk): after a pause
#
# After CFVLM_MAX_STARTS consecutive starts without a newer checkpoint, the job ends, no matter who requeued it. See docs/slurm.md.
set -euo pipefail
unset SLURM_EXPORT_ENV # otherwise srun would start its tasks with an empty environment
source slurm/env.sh

ulimit -l unlimited 2>/dev/null || : # InfiniBand pins memory; srun passes the limit to the tasks

say() { echo "$(date '+%F %T') slurm/launch.sh: $*"; }

if [[ -e ${CFVLM_SECRETS:=} ]]; then
    if [[ $(stat -L -c %a "$CFVLM_SECRETS") != *00 ]]; then # -L: check the target of a link, because a link itself is always open
        say "error: other users can read $CFVLM_SECRETS; run chmod 600 on it"
        exit 2
    fi
    set -a
    # shellcheck source=/dev/null
    source "$CFVLM_SECRETS"
    set +a
fi

# container_runtime: print this machine's container runtime, the default of CONTAINER_RUNTIME.
container_runtime() {
    local found
    if [[ $(srun --help 2>&1) == *--container-image* ]]; then
        echo pyxis
    else
        for found in apptainer singularity; do
            if command -v "$found" >/dev/null; then echo "$found" && return; fi
        done
    fi
}

# With an image, steps run in it through options of srun (pyxis) or a command prefix (apptainer).
container=() inside=() shield=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    mkdir -p "$HF_HOME"
    mounts=${CONTAINER_MOUNTS:-$PWD:$PWD,$HF_HOME:$HF_HOME,/tmp:/tmp}
    : "${CONTAINER_RUNTIME:=$(container_runtime)}"
    case $CONTAINER_RUNTIME in
        pyxis) container=(--container-image="$CONTAINER_IMAGE" --container-name="cfvlm_ds-$SLURM_JOB_ID" --container-mounts="$mounts" --container-workdir="$PWD") ;;
        apptainer | singularity)
            inside=("$CONTAINER_RUNTIME" exec --bind "$mounts" --pwd "$PWD")
            if ((${SLURM_GPUS_ON_NODE:-0})); then inside+=(--nv); fi
            inside+=("$CONTAINER_IMAGE")
            ;;
        *)
            say "error: no runtime for CONTAINER_IMAGE: ${CONTAINER_RUNTIME:-srun has no pyxis, and apptainer is not installed}; set CONTAINER_RUNTIME to pyxis or apptainer"
            exit 2
            ;;
    esac
fi

# step SRUN-OPTIONS -- COMMAND...: run a command on the job's nodes, for at most step_limit seconds if that variable is set.
step() {
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    exec ${step_limit:+timeout --kill-after=5 $step_limit} srun --export=ALL --kill-on-bad-exit=1 "${container[@]}" "${options[@]}" "${shield[@]}" "${inside[@]}" "$@"
}

# rendezvous NODE: set the address and port where ranks meet. The port depends on job and start, and is outside the ephemeral range.
rendezvous() {
    MASTER_ADDR=$1
    if ! getent hosts "$1" >/dev/null; then
        MASTER_ADDR=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 2) % 6000))
    export MASTER_ADDR MASTER_PORT
}

# newest_step [FOLDER]: print the step of the newest complete checkpoint, or -1. The default folder is the run or its newest round.
newest_step() {
    local path newest=-1 folder
    folder=${1:-$({ compgen -G "$run_dir/round-*" || echo "$run_dir"; } | sort -V | tail -n 1)}
    for path in "$folder"/checkpoint-*; do
        if [[ ${path##*-} =~ ^[0-9]+$ ]] && ((${path##*-} > newest)); then newest=${path##*-}; fi
    done
    echo "$newest"
}

# progress: print a number that increases with each checkpoint and, with train.rounds, with each sampled picture.
progress() {
    local folder number
    number=$({ cat "$run_dir"/sampled-*/sample/*.jsonl 2>/dev/null || :; } | wc -l)
    for folder in "$run_dir" "$run_dir"/round-*; do number=$((number + $(newest_step "$folder") + 1)); done
    echo "$number"
}

# again WHY CODE: requeue the job, or end it with CODE if earlier starts have made no progress.
again() {
    if ((terminated)); then
        say "not requeued: Slurm itself ends this job (scancel, or preemption, after which Slurm requeues it)"
        exit "$2"
    fi
    if (($(progress) <= first && starts >= max_starts)); then
        say "giving up: $1; $starts starts in a row have made no progress beyond step $(newest_step) (CFVLM_MAX_STARTS=$max_starts)"
        exit "$2"
    fi
    say "requeue: $1; newest checkpoint: step $(newest_step)"
    if [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]] &&
        [[ $(scontrol show partition "$SLURM_JOB_PARTITION") =~ PreemptMode=[A-Z,]*REQUEUE ]]; then
        exit "$2" # preempted: Slurm requeues the job itself; a second requeue would start the job again after it has finished
    fi
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm does not requeue this job; the same sbatch command continues it"
    exit "$2"
}

# await PID: wait for a child and set rc to its exit code, even if signals arrive (each signal interrupts a bash `wait`).
await() {
    interrupted=1
    while ((interrupted)); do
        interrupted=0 rc=0
        wait "$1" || rc=$?
    done
}

# preflight: check every node, report bad ones, and fill the arrays good and bad. Set fault to a problem that cannot be attributed to one node.
preflight() {
    # The limit applies inside the container. Creating the container may take another ten minutes.
    local reports=$start_dir/nodes limit=${CFVLM_PREFLIGHT_S:-300} making=0 node line
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then making=600; fi
    mkdir -p "$reports"
    MASTER_PORT=$((MASTER_PORT + 1)) step_limit=$((limit + making + 15)) step --nodes=${#nodes[@]} --ntasks=${#nodes[@]} --ntasks-per-node=1 --kill-on-bad-exit=0 -- \
        timeout --kill-after=5 "$limit" cfvlm-ds cluster check "$reports" --timeout_s $((limit / 3)) &>"$start_dir/preflight.log" &
    await $!
    sed 's/^/    /' "$start_dir/preflight.log"
    for node in "${nodes[@]}"; do
        line="no answer within $limit s: it cannot run cfvlm-ds, sees another file system, or hangs"
        if [[ -f $reports/$node ]]; then read -r line <"$reports/$node"; fi
        case $line in
            ok) good+=("$node") ;;
            waited:*) good+=("$node") && fault=${line#waited: } ;;
            *) bad+=("$node") && say "bad node $node: ${line#bad: }" ;;
        esac
    done
}

# launch TRAIN-OPTIONS...: run train.py in every task of the allocation, on all nodes except CFVLM_SPARE_NODES spare ones.
launch() {
    local nodes=() good=() bad=() spare=${CFVLM_SPARE_NODES:-0} fault="" place=() before=-2 shown code pause=${CFVLM_FULL_DISK_PAUSE_S:-300}
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${nodes[*]}"
    say "command:$(printf ' %q' train.py "$@")"
    rendezvous "${nodes[0]}"
    run_dir=$(step --nodes=1 --ntasks=1 -- cfvlm-ds cluster output_dir -- "$@") || exit 2
    start_dir=$run_dir/slurm/$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}
    mkdir -p "$start_dir"
    say "logs of all ranks: $start_dir"

    terminated=0 max_starts=${CFVLM_MAX_STARTS:-3} starts=0 first=$(progress)
    if [[ -f ${start_dir%/*}/starts ]]; then read -r before starts <"${start_dir%/*}/starts"; fi
    if ((first > before)); then starts=0; fi
    starts=$((starts + 1))
    echo "$first $starts" >"${start_dir%/*}/starts"

    trap 'interrupted=1; if [[ -n ${ranks:-} ]]; then say "USR1: forwarded to the ranks"; kill -USR1 "$ranks"; fi' USR1
    trap 'interrupted=1 terminated=1' TERM
    trap 'again "the time limit is near, and the ranks have not stopped by themselves" 85' ALRM
    if [[ -n ${SLURM_JOB_END_TIME:-} ]]; then
        (sleep $((SLURM_JOB_END_TIME - $(date +%s) > 40 ? SLURM_JOB_END_TIME - $(date +%s) - 30 : 10)) && kill -ALRM $$) &
    fi
    trap 'kill $(jobs -p) 2>/dev/null || :' EXIT

    preflight
    if ((${#good[@]} < ${#nodes[@]} - spare)); then
        again "too few good nodes; to continue without the bad ones, submit again with --exclude=$(IFS=, && echo "${bad[*]}")" 1
    elif [[ -n $fault ]] && ((${#good[@]} == ${#nodes[@]})); then
        again "the nodes do not work together: $fault" 1
    fi
    if ((spare)); then
        good=("${good[@]:0:${#nodes[@]}-spare}")
        rendezvous "${good[0]}"
        place=(--nodes=${#good[@]} --nodelist="$(IFS=, && echo "${good[*]}")" --ntasks=$((SLURM_NTASKS * ${#good[@]} / ${#nodes[@]})))
        say "training on ${good[*]}"
    fi

    # Ignore signals until train.py blocks them in its first lines (it handles them later), because USR1 ends a process by default. srun
    # expands patterns in a file name, but not in --chdir. With %t, the nodes write the files; if srun wrote them, it would wait for a lost
    # node.
    # shellcheck disable=SC2016
    shield=(sh -c 'trap "" USR1 TERM; cd "$0" && exec "$@"' "$PWD")
    : >"$start_dir/rank-0.log" # tail may miss a file that appears just before the ranks end
    step "${place[@]}" --distribution=block:block --chdir="$start_dir" --output=rank-%t.log -- python train.py "$@" &
    ranks=$!
    tail --pid=$ranks -n +1 -F "$start_dir/rank-0.log" 2>/dev/null &
    shown=$!
    await $ranks
    code=$rc
    await $shown # a requeue would cut off the last lines of rank 0's log
    rc=$code
    say "exit code $rc"
    case $rc in
        0) exit 0 ;;
        2)
            # Rank 0, whose log is shown, prints errors that all ranks raise. If it has printed none, show the errors of the other ranks.
            grep -qs '^error: ' "$start_dir/rank-0.log" || sed -n '/^error: /p' "$start_dir"/rank-*.log | sort -u | head -n 8 || :
            say "giving up: the input has to be corrected" && exit 2
            ;;
        85) again "stopped on request" 85 ;;
        87)
            say "a disk is full: free some space within $pause s (CFVLM_FULL_DISK_PAUSE_S); the job is then requeued"
            sleep "$pause" &
            ranks="" && await $!
            again "a disk was full" 87
            ;;
        *)
            sed -nE 's/^(\[rank[0-9]+\]: )?((error:|[A-Za-z_.]+(Error|Exception)\b).*)/\2/p' "$start_dir"/rank-*.log | sort | uniq -c | tail -n 8 | cut -c -400
            again "a rank failed, see $start_dir" "$rc"
            ;;
    esac
}
