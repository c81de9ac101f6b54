"""How good SAEs are on text that they were never trained on.

`evaluate` and `evaluate_cross_entropy` judge one SAE on activations at hand, as training does;
`judge` judges any number while a language model reads text: `python -m kronsae.evaluate RUN…`.
"""

from kronsae.evaluate.heldout import (
    BATCH_TOKENS,
    CONTEXTS_AT_ONCE,
    Heldout,
    evaluate,
    evaluate_cross_entropy,
)
from kronsae.evaluate.judge import Judgement, judge

__all__ = [
    "BATCH_TOKENS",
    "CONTEXTS_AT_ONCE",
    "Heldout",
    "Judgement",
    "evaluate",
    "evaluate_cross_entropy",
    "judge",
]
