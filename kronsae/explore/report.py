"""report.html: a run on one page that needs nothing else, neither a network nor a script.

`page/report.html.j2` is the page; here is what it shows.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kronsae.config import DataConfig, SAEConfig, kind_of, with_defaults
from kronsae.data.token_text import token_texts
from kronsae.errors import warn
from kronsae.explore import charts
from kronsae.explore.charts import Record, is_number
from kronsae.metrics.figures import MEANING, massive_warning
from kronsae.properties.contexts import LatentContexts, Window, short, title
from kronsae.registry import SELECTIONS, command_line
from kronsae.runs.folder import read_run
from kronsae.system.files import read_log, write_text
from kronsae.system.templates import render

_TEMPLATE = Path(__file__).parent / "page" / "report.html.j2"


def write_report(
    run_folder: Path, *, contexts: Sequence[LatentContexts] = (), tokenizer: Any = None
) -> Path:
    """Write report.html of a run from its config.json and metrics.jsonl; returns its path.

    contexts: latents to show (`kronsae.properties.contexts.top_contexts`). What is missing, in
    metrics.jsonl or here, is left out of the page. Raises InputError if it cannot be written.
    """
    settings = read_run(run_folder)
    records, damaged = read_metrics(run_folder / "metrics.jsonl")
    sae, data = with_defaults(SAEConfig, settings["config"]["sae"]), settings["config"]["data"]
    data = {} if data is None else with_defaults(DataConfig, data)
    hook = data.get("hookpoint") or f"layer {data.get('layer')}"
    selection = sae["selection"]
    timed = [r for r in records if is_number(r.get("tokens")) and is_number(r.get("seconds"))]
    evaluation = last_evaluation(records)
    command = settings.get("command", [])
    page = render(
        _TEMPLATE,
        name=run_folder.resolve().name,
        kind=kind_of(sae),
        source=f"{hook} of {data['model']}" if data.get("model") else "",
        sae=sae,
        data=data,
        exact=SELECTIONS[selection].exact if selection in SELECTIONS else True,
        trained=timed[-1] if timed else None,
        evaluation=evaluation,
        diverged=next((r.get("reason") for r in records if r.get("kind") == "diverged"), None),
        figures=MEANING,
        damaged=damaged,
        warning=massive_warning(evaluation),
        latents=[_latent(latent, tokenizer) for latent in contexts],
        charts=[drawing for chart in charts.CHARTS if (drawing := charts.draw(chart, records))],
        edges=charts,
        explorer=_explorer(run_folder) if _has_latents_to_show(data) else None,
        folder=str(run_folder),
        resumed=str(run_folder.parent if "sweep" in settings else run_folder),
        command=command if isinstance(command, str) else _command(command),
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
        grouped="{:,}".format,
        quoted=shlex.quote,
        repr=repr,
        short=short,
        duration=elapsed,
        is_number=is_number,
        figure_text=charts.figure_text,
    )
    write_text(run_folder / "report.html", page)
    return run_folder / "report.html"


EXPLORER = "explorer.html"
"""The explorer of a run, in its folder."""

_LINK = Markup(f'<a href="{EXPLORER}">Explore all latents</a>')


def _has_latents_to_show(data: dict[str, Any]) -> bool:
    """Whether `kronsae explore` takes a run of this data: text that a language model reads."""
    return bool(data.get("model")) and data.get("image_column") is None


def _explorer(run_folder: Path) -> Markup:
    """A link to the run's explorer, or how it is made."""
    if (run_folder / EXPLORER).is_file():
        return _LINK
    return Markup("<code>{}</code> makes a page of all latents.").format(
        command_line("explore", str(run_folder))
    )


def link_explorer(run_folder: Path) -> None:
    """Link the run's explorer in a report.html that was written before it."""
    path = run_folder / "report.html"
    if path.is_file():
        page = path.read_text(encoding="utf-8")
        place = re.compile(r'(?<=<p id="explorer">).*?(?=</p>)', re.DOTALL)
        write_text(path, place.sub(_LINK, page, count=1))


def read_metrics(path: Path) -> tuple[list[Record], str | None]:
    """The records, by step, and a warning, which is also given, if some lines are damaged.

    These are left out. So is half a line at the end, of a run that was killed, without a word.
    """
    try:
        records, damaged = read_log(path)
    except OSError:
        return [], None
    stepped = [record for record in records if is_number(record.get("step"))]
    if not damaged:
        return sorted(stepped, key=lambda record: record["step"]), None
    numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
    said = f"{path.name}: lines that are broken or were altered are left out: {numbers}"
    warn(f"{path.parent}: {said}")
    return sorted(stepped, key=lambda record: record["step"]), said


def last_evaluation(records: Sequence[Record]) -> Record:
    """The final one, or the last held-out one of a run that has not ended; empty without any."""
    by_kind = {record.get("kind"): record for record in records}
    return by_kind.get("final") or by_kind.get("heldout") or {}


def elapsed(seconds: float) -> str:
    """Seconds in words: "2 h 5 min", "3 min 20 s", "4.1 s"."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def _latent(latent: LatentContexts, tokenizer: Any) -> tuple[str, list[tuple[Window, list[str]]]]:
    """A latent's title, and its windows with the text of each of their tokens."""
    windows = [(w, token_texts(w.tokens, tokenizer, w.activations)) for w in latent.windows]
    return title(latent), windows


def _command(argv: Sequence[str]) -> str:
    """The command line of sys.argv, as one would type it."""
    program, *arguments = argv or ["kronsae"]
    train = ["python", "-m", "kronsae.train"]
    return shlex.join([*(train if Path(program).name == "train.py" else ["kronsae"]), *arguments])
