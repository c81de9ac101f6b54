"""SAEs in the formats and classes of other libraries.

formats.py, load.py     base class of formats; `kronsae.load`
own.py, lens_format.py, sparsify.py, dictionary_learning.py
                        formats of kronsae, SAELens, sparsify and dictionary_learning
gemma_scope.py, llamascopium.py, single_files.py
                        formats of public suites, which are read alone
pretrained.py           SAEs of SAELens' registry (imports sae_lens)
stock.py                the common form of other libraries' SAEs
sae_lens.py             KronSAE as an architecture of SAELens (imports sae_lens)
sae_bench.py            adaptor for SAEBench (imports sae_bench)

`kronsae.load` and `kronsae export` read and write these formats without the libraries.
"""

from kronsae.interop import (
    dictionary_learning,
    gemma_scope,
    lens_format,
    llamascopium,
    own,
    single_files,
    sparsify,
)

__all__ = [
    "dictionary_learning",
    "gemma_scope",
    "lens_format",
    "llamascopium",
    "own",
    "single_files",
    "sparsify",
]
