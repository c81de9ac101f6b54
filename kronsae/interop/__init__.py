"""SAEs in the formats and classes of other libraries.

formats.py              what a format is          own.py, load.py         ours; `kronsae.load`
stock.py                what stock formats can hold, and how an SAE fits in
lens_format.py          SAELens' folders          sparsify.py, dictionary_learning.py    theirs
sae_lens.py             KronSAE as an architecture of SAELens (imports sae_lens)
sae_bench.py            the adaptor for SAEBench (imports sae_bench)

Folders are read and written here without the libraries; `kronsae.load` and
`python -m kronsae.export` are the ways in.
"""

from kronsae.interop import dictionary_learning, lens_format, own, sparsify

__all__ = ["dictionary_learning", "lens_format", "own", "sparsify"]
