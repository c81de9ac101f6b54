"""Settings of the embedded default: what `python -m kronsae.train` without arguments runs."""

from typing import Any

PAPER_DICT_SIZE = 2**15
"""Dictionary size where none is given. [KronSAE, App. A.1]"""

EMBEDDED: dict[str, Any] = {
    "layer": 2,
    "buffer_tokens": 65_536,
    "heldout_tokens": 16_384,
    "dict_size": 4096,
    "m": 4,
    "n": 4,
    "k": 32,
    "tokens": 800_000,
    "batch_size": 1024,
    "lr": 1.6e-2,
    "eval_every": 200,
}
"""Settings that apply with model 'embedded', below a config file and flags."""
