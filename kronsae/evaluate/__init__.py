"""`kronsae evaluate RUN…`: evaluation of SAEs on text that they were not trained on."""

from kronsae.evaluate.judge import Judgement, judge

__all__ = ["Judgement", "judge"]
