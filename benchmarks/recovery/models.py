"""The models: nine, all tiny and made from configs, with four optimizers. Nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from benchmarks.recovery.data import (
    BEGIN,
    CLASSES,
    IMAGE,
    LONG,
    TOKENS,
    VOCABULARY,
    Pool,
    image_pool,
    language_pool,
    masked_pool,
    translation_pool,
)


@dataclass(frozen=True)
class Task:
    """A kind of model with its data and its optimizer.

    Args:
        name: Short name.
        title: What it is, for the report.
        build: Makes the untrained model, after the seed was set.
        pool: Makes ``count`` rows of a domain.
        labels: Number of labels that can be told apart.
        args: Arguments of the Trainer.
        batch: Rows of a micro-batch.
        unclipped_args: What differs where gradients are not clipped, so that the run without a fault is sound.
    """

    name: str
    title: str
    build: Callable[[], Any]
    pool: Callable[[str, int, int], Pool]
    labels: int
    args: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    unclipped_args: dict[str, Any] = field(default_factory=dict)


def decoder() -> Any:
    """A small Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LONG,
            bos_token_id=BEGIN,
            eos_token_id=BEGIN,
            pad_token_id=None,
        )
    )


def gpt2(dropout: float = 0.0) -> Any:
    """A small GPT-2."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS,
            n_positions=LONG,
            n_embd=32,
            n_layer=1,
            n_head=2,
            bos_token_id=BEGIN,
            eos_token_id=BEGIN,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )


def encoder() -> Any:
    """A small BERT with dropout."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=TOKENS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LONG,
            hidden_dropout_prob=0.05,
            attention_probs_dropout_prob=0.0,
        )
    )


def small_encoder() -> Any:
    """A small DistilBERT with more dropout."""
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=TOKENS,
            dim=32,
            hidden_dim=64,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=LONG,
            dropout=0.1,
            attention_dropout=0.0,
        )
    )


def seq2seq() -> Any:
    """A small T5."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=TOKENS,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=BEGIN,
            pad_token_id=BEGIN,
            eos_token_id=BEGIN,
        )
    )


def vision_transformer() -> Any:
    """A small ViT."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def resnet() -> Any:
    """A small ResNet; its batch normalization keeps running means outside of the parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=CLASSES,
        )
    )


@lru_cache(maxsize=1)
def _base_weights() -> dict[str, torch.Tensor]:
    """Train a decoder on the base domain, once a process, and return its weights."""
    with torch.random.fork_rng():
        set_seed(7)
        model = decoder()
        rows = language_pool("base", 160 * 32, 11)["input_ids"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch in rows.split(32):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


def adapted_decoder() -> Any:
    """A decoder that was trained on another domain, with LoRA adapters on every linear layer."""
    from peft import LoraConfig, get_peft_model

    model = decoder()
    model.load_state_dict(_base_weights())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


TASKS = {
    task.name: task
    for task in (
        Task(
            "decoder",
            "decoder, AdamW, cosine",
            decoder,
            language_pool,
            VOCABULARY,
            {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
        ),
        Task(
            "vit",
            "ViT, SGD with momentum, cosine",
            vision_transformer,
            image_pool,
            CLASSES,
            {
                "learning_rate": 0.1,
                "lr_scheduler_type": "cosine",
                "optim": "sgd",
                "optim_args": "momentum=0.9",
            },
            batch=32,
            unclipped_args={"learning_rate": 0.04},
        ),
        Task(
            "lora",
            "LoRA on a trained decoder, AdamW, linear",
            adapted_decoder,
            language_pool,
            VOCABULARY,
            {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "optim": "adamw_torch"},
        ),
        Task(
            "mlm",
            "encoder with masked LM, AdamW with weight decay, linear",
            encoder,
            masked_pool,
            VOCABULARY,
            {
                "learning_rate": 1e-2,
                "lr_scheduler_type": "linear",
                "optim": "adamw_torch",
                "weight_decay": 0.01,
                "adam_beta2": 0.98,
            },
            batch=32,
        ),
        Task(
            "t5",
            "T5, Adafactor, constant rate",
            seq2seq,
            translation_pool,
            VOCABULARY,
            {"learning_rate": 2e-2, "lr_scheduler_type": "constant_with_warmup", "optim": "adafactor"},
        ),
        Task(
            "accum",
            "GPT-2, two micro-batches in bf16, AdamW, cosine",
            gpt2,
            language_pool,
            VOCABULARY,
            {
                "learning_rate": 1e-2,
                "lr_scheduler_type": "cosine",
                "optim": "adamw_torch",
                "gradient_accumulation_steps": 2,
                "bf16": True,
            },
            batch=8,
        ),
        Task(
            "resnet",
            "ResNet with batch norm, SGD (healthy runs only)",
            resnet,
            image_pool,
            CLASSES,
            {
                "learning_rate": 0.05,
                "lr_scheduler_type": "cosine",
                "optim": "sgd",
                "optim_args": "momentum=0.9",
            },
            batch=32,
        ),
        Task(
            "dropout",
            "GPT-2 with dropout 0.3, AdamW (healthy runs only)",
            lambda: gpt2(0.3),
            language_pool,
            VOCABULARY,
            {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
        ),
        Task(
            "distil",
            "DistilBERT with masked LM, AdamW, cosine",
            small_encoder,
            masked_pool,
            VOCABULARY,
            {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
            batch=24,
        ),
    )
}

MODELS_OF_HALF = {"design": ("decoder", "vit", "lora", "distil"), "judge": ("mlm", "t5", "accum")}
"""Models of the fault and switch cells. Healthy runs name their own."""


def fresh_model(task: Task, seed: int) -> Any:
    """Return the untrained model of a task."""
    if task.build is adapted_decoder:
        _base_weights()
    set_seed(seed)
    return task.build()
