"""What an index gets: links of the long description, the distribution of the kernels alone."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def kernels():
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    return tomllib.loads((ROOT / "kronsae_kernels" / "pyproject.toml").read_text(encoding="utf-8"))


def test_links_of_the_long_description_are_absolute():
    """In the order of README.md: pages and headings in the repository, pictures as files."""
    readme = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    shown = LINK.findall(SETUP["long_description"]())
    repository = SETUP["REPOSITORY"]
    assert len(readme) == len(shown) > 20
    for (picture, target), (_, absolute) in zip(readme, shown, strict=True):
        if target.startswith("https:"):
            assert absolute == target
        elif target.startswith("#"):
            assert absolute == repository + target
        else:
            kind = "raw" if picture else "blob"
            assert absolute == f"{repository}/{kind}/main/{target}"
            assert (ROOT / target.partition("#")[0]).is_file(), target
    assert any(picture for picture, _ in shown)


def test_every_extra_is_explained():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([\w-]+)`", page.partition("| extra |")[2], flags=re.MULTILINE)
    assert explained[: len(SETUP["EXTRAS"])] == list(SETUP["EXTRAS"])
    # The pip of Python 3.10 and 3.11 does not find an extra with an underscore.
    assert all(re.fullmatch("[a-z-]+", extra) for extra in SETUP["EXTRAS"])


def test_pages_install_what_can_be_installed():
    """kronsae is on no index: pages install it from a checkout or from the repository."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in [*pages, ROOT / "kronsae_kernels" / "README.md"]:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"pip install '?kronsae(?!.* @ git\+)[^`\n]*", text), page.name
        for extra in re.findall(r"pip install [^`\n]*\[([\w-]+)\]", text):
            assert extra in SETUP["EXTRAS"], page.name


def data_files(package: str) -> set[Path]:
    """All files of a package that are not Python, without what builds leave."""
    made = re.compile(r"__pycache__|/build/|\.egg-info/")
    files = (path for path in (ROOT / package).rglob("*") if path.is_file())
    return {path for path in files if path.suffix != ".py" and not made.search(str(path))}


def packed(data: dict[str, list[str]]) -> set[Path]:
    """The files that `package_data` names."""
    return {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
        if path.is_file() and path.suffix != ".py"
    }


def test_every_data_file_is_packed(kernels):
    """In the wheels of both distributions, without the kernels' own packaging."""
    folder = ROOT / "kronsae_kernels"
    own = {folder / name for name in ("pyproject.toml", "README.md", "LICENSE")}
    of_kernels = data_files("kronsae_kernels") - own
    assert packed(SETUP["PACKAGE_DATA"]) == data_files("kronsae") | of_kernels
    assert packed(kernels["tool"]["setuptools"]["package-data"]) == of_kernels


# The kernels' own distribution


def test_kernels_have_all_their_folders(kernels):
    folders = {path.parent for path in (ROOT / "kronsae_kernels").rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    assert set(kernels["tool"]["setuptools"]["packages"]) == {
        name for name in names if "build" not in name
    }


def test_kernels_need_what_kronsae_needs_of_torch(kernels):
    needed = kernels["project"]["dependencies"]
    assert [re.match(r"\w+", each).group() for each in needed] == ["torch"]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(f'"{each}"' in setup for each in needed)


def test_kernels_work_where_nothing_but_torch_is():
    """The example of their README, while kronsae and its other requirements cannot be imported."""
    readme = (ROOT / "kronsae_kernels" / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    missing = ["kronsae", "safetensors", "transformers", "datasets", "huggingface_hub", "rich"]
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n{example}\n"
        "assert x_hat.shape == (32, 64)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
