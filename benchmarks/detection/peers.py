"""Rules of other systems, re-stated from what they do, with their defaults.

Each is a callable ``(step, loss, grad_norm) -> bool``, true when the system would have raised
its alarm. What they do with a NaN is kept as it is in the original, blindness included.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import numpy as np


class SkipStep:
    """OLMo-core's skip-step optimizer: above the mean by 6 spreads of the last 128 values, from 64 on."""

    def __init__(self, window: int = 128, n_sigmas: float = 6.0, *, with_norm: bool = True) -> None:
        self.window, self.n_sigmas, self.with_norm = window, n_sigmas, with_norm
        self.losses: deque[float] = deque(maxlen=window + 1)
        self.norms: deque[float] = deque(maxlen=window + 1)

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        fits = self._fits(self.losses, loss)
        if self.with_norm and grad_norm is not None:
            fits = self._fits(self.norms, grad_norm) and fits
        return not fits

    def _fits(self, kept: deque[float], value: float) -> bool:
        kept.append(value)
        if len(kept) < max(2, self.window // 2):
            return True
        before = np.fromiter(kept, float)[:-1]
        with np.errstate(all="ignore"):
            return bool(value - before.mean() <= self.n_sigmas * before.std(ddof=1))


class StabilityMonitor:
    """OLMo-core's monitor: above the mean by 6 spreads of exactly 128 earlier values."""

    def __init__(self, window: int = 128, n_sigmas: float = 6.0) -> None:
        self.n_sigmas = n_sigmas
        self.kept: deque[float] = deque(maxlen=window)

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        spiked = False
        if len(self.kept) == self.kept.maxlen:
            before = np.fromiter(self.kept, float)
            with np.errstate(all="ignore"):
                mean, spread = before.mean(), before.std()
                spiked = bool(spread >= 1e-10 and loss > mean + self.n_sigmas * spread)
        self.kept.append(loss)
        return spiked


class KillLossSpike:
    """llm-foundry: five values in a row of twice the window's mean, or half a window above a cap.

    The window grows to a twentieth of the run, which the original knows beforehand.
    """

    def __init__(
        self, total_steps: int = 0, patience: int = 4, outlier: float = 2.0, cap: float = 10.0
    ) -> None:
        self.total_steps, self.patience, self.outlier, self.cap = total_steps, patience, outlier, cap
        self.window, self.seen, self.in_a_row = 100, 0, 0
        self.kept: list[float] = []
        self.is_sized = False

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.seen += 1
        alarm = False
        if len(self.kept) == self.window and not self.is_sized:
            self.is_sized = True
            self.cap = min(max(self.kept), self.cap)
            self.window = max(100, round(0.05 * self.total_steps))
        if self.is_sized and len(self.kept) >= self.window:
            self.kept = self.kept[-self.window :]
            if loss >= self.outlier * statistics.fmean(self.kept):
                self.in_a_row += 1
                alarm = self.in_a_row > self.patience
            else:
                self.in_a_row = 0
                if self.seen > 2 * self.window:
                    alarm = sum(value > self.cap for value in self.kept) >= self.window / 2
        self.kept.append(loss)
        return alarm


class Watchdog:
    """axolotl: three logged values in a row above a threshold (5.0 in its examples)."""

    def __init__(self, threshold: float = 5.0, patience: int = 3) -> None:
        self.threshold, self.patience, self.in_a_row = threshold, patience, 0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.in_a_row = self.in_a_row + 1 if loss > self.threshold else 0
        return self.in_a_row >= self.patience


class SpikeDetection:
    """Lightning: worse than the last accepted value and further from the mean of ten than twice that mean."""

    def __init__(self, window: int = 10, warmup: int = 1, rtol: float = 2.0) -> None:
        self.warmup, self.rtol, self.seen, self.last = warmup, rtol, 0, 0.0
        self.kept: deque[float] = deque(maxlen=window)

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.seen += 1
        if self.seen > self.warmup:
            if not math.isfinite(loss):
                return True
            if loss > self.last and self.kept:
                mean = statistics.fmean(self.kept)
                if abs(loss - mean) >= self.rtol * abs(mean):
                    return True
        if math.isfinite(loss):
            self.kept.append(loss)
            self.last = loss
        return False


class UnexpectedlyLarge:
    """Megatron-LM: ten times the largest of the first hundred finite values."""

    def __init__(self, factor: float = 10.0, samples: int = 100) -> None:
        self.factor, self.samples, self.seen, self.largest = factor, samples, 0, 0.0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        if not math.isfinite(loss):
            return False
        if self.seen < self.samples:
            self.seen += 1
            self.largest = max(self.largest, abs(loss))
            return False
        return abs(loss) >= self.factor * self.largest


class ZScore:
    """ZClip's test: 2.5 spreads above moving averages (0.97) of mean and variance, after 25 values."""

    def __init__(
        self, alpha: float = 0.97, limit: float = 2.5, warmup: int = 25, *, on_norm: bool = False
    ) -> None:
        self.alpha, self.limit, self.warmup, self.on_norm = alpha, limit, warmup, on_norm
        self.first: list[float] = []
        self.mean, self.variance = math.nan, math.nan

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        value = grad_norm if self.on_norm else loss
        if value is None:
            return False
        if len(self.first) < self.warmup:
            self.first.append(value)
            if len(self.first) == self.warmup and all(map(math.isfinite, self.first)):
                self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
            return False
        spread = math.sqrt(self.variance)
        z = (value - self.mean) / (spread + 1e-6)
        fires = z > self.limit
        used = self.mean + self.limit * spread / (z / self.limit) if fires else value
        self.mean = self.alpha * self.mean + (1.0 - self.alpha) * used
        self.variance = self.alpha * self.variance + (1.0 - self.alpha) * min((used - self.mean) ** 2, 1e300)
        return fires


class Slope:
    """dlib's trainer: at each saved state the loss since the last one rose with a probability above 0.99."""

    def __init__(self, interval: int = 500) -> None:
        self.interval, self.since = interval, 0
        self.kept: deque[float] = deque(maxlen=2 * interval)

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.kept.append(loss)
        self.since += 1
        if self.since < self.interval:
            return False
        self.since = 0
        y = np.fromiter(self.kept, float)
        if not np.isfinite(y).all():
            return bool(np.isnan(y).any())
        n = len(y)
        if n < 30:
            return False
        x = np.arange(n) - (n - 1) / 2
        slope = float((x * y).sum() / (x * x).sum())
        rest = y - y.mean() - slope * x
        error = math.sqrt(float((rest * rest).sum()) / (n - 2) * 12.0 / (n**3 - n))
        if error == 0.0:
            return slope > 0.0
        return 0.5 * math.erfc(-slope / error / math.sqrt(2.0)) > 0.99


class PageHinkley:
    """river: the sum of deviations from the running mean, above its own minimum by 50."""

    def __init__(self, *, both: bool = False) -> None:
        self.both = both
        self._reset()

    def _reset(self) -> None:
        self.n, self.mean, self.up, self.down = 0, 0.0, 0.0, 0.0
        self.lowest, self.highest = math.inf, -1.0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.n += 1
        self.mean += (loss - self.mean) / self.n
        deviation = loss - self.mean
        self.up = 0.9999 * self.up + deviation - 0.005
        self.down = 0.9999 * self.down + deviation + 0.005
        self.lowest, self.highest = min(self.lowest, self.up), max(self.highest, self.down)
        if self.n < 30:
            return False
        fires = self.up - self.lowest > 50.0 or (self.both and self.highest - self.down > 50.0)
        if fires:
            self._reset()
        return fires


class Adwin:
    """ADWIN on the exact window: two parts with means too far apart for their lengths."""

    def __init__(self, delta: float = 0.002, clock: int = 32) -> None:
        self.delta, self.clock, self.seen = delta, clock, 0
        self.kept: list[float] = []

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.kept.append(loss)
        self.seen += 1
        if self.seen % self.clock or len(self.kept) <= 10:
            return False
        y = np.asarray(self.kept)
        n = len(y)
        with np.errstate(all="ignore"):
            sums = np.cumsum(y)
            n0 = np.arange(5, n - 4)
            n1 = n - n0
            gap = np.abs(sums[n0 - 1] / n0 - (sums[-1] - sums[n0 - 1]) / n1)
            d = math.log(2.0 * math.log(n) / self.delta)
            r = 1.0 / (n0 - 4) + 1.0 / (n1 - 4)
            limit = np.sqrt(2.0 * r * y.var() * d) + 2.0 / 3.0 * d * r
            cuts = np.nonzero(gap > limit)[0]
        if not len(cuts):
            return False
        self.kept = self.kept[int(n0[cuts[0]]) :]
        return True


class Cusum:
    """river: deviations from the mean of the first 30 beyond half a spread, summed up to 5 spreads."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.spread = math.nan
        self.up = 0.0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        if len(self.first) < 30:
            self.first.append(loss)
            if len(self.first) == 30 and all(map(math.isfinite, self.first)):
                self.mean, self.spread = statistics.fmean(self.first), statistics.stdev(self.first)
            return False
        self.up = max(0.0, self.up + loss - self.mean - 0.5 * self.spread)
        if self.up > 5.0 * self.spread:
            self.__init__()  # type: ignore[misc]
            return True
        return False


class Ewma:
    """river: a moving average (0.1) further from the running mean than 4 of its spreads, upwards."""

    def __init__(self, alpha: float = 0.1, limit: float = 4.0) -> None:
        self.alpha, self.limit, self.n = alpha, limit, 0
        self.mean = self.squares = self.average = 0.0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        self.n += 1
        if self.n == 1:
            self.average = loss
        self.average = self.alpha * loss + (1.0 - self.alpha) * self.average
        change = loss - self.mean
        self.mean += change / self.n
        self.squares += min(abs(change), 1e150) * min(abs(loss - self.mean), 1e150)
        if self.n < 30:
            return False
        share = self.alpha / (2.0 - self.alpha) * (1.0 - (1.0 - self.alpha) ** (2 * self.n))
        return self.average - self.mean > self.limit * math.sqrt(self.squares / self.n * share)


class FiniteGuard:
    """What several trainers do: stop when the loss is not finite."""

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        return not math.isfinite(loss)


class EarlyStopping:
    """Lightning's early stopping put on the logged loss: not finite, or no new best for three values."""

    def __init__(self, patience: int = 3) -> None:
        self.patience, self.best, self.waited = patience, math.inf, 0

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool:
        if not math.isfinite(loss):
            return True
        if loss < self.best:
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        return self.waited >= self.patience


PEERS = {
    "OLMo-core SkipStep (128, 6 sigma)": SkipStep,
    "OLMo-core SkipStep, loss only": lambda: SkipStep(with_norm=False),
    "OLMo-core StabilityMonitor (128, 6 sigma)": StabilityMonitor,
    "llm-foundry KillLossSpike": KillLossSpike,
    "axolotl watchdog (5.0, 3)": Watchdog,
    "Lightning SpikeDetection": SpikeDetection,
    "Lightning EarlyStopping (3) on the loss": EarlyStopping,
    "Megatron-LM 10 x first maximum": UnexpectedlyLarge,
    "ZClip z > 2.5 on the loss": ZScore,
    "ZClip z > 2.5 on the gradient norm": lambda: ZScore(on_norm=True),
    "dlib slope (500)": Slope,
    "river Page-Hinkley, up": PageHinkley,
    "river Page-Hinkley, both ways": lambda: PageHinkley(both=True),
    "river ADWIN": Adwin,
    "river CUSUM, up": Cusum,
    "river EWMA, up": Ewma,
    "finite guard": FiniteGuard,
}
"""Name and maker of each rule; AdaGC and SPAM act on single tensors and have no place on a loss."""
