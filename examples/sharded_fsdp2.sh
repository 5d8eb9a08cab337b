#!/usr/bin/env bash
# Train a model whose weights and optimizer are sharded over two processes (FSDP2), on CPU.
#
#   bash examples/sharded_fsdp2.sh out
#
# Transformers shards the model while it loads it (`DistributedConfig`). The learning rate is far
# too high from step 30 on: both processes put back their shards of the same step. Each checkpoint
# holds the optimizer too, so that the run can be resumed; the stock Trainer refuses to save it.
# Needs Transformers 5.
set -euo pipefail
output=${1:-out}

export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
python -m torch.distributed.run --standalone --nproc_per_node=2 "$(dirname "$0")/train_lm.py" \
    --fsdp_size 2 \
    --output_dir "$output" --max_steps 60 --save_steps 10 --save_total_limit 2 \
    --eval_on_save --preserve_best_model --preserve_n_best 2 \
    --divguard_detector adaptive --divguard_action rollback \
    --fault learning_rate --fault_step 30 --learning_rate 2e-3 \
    --vocabulary 300 --block 32 --hidden 64 --layers 1 --text_limit 300000 \
    --ddp_backend gloo --use_cpu --report_to none --disable_tqdm true
