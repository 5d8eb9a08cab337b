"""What a script calls on a guarded trainer: train, list checkpoints and events, load and save weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_divguard.hf.arguments import options_of
from hf_divguard.hf.folder_locks import FolderLocks
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.resume import choose_for_all
from hf_divguard.hf.run import GuardedRun
from hf_divguard.hf.run_components import saves_checkpoints_itself
from hf_divguard.hf.unguarded import note_guarded
from hf_divguard.storage.checkpoints import Checkpoint

__all__ = ["PublicMethods"]


# To a type checker the mixin is the Trainer it will be mixed into.
if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class PublicMethods(_Host):
    """The methods and properties that :class:`DivGuardMixin` adds or extends for scripts."""

    _run: GuardedRun | None = None
    _options: Any
    _locks: FolderLocks | None = None
    _resumes_newest = False

    def best_checkpoints(self, n: int | None = None) -> list[Checkpoint]:
        """Return the best checkpoints of this run, best first.

        Args:
            n: How many at most; ``None`` for ``args.preserve_n_best``.

        Returns:
            The checkpoints, with path, step and metric. Those that were not evaluated at
            their own step are left out; non-finite metrics come last. Empty before training.
        """
        if self._run is None:
            return []
        checkpoints = self._run.checkpoints
        return checkpoints.ledger.best(
            checkpoints.greater_is_better, self._options.preserve_n_best if n is None else n
        )

    @property
    def divguard_events(self) -> list[dict[str, Any]]:
        """What the guards did in this run, oldest first, as in ``output_dir/divguard/events.jsonl``."""
        return list(self._run.journal.events) if self._run is not None else []

    @property
    def divguard_suspect_rows(self) -> list[dict[str, int]]:
        """Rows that stood out in batches with a high loss: ``step``, ``rank``, ``micro_batch`` and ``row``.

        ``dataset_index`` is their number in the training dataset, where the sampler gives one.
        """
        comparison = self._run.comparison if self._run is not None else None
        return list(comparison.bad_batches.rows) if comparison is not None else []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the stock Trainer does, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: ``True`` or ``"latest"``: the newest complete checkpoint
                in ``output_dir``; the log says which were skipped and why. ``"best"``: the best
                complete one. ``"auto"``: the newest complete one, or from scratch if there is
                provably nothing to resume. A path, or the name of a folder in ``output_dir``:
                that one. Text from a command line is understood (``"true"``).
            *args: As for the stock Trainer.
            **kwargs: As for the stock Trainer.

        Raises:
            NoCompleteCheckpointError: If there are checkpoints but none is complete, or if it
                cannot be known.
            CheckpointError: If the named checkpoint does not exist or is not complete.
            FolderInUseError: If another training writes its checkpoints into the same folder.
            TrainingDivergedError: If rollbacks did not help; the model then holds the best
                weights from before the fault.
            SystemExit: With exit code 75, if a signal had the run save and end
                (``divguard_save_on_signal``, ``enable_jit_checkpoint``).
        """
        note_guarded(self.args)
        self._options = options_of(self.args)
        is_auto = str(resume_from_checkpoint).strip().lower() == "auto"
        with FolderLocks() as locks:
            self._locks = locks
            self._resumes_newest = str(resume_from_checkpoint).strip().lower() in ("true", "latest", "auto")
            try:
                if resume_from_checkpoint or resume_from_checkpoint == "":
                    chosen = self._choose_checkpoint(resume_from_checkpoint, locks)
                    if chosen is None and not is_auto and resume_from_checkpoint is not True:
                        raise ValueError(
                            f"No valid checkpoint found in output directory ({self.args.output_dir}). To start from "
                            "scratch where there is none, set `resume_from_checkpoint='auto'`."
                        )
                    # Where ``True`` finds nothing, the host says so; with "auto" training starts from scratch.
                    resume_from_checkpoint = chosen or (None if is_auto else True)
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._locks = None

    def _choose_checkpoint(self, asked: str | bool, locks: FolderLocks) -> str | None:
        args: Any = self.args
        ranks = Ranks(args.process_index, args.world_size)
        # Before anything is cleaned up that another training may be writing.
        saves = saves_checkpoints_itself(self._options, self.callback_handler.callbacks)
        locks.hold(args.output_dir, ranks, create=saves)
        return choose_for_all(
            asked,
            args.output_dir,
            ranks,
            metric=self._options.divguard_ranking_key,
            greater_is_better=self._options.divguard_greater_is_better,
        )

    def load_last_good(self) -> str:
        """Load the weights of the last good checkpoint: the newest one from before the fault that ended the run.

        Returns:
            The folder of the checkpoint.

        Raises:
            ValueError: If there is no good checkpoint.
            CheckpointError: If its weights cannot be loaded; the model is then as it was.
        """
        if self._run is None:
            raise ValueError("There is no good checkpoint to load: call `train()` first.")
        return self._run.load_last_good()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as the stock Trainer does; after a stopped run, warn which weights these are."""
        if not _internal_call and self._run is not None:
            self._run.warn_of_weights()
        super().save_model(output_dir, _internal_call=_internal_call)
