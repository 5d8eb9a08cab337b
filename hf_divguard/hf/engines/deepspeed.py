"""DeepSpeed with ZeRO 1, 2 or 3: its engine owns the optimizer, of which every rank holds a part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hf_divguard.errors import CheckpointError
from hf_divguard.hf.engines.elsewhere import parallelism
from hf_divguard.hf.engines.engine import SAFE_ADVICE, Engine, KeptState, Unsupported
from hf_divguard.hf.engines.tensors import is_adapted, to_cpu
from hf_divguard.hf.rates import rates_kept
from hf_divguard.storage.archives import check_zip
from hf_divguard.storage.layouts.deepspeed import LATEST, files_of_rank, folder_of_state

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["DeepSpeed"]

# What the state of a ZeRO optimizer calls its float32 weights and the state of the optimizer inside, in stages 1
# and 2 and in stage 3.
_FLOAT32 = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_INNER = ("base_optimizer_state", "optimizer_state_dict")
# A load sets these to what they were at the save. The loop goes on counting.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_PART = "part {} of the float32 weights"

# Settings under which nothing was tried, or the engine holds the state in another form.
_UNTRIED: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("zero_optimization.offload_optimizer.device", lambda value: value == "nvme"),
    ("zero_optimization.offload_param.device", lambda value: value == "nvme"),
    ("zero_optimization.elastic_checkpoint", bool),
    ("zero_optimization.zenflow", bool),
    ("zero_optimization.zero_hpz_partition_size", lambda value: value > 1),
    ("zero_optimization.mics_shard_size", lambda value: value > 0),
    ("checkpoint.load_universal", bool),
    ("checkpoint.writer", bool),
    ("datastates_ckpt", bool),
    ("tensor_parallel.autotp_size", lambda value: value > 1),
)


class DeepSpeed(Engine):
    """The ZeRO optimizer of DeepSpeed, stages 1 to 3.

    Weights are kept as this rank's part of the float32 weights, from which DeepSpeed makes
    those that the model computes with: in stages 1 and 2 they are then gathered from all
    ranks, in stage 3 each rank holds its part of them.
    """

    name = "DeepSpeed with ZeRO 1, 2 or 3"
    forwards_together = True
    puts_together = True
    updates_in_backward = True

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether accelerate runs with DeepSpeed, and no layer or sequence is divided."""
        return host.distributed_type == "DEEPSPEED" and parallelism(host) is None

    def unsupported(self) -> Unsupported | None:
        """Return which setting of DeepSpeed has no rollback."""
        stage = self._setting("zero_optimization.stage", 0)
        if stage not in (1, 2, 3):
            return Unsupported(
                f"DeepSpeed without ZeRO (`zero_optimization.stage` is {stage})",
                f"Set the stage to 1, 2 or 3. Or: {SAFE_ADVICE[0].lower()}{SAFE_ADVICE[1:]}",
            )
        for key, is_untried in _UNTRIED:
            value = self._setting(key)
            if value is not None and is_untried(value):
                return Unsupported(f"the setting `{key}` = {value!r} of DeepSpeed")
        is_bf16 = self._setting("bf16.enabled") is True
        if stage == 1 and is_bf16 and self._setting("data_types.grad_accum_dtype") == "fp32":
            return Unsupported("ZeRO stage 1 of DeepSpeed in bf16 with gradients in float32")
        return None

    @property
    def skips_by_itself(self) -> bool:
        """Whether DeepSpeed leaves out an update if a gradient is not finite; in bf16 it can be switched off."""
        return bool(
            self._setting("bf16.enabled") is not True or self._setting("bf16.check_grad_overflow", True)
        )

    def why_nothing_skipped(self) -> str | None:
        """Return why single updates cannot be left out."""
        return None if self.skips_by_itself else "the setting `bf16.check_grad_overflow` = False of DeepSpeed"

    def _setting(self, key: str, default: Any = None) -> Any:
        config = self.host.trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        return config.get_value(key, default)

    # ---- DeepSpeed's objects

    @property
    def _engine(self) -> Any:
        return self.host.trainer.model_wrapped

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _shards_weights(self) -> bool:
        """Whether it is stage 3."""
        return hasattr(self._zero, "fp32_partitioned_groups_flat")

    @property
    def _float32(self) -> list[torch.Tensor]:
        """This rank's parts of the weights that the optimizer updates."""
        zero = self._zero
        parts = (
            zero.fp32_partitioned_groups_flat
            if self._shards_weights
            else zero.single_partition_of_fp32_groups
        )
        return list(parts)

    @property
    def _computing(self) -> list[torch.Tensor]:
        """What the model computes with: all of it in stages 1 and 2, this rank's parts in stage 3."""
        zero = self._zero
        return list(zero.fp16_partitioned_groups_flat if self._shards_weights else zero.bit16_groups_flat)

    @contextlib.contextmanager
    def _parameters_at_rest(self) -> Iterator[None]:
        """Let the ranks give back the parameters that they have gathered (stage 3), and gather them again at the end."""
        zero = self._zero
        if self._shards_weights:
            zero.checkpoint_event_prologue()
        yield
        if self._shards_weights:
            zero.checkpoint_event_epilogue()

    # ---- in memory

    def weights_are_finite(self) -> bool:
        """Return whether this rank's part of the weights is finite."""
        return all(bool(torch.isfinite(part).all()) for part in self._float32)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's parts of the float32 weights, and all buffers."""
        parts = {_PART.format(index): part.detach() for index, part in enumerate(self._float32)}
        return {**parts, **dict(self.host.model.named_buffers())}

    def keep(self, *, with_optimizer: bool = True) -> KeptState:
        """Return a copy in CPU memory: the parts of this rank, loss scale and optimizer."""
        rest = {name: value for name, value in self._zero.state_dict().items() if name not in _FLOAT32}
        if not with_optimizer:
            rest = {name: {} if name in _INNER else value for name, value in rest.items()}
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}
        return KeptState(tensors, to_cpu(rest))

    def check(self, kept: KeptState, step: int) -> None:
        """Raise if the parts of now are others than the kept ones."""
        for name, part in self.tensors().items():
            if name in kept.tensors and kept.tensors[name].shape == part.shape:
                continue
            raise CheckpointError(
                f"The snapshot of step {step} lacks {name} as it is now: parameters were added to the optimizer, or "
                "taken from it, after it was taken."
            )

    def put_back(self, kept: KeptState, *, weights_only: bool = False) -> None:
        """Put a kept state back. In stages 1 and 2, and for small parameters in stage 3, the ranks exchange weights."""
        zero = self._zero
        state = to_cpu(kept.optimizer)
        state[_FLOAT32[self._shards_weights]] = [
            kept.tensors[_PART.format(index)] for index in range(len(self._float32))
        ]
        by_rank = [None] * dist.get_rank(zero.dp_process_group) + [state]
        with rates_kept(self.host), self._parameters_at_rest():
            zero.load_state_dict(by_rank, load_optimizer_states=not weights_only, load_from_fp32_weights=True)
            if not self._shards_weights:
                zero.update_lp_params()
        self._write_buffers(kept.tensors)

    def _write_buffers(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.host.model.named_buffers():
                if name in tensors:
                    buffer.copy_(tensors[name])

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Put what the model computes with and the float32 weights back as they were on an error."""
        live = [*self._float32, *self._computing, *self.host.model.buffers()]
        copies = [each.detach().to("cpu", copy=True) for each in live]
        try:
            yield
        except BaseException:
            for each, copy in zip(live, copies, strict=True):
                each.data.copy_(copy)
            raise

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let the model compute with weights made from kept parts; its own are put back as they were."""
        buffers = {name: buffer.clone() for name, buffer in self.host.model.named_buffers()}
        own = [each.detach().clone() for each in self._computing] if tensors else []
        try:
            if tensors:
                self._compute_with([tensors[_PART.format(index)] for index in range(len(self._float32))])
                self._write_buffers(tensors)
            yield
        finally:
            if tensors:
                with self._parameters_at_rest():
                    for each, copy in zip(self._computing, own, strict=True):
                        each.data.copy_(copy)
            self._write_buffers(buffers)

    def _compute_with(self, parts: list[torch.Tensor]) -> None:
        if self._shards_weights:
            with self._parameters_at_rest():
                for each, part in zip(self._computing, parts, strict=True):
                    each.data.copy_(part)
            return
        # DeepSpeed makes all weights from what it takes for the parts of the optimizer.
        own = [(each, each.data) for each in self._float32]
        try:
            for (each, data), part in zip(own, parts, strict=True):
                each.data = part.to(data.device)
            self._zero.update_lp_params()
        finally:
            for each, data in own:
                each.data = data

    # ---- on disk

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read all files that this rank needs to their ends; DeepSpeed reads them again when all ranks could.

        The float32 weights are a part of the optimizer, so with ``weights_only`` that comes back, too.
        """
        self._check_files(checkpoint)
        engine = self._engine
        strict = not is_adapted(self.host.model)

        def put() -> None:
            counted = {name: getattr(engine, name) for name in _COUNTERS}
            with rates_kept(self.host):
                loaded, _ = engine.load_checkpoint(
                    checkpoint, load_module_strict=strict, load_lr_scheduler_states=False
                )
            if loaded is None:
                raise CheckpointError(f"DeepSpeed found no state in {checkpoint}.")
            for name, value in counted.items():
                setattr(engine, name, value)

        return put

    def _check_files(self, checkpoint: str) -> None:
        zero, folder = self._zero, Path(checkpoint)
        names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
        rank, size = dist.get_rank(zero.dp_process_group), dist.get_world_size(zero.dp_process_group)
        state = folder_of_state(folder)
        if state is None:
            raise FileNotFoundError(
                f"{checkpoint} has no file `{LATEST}`, which names the folder of its state."
            )
        files = files_of_rank(names, state, rank)
        for name in files:
            if name not in names:
                raise FileNotFoundError(f"{checkpoint} has no {name}, which rank {rank} of {size} needs.")
            try:
                check_zip(folder / name, read_all=True)
            except ValueError as error:
                raise CheckpointError(f"{folder / name} {error}.") from None

    # ---- gradients

    def gradient_norm(self) -> torch.Tensor | None:
        """Return the norm that DeepSpeed has measured in the update."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(float(norm))
