#!/usr/bin/env bash
# Train in two processes on one machine (DistributedDataParallel); all guards work as in one process.
#
#   bash examples/two_processes.sh out
#
# Further flags of train_lm.py may follow the folder.
#
# The learning rate is far too high from step 30 on. Both processes roll back to the same step.
set -euo pipefail
output=${1:-out}

export OMP_NUM_THREADS=1
python -m torch.distributed.run --standalone --nproc_per_node=2 "$(dirname "$0")/train_lm.py" \
    --output_dir "$output" --max_steps 60 --save_steps 10 --save_total_limit 2 \
    --eval_on_save --preserve_best_model --preserve_n_best 2 \
    --divguard_detector adaptive --divguard_action rollback \
    --fault learning_rate --fault_step 30 --learning_rate 2e-3 \
    --vocabulary 300 --block 32 --hidden 64 --layers 1 --text_limit 300000 \
    --ddp_backend gloo --use_cpu --report_to none --disable_tqdm true "${@:2}"
