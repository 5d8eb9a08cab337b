"""Scalars of TensorBoard event files, read by the package ``tensorboard`` if it is installed."""

from __future__ import annotations

from hf_divguard.cli.exits import CommandError

__all__ = ["read_event_files"]


def read_event_files(files: list[str]) -> list[tuple[int, str, float, float]]:
    """Return step, tag, value and time of each scalar in ``files``, in the order of their writing.

    Raises:
        CommandError: If tensorboard is not installed, or a file cannot be read.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-not-found, unused-ignore]
            EventFileLoader,
        )
        from tensorboard.util.tensor_util import (  # type: ignore[import-not-found, unused-ignore]
            make_ndarray,
        )
    except ImportError:
        raise CommandError(
            f"`{files[0]}` is a TensorBoard event file, which the package tensorboard reads. Run `pip install "
            "tensorboard`, or give the `trainer_state.json` of the run."
        ) from None
    rows: list[tuple[int, str, float, float]] = []
    for file in files:
        try:
            for event in EventFileLoader(file).Load():
                for value in event.summary.value:
                    if value.HasField("tensor") and not value.tensor.tensor_shape.dim:
                        number = float(make_ndarray(value.tensor))
                        rows.append((event.step, value.tag, number, event.wall_time))
        except Exception as error:
            raise CommandError(f"`{file}` cannot be read as an event file: {error}") from error
    return rows
