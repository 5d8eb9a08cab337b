#!/usr/bin/env bash
# Start a training again until it has finished, as a scheduler does with jobs that it interrupts.
#
#   bash examples/restart_loop.sh out
#
# The first two jobs get SIGTERM soon after they have saved a checkpoint. Each of them saves the
# present step and exits with 75. The same command line continues it: `auto` starts from scratch
# only where there is no checkpoint. In a SLURM job, the loop is `#SBATCH --requeue`,
# the signal is `#SBATCH --signal=TERM@120`, and `srun` stands before `python`.
set -uo pipefail
output=${1:-out}
interrupted_jobs=${2:-2}

count_checkpoints() {
    find "$output" -maxdepth 1 -name 'checkpoint-*' 2> "/dev/null" | wc -l
}

interrupt_after_next_checkpoint() {
    local job=$1 before=$2
    while kill -0 "$job" 2> "/dev/null"; do
        if [ "$(count_checkpoints)" -gt "$before" ]; then
            kill -TERM "$job"
            return
        fi
        sleep 0.1
    done
}

for attempt in 1 2 3 4 5; do
    before=$(count_checkpoints)
    python "$(dirname "$0")/train_lm.py" --output_dir "$output" --resume_from_checkpoint auto \
        --divguard_save_on_signal SIGTERM --divguard_detector adaptive --divguard_action stop \
        --max_steps 600 --save_steps 100 --eval_on_save --preserve_best_model --learning_rate 2e-3 \
        --vocabulary 300 --block 32 --hidden 64 --layers 1 --text_limit 300000 \
        --use_cpu --report_to none --disable_tqdm true &
    job=$!
    if [ "$attempt" -le "$interrupted_jobs" ]; then
        interrupt_after_next_checkpoint "$job" "$before"
    fi
    wait "$job"
    code=$?
    echo "job $attempt ended with exit code $code"
    case $code in
        0) exit 0 ;;         # finished
        75) ;;               # interrupted, and the present step is saved: start it again
        79) exit 79 ;;       # diverged: a restart would diverge again
        *) exit "$code" ;;   # an error
    esac
done
echo "not finished after $attempt jobs"
exit 1
