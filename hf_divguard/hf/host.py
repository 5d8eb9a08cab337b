"""The seam to the host: the only file besides ``trainer.py`` that names private members of ``Trainer``.

Versions of Transformers differ only here. The seam is tested, not the version number: 5.0
still has the loop of 4.57.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer

from hf_divguard.hf.side_effects import values_kept

__all__ = [
    "HAS_FINALIZE",
    "HAS_ROTATE_METHOD",
    "Host",
    "SaveInProgress",
    "rewrite_best",
    "rotate_as_host",
    "save_limit",
    "sharded_model_accepted",
]

HAS_ROTATE_METHOD = hasattr(Trainer, "_rotate_checkpoints")
"""4.57 to 5.0 rotate through a method, later versions through a module function. Ends with 4.x support."""

HAS_FINALIZE = hasattr(Trainer, "_finalize_training")
"""Later 5.x end training in a method of its own; before, inside ``_inner_training_loop``. Ends with 4.x support."""


@dataclass
class SaveInProgress:
    """What the overrides of the host's save need to know while one of ours is under way.

    Args:
        folder: Run folder that the host writes into instead of its own; ``None`` for its own.
        save_total_limit: The user's limit, which is hidden from the host's rotation.
        pushes: Folders whose upload the host asked for; they are uploaded under their final name.
    """

    folder: str | None
    save_total_limit: int | None
    pushes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def limit_shown(self, args: Any) -> Iterator[None]:
        """Show the user's limit while ``training_args.bin`` is written."""
        with save_limit(args, self.save_total_limit):
            yield


@contextlib.contextmanager
def save_limit(args: Any, limit: int | None) -> Iterator[None]:
    """Show the host another ``save_total_limit``; with ``None`` it deletes nothing."""
    before, args.save_total_limit = args.save_total_limit, limit
    try:
        yield
    finally:
        args.save_total_limit = before


@contextlib.contextmanager
def sharded_model_accepted(
    given: Sequence[Any], named: Mapping[str, Any], saves_itself: Callable[[Any, Any], bool]
) -> Iterator[None]:
    """Let a Trainer be made for a model that the host has sharded, although its optimizer is to be saved.

    The host refuses that, because it can save none. Where checkpoints are saved by us, the
    optimizer is saved and loaded by us, too. Ends when the host can.

    Args:
        given: The arguments of the Trainer by position, without the Trainer itself.
        named: Those by name.
        saves_itself: Returns, from arguments and callbacks, whether checkpoints are saved by us.
    """
    model = named.get("model", given[0] if given else None)
    args = named.get("args", given[1] if len(given) > 1 else None)
    is_refused = (
        getattr(model, "is_distributed_loading_by_transformers", False)
        and args is not None
        and not args.save_only_model
        and saves_itself(args, named.get("callbacks") or ())
    )
    if not is_refused:
        yield
        return
    args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = False


