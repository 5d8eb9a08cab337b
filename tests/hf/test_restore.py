"""What a checkpoint or a snapshot gives back: every weight that is trained, or an error that says which not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from hf_divguard import CheckpointError, DivergenceDetector, NonFiniteDetector, TrainingDivergedError
from hf_divguard.hf.engines.whole_weights import load_weights, weights_kept_on_error
from hf_divguard.hf.host import Host
from tests.hf.faults import NaNBatch, ScriptedRule
from tests.tiny import same_weights, tiny_model, weights

MakeTrainer = Callable[..., Any]

QUICK = {
    "divguard_check_steps": 1,
    "divguard_cooldown_steps": 4,
    "divguard_compare": "off",
    "max_steps": 16,
    "save_steps": 4,
}
MEMORY = {"divguard_snapshot_steps": 4, "save_strategy": "no"}


class EachStep(TrainerCallback):
    """Copies the weights and buffers of every step, and those right after a rollback."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}
        self.restored: list[dict[str, torch.Tensor]] = []
        self.identities: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy what the step has left."""
        self.at[state.global_step] = everything(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Copy it if this is the log of a rollback."""
        if "divguard/rollbacks" in logs:
            self.restored.append(everything(kwargs["model"]))
            self.identities = [id(weight) for weight in kwargs["model"].parameters()]


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of parameters and buffers."""
    return weights(model) | {name: buffer.clone() for name, buffer in model.named_buffers()}


def run(
    make_trainer: MakeTrainer, model: Any, *, callbacks: Any = (), **options: Any
) -> tuple[Any, EachStep]:
    """Return a trainer that has to go back from step 11 to a state of step 8, and what it will show."""
    seen = EachStep()
    detector = DivergenceDetector(ScriptedRule({11: 10}), action="rollback")
    trainer = make_trainer(model=model, callbacks=[*callbacks, seen, detector], **{**QUICK, **options})
    return trainer, seen


def goes_back(trainer: Any, seen: EachStep) -> None:
    """Train, and assert that the rollback gave back all that had been trained, in the same objects."""
    identities = [id(weight) for weight in trainer.model.parameters()]
    trainer.train()
    (event,) = trainer.divguard_events
    assert (event["event"], event["step"], event["target_step"]) == ("rollback", 11, 8)
    assert not same_weights(seen.at[11], seen.at[8])
    assert same_weights(seen.restored[0], seen.at[8])
    assert seen.identities == identities


# ---- whole models

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 4}),
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
}


def model_of(kind: str) -> Any:
    """Return a tiny model of an architecture."""
    name, options = KINDS[kind]
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_weight_comes_back_whatever_it_is_called_on_disk(
    make_trainer: MakeTrainer, kind: str
) -> None:
    """Mixtures of experts are saved under other names and in other shapes than they are trained in."""
    goes_back(*run(make_trainer, model_of(kind)))


def test_generators_are_where_they_were_after_a_load_under_other_names(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Building the model a second time draws from them."""
    trainer, _ = run(make_trainer, model_of("mixtral"), max_steps=4)
    trainer.train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_weights(Host(trainer), str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_that_is_given_up_holds_every_weight_of_the_checkpoint_it_names(
    make_trainer: MakeTrainer,
) -> None:
    """Those too that are saved under other names."""
    model = model_of("mixtral")
    trainer, seen = run(
        make_trainer,
        model,
        callbacks=[NaNBatch(model, range(10, 100)), NonFiniteDetector(action="rollback")],
        divguard_max_rollbacks=1,
        max_steps=24,
    )
    with pytest.raises(TrainingDivergedError, match=r"The model holds the weights of .*checkpoint-8"):
        trainer.train()
    assert same_weights(everything(model), seen.at[8])


class Tacked(torch.nn.Module):
    """Two parameters in one memory, of which a file holds one."""

    _keys_to_ignore_on_save = None  # the host asks for it where a file lacks something

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 16)
        self.head = torch.nn.Linear(16, 16, bias=False)
        self.head.weight.data = self.embed.weight.data

    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
        """Return loss and logits."""
        logits = self.head(self.embed(input_ids)).flatten(0, 1)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is saved: one of the two."""
        state = super().state_dict(*args, **kwargs)
        state.pop("head.weight")
        return state


def test_two_parameters_in_one_memory_come_back_by_one_of_them(make_trainer: MakeTrainer) -> None:
    """As safetensors keep them."""
    torch.manual_seed(0)
    goes_back(*run(make_trainer, Tacked(), eval_dataset=None))


def test_a_model_that_from_pretrained_cannot_build_is_refused_by_the_names_it_lacks(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """What went wrong there is the cause."""

    class Demanding(GPT2LMHeadModel):
        def __init__(self, config: Any, *, needed: bool) -> None:
            super().__init__(config)

    trainer, _ = run(make_trainer, Demanding(tiny_model().config, needed=True), max_steps=4)
    trainer.train()
    path = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"`transformer\.ln_f\.weight`") as caught:
        load_weights(Host(trainer), str(path.parent))
    assert "needed" in str(caught.value.__cause__)


def test_weights_in_several_files_come_back(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """As large models are saved."""
    model = tiny_model()
    save = model.save_pretrained
    model.save_pretrained = lambda folder, **options: save(folder, **{**options, "max_shard_size": "2KB"})
    goes_back(*run(make_trainer, model))
    assert len(list((tmp_path / "out" / "checkpoint-8").glob("*.safetensors"))) > 1


class Normed(torch.nn.Module):
    """A model that is none of Transformers', with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 16)

    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
        """Return loss and logits."""
        logits = self.head(self.norm(self.embed(input_ids).flatten(0, 1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}


def test_running_statistics_of_a_model_of_ones_own_come_back(make_trainer: MakeTrainer) -> None:
    """Buffers are part of what is saved."""
    torch.manual_seed(0)
    goes_back(*run(make_trainer, Normed(), eval_dataset=None))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_that_was_compiled_by_hand_comes_back(make_trainer: MakeTrainer) -> None:
    """Its names carry a prefix."""
    model = torch.compile(tiny_model(), backend="eager")
    goes_back(*run(make_trainer, model, remove_unused_columns=False))


def test_a_file_that_lacks_a_trained_weight_is_refused_and_nothing_is_changed(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The sentence names it; the model is as it was before the attempt."""
    trainer, _ = run(make_trainer, tiny_model(), max_steps=8)
    trainer.train()
    path = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    before = everything(trainer.model)
    with (
        pytest.raises(CheckpointError, match=r"checkpoint-4 .*`transformer\.ln_f\.weight`"),
        weights_kept_on_error(trainer.model),
    ):
        load_weights(Host(trainer), str(path.parent))
    assert same_weights(everything(trainer.model), before)


# ---- adapters


def adapters(kind: str) -> Any:
    """Return a tiny model with adapters of a kind."""
    peft = pytest.importorskip("peft")
    on = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    if kind in ("prompt", "prefix", "projected", "p_tuning"):
        made = {
            "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "projected": lambda: peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8, prefix_projection=True
            ),
            "p_tuning": lambda: peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8
            ),
        }
        set_seed(0)
        sizes = {"vocab_size": 16, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(**sizes, **still, bos_token_id=0, eos_token_id=0)
        return peft.get_peft_model(GPT2LMHeadModel(config), made[kind]())
    configs = {
        "lora": lambda: peft.LoraConfig(r=2, **on),
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **on),
        "modules_to_save": lambda: peft.LoraConfig(r=2, modules_to_save=["ln_f"], **on),
        "bias": lambda: peft.LoraConfig(r=2, bias="all", **on),
        "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices={"wte": [1, 2]}, **on),
        "ia3": lambda: peft.IA3Config(
            target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True
        ),
        "adalora": lambda: peft.AdaLoraConfig(total_step=16, init_r=4, target_r=2, tinit=2, tfinal=4, **on),
    }
    model = peft.get_peft_model(tiny_model(), configs["lora" if kind == "unfrozen" else kind]())
    if kind == "unfrozen":
        model.base_model.model.transformer.ln_f.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "kind", ["lora", "dora", "modules_to_save", "bias", "tokens", "ia3", "adalora", "prompt", "prefix"]
)
def test_adapters_come_back_from_disk(make_trainer: MakeTrainer, kind: str) -> None:
    """All that is trained of them, and the rest was never changed."""
    goes_back(*run(make_trainer, adapters(kind), eval_dataset=None))


@pytest.mark.parametrize("kind", ["p_tuning", "projected", "unfrozen"])
def test_adapters_whose_files_lack_what_was_trained_come_back_from_memory(
    make_trainer: MakeTrainer, kind: str
) -> None:
    """A snapshot holds the parameters themselves."""
    goes_back(*run(make_trainer, adapters(kind), eval_dataset=None, **MEMORY))


@pytest.mark.parametrize("kind", ["p_tuning", "projected", "unfrozen"])
def test_adapters_whose_files_lack_what_was_trained_are_not_said_to_be_back(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture, kind: str
) -> None:
    """The run is given up, with the weights as they were, and the log says what to do."""
    trainer, seen = run(make_trainer, adapters(kind), eval_dataset=None)
    with pytest.raises(TrainingDivergedError, match="The model holds the weights as they were"):
        trainer.train()
    assert "Keep states in memory with `divguard_snapshot_steps`" in our_log.text
    assert same_weights(everything(trainer.model), seen.at[11])


def test_all_adapters_that_were_active_stay_active_and_trained(make_trainer: MakeTrainer) -> None:
    """The host's load would leave the first one only."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    trainer, seen = run(make_trainer, model, eval_dataset=None)
    goes_back(trainer, seen)
    assert model.active_adapters == ["first", "second"]
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    after = seen.at[16]
    assert all(not torch.equal(after[name], seen.restored[0][name]) for name in trained)


def test_adapters_keep_their_precision_and_their_memory(make_trainer: MakeTrainer) -> None:
    """The host's load would turn bfloat16 into float32 behind the back of the optimizer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_model().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    addresses = [weight.data_ptr() for weight in model.parameters()]
    goes_back(*run(make_trainer, model, eval_dataset=None))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert [weight.data_ptr() for weight in model.parameters()] == addresses


# ---- parameters that are unfrozen on the way


class Unfreeze(TrainerCallback):
    """Lets all parameters be trained from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unfreeze them if this is the step."""
        if state.global_step == self.step:
            kwargs["model"].requires_grad_(True)


@pytest.mark.parametrize("where", [{}, MEMORY], ids=["disk", "memory"])
def test_what_was_unfrozen_after_the_target_goes_back_too(
    make_trainer: MakeTrainer, where: dict[str, Any]
) -> None:
    """The optimizer has held it from the start, so it is in the snapshot."""
    model = tiny_model()
    model.transformer.wpe.requires_grad_(False)
    trainer, seen = run(make_trainer, model, callbacks=[Unfreeze(9)], **where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    goes_back(trainer, seen)
    assert not torch.equal(seen.at[11]["transformer.wpe.weight"], seen.at[8]["transformer.wpe.weight"])


def test_what_was_unfrozen_but_given_to_no_optimizer_is_no_obstacle(make_trainer: MakeTrainer) -> None:
    """It takes a gradient, and nothing changes it."""
    model = tiny_model()
    model.transformer.wpe.requires_grad_(False)
    goes_back(*run(make_trainer, model, callbacks=[Unfreeze(9)], **MEMORY))


def test_what_an_optimizer_was_given_after_the_snapshot_is_named(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """A snapshot that lacks it is passed over."""

    class Grow(Unfreeze):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == self.step:
                kwargs["optimizer"].add_param_group({"params": [kwargs["model"].transformer.wpe.weight]})

    model = tiny_model()
    model.transformer.wpe.requires_grad_(False)
    trainer, seen = run(make_trainer, model, callbacks=[Grow(9)], lr_scheduler_type="constant", **MEMORY)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    with pytest.raises(TrainingDivergedError, match="The model holds the weights as they were"):
        trainer.train()
    assert "snapshot of step 8 lacks `transformer.wpe.weight`" in our_log.text
    assert same_weights(everything(trainer.model), seen.at[11])


# ---- which snapshots are kept


@pytest.mark.parametrize("every", [2, 5, 30])
def test_snapshots_reach_back_to_before_a_fault_however_close_together_they_are(
    make_trainer: MakeTrainer, every: int
) -> None:
    """A fault of step 202 is found at 213; snapshots since then must not have pushed the good ones out."""
    trainer = make_trainer(
        callbacks=[DivergenceDetector(ScriptedRule({213: 202}), action="rollback")],
        divguard_snapshot_steps=every,
        divguard_compare="off",
        save_strategy="no",
        max_steps=214,
    )
    trainer.train()
    (event,) = trainer.divguard_events
    assert event["event"] == "rollback"
    assert 202 - 2 * 40 - 2 * every <= event["target_step"] <= 200


@pytest.mark.parametrize(("every", "kept"), [(2, 5), (25, 4)])
def test_only_a_few_snapshots_are_kept_and_the_first_and_the_newest_are_among_them(
    make_trainer: MakeTrainer, every: int, kept: int
) -> None:
    """One more of those that are close together."""
    steps: list[int] = []

    class AtEnd(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.extend(snapshot.step for snapshot in trainer._run.rollback.snapshots.all())

    trainer = make_trainer(
        callbacks=[NonFiniteDetector(action="rollback"), AtEnd()],
        divguard_snapshot_steps=every,
        save_strategy="no",
        max_steps=150,
    )
    trainer.train()
    assert len(steps) == kept
    assert (steps[0], steps[-1]) == (0, 150)
    assert any(40 <= 150 - step <= 80 for step in steps)


# ---- optimizers


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_update_in_the_backward_pass_are_refused(
    make_trainer: MakeTrainer, name: str
) -> None:
    """Before the first step."""
    options = {"optim_target_modules": ["attn"]} if "layerwise" in name else {}
    model = tiny_model()
    callbacks = [NaNBatch(model, range(0)), NonFiniteDetector(action="rollback")]
    trainer = make_trainer(model=model, callbacks=callbacks, optim=name, **QUICK, **options)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="which updates the weights during the backward pass"):
        trainer.train()


def test_the_second_name_of_tied_weights_is_not_called_missing(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the line on the rollback it would look like a restore that failed."""
    trainer, seen = run(make_trainer, tiny_model())
    trainer.train()
    assert len(seen.restored) == 1
    assert "missing keys" not in caplog.text
