"""Kernels of sparse autoencoders: encoders that return only the active latents, sparse decoders.

Needs torch alone. `fused_encode` and `sparse_decode` are a fixed contract; the modules behind them
(`torch_impl`, `backends`) may change between versions, `reference` is their specification.
"""

from kronsae_kernels.batch_topk import batch_topk_encode
from kronsae_kernels.common import SparseCodes
from kronsae_kernels.decode import sparse_decode
from kronsae_kernels.encode import dense_encode, fused_encode
from kronsae_kernels.experts import expert_encode
from kronsae_kernels.hierarchical import HierarchicalLoss, hierarchical_loss
from kronsae_kernels.nested import nested_decode
from kronsae_kernels.refine import refine_codes
from kronsae_kernels.threshold import jump, threshold_encode
from kronsae_kernels.version import __version__

__all__ = [
    "HierarchicalLoss",
    "SparseCodes",
    "__version__",
    "batch_topk_encode",
    "dense_encode",
    "expert_encode",
    "fused_encode",
    "hierarchical_loss",
    "jump",
    "nested_decode",
    "refine_codes",
    "sparse_decode",
    "threshold_encode",
]
