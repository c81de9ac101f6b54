"""The report: everything on the page, nothing from outside, and no input that breaks it."""

import json
from html.parser import HTMLParser

import pytest
import torch

from kronsae import SAE, RunConfig, SAEConfig
from kronsae.config import DataConfig, TrainConfig
from kronsae.errors import Notice
from kronsae.explore.charts import (
    CHARTS,
    draw,
    figure_text,
    linear_ticks,
    log_ticks,
    tick_text,
)
from kronsae.explore.report import link_explorer, read_metrics, write_report
from kronsae.metrics.heldout import Heldout, HeldoutText
from kronsae.properties.contexts import top_contexts
from kronsae.system.files import log_line, read_log

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "br"}
HELDOUT = {
    "explained_variance": 0.8125,
    "fvu": 0.1875,
    "explained_variance_batch": 0.8,
    "mse": 0.25,
    "l0": 31.5,
    "dead_share": 0.125,
    "dense_share": 0.03125,
}
CROSS_ENTROPY = {"ce_clean": 2.5, "ce_spliced": 2.75, "ce_zero": 7.5, "ce_recovered": 0.95}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


class EvilTokenizer:
    """Every token is a script."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return EVIL * len(ids)


def write_run(folder, records, **settings):
    sae = SAEConfig(d_model=6, heads=5, m=2, n=3, k=4)
    config = RunConfig(sae, DataConfig(layer=2), TrainConfig(tokens=8000))
    document = {
        "config": config.to_dict(),
        "versions": {"torch": "2.0"},
        "command": "x",
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_member_goes_on_with_its_sweep(tmp_path):
    for name, sweep in {"alone": {}, "member": {"sweep": "member"}}.items():
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, records(), **sweep)
        page = Page(write_report(tmp_path / name).read_text(encoding="utf-8"))
        resumed = tmp_path if sweep else tmp_path / name
        assert f"--resume {resumed} " in page.text.replace("\n", " ")


def records(count: int = 1000) -> list[dict]:
    found = [
        {
            "kind": "train",
            "step": step,
            "tokens": 8 * step,
            "seconds": 0.1 * step,
            "loss": 1 / step,
            "auxk_loss": 0.0,
            "explained_variance": 1 - 1 / step,
            "l0": 32.0,
            "dead_share": 0.01,
            "grad_norm": 0.5,
            "lr": 1e-3,
            "tokens_per_s": 80.0,
            "wait_share": 0.1,
        }
        for step in range(1, count + 1)
    ]
    found.append({"kind": "heldout", "step": count // 2, "tokens": 4 * count, **HELDOUT})
    found.append({"kind": "final", "step": count, "tokens": 8 * count, **HELDOUT, **CROSS_ENTROPY})
    return found


def some_contexts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (8, 20), generator=generator)
    x = torch.randn(160, 6, generator=generator)
    sae = SAE(SAEConfig(d_model=6, heads=5, m=2, n=3, k=4), generator=generator)
    return top_contexts(
        sae, Heldout(x, text=HeldoutText(None, ids, torch.ones(8, 20, dtype=torch.bool)))
    )


def test_the_whole_page(tmp_path):
    write_run(tmp_path, records())
    path = write_report(tmp_path, contexts=some_contexts())
    assert path == tmp_path / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for expected in (
        "81.25 %",
        "31.5",
        "12.50 %",
        "3.12 %",
        "2.75",
        "95.00 %",
        "8,000",
        "1 min 40 s",
        "2.500 to 2.750 nats",
    ):
        assert expected in page.text, expected
    for expected in ("--resume", "kronsae.load(", "Explained variance", '"adam_beta2"', "[3]"):
        assert expected in page.text, expected
    assert page.tags.count("figure") == 7
    assert page.tags.count("article") == 6
    assert page.tags.count("mark") == sum(len(found.windows) for found in some_contexts())
    assert "script" not in page.tags
    for name, value in page.attributes:
        assert name not in ("src", "href") and not name.startswith("on"), (name, value)
    policy = [value for name, value in page.attributes if name == "content"][0]
    assert policy.startswith("default-src 'none'; style-src") and "script" not in policy
    assert (
        html.count("http") == html.count("http-equiv=") == 1
        and "@import" not in html
        and "url(" not in html
    )
    assert len(html) < 200_000  # long curves are thinned
    write_report(tmp_path, contexts=some_contexts())
    assert path.read_text(encoding="utf-8") == html


def test_the_explorer_is_linked_once_it_exists(tmp_path):
    write_run(tmp_path, records(20))
    path = write_report(tmp_path)
    said = " ".join(Page(path.read_text()).text.split())
    assert f"kronsae explore {tmp_path} makes a page" in said
    link_explorer(tmp_path)
    page = path.read_text()
    assert ("href", "explorer.html") in Page(page).attributes and "kronsae explore" not in page
    (tmp_path / "explorer.html").write_text("")
    assert write_report(tmp_path).read_text() == page  # as after --resume
    path.unlink()
    link_explorer(tmp_path)
    assert not path.exists()


def test_everything_is_escaped(tmp_path):
    folder = tmp_path / "a <b> & 'c' $body {style}"
    folder.mkdir()
    write_run(folder, records(20), command=EVIL, versions={EVIL: EVIL})
    document = json.loads((folder / "config.json").read_text())
    for part in document["config"].values():
        part.update({key: EVIL for key in part if isinstance(part[key], str)})
        part[EVIL] = EVIL
    document[EVIL] = {EVIL: EVIL}
    (folder / "config.json").write_text(json.dumps(document))
    bad = {"kind": "final", "step": 21, "explained_variance": EVIL, EVIL: EVIL}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(bad) + "\n")
    html = write_report(folder, contexts=some_contexts(), tokenizer=EvilTokenizer()).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert EVIL in page.text
    assert page.tags.count("body") == 1


@pytest.mark.parametrize("left_out", [*HELDOUT, "loss", "tokens", "step", "kind", "seconds", "lr"])
def test_missing_metrics(tmp_path, left_out):
    found = [{k: v for k, v in record.items() if k != left_out} for record in records(30)]
    write_run(tmp_path, found)
    Page(write_report(tmp_path).read_text(encoding="utf-8"))


def test_no_metrics(tmp_path):
    write_run(tmp_path, [])
    for _ in range(2):
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
        assert "figure" not in page.tags
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)


def test_lines_end_at_line_feeds_alone(tmp_path):
    """A text of a record may hold other ends of lines."""
    record = {"kind": "final", "step": 1, "note": "a\u2028b\x85c"}
    write_run(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\r\n\n")
    records, damaged = read_metrics(tmp_path / "metrics.jsonl")
    assert records == [record]
    assert "left out: 2" in damaged  # the empty line


def test_a_run_that_was_killed(tmp_path):
    write_run(tmp_path, records(50)[:-1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 51, "lo')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "has not ended" in page.text and "81.25 %" in page.text


@pytest.mark.parametrize(
    "value", [0, -5.0, float("nan"), float("inf"), None, "1e-3", 1e-300, 1e300]
)
def test_odd_values(tmp_path, value):
    odd = {key: value for key in records(1)[0] if key not in ("kind", "step", "tokens")}
    found = [{"kind": kind, "step": 1, "tokens": 0, **odd} for kind in ("train", "heldout")]
    write_run(tmp_path, found)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for name, drawn in page.attributes:
        if name in ("d", "x", "y", "cx", "cy"):
            assert "nan" not in drawn and "inf" not in drawn


def test_lines_that_were_altered_do_not_reach_the_page(tmp_path):
    """Each line has a checksum; half a line at the end is what a kill leaves."""
    write_run(tmp_path, [])
    log = tmp_path / "metrics.jsonl"
    lines = [log_line(record) for record in records(50)]
    lines[-1] = lines[-1].replace('"l0": 31.5', '"l0": 91.5')
    lines[3] = lines[3].replace('"step": 4', '"step": 4e9')
    lines[5] = lines[5][:40] + "\n"
    lines[7] = "null\n"
    lines[8] = "\xff\x00[[[\n"
    lines[9] = '{"kind": "final", "step": 99, "l0": 77.7}\n'
    log.write_text("".join(lines) + '{"kind": "train", "st')
    with pytest.warns(Notice, match="were altered are left out: 4, 6, 8, 9, 10, ...$"):
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "metrics.jsonl: lines that are broken or were altered are left out: 4, 6" in page.text
    assert "91.5" not in page.text and "77.7" not in page.text and "has not ended" in page.text


@pytest.mark.filterwarnings("error")
def test_lines_of_earlier_versions_have_no_checksum(tmp_path):
    write_run(tmp_path, records(50))  # and a run that goes on has some
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(log_line({"kind": "final", "step": 51, "tokens": 408, "l0": 30.25}))
        file.write('{"kind": "tra')
    assert "30.25" in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_any_flipped_bit_of_a_line_is_noticed_or_changes_nothing(tmp_path):
    record = {"kind": "train", "step": 7, "loss": 0.123456789012345, "lr": None}
    line = log_line(record).encode()
    for bit in range(8 * (len(line) - 1)):
        altered = bytearray(line)
        altered[bit // 8] ^= 1 << bit % 8
        (tmp_path / "log").write_bytes(line + altered)
        found, damaged = read_log(tmp_path / "log")
        assert found == [record] * len(found) and (len(found) == 2 or damaged)


def test_a_run_that_diverged(tmp_path):
    reason = "step 50: training has diverged; try a smaller lr than 100"
    said = {"explained_variance": None, "not_finite": "explained_variance is nan"}
    found = records(50)
    found[-1] |= said
    write_run(tmp_path, [*found, {"kind": "diverged", "step": 50, "reason": reason}])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert f"{reason}." in page.text and "explained_variance is nan." in page.text
    assert "–" in page.texts and "None" not in page.texts
    assert "has not ended" not in page.text


@pytest.mark.parametrize(
    "key, value, shown, tick",
    [
        ("lr", 5e24, "5.000e+24", "5e+24"),
        ("lr", 0.0, "0", "0"),
        ("lr", 4e-4, "0.0004000", "0.0004"),
        ("tokens_per_s", 123_456, "123,456", "123.5 k"),
        ("tokens_per_s", 2e9, "2.000e+09", "2 B"),
        ("explained_variance", -4700.883286, "-470088.33 %", "-4.701e+05 %"),
        ("explained_variance", -5.8e72, "-5.8e+74 %", "-5.8e+74 %"),
        ("mse", 5.72e72, "5.720e+72", "5.7e+72"),
        ("mse", 999.96, "1,000", "1000"),
    ],
)
def test_numbers_of_any_size_are_short(key, value, shown, tick):
    assert figure_text(key, value) == shown and tick_text(key, value) == tick


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)
def test_what_is_too_large_to_draw_is_left_out(chart):
    records = [
        {"kind": "train", "step": step, "tokens": step, chart.key: value}
        for step, value in enumerate((5e-324, 1e-280, 0.5, 1e280, 1.7e308), 1)
    ]
    drawing = draw(chart, records)
    assert drawing is not None and "inf" not in str(drawing) and "nan" not in str(drawing)
    assert draw(chart, records[:1]) is None and draw(chart, records[4:]) is None


def test_a_line_of_one_point_is_seen():
    train = {"kind": "train", "step": 1, "tokens": 256, "lr": 0.1}
    chart = next(chart for chart in CHARTS if chart.key == "lr")
    (line,) = draw(chart, [train]).lines
    assert "a2 2" in line[2]
    (line,) = draw(chart, [train, train | {"tokens": 512}]).lines
    assert line[2].count("L") == 1 and "a" not in line[2]


def test_dense_and_custom_data(tmp_path):
    sae = SAEConfig(d_model=6, encoder="dense", dict_size=30, k=4)
    settings = {"config": {"sae": sae.__dict__, "data": None, "train": {}}}
    write_run(tmp_path, records(5), **settings, command=["/home/me/kronsae/train.py", "--k", "a b"])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "TopK SAE" in page.text and "KronSAE on" not in page.text
    assert "python -m kronsae.train --k 'a b'" in page.text
    for program in ("/home/me/.venv/bin/kronsae", "/home/me/kronsae/__main__.py"):
        write_run(tmp_path, records(5), **settings, command=[program, "train", "--k", "a b"])
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
        assert "kronsae train --k 'a b'" in page.texts


def test_ticks():
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert linear_ticks(0, 730_000, 4) == pytest.approx([0, 200_000, 400_000, 600_000, 800_000])
    assert linear_ticks(3, 3)[0] <= 3 <= linear_ticks(3, 3)[-1]
    assert linear_ticks(0, 0)[0] == 0 < linear_ticks(0, 0)[-1]
    assert log_ticks(0.03, 0.6) == pytest.approx([0.01, 0.1, 1])
    assert log_ticks(0.002, 900) == pytest.approx([10.0**i for i in range(-3, 4)])
    for value in (1.0, 10.0, 0.37):
        ticks = log_ticks(value, value)
        assert ticks[0] <= value * 1.001 and ticks[-1] >= value * 0.999 and len(ticks) > 1
