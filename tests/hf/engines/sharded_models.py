"""A tiny model that Transformers shards itself when it loads it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.tiny import LENGTH, VOCABULARY


def save_llama(folder: Path) -> None:
    """Save a Llama of some thousand parameters on the first rank; the others wait until it is there."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    if os.environ.get("RANK", "0") == "0":
        set_seed(0)
        size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        more = {"max_position_embeddings": LENGTH, "attention_dropout": 0.1, "bos_token_id": 0}
        aside = folder.with_name("llama-unfinished")
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size, **more)).save_pretrained(aside)
        aside.rename(folder)
    until = time.monotonic() + 60
    while not folder.is_dir():
        assert time.monotonic() < until, "the first rank has not saved the model"
        time.sleep(0.01)


def sharded_llama(folder: str | Path, **sizes: Any) -> Any:
    """Return the model, sharded over the ranks of this run, or whole where there is one."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ["ACCELERATE_USE_CPU"] = "1"
    path = Path(folder).parent / "llama"
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_llama(path)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return LlamaForCausalLM.from_pretrained(path)
    return LlamaForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(**(sizes or {"fsdp_size": ranks}))
    )
