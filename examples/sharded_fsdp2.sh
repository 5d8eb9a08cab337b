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
export ACCELERATE_USE_CPU=1
exec bash "$(dirname "$0")/two_processes.sh" "${1:-out}" --fsdp_size 2
