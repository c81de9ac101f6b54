"""How far long work is, and how long it still takes, in words."""

import math
import time

UNITS = {"years": 31_557_600, "weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60}


def duration(seconds: float) -> str:
    """Seconds in words, such as "about 3 weeks": one significant digit in the largest unit."""
    for unit, size in (*UNITS.items(), ("seconds", 1)):
        count = seconds / size
        if count >= 0.95 or unit == "seconds":
            break
    digits = -math.floor(math.log10(count)) if count > 0 else 0
    rounded = max(1, round(count, digits))
    return f"about {rounded:,.0f} {unit if rounded > 1 else unit[:-1]}"


class Pace:
    """The mean rate of work since its first report: what came before it was preparation."""

    def __init__(self, unit: str, *, rated: bool = False) -> None:
        """unit: what is counted, in the plural.  rated: whether words give the rate, too."""
        self.unit, self.rated = unit, rated
        self.began: tuple[float, int] | None = None
        """Time and count of the first report."""

    def words(self, done: int, total: int | None, now: float | None = None) -> str:
        """ "512 of 2,048 tokens, 80 tokens/s, about 20 seconds left".

        total: None if it is not known.  now: of `time.monotonic`, if it was asked already.
        """
        said = f"{min(done, total):,} of {total:,}" if total else f"{done:,}"
        said += f" {self.unit}"
        seconds = self.seconds_each(done, now)
        if seconds is None:
            return said
        if self.rated:
            said += f", {1 / seconds:,.0f} {self.unit}/s"
        if total and total > done:
            said += f", {duration((total - done) * seconds)} left"
        return said

    def left(self, done: int, total: int) -> str:
        """The time left, in words; "" if it is not known yet."""
        seconds = self.seconds_each(done)
        return "" if seconds is None else f"{duration((total - done) * seconds)} left"

    def seconds_each(self, done: int, now: float | None = None) -> float | None:
        """Seconds of one; None before the second report."""
        now = time.monotonic() if now is None else now
        self.began = self.began or (now, done)
        began, first = self.began
        return (now - began) / (done - first) if done > first and now > began else None