class Host:
    """What the guards use of a ``Trainer``. ``tests/hf/fake_host.py`` has one without a trainer.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    # ---- what it holds

    @property
    def trainer(self) -> Any:
        """The trainer, for its public methods."""
        return self._trainer

    @property
    def args(self) -> Any:
        """The ``TrainingArguments``."""
        return self._trainer.args

    @property
    def state(self) -> Any:
        """The ``TrainerState``."""
        return self._trainer.state

    @property
    def control(self) -> Any:
        """The ``TrainerControl``, as the callbacks left it."""
        return self._trainer.control

    @property
    def callbacks(self) -> list[Any]:
        """The live list of callbacks, in the order in which they are called."""
        return self._trainer.callback_handler.callbacks

    @property
    def model(self) -> Any:
        """The model as the user gave it, not wrapped for several processes."""
        return self._trainer.model

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._trainer.optimizer

    @property
    def first_rate(self) -> Any:
        """The learning rate of the first parameter group now; ``None`` without an optimizer."""
        groups = getattr(self._trainer.optimizer, "param_groups", None)
        return groups[0].get("lr") if groups else None

    @property
    def scheduler(self) -> Any:
        """The schedule of the learning rate."""
        return self._trainer.lr_scheduler

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16 training, or ``None``."""
        return getattr(self._trainer.accelerator, "scaler", None)

    @property
    def scales_losses(self) -> bool:
        """Whether a loss scaler is at work: the host's own, or in fp16 that of an engine."""
        return (
            self.scaler is not None or getattr(self._trainer.accelerator, "mixed_precision", "no") == "fp16"
        )

    @property
    def label_names(self) -> list[str]:
        """Names of the labels in a batch."""
        return getattr(self._trainer, "label_names", None) or ["labels"]

    @property
    def completes_step(self) -> bool:
        """Whether the present micro-batch is the last one before the optimizer's step."""
        return bool(self._trainer.accelerator.sync_gradients)

    @property
    def prepares_inputs_itself(self) -> bool:
        """Whether a subclass prepares inputs in a way of its own, as by generating them."""
        return type(self._trainer)._prepare_inputs is not Trainer._prepare_inputs

    def loss_of(self, inputs: Any, num_items: Any, n_micro_batches: int) -> torch.Tensor:
        """Return the loss of a micro-batch alone, on the scale of the loss of a step."""
        trainer = self._trainer
        prepared = trainer._prepare_inputs(dict(inputs))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, prepared, num_items_in_batch=num_items)
        loss = loss.detach().mean().float()
        takes_items = trainer.model_accepts_loss_kwargs and num_items is not None
        is_share = takes_items or trainer.compute_loss_func is not None
        return loss * n_micro_batches if is_share else loss

    @contextlib.contextmanager
    def metrics_kept(self) -> Iterator[None]:
        """Put what the trainer counts and collects back at the end."""
        with values_kept(self._trainer):
            yield

    @property
    def distributed_type(self) -> str:
        """How accelerate distributes the run: ``"NO"``, ``"MULTI_GPU"``, ``"FSDP"``..."""
        kind = self._trainer.accelerator.distributed_type
        return str(getattr(kind, "value", kind))

    # ---- logs

    def log(self, logs: dict[str, float]) -> None:
        """Log through the host, so that every tracker gets it."""
        self._trainer.log(logs)

    def log_event(self, values: dict[str, float]) -> None:
        """Log through the host's own ``log``: overrides of it, as those of TRL, count what is logged as a step."""
        Trainer.log(self._trainer, values)

    @property
    def last_logged_step(self) -> int:
        """Step of the last training log."""
        return self._trainer._globalstep_last_logged

    @last_logged_step.setter
    def last_logged_step(self, step: int) -> None:
        self._trainer._globalstep_last_logged = step

    @property
    def total_loss(self) -> float:
        """Sum of the losses of the logged steps of this ``train()`` call."""
        return float(self._trainer._total_loss_scalar)

    @total_loss.setter
    def total_loss(self, total: float) -> None:
        self._trainer._total_loss_scalar = total

    def add_to_running_loss(self, amount: float) -> float:
        """Add to the losses that wait for the next log; return what must be added at the end of a step."""
        running = getattr(self._trainer, "_tr_loss", None)
        if not isinstance(running, torch.Tensor):
            return amount  # until 5.0 the sum is a local variable of the host's loop
        running += amount
        return 0.0

    # ---- loading

    def load_weights(self, checkpoint: str) -> None:
        """Load the weights as the host does, without its warnings on missing keys."""
        # The host warns of the second name of tied weights too, which no file holds. The caller checks for itself.
        self._trainer._issue_warnings_after_load = lambda *args, **kwargs: None  # shadows the method
        try:
            self._trainer._load_from_checkpoint(checkpoint)
        finally:
            del self._trainer._issue_warnings_after_load

    def load_scaler(self, checkpoint: str) -> None:
        """Load the state of the gradient scaler."""
        self._trainer._load_scaler(checkpoint)

    def load_random_states(self, checkpoint: str) -> None:
        """Load the states of the random number generators."""
        self._trainer._load_rng_state(checkpoint)

    # ---- saving

    @contextlib.contextmanager
    def saving_to(self, folder: str | None) -> Iterator[SaveInProgress]:
        """Have the host's save write into ``folder``, rotate nothing and upload nothing."""
        trainer, state = self._trainer, self._trainer.state
        saving = SaveInProgress(folder, trainer.args.save_total_limit)
        # The host would look for the best checkpoint beside the folder it writes to, behind a barrier that a rank
        # with an error never reaches. The pointer is set when the checkpoint is finished.
        best_step, state.best_global_step = state.best_global_step, None
        trainer._save_in_progress = saving
        try:
            with save_limit(trainer.args, None):  # without a limit the host's rotation does nothing
                yield saving
        finally:
            trainer._save_in_progress = None
            state.best_global_step = best_step

    def push(self, checkpoint: str) -> Any:
        """Upload a finished checkpoint; return the job, or ``None``."""
        self._trainer._push_from_checkpoint(checkpoint)
        return getattr(self._trainer, "push_in_progress", None)

    def rotate(self, run_dir: str) -> None:
        """Call the trainer's ``_rotate_checkpoints``."""
        self._trainer._rotate_checkpoints(use_mtime=True, output_dir=run_dir)

    def rotate_after_own_save(self, run_dir: str) -> None:
        """Call ``_rotate_checkpoints`` after a save of the host's own, where the host does not do so itself."""
        if not HAS_ROTATE_METHOD and self._trainer.args.should_save:
            self.rotate(run_dir)

    def rewrite_best(self, path: str) -> None:
        """Bring what a ``trainer_state.json`` says of the best checkpoint up to the present state."""
        rewrite_best(self._trainer.state, path)


def rotate_as_host(trainer: Any, use_mtime: bool, output_dir: str | None) -> None:
    """Delete old checkpoints as the host's own module function does; before 5.1 it is a method."""
    from transformers.trainer_utils import rotate_checkpoints

    rotate_checkpoints(
        output_dir=trainer.args.output_dir if output_dir is None else output_dir,
        save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint,
        use_mtime=use_mtime,
    )


_BEST_FIELDS = ("best_global_step", "best_metric", "best_model_checkpoint")
# The host dumps its state with sorted keys and an indent of two, so the three stand at the top, a line each.
_BEST_LINES = re.compile(r"\A\{\n" + "".join(rf'  "{name}": [^\n]*,\n' for name in _BEST_FIELDS))


def rewrite_best(state: Any, path: str) -> None:
    """Replace the three lines at the top of the file that ``state`` was written to.

    Writing all of the state again takes, with some hundred log entries, as long as writing a
    small model. A file of another form is written again all the same.
    """
    lines = "{\n" + "".join(f'  "{name}": {json.dumps(getattr(state, name))},\n' for name in _BEST_FIELDS)
    with open(path, encoding="utf-8") as file:
        # Most saves change nothing here: then the rest is not read.
        if file.read(len(lines)) == lines:
            return
        file.seek(0)
        text = file.read()
    head = _BEST_LINES.match(text)
    if head is None:
        state.save_to_json(os.fspath(path))
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(lines + text[head.end() :])
