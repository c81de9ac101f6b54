"""Other libraries' TopK training steps, as their trainers run them (to install: README.md).

Each starts from the weights it is given and keeps its own optimizer, schedule, clipping, decoder
norm and bookkeeping of dead latents (no latent is dead yet, so no auxiliary loss is computed).
First steps, in which some initialise a bias from data, are left out. Paths and lines are those of
the versions that the extra pins.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from kronsae.data.common import reason

STEPS = 100_000
"""Length of the training that their schedules are made for."""
LAST_RATE = 1e-6
"""Learning rate at the end of a schedule, where a library asks for one."""


class Recipe(NamedTuple):
    """A schedule for the libraries' trainers: a linear warm-up, then a cosine, or else a line."""

    lr: float
    steps: int
    warmup: int


class Peer(NamedTuple):
    """A library's trainer, set up."""

    step: Callable[[Tensor], Tensor]
    """Trains on a batch [B, d]; its loss, in its own unit."""
    reconstruct: Callable[[Tensor], Tensor]
    """[B, d] to [B, d] with the weights as they are."""


def sparsify(
    shape: Shape,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    recipe: Recipe | None = None,
) -> Peer:
    """eai-sparsify 1.3.3: the part of Trainer.fit's loop that is not the language model.

    With its "adam" (torch.optim.Adam where bitsandbytes is missing), the optimizer of the others;
    signum is its default. It autocasts to bfloat16 on a GPU by itself (sparse_coder.py:205-209).
    """
    device = w_enc.device
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder fails on a CPU
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    config = SparseCoderConfig(num_latents=shape.dict_size, k=shape.k)
    sae = SparseCoder(shape.d, config, device, dtype=torch.float32)
    sae.load_state_dict(
        {"encoder.weight": w_enc, "encoder.bias": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    )
    rate = 2e-4 / (sae.num_latents / 2**14) ** 0.5  # trainer.py:123
    rate, steps, warmup = recipe or Recipe(rate, STEPS, 1000)
    optimizer = torch.optim.Adam([{"params": sae.parameters(), "lr": rate}])  # trainer.py:120-130
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)  # trainer.py:132-136
    did_fire = torch.zeros(sae.num_latents, device=device, dtype=torch.bool)
    silent_for = torch.zeros(sae.num_latents, device=device, dtype=torch.long)

    def step(x: Tensor) -> Tensor:
        sae.set_decoder_norm_to_unit_norm()  # trainer.py:424-425
        variance = (x - x.mean(0)).pow(2).sum()  # trainer.py:452
        out = sae(x=x, y=x, dead_mask=None, total_variance=variance)  # trainer.py:454-460
        did_fire[out.latent_indices.flatten()] = True  # trainer.py:463
        fvu = float(out.fvu.detach())  # trainer.py:467-469, logging: waits for the GPU
        loss = out.fvu + 0 * out.auxk_loss + out.multi_topk_fvu / 8  # trainer.py:480-484
        loss.div(1).backward()  # trainer.py:485
        sae.remove_gradient_parallel_to_decoder_directions()  # trainer.py:551-553
        optimizer.step()  # trainer.py:556-560
        optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():  # trainer.py:567-576
            silent_for.add_(x.shape[0])
            silent_for[did_fire] = 0
            did_fire.zero_()
        return torch.tensor(fvu)

    return Peer(step, lambda x: sae(x).sae_out)


def sae_lens(
    shape: Shape,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    recipe: Recipe | None = None,
) -> Peer:
    """sae-lens 6.54: SAETrainer.step (training/sae_trainer.py), with its autocast on a GPU."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    device = w_enc.device
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shape.d, d_sae=shape.dict_size, k=shape.k, device=str(device), dtype="float32"
        )
    )
    sae.load_state_dict({"W_enc": w_enc.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec})
    schedule: dict[str, Any] = {"lr_end": 3e-5}  # as its runner fills in (config.py); constant
    if recipe is not None:
        schedule = {"lr": recipe.lr, "lr_end": LAST_RATE, "lr_scheduler_name": "cosineannealing"}
        schedule["lr_warm_up_steps"] = recipe.warmup
    config = SAETrainerConfig(
        total_training_samples=(recipe.steps if recipe else STEPS) * shape.tokens,
        train_batch_size_samples=shape.tokens,
        **schedule,
        device=str(device),
        autocast=device.type == "cuda",
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x: Tensor) -> Tensor:
        loss = trainer.step(x).loss.detach()
        trainer.n_training_steps += 1  # as `fit` does
        return loss

    return Peer(step, sae)


def dictionary_learning(
    shape: Shape,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    recipe: Recipe | None = None,
) -> Peer:
    """dictionary-learning 0.1.0: TopKTrainer.update (trainers/top_k.py) as trainSAE calls it.

    On a GPU with autocast_dtype=torch.bfloat16, which its documentation advises.
    """
    from dictionary_learning.trainers.top_k import TopKTrainer

    device, schedule = w_enc.device, {"steps": STEPS}
    if recipe is not None:
        schedule = {"lr": recipe.lr, "steps": recipe.steps, "warmup_steps": recipe.warmup}
        schedule["decay_start"] = recipe.warmup + 1
    trainer = TopKTrainer(
        **schedule,
        activation_dim=shape.d,
        dict_size=shape.dict_size,
        k=shape.k,
        layer=0,
        lm_name="",
        device=str(device),
    )
    weights = {"encoder.weight": w_enc, "encoder.bias": b_enc, "b_dec": b_dec}
    trainer.ae.load_state_dict({**weights, "decoder.weight": w_dec.T}, strict=False)
    gpu = device.type == "cuda"
    done = trainer.threshold_start_step  # from then on it keeps a threshold, too

    def step(x: Tensor) -> Tensor:
        nonlocal done
        done += 1
        x = x.to(torch.bfloat16 if gpu else torch.float32)  # training.py:200
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):  # training.py:141, 237
            return torch.tensor(trainer.update(done, x))  # training.py:238

    return Peer(step, trainer.ae)


class Library(NamedTuple):
    """Where a peer comes from."""

    package: str
    """Module that it is imported as."""
    make: Callable[..., Peer]


PEERS = {
    "eai-sparsify": Library("sparsify", sparsify),
    "sae-lens": Library("sae_lens", sae_lens),
    "dictionary-learning": Library("dictionary_learning", dictionary_learning),
}
"""Peers by the name of their distribution."""


_RELEASE = torch.__version__.partition("+")[0]  # an index has no "2.13.0+cpu"
INSTALL = f"pip install torch=={_RELEASE} -e '.[peers]' && pip uninstall -y torchvision"
"""Keeps this torch, and removes a torchvision that is built for another and that no peer needs."""


def why_not(name: str) -> str | None:
    """Why a peer cannot run, and what to do. (Another package is called sparsify, too.)"""
    if version(name) is None:
        return f"{name} is not installed: {INSTALL}"
    try:
        importlib.import_module(PEERS[name].package)
    except Exception as error:  # a torchvision that does not fit raises several kinds
        return f"{name} cannot be imported ({reason(error)}): {INSTALL}"
    return None


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
