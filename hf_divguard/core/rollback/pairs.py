"""The losses of one incident: those of present and of kept weights on the same micro-batches, by kept state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hf_divguard.core.rollback.comparison import Pair, best_step
from hf_divguard.core.rollback.soundness import is_sound
from hf_divguard.core.rollback.trial import mean_gain

__all__ = ["PairsByState"]

# The newest sound state knows the coming batches where it shows so much of the difference to the best one.
_KNOWS = 0.5
# Micro-batches after which it is known which states do worse than the best one.
_KNOWN = 3


class PairsByState:
    """Collects the losses of the looks of an incident.

    Example:
        >>> pairs = PairsByState()
        >>> pairs.add([5.0, 5.2], {40: [1.5, 1.4], 20: [1.6, 1.6]})
        >>> pairs.most, pairs.means()
        (2, {40: 1.45, 20: 1.6})
        >>> pairs.has_older(40), sorted(pairs.sound(since=30))
        (True, [20])
    """

    def __init__(self) -> None:
        self._pairs: dict[int, list[tuple[float, float]]] = {}
        self._looks: list[tuple[int, int]] = []
        self._out: set[int] = set()

    def add(self, present: Sequence[float], kept: Mapping[int, Sequence[float]], *, at: int = 0) -> None:
        """Take the losses of one look.

        Args:
            present: Loss of each micro-batch with the present weights.
            kept: The same with kept weights, by their step. A state that is missing takes part no more.
            at: Present step.
        """
        self._looks.append((at, len(present)))
        out = self._pairs.keys() - kept.keys()
        self._out |= out
        self._pairs = {step: pairs for step, pairs in self._pairs.items() if step not in out}
        for kept_step, losses in kept.items():
            self._pairs.setdefault(kept_step, []).extend(zip(present, losses, strict=True))

    def clear(self) -> None:
        """Forget all losses."""
        self._pairs.clear()
        self._looks.clear()
        self._out.clear()

    @property
    def most(self) -> int:
        """Number of micro-batches of all looks."""
        return sum(count for _, count in self._looks)

    def means(self) -> dict[int, float]:
        """Return the mean kept loss, by state, on the micro-batches that all of them have in common.

        States that were compared on less than half as many as another one are left out.
        """
        most = max(map(len, self._pairs.values()), default=0)
        compared = {step: pairs for step, pairs in self._pairs.items() if 2 * len(pairs) >= most}
        count = min(map(len, compared.values()), default=0)
        return {step: sum(loss for _, loss in pairs[-count:]) / count for step, pairs in compared.items()}

    def needs(self, kept_step: int, spread: float) -> bool:
        """Return whether a state has to be compared on further micro-batches.

        Not if it is older than the best one and is known to do worse: it is no target any more. Nor are still older
        ones that were not compared before.

        Args:
            kept_step: Step of the state.
            spread: Noise of a loss.
        """
        if kept_step in self._out or (kept_step not in self._pairs and kept_step < max(self._out, default=0)):
            return False
        if len(self._pairs.get(kept_step, ())) < _KNOWN:
            return True
        best = best_step(self.means(), spread)
        return best is None or kept_step >= best

    def of(self, kept_step: int) -> list[Pair]:
        """Return the losses of a state."""
        return [Pair(*pair) for pair in self._pairs[kept_step]]

    def gains(self) -> list[float]:
        """Return by how much every state did better, for every micro-batch."""
        return [now - then for pairs in self._pairs.values() for now, then in pairs]

    def gains_by_step(self, kept_step: int) -> list[tuple[int, float]]:
        """Return by how much a state did better, in the mean of each look, with the step of the look."""
        pairs, found = list(self._pairs[kept_step]), []
        for step, count in reversed(self._looks):
            if len(pairs) < count:
                break
            found.append((step, mean_gain(pairs[-count:])))
            del pairs[-count:]
        return found[::-1]

    def has_older(self, kept_step: int) -> bool:
        """Return whether older states than this one were compared: as long as the incident lasts they are."""
        return any(each < kept_step for each in (*self._pairs, *self._out))

    def sound(self, since: int) -> dict[int, list[tuple[float, float]]]:
        """Return the losses of the states that were kept two steps or more before an incident."""
        return {kept_step: pairs for kept_step, pairs in self._pairs.items() if is_sound(kept_step, since)}

    def shows_a_turn(self, good: int, since: int, is_damaged: Callable[[int, int], bool]) -> bool:
        """Return whether the newest state that was sound does badly on the coming batches, whatever older ones do.

        It was kept two steps or more before a loss was out of its range, so the data are not
        those that it was trained on: a turn of domains, which an older state may know. But a
        fault that was seen late has damaged it already: then it does badly on its own data, too.

        Args:
            good: The state that does best.
            since: Step at which the incident began.
            is_damaged: Whether the first state is worse than the second on what it was trained on itself.
        """
        sound = self.sound(since)
        if not sound or max(sound) <= good:
            return False
        newest, best = self._pairs[max(sound)], self._pairs[good]
        count = min(len(newest), len(best))
        knows = mean_gain(newest[-count:]) >= _KNOWS * mean_gain(best[-count:])
        return not knows and not is_damaged(max(sound), good)
