"""An SAE goes to a hub and comes back: a small server here speaks as much of its protocol as that
needs. The client runs in a process of its own, as it reads its endpoint when it is imported.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt

from kronsae import SAE, InputError, SAEConfig
from kronsae.hub import model_card, push

METADATA = {
    "data": {"name": "EleutherAI/pythia-70m", "hookpoint": "gpt_neox.layers.3"},
    "metrics": {"explained_variance": 0.75, "l0": 4.0, "ce_recovered": 0.9},
}


class Hub(ThreadingHTTPServer):
    """Repositories in memory: {repo: {commit: {path: bytes}}}; branches {repo: {name: commit}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches[repo].get(branch, "")
        merged = {**self.commits[repo].get(parent, {}), **files}
        name = hashlib.sha1(repr((parent, sorted(files.items()))).encode()).hexdigest()
        self.commits[repo][name] = merged
        self.branches[repo][branch] = name
        return name


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        """Quiet."""

    def reply(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def not_found(self, what: str) -> None:
        self.reply(404, {"error": what}, X_Error_Code=what, X_Error_Message=what)

    def do_POST(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            there = repo in hub.commits
            if not there:
                hub.commits[repo], hub.branches[repo] = {}, {}
                hub.private[repo] = wanted.get("visibility") == "private"
                hub.commit(repo, "main", {})
            self.reply(409 if there else 200, {"url": f"{hub.url}/{repo}"})
            return
        if parts[:2] == ["api", "validate-yaml"]:
            self.reply(200, {"errors": [], "warnings": []})
            return
        repo, action, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if action == "branch":
            hub.branches[repo].setdefault(revision, hub.branches[repo]["main"])
            self.reply(201, {})
        elif action == "preupload":
            files = json.loads(body)["files"]
            answer = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.reply(200, {"files": answer})
        elif action == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = hub.commit(repo, revision, files)
            url = f"{hub.url}/{repo}/commit/{commit}"
            self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url})
        else:
            hub.unknown.append(f"POST {self.path}")
            self.not_found("EntryNotFound")

    def do_GET(self) -> None:
        hub = self.server
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, action, revision = "/".join(parts[2:4]), parts[4:5], "/".join(parts[5:6])
            commit, files = self.find(repo, revision or "main")
            if files is None:
                return
            if action == ["tree"]:
                tree = [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
                self.reply(200, tree)
            else:
                siblings = [{"rfilename": path} for path in files]
                known = {"id": repo, "sha": commit, "siblings": siblings, "private": False}
                self.reply(200, known)
        elif parts[2:3] == ["resolve"]:
            repo, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            commit, files = self.find(repo, revision)
            if files is None:
                return
            if path not in files:
                self.not_found("EntryNotFound")
                return
            tag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.reply(200, files[path], ETag=tag, X_Repo_Commit=commit)
        else:
            hub.unknown.append(f"GET {self.path}")
            self.not_found("EntryNotFound")

    do_HEAD = do_GET

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        hub = self.server
        if repo not in hub.commits:
            self.not_found("RepoNotFound")
            return "", None
        commit = hub.branches[repo].get(revision, revision)
        if commit not in hub.commits[repo]:
            self.not_found("RevisionNotFound")
            return "", None
        return commit, hub.commits[repo][commit]


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, tmp_path: Path, script: str) -> list[str]:
    """The lines that a Python script prints, with the client pointed to `hub`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_of_this_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_push_and_load(hub, tmp_path):
    """A run with its report, to main and to a branch; loaded by id, branch and commit."""
    sae = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3)).eval()
    sae.save(tmp_path / "run" / "sae", METADATA)
    (tmp_path / "run" / "report.html").write_text("<html>the run</html>")
    second = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=4)).eval()
    second.save(tmp_path / "second")
    lines = run(
        hub,
        tmp_path,
        """
import kronsae
from kronsae.export.__main__ import main
from kronsae.hub import push
assert main(["run", "--to", "hub", "--repo", "me/sae", "--private"]) == 0
url = push("second", "me/sae", revision="wider", message="k is 4")
sae = kronsae.load("me/sae")
print(sae.config.k, sae.metadata["data"]["name"], sae.W_dec.sum().item())
print(kronsae.load("me/sae", revision="wider").config.k, kronsae.load("me/sae").config.k)
print(kronsae.load("me/sae", revision=url.rpartition("/")[2]).config.k)
for source, settings in (("me/other", {}), ("me/sae", {"revision": "no"}),
                         ("me/sae", {"subfolder": "layers.3"})):
    try:
        kronsae.load(source, **settings)
    except kronsae.InputError as error:
        print(error)
""",
    )
    assert lines[0].startswith(f"Pushed: {hub.url}/me/sae/commit/")
    k, model, total = lines[2].split()
    assert (k, model) == ("3", "EleutherAI/pythia-70m")
    assert float(total) == pytest.approx(sae.W_dec.sum().item(), abs=1e-6)
    assert lines[3:5] == ["4 3", "4"]
    assert "me/other: neither a local folder nor a repository" in lines[5]
    assert "me/sae, revision 'no', neither" in lines[6].replace(":", "")
    assert "me/sae, layers.3 holds no SAE" in lines[7]
    assert hub.private == {"me/sae": True} and not hub.unknown
    files = hub.commits["me/sae"][hub.branches["me/sae"]["main"]]
    assert sorted(files) == ["README.md", "config.json", "report.html", "sae.safetensors"]
    assert files["report.html"] == b"<html>the run</html>"


def test_push_and_load_of_a_suite(hub, tmp_path):
    """Its members by layer, of which the index alone is read first."""
    script = """
import torch
import kronsae
from kronsae import SAEConfig, TrainConfig
from kronsae.export.__main__ import main
from kronsae.train import fit_many
x = {name: torch.randn(300, 8) for name in ("a", "b")}
config = SAEConfig(heads=4, m=2, n=2, k=3)
train = TrainConfig(tokens=200, batch_size=100)
data = lambda layer: {"layer": layer, "hookpoint": None, "model": "EleutherAI/pythia-70m"}
parts = {"sae": {"d_model": 8, "dict_size": 16, "k": 3}, "train": {}}
settings = [{"config": {**parts, "data": data(n)}, "data": {"layer": n}} for n in (3, 4)]
fit_many([config] * 2, x, train, names=["l3", "l4"], hookpoints=["a", "b"], out="suite",
         settings=settings)
assert main(["suite", "--to", "hub", "--repo", "me/suite"]) == 0
print(kronsae.load("me/suite", layer=4).config.k, kronsae.load("me/suite", subfolder="l3").config.k)
for settings in ({"layer": 5}, {}):
    try:
        kronsae.load("me/suite", **settings)
    except kronsae.InputError as error:
        print(error)
assert main(["suite", "--to", "hub", "--repo", "me/one", "--members", "l4"]) == 0
"""
    lines = run(hub, tmp_path, script)
    assert 'kronsae.load("me/suite", subfolder="NAME")' in lines[1]
    assert lines[2] == "3 3" and "no SAE at layer 5; it has l3, l4" in lines[3]
    files = hub.commits["me/suite"][hub.branches["me/suite"]["main"]]
    member = ("README.md", "config.json", "sae.safetensors")
    inside = {f"{name}/{file}" for name in ("l3", "l4") for file in member}
    assert set(files) == {"README.md", "sweep.json", *inside}
    card = files["README.md"].decode()
    assert 'kronsae.load("me/suite", layer=3)' in card and "| l4 |" in card
    one = hub.commits["me/one"][hub.branches["me/one"]["main"]]
    assert not any(file.startswith("l3") for file in one) and not hub.unknown


def test_an_sae_of_another_library_on_the_hub(hub, tmp_path):
    """As sparsify's repositories are: a folder for each hookpoint."""
    fixture = Path(__file__).parent / "fixtures" / "interop" / "sparsify" / "layers.3"
    hub.commits["them/saes"], hub.branches["them/saes"] = {}, {}
    files = {f"layers.3/{path.name}": path.read_bytes() for path in fixture.iterdir()}
    hub.commit("them/saes", "main", files)
    script = """
import kronsae
sae = kronsae.load("them/saes", subfolder="layers.3")
print(sae.config.k, sae.config.encoder, sae.metadata["data"]["layer"])
"""
    assert run(hub, tmp_path, script) == ["3 dense 3"]


def test_model_card():
    """The hub reads its head; people read the rest."""
    sae = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3))
    sae.metadata = METADATA
    card = model_card(sae, "me/my-sae", report=True)
    _, head, text = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["base_model"] == "EleutherAI/pythia-70m" and facts["library_name"] == "kronsae"
    assert {"sparse-autoencoder", "kronsae"} <= set(facts["tags"])
    for part in (
        "# my-sae",
        "A KronSAE of `EleutherAI/pythia-70m` at `gpt_neox.layers.3` (the residual stream after "
        "block 3): 16 latents, 3 active per token",
        'kronsae.load("me/my-sae")',
        "| Explained variance | 0.75 |",
        "| heads | 4 |",
        "report.html",
    ):
        assert part in text, part


