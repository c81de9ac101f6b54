"""Adaptor for SAEBench, and its evaluations from the command line.

    kronsae interop.sae_bench RUN --evals core absorption sparse_probing --model-name NAME

SAEBench takes SAEs of SAELens, so the adaptor is `kronsae.interop.sae_lens.KronSAE` with the fields
of `cfg` that the evaluations need. Its `encode` gives dense latents [..., F].

From a checkout: `pip install -e '.[sae-bench]'`, in an environment of its own, because sae-bench
0.6.0 needs numpy < 2 and datasets < 4.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kronsae.commandline import Parser, exit_status
from kronsae.data.hookpoints import Site
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.interop.sae_lens import KronSAE
from kronsae.model.origin import Origin
from kronsae.model.sae import SAE

NamedSAEs = list[tuple[str, Any]]

PROXY = (
    "W_enc and b_enc are a proxy: the mean of a latent's base and extension row, which encode does "
    "not use"
)


def adapt(
    sae: SAE,
    *,
    model_name: str | None = None,
    layer: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> KronSAE:
    """The SAE as SAEBench takes it: `run_eval(config, [("name", adapt(sae))], …)`.

    model_name: TransformerLens' name (default: of the model that the SAE was trained on).
    layer: the residual stream after this block (default: of the SAE's hookpoint).
    Texts begin with BOS if the SAE's contexts did, or if its metadata does not say.
    If `W_enc` is a proxy, `cfg.metadata` says so, which SAEBench writes to its results.
    Raises InputError for a transcoder, or if model or layer is not known.
    """
    origin = Origin.of(sae.metadata)
    model_name = model_name or origin.model
    layer = origin.layer if layer is None else layer
    if model_name is None or layer is None:
        raise InputError(
            f"SAEBench evaluates the residual stream after a block: expected a model and a layer, "
            f"got {model_name!r} and {layer!r} (hookpoint {origin.hookpoint!r})"
        )
    wrapped = KronSAE.wrap(sae).requires_grad_(False)
    facts = wrapped.cfg.metadata
    facts.model_name, facts.hook_layer = model_name, layer
    facts.hook_name = Site(layer, "resid_post").lens
    if facts.prepend_bos is None:  # SAEBench needs to know, and assumes it of most SAEs
        facts.prepend_bos = True
    facts.context_size = facts.context_size or 128
    if sae.kind.dense_form(sae.W_enc, sae.b_enc) is None:
        facts.w_enc = PROXY
    return wrapped.to(device=device, dtype=getattr(torch, dtype))


@contextmanager
def without_shape_checks() -> Iterator[None]:
    """Switch off jaxtyping's shape checks, which sae-bench 0.6.0 fails when it trains probes.

    `train_probe_on_activations` binds the number of examples per class and calls with twice as
    many.
    """
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def evaluations(model_name: str, dtype: str, batch_size: int, out: Path) -> dict[str, Callable]:
    """SAEBench's evaluations by name: functions of a list of (name, SAE), and a device.

    Settings are SAEBench's defaults with seed 42; for core, those of its script for custom SAEs.
    """
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.core import main as core
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
    from sae_bench.evals.sparse_probing import main as sparse_probing

    settings = {
        "model_name": model_name,
        "random_seed": 42,
        "llm_dtype": dtype,
        "llm_batch_size": batch_size,
    }
    absorption_config = absorption.AbsorptionEvalConfig(**settings)
    probing_config = sparse_probing.SparseProbingEvalConfig(**settings)
    scr, tpp = (
        scr_and_tpp.ScrAndTppEvalConfig(**settings, perform_scr=scr) for scr in (True, False)
    )
    flags = {"save_activations": False}
    both = {**flags, "clean_up_activations": True}
    return {
        "core": partial(_run_core, core, dtype, out / "core"),
        "absorption": partial(_run_eval, absorption, absorption_config, out / "absorption", {}),
        "sparse_probing": partial(
            _run_eval, sparse_probing, probing_config, out / "sparse_probing", flags
        ),
        "scr": partial(_run_eval, scr_and_tpp, scr, out, both),
        "tpp": partial(_run_eval, scr_and_tpp, tpp, out, both),
    }


def _run_eval(
    module: Any, config: Any, folder: Path, flags: dict[str, bool], saes: NamedSAEs, device: str
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    with without_shape_checks():
        return module.run_eval(config, saes, device, str(folder), **flags)


def _run_core(core: Any, dtype: str, folder: Path, saes: NamedSAEs, device: str) -> Any:
    return core.multiple_evals(
        selected_saes=saes,
        n_eval_reconstruction_batches=200,
        n_eval_sparsity_variance_batches=2000,
        eval_batch_size_prompts=16,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset="Skylion007/openwebtext",
        context_size=128,
        output_folder=str(folder),
        dtype=dtype,
        device=device,
    )


NAMES = ("core", "absorption", "sparse_probing", "scr", "tpp")


def make_parser() -> Parser:
    parser = Parser(
        "interop.sae_bench",
        "Run evaluations of SAEBench on SAEs. Models and data sets come from the Hugging Face hub.",
        "kronsae interop.sae_bench runs/MY-RUN --evals core",
    )
    parser.add_argument("sources", nargs="+", metavar="SAE", help="run folders, or hub ids")
    parser.add_argument(
        "--evals", nargs="+", required=True, choices=NAMES, help="evaluations to run"
    )
    parser.add_argument(
        "--model-name", metavar="NAME", help="TransformerLens' name (default: the run's model)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="residual stream after block N (default: the run's)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("eval_results"), metavar="DIR", help="folder of results"
    )
    parser.add_argument(
        "--llm-batch-size",
        type=int,
        default=32,
        metavar="N",
        help="contexts per forward pass of the model",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of model and SAE"
    )
    parser.add_argument("--device", default=None, metavar="NAME", help="cpu or cuda")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(_run, argv)


def _run(argv: list[str]) -> None:
    request = make_parser().parse(argv)
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    saes, models = [], set()
    for source in request.sources:
        sae = adapt(
            load(source),
            model_name=request.model_name,
            layer=request.layer,
            device=device,
            dtype=request.dtype,
        )
        path = Path(source).resolve()
        # A run's folder sae/ is named after the run.
        saes.append((path.parent.name if path.name == "sae" else path.name, sae))
        models.add(sae.cfg.metadata.model_name)
    if len(models) > 1:
        raise InputError(f"expected SAEs of one model, got {', '.join(sorted(models))}")
    if len({name for name, _ in saes}) < len(saes):
        raise InputError("two SAEs have the same name, so their results would have the same file")
    known = evaluations(models.pop(), request.dtype, request.llm_batch_size, request.out)
    for name in request.evals:
        known[name](saes, device)
    print(f"In {request.out}: {', '.join(request.evals)}")


if __name__ == "__main__":
    sys.exit(main())
