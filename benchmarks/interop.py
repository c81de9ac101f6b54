"""SAEs carried to other libraries and back: explained variance and L0 before and after.

    python -m benchmarks.interop --out DIR     # needs the other libraries

On the embedded language model's activations. Outwards: trained here, written here, loaded and
judged by the other library. Inwards: trained and saved by the other library, loaded and judged
here. Training is short: what is compared is each SAE with itself.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae import SAE, DataConfig, SAEConfig, TrainConfig, load
from kronsae.experiments.activations import collect
from kronsae.export.verify import Verification, verify
from kronsae.registry import FORMATS
from kronsae.runs.folder import versions
from kronsae.sources import open_activations
from kronsae.system.files import write_json, write_text
from kronsae.system.tables import markdown
from kronsae.training.fit import fit

SIZE, K = 1024, 16
TOKENS, HELDOUT, BATCH = 60_000, 8192, 512
"""Tokens that each SAE is trained on and judged on, and those of a training step."""
DENSE = {"encoder": "dense", "dict_size": SIZE, "k": K}
KRON = {"dict_size": SIZE, "m": 4, "n": 4, "k": K}
STOCK = {
    "TopK": DENSE,
    "BatchTopK": {**DENSE, "selection": "batchtopk"},
    "Matryoshka BatchTopK": {**DENSE, "selection": "batchtopk", "objective": "matryoshka"},
    "JumpReLU": {**DENSE, "selection": "jumprelu"},
}
OUTWARDS: dict[str, dict[str, dict[str, Any]]] = {
    "sae_lens": {
        **STOCK,
        "KronSAE": KRON,
        "BatchTopK KronSAE": {**KRON, "selection": "batchtopk"},
        "JumpReLU KronSAE": {**KRON, "selection": "jumprelu"},
        "Switch TopK": {**DENSE, "experts": 4},
    },
    "sparsify": {"TopK": DENSE},
    "dictionary_learning": STOCK,
}
"""Configurations of the SAEs that are trained here, by the library that they go to."""

Trained = tuple[str, str, Callable[[Path], None]]
"""Library, architecture, and a function that saves the SAE as that library does."""


def sae_lens_trained(x: Tensor) -> Iterator[Trained]:
    """SAEs trained by SAELens' own trainer step."""
    from sae_lens import SAETrainer, TrainingSAE
    from sae_lens.config import SAETrainerConfig

    kinds = {
        "TopK": {"architecture": "topk", "k": K},
        "BatchTopK": {"architecture": "batchtopk", "k": K},
        "Matryoshka BatchTopK": {
            "architecture": "matryoshka_batchtopk",
            "k": K,
            "matryoshka_widths": [SIZE // 4, SIZE],
        },
        "JumpReLU": {"architecture": "jumprelu"},
        "ReLU": {"architecture": "standard"},
        "Gated": {"architecture": "gated"},
    }
    for kind, settings in kinds.items():
        sae = TrainingSAE.from_dict({"d_in": x.shape[1], "d_sae": SIZE, **settings})
        config = SAETrainerConfig(
            total_training_samples=len(x), train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-3
        )
        trainer = SAETrainer(config, sae, data_provider=iter(()))
        for rows in x.split(BATCH):
            trainer.step(rows)
            trainer.n_training_steps += 1
        yield "sae_lens", kind, sae.save_inference_model


def sparsify_trained(x: Tensor) -> Iterator[Trained]:
    """An SAE trained by the loss of sparsify's coder, and Adam."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=SIZE, k=K))
    coder.b_dec.data = x[:BATCH].mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    for rows in x.split(BATCH):
        coder.set_decoder_norm_to_unit_norm()
        coder(rows).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    yield "sparsify", "TopK", coder.save_to_disk


def dictionary_learning_trained(x: Tensor) -> Iterator[Trained]:
    """SAEs trained by dictionary_learning's trainers."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = {"steps": -(-len(x) // BATCH), "activation_dim": x.shape[1], "dict_size": SIZE}
    common |= {"layer": 2, "lm_name": "embedded", "lr": 3e-3, "warmup_steps": 10, "device": "cpu"}
    kept = {**common, "k": K, "threshold_start_step": 10, "threshold_beta": 0.9}
    trainers = {
        "TopK": TopKTrainer(**kept),
        "BatchTopK": BatchTopKTrainer(**kept),
        "Matryoshka BatchTopK": MatryoshkaBatchTopKTrainer(**kept, group_fractions=[0.25, 0.75]),
        "JumpReLU": JumpReluTrainer(**common, target_l0=K, sparsity_warmup_steps=20),
    }
    for kind, trainer in trainers.items():
        for step, rows in enumerate(x.split(BATCH)):
            trainer.update(step, rows)

        def save(folder: Path, trainer: Any = trainer) -> None:
            folder.mkdir()
            torch.save(trainer.ae.state_dict(), folder / "ae.pt")
            config = {"trainer": trainer.config}
            (folder / "config.json").write_text(json.dumps(config))

        yield "dictionary_learning", kind, save


def facts(architecture: str, direction: str, result: Verification) -> dict[str, Any]:
    """Figures of an SAE that was carried over, its old library first.

    Raises SystemExit unless both libraries compute the same.
    """
    if not result.agrees:
        raise SystemExit(f"{architecture}, {direction}: {result}")
    ours, theirs = result.before, result.after
    pair = (theirs, ours) if direction.endswith("→ kronsae") else (ours, theirs)
    return {
        "architecture": architecture,
        "direction": direction,
        "explained_variance": [one.explained_variance for one in pair],
        "l0": [one.l0 for one in pair],
        "largest_difference": result.largest_difference,
    }


def outwards(x: Tensor, heldout: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """Each SAE of `OUTWARDS`; those that another library may save again also come back."""
    train = TrainConfig(tokens=len(x), batch_size=BATCH, lr=8e-3, eval_every=0)
    saes: dict[str, SAE] = {}
    for library, kinds in OUTWARDS.items():
        for kind, settings in kinds.items():
            if kind not in saes:
                saes[kind] = fit(SAEConfig(**settings), x, train).sae
            out = FORMATS[library].write(saes[kind], folder / f"{library} {kind}")
            name = FORMATS[library].library
            yield facts(kind, f"kronsae → {name}", verify(saes[kind], out, library, heldout))
            if library == "sae_lens" and kind.startswith(("KronSAE", "Switch")):
                import sae_lens

                again = folder / f"again {kind}"
                sae_lens.SAE.load_from_disk(out).save_model(again)
                result = verify(load(again), again, library, heldout)
                yield facts(kind, f"{name} → kronsae", result)


def inwards(x: Tensor, heldout: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """SAEs that the other libraries trained."""
    for trained in (sae_lens_trained, sparsify_trained, dictionary_learning_trained):
        for library, kind, save in trained(x):
            path = folder / f"{library} {kind} trained there"
            save(path)
            ours = load(path, allow_pickle=True)
            name = FORMATS[library].library
            yield facts(kind, f"{name} → kronsae", verify(ours, path, library, heldout))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line each SAE."""
    rows = sorted(rows, key=lambda row: (row["direction"].replace("kronsae", ""), str(row)))
    header = ["from → to", "architecture", "explained variance before", "after", "L0 before"]
    lines = (
        (row["direction"], row["architecture"])
        + tuple(f"{ev:.6f}" for ev in row["explained_variance"])
        + tuple(f"{l0:.3f}" for l0 in row["l0"])
        + (f"{row['largest_difference']:.0e}",)
        for row in rows
    )
    return markdown([*header, "after", "largest difference"], lines)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.interop", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of interop.json, .md")
    out = parser.parse_args().out
    torch.manual_seed(0)
    data = DataConfig(layer=2, buffer_tokens=65_536, heldout_tokens=32_768)
    source = open_activations(data, batch_size=4096, seed=0, device="cpu")
    heldout, x = source.heldout_activations()[:HELDOUT], collect(source, TOKENS)
    scale = (x.square().sum(1).mean() / x.shape[1]) ** -0.5  # as the other trainers expect
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for carry in (outwards, inwards)
            for row in carry(x * scale, heldout * scale, Path(folder))
        ]
    print(table(rows))
    libraries = ("sae-lens", "eai-sparsify", "dictionary-learning")
    all_versions = {**versions(), **{name: metadata.version(name) for name in libraries}}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "interop.json", {"versions": all_versions, "rows": rows})
    write_text(out / "interop.md", table(rows) + "\n")


if __name__ == "__main__":
    main()