def test_model_card_of_an_sae_that_says_nothing_of_its_model():
    sae = SAE(SAEConfig(d_model=8, encoder="dense", dict_size=16, k=3, selection="batchtopk"))
    sae.metadata = {"data": {"name": "/somewhere/on/my/disk"}}
    card = model_card(sae, "me/my-sae")
    assert "base_model" not in card and "report.html" not in card and "held-out" not in card
    assert "A BatchTopK SAE of" in card and "about 3 active per token" in card


def test_names_stay_names():
    """Whatever metadata hold, they are text of the card, and neither Markdown nor YAML."""
    evil = "a`b``c` [click](http://x) <script>\n---\nbase_model: them/theirs"
    sae = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3))
    data = {"name": evil, "hookpoint": f"`{evil}", "target_hookpoint": evil, "layer": None}
    data |= {"context_begin": [evil, "`"], "context_length": 8}
    sae.metadata = {"data": data, "config": {"data": {"dataset": evil}}}
    card = model_card(sae, "me/my-sae")
    _, head, text = card.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"library_name", "tags"}
    shown = MarkdownIt().parse(text)
    inline = [token for block in shown for token in block.children or ()]
    assert not {"link_open", "html_inline", "em_open"} & {token.type for token in inline}
    names = [token.content for token in inline if token.type == "code_inline"]
    on_a_line = " ".join(evil.split())
    assert names.count(on_a_line) == 4 and names.count("`") == 1
    assert f"`{on_a_line}" in names


