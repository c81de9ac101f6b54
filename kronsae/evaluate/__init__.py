"""SAEs judged on text that they were never trained on: `python -m kronsae.evaluate RUN…`."""

from kronsae.evaluate.judge import Judgement, judge

__all__ = ["Judgement", "judge"]
