"""SAEs on the Hugging Face hub: `push` one, or a sweep, with model card and report.

from kronsae.hub import push
push("runs/my-run", "me/my-sae")                 # or: python -m kronsae.export … --to hub
sae = kronsae.load("me/my-sae", revision="main")
push("runs/my-suite", "me/my-suite")
sae = kronsae.load("me/my-suite", layer=6)
"""

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kronsae.config import kind_of, without_nesting
from kronsae.data.common import reason
from kronsae.data.text import COMPRESSIONS, KINDS, TEXT_SUFFIXES
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.interop.suite import INDEX_NAME
from kronsae.metrics.figures import MEANING
from kronsae.model.massive import rule_of
from kronsae.model.origin import Origin
from kronsae.model.sae import SAE
from kronsae.runs.folder import saved_members
from kronsae.runs.sweep import comparison
from kronsae.system.documents import part_of, shown
from kronsae.system.files import write_json
from kronsae.system.tables import markdown
from kronsae.system.templates import render
from kronsae_kernels import __version__

CARD_NAME, REPORT_NAME = "README.md", "report.html"
_CARD = Path(__file__).parent / "model_card.md.j2"
_SUITE_CARD = Path(__file__).parent / "suite_card.md.j2"


def push(
    source: SAE | str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    members: Sequence[str] | None = None,
) -> str:
    """Upload an SAE to the hub in one commit; returns its URL.

    source: an SAE, or what `kronsae.load` takes; of a run folder report.html goes along. Or the
        folder of a sweep, whose members get a folder each.
    repo_id: "owner/name"; made if it does not exist.  revision: a branch, made if need be.
    members: of a sweep, those to upload (None: all that have an SAE and did not diverge).
    The hub's token is that of `hf auth login`, or HF_TOKEN.

    The repository gets sae.safetensors and config.json, from which `kronsae.load(repo_id)` makes
    the SAE again, and README.md, its model card. config.json names model, data and settings as the
    run did: look whether they hold a path that is private.
    Raises InputError if there is no such SAE, or if the hub refuses.
    """
    from huggingface_hub import HfApi

    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise InputError(f"repo_id: expected 'owner/name', got {shown(repo_id)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        if not isinstance(source, SAE) and (Path(source) / INDEX_NAME).is_file():
            _fill_suite(Path(source), folder, repo_id, members)
        else:
            _fill(source, folder, repo_id)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"SAE from kronsae {__version__}",
            )
        except Exception as error:  # the hub client raises dozens of kinds
            raise InputError(
                f"{repo_id}: the Hugging Face hub did not take it ({reason(error)}); log in with "
                "`hf auth login`, and check that the name is yours"
            ) from error
    return commit.commit_url


def _fill(source: SAE | str | Path, folder: Path, repo_id: str) -> SAE:
    """Write the files of an SAE to a new folder; the SAE."""
    sae = source if isinstance(source, SAE) else load(source)
    sae.save(folder)
    if not isinstance(source, SAE) and (report := Path(source) / REPORT_NAME).is_file():
        shutil.copy(report, folder)
    card = model_card(sae, repo_id, report=(folder / REPORT_NAME).is_file())
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    return sae


def _fill_suite(sweep: Path, folder: Path, repo_id: str, wanted: Sequence[str] | None) -> None:
    """Write the files of the SAEs of a sweep, its index and its card."""
    index, runs = saved_members(sweep, wanted)
    origins = {
        name: Origin.of(_fill(run, folder / name, repo_id).metadata) for name, run in runs.items()
    }
    write_json(folder / INDEX_NAME, index)
    if (report := sweep / REPORT_NAME).is_file():
        shutil.copy(report, folder)
    layers = [origin.layer for origin in origins.values()]
    example, origin = next(iter(origins.items()))
    card = render(
        _SUITE_CARD,
        repo_id=repo_id,
        name=repo_id.partition("/")[2],
        origin=origin,
        base_model=_on_hub(origin.model),
        dataset=_on_hub(origin.dataset),
        count=len(runs),
        example=example,
        layer=next((layer for layer in layers if layers.count(layer) == 1), None),
        table=markdown(*comparison(index["members"])),
    )
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def model_card(sae: SAE, repo_id: str, *, report: bool = False) -> str:
    """README.md of a repository: the hub's metadata, then what the SAE is and how to load it."""
    config = dataclasses.asdict(sae.config)
    origin, kind = Origin.of(sae.metadata), kind_of(config)
    tags = ["sparse-autoencoder", "interpretability", "kronsae", kind.lower().replace(" ", "-")]
    settings = [
        (name, value) for name, value in without_nesting(config).items() if value not in (0, False)
    ]
    metrics = part_of(sae.metadata, "metrics")
    figures = [
        (label, _figure(metrics[name], "," if name == "heldout_tokens" else ".4g"), meaning)
        for name, (label, meaning) in MEANING.items()
        if type(metrics.get(name)) in (int, float)
    ]
    return render(
        _CARD,
        sae=sae,
        repo_id=repo_id,
        name=repo_id.partition("/")[2],
        kind=kind,
        massive=rule_of(sae.metadata),
        active=sae.selection.describe(sae.config),
        origin=origin,
        base_model=_on_hub(origin.model),
        dataset=_on_hub(origin.dataset),
        tags=list(dict.fromkeys(tags)),
        figures=markdown(("figure", "value", "meaning"), figures) if figures else "",
        settings=markdown(("setting", "value"), settings),
        report=report,
    )


def _on_hub(name: str | None) -> str | None:
    """The name of a model or dataset, if it can be one of the hub ("owner/name") and is no path."""
    if name is None or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII):
        return None
    path = Path(name)
    of_file = path.suffix.lower() in (*KINDS, *COMPRESSIONS, *TEXT_SUFFIXES)
    return None if of_file or path.exists() else name


def _figure(value: float, form: str) -> str:
    return f"{value:{form}}" if abs(value) < 1e300 else "not finite"