@pytest.mark.parametrize(
    ("dataset", "on_hub"),
    [
        ("HuggingFaceFW/fineweb-edu", True),
        *((name, False) for name in ("stdlib", "texts/mine.jsonl", "./mine/text", "a/*.txt")),
        *((name, False) for name in ("tests/fixtures", "a/b,c/d", "/data/private", "mine:rest/x")),
    ],
)
def test_dataset_of_the_card(dataset, on_hub):
    """Text names it as the run did; the hub links to one of its own."""
    sae = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3))
    sae.metadata = METADATA | {"config": {"data": {"dataset": dataset}}}
    card = model_card(sae, "me/my-sae")
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts.get("datasets") == ([dataset] if on_hub else None)
    assert f"of activations of width 8, trained on text of `{dataset}`.\n" in card
    assert "text of" not in model_card(SAE(sae.config), "me/my-sae")


def test_figures_that_are_no_numbers():
    sae = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3))
    values = {"explained_variance": float("nan"), "mse": float("inf"), "l0": 10**400}
    sae.metadata = {"metrics": values | {"ce_recovered": None, "fvu": "0.5", "cosine": 0.5}}
    card = model_card(sae, "me/my-sae")
    assert "nan" not in card and card.count("| not finite |") == 3
    assert "| Cosine | 0.5 |" in card and "FVU" not in card


def test_push_refuses_a_name_that_is_none():
    with pytest.raises(InputError, match="expected 'owner/name', got 'mine'"):
        push(SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=3)), "mine")
