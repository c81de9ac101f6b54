"""The operations as Triton kernels: what `impl="triton"` runs.

    select     the k largest latents, without the [B, F] scores        gemm      the encoder
    decode     the decoder, and decoder + loss + gradients of codes    backward  gradients, AdamW
    device     functions that kernels call                             configs   block sizes
    counters   numbers and counters of a step
    operations launches these as the operations of a backend           launch    every launch

May change between versions.
"""
