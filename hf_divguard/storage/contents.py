"""Judging a checkpoint without a manifest, by the files that the Trainer would have left in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hf_divguard.storage.archives import check_safetensors, check_zip, read_host_json
from hf_divguard.storage.layout import (
    ARCHIVE,
    RNG,
    SHARD,
    foreign_layout,
    has_training_state,
    is_trainer_file,
    weight_files,
)
from hf_divguard.storage.layouts import Layout, Parts, layout_of
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME, checkpoint_folders
from hf_divguard.storage.regular_files import (
    LimitExceeded,
    error_words,
    is_unreadable,
    list_files,
    named_file,
)
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME
from hf_divguard.storage.verdict import Status, Verdict

__all__ = ["judge_contents", "problems_sentence"]

_MAX_ENTRIES = 100_000
# What is parsed of one JSON file, and of all files together: a second or two.
_MAX_JSON_BYTES = 8 << 20
_MAX_PARSED_BYTES = 48 << 20
# JSON that the Trainer and the tokenizers write; what others put beside it may have its own form.
_JSON = re.compile(
    r"(?:.*_)?(?:config|tokenizer|vocab|added_tokens|special_tokens_map|modules)\.json|.*\.index\.json"
)
_MOST_MISSING_RANKS = 100


def judge_contents(folder: str | os.PathLike[str], *, step: int | None, read_all: bool = False) -> Verdict:
    """Judge the checkpoint in ``folder`` by its files alone.

    Args:
        folder: The checkpoint folder.
        step: The step that its name gives; ``None`` if its name gives none.
        read_all: Read the archives of ``torch.save`` completely and compare their checksums.

    Raises:
        OSError: If the folder cannot be listed.
    """
    try:
        sizes, others = list_files(folder, limit=_MAX_ENTRIES)
    except LimitExceeded as error:
        return Verdict("unknown", f"It cannot be judged: {error}")
    names = [name for name in sizes if name not in (SIDECAR_NAME, MANIFEST_NAME, INCOMPLETE_NAME)]
    if not names and not others:
        return Verdict("incomplete", "It is empty.", ("the folder is empty",))
    if not weight_files(names) and foreign_layout(names) is None and not any(map(is_trainer_file, names)):
        inside = list(checkpoint_folders(folder).values())
        hint = (
            f" It is an output folder: give a checkpoint in it, such as {inside[-1].name!r}."
            if inside
            else ""
        )
        return Verdict(
            "unknown", f"It holds none of the files that the Trainer writes into a checkpoint.{hint}"
        )
    return _Judge(Path(folder), {name: sizes[name] for name in names}, others).judge(step, read_all)


def problems_sentence(problems: Sequence[str]) -> str:
    """Return the problems as one sentence that names the first three."""
    shown = "; ".join(problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{shown}{more}."


class _Judge:
    """Looks at the files of one folder and notes what is wrong, by name.

    Args:
        folder: The folder.
        sizes: Its files, with their sizes.
        others: What in it is neither file nor folder.
    """

    def __init__(self, folder: Path, sizes: dict[str, int], others: dict[str, str]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._names = names = list(sizes)
        self._others = others
        self._weights = weight_files(names)
        self._bytes_left = _MAX_PARSED_BYTES
        self._problems: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._too_large: dict[str, str] = {}

    def judge(self, step: int | None, read_all: bool) -> Verdict:
        """Return the verdict."""
        known = layout_of(self._names)
        layout = None if known is not None else foreign_layout(self._names)
        self._check_trainer_state(step)
        loadable = False
        if layout is None:
            parts = Parts() if known is None else self._check_parts(known)
            if self._weights or not parts.weights:
                self._check_weights()
            has_weights = self._problems.keys() <= {TRAINER_STATE_NAME, *parts.optimizer}
            self._check_companions()
            self._check_training_state(parts)
            self._check_files(read_all)
            for name, kind in self._others.items():
                if is_trainer_file(name) or _JSON.fullmatch(name) or weight_files([name]):
                    self._problems[name] = f"is {kind} instead of a file"
            needed = {*self._weights, *self._companions()} - {"training_args.bin"}
            loadable = has_weights and all(needed.isdisjoint(found) for _, found in self._findings())
        for status, found in self._findings():
            if found:
                words = tuple(f"{named_file(name)} {problem}" for name, problem in found.items())
                return Verdict(status, problems_sentence(words), words, loadable)
        if layout is not None:
            reason = (
                f"It was saved in the layout of {layout}, whose parts cannot be judged without a manifest."
            )
            return Verdict("unknown", reason)
        if not has_training_state(self._names) and not (known is not None and parts.optimizer):
            reason = "The model is complete; the optimizer's state was not saved (`save_only_model`)."
            return Verdict("complete", reason, (), True, False)
        reason = "Every file that the Trainer writes is there and complete."
        if known is not None:
            reason = f"Every file that {known.name} writes is there, of every rank."
        return Verdict("complete", reason, (), True, True)

    def _findings(self) -> list[tuple[Status, dict[str, str]]]:
        return [
            ("unreadable", self._unreadable),
            ("incomplete", self._problems),
            ("unknown", self._too_large),
        ]

    def _check(self, name: str, check: Callable[[], Any]) -> Any:
        """Return what ``check`` returns; note under ``name`` what it raises."""
        try:
            return check()
        except (FileNotFoundError, NotADirectoryError):
            self._problems[name] = "is missing"
        except OSError as error:
            where = self._unreadable if is_unreadable(error) else self._problems
            where[name] = f"cannot be read ({error_words(error)})"
        except LimitExceeded as error:
            self._too_large[name] = str(error) if str(error).startswith("has ") else "is larger than is read"
        except ValueError as error:
            self._problems[name] = str(error)
        return None

    def _json(self, name: str) -> Any:
        """Return the content of a JSON file; note what is wrong with it."""
        path = self._folder / name

        def read() -> Any:
            limit = min(_MAX_JSON_BYTES, self._bytes_left)
            self._bytes_left -= min(os.stat(path).st_size, limit)
            return read_host_json(path, max_bytes=limit)

        return self._check(name, read)

    def _check_header(self, path: Path) -> None:
        self._bytes_left -= check_safetensors(path, max_bytes=self._bytes_left)

    def _check_trainer_state(self, step: int | None) -> None:
        state = self._json(TRAINER_STATE_NAME)
        if any(TRAINER_STATE_NAME in found for _, found in self._findings()):
            return
        found = state.get("global_step") if isinstance(state, dict) else None
        if type(found) is not int:
            self._problems[TRAINER_STATE_NAME] = "holds no `global_step`"
        elif step is not None and found != step:
            self._problems[TRAINER_STATE_NAME] = f"is of step {str(found)[:20]}, not of checkpoint-{step}"

    def _check_weights(self) -> None:
        if not self._weights:
            others = (
                "`pytorch_model.bin`, index of shards, `adapter_model.safetensors` or `adapter_model.bin`"
            )
            self._problems["model.safetensors"] = (
                f"is missing, and there is no {others} either: the model has no weights"
            )
        for name in self._weights:
            parent, slash, base = name.rpartition("/")
            if base.endswith(".index.json"):
                self._check_shards(name)
            elif SHARD.fullmatch(base) is not None:
                single = f"{parent}{slash}{base.partition('-')[0]}{os.path.splitext(base)[1]}"
                if not {single, f"{single}.index.json"} & set(self._weights):
                    self._problems[f"{single}.index.json"] = "is missing, the index of the model's shards"

    def _check_shards(self, index: str) -> None:
        content = self._json(index)
        if any(index in found for _, found in self._findings()):
            return
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards:
            self._problems[index] = "holds no `weight_map`"
            return
        parent, slash, _ = index.rpartition("/")
        present = set(self._weights)
        for shard in shards.values():
            if not isinstance(shard, str) or not shard.isprintable() or re.search(r"[/\\]|^\.*$", shard):
                self._problems[index] = f"names a shard that is no file beside it: {str(shard)[:80]!a}"
            elif f"{parent}{slash}{shard}" not in present:
                self._problems[f"{parent}{slash}{shard}"] = f"is missing, a shard that `{index}` names"

    def _companions(self) -> set[str]:
        """Return the files that the Trainer always writes beside the weights.

        A model that is no ``PreTrainedModel`` has no configuration; one with an index of shards or
        settings for generation is one.
        """
        expected = {"training_args.bin"} if self._weights else set()
        for name in self._weights:
            folder, slash, base = name.rpartition("/")
            if base.startswith("adapter_model."):
                expected.add(f"{folder}{slash}adapter_config.json")
            elif base.endswith(".index.json") or f"{folder}{slash}generation_config.json" in self._names:
                expected.add(f"{folder}{slash}config.json")
        return expected

    def _check_companions(self) -> None:
        for name in sorted(self._companions().difference(self._names)):
            self._problems[name] = "is missing"

    def _check_parts(self, layout: Layout) -> Parts:
        """Note what is wrong with the files of a layout of its own; return what it holds."""
        parts: Parts | None = self._check(
            f"the files of {layout.name}", lambda: layout.parts(self._folder, self._sizes, None)
        )
        self._problems |= {} if parts is None else parts.problems
        return parts or Parts()

    def _check_training_state(self, parts: Parts) -> None:
        """Note what is missing of optimizer, scheduler and random states, nothing if no part was saved."""
        ranks = [match[1] for name in self._names if (match := RNG.fullmatch(name)) is not None]
        expected = [] if parts.optimizer else ["optimizer.pt"]
        expected += [] if parts.holds_schedule else ["scheduler.pt"]
        missing = [name for name in expected if name not in self._names]
        if not ranks and not parts.optimizer and len(missing) == 2:
            return
        if not ranks:
            missing.append("rng_state.pth")
        elif None not in ranks:
            numbers = {int(rank) for rank in ranks if rank is not None}
            # One process alone writes `rng_state.pth`, so a numbered file means two or more.
            gaps = (rank for rank in range(max(2, max(numbers) + 1)) if rank not in numbers)
            missing += [f"rng_state_{rank}.pth" for rank in islice(gaps, _MOST_MISSING_RANKS)]
        self._problems |= dict.fromkeys(missing, "is missing")

    def _check_files(self, read_all: bool) -> None:
        for name in self._names:
            base, path = name.rpartition("/")[2], self._folder / name
            if base.endswith(".safetensors"):
                self._check(name, lambda path=path: self._check_header(path))  # type: ignore[misc]
            elif ARCHIVE.fullmatch(base):
                self._check(name, lambda path=path: check_zip(path, read_all=read_all))  # type: ignore[misc]
            elif _JSON.fullmatch(base) and name not in (TRAINER_STATE_NAME, *self._weights):
                self._json(name)
