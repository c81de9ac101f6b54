"""Packaging of kronsae; `kronsae_kernels/pyproject.toml` is that of the kernels alone.

README.md says how to install both. `long_description` is README.md as an index shows it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/kronsae/kronsae"
VERSION = (ROOT / "kronsae_kernels" / "version.py").read_text(encoding="utf-8").split('"')[1]

PACKAGE_DATA = {
    "kronsae": ["py.typed", "*.j2"],
    "kronsae_kernels": ["py.typed"],
    "kronsae.embedded": ["stdlib-4m/*"],
    "kronsae.explore": ["page/*"],
    "kronsae.features": ["*.j2"],
    "kronsae_kernels.triton_impl": ["*.json"],
}
"""Files of the packages that are not Python."""

DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"]

EXTRAS = {
    # To work on kronsae: tests, linting, the site, building distributions.
    "dev": [
        "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "pytest>=8",
        "pytest-benchmark",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "expecttest",
        "mypy",
        "ruff==0.17.6",
        "tensorboard",
        "matplotlib",
        "pillow",
        "scipy",
        "selenium",
        "starlette",
        "uvicorn",
        "build",
        "twine",
        *DOCS,
    ],
    # `mkdocs build`.
    "docs": DOCS,
    # Pictures of `kronsae evaluate`, and of a latent's card.
    "report": ["matplotlib"],
    # `kronsae experiments`.
    "experiments": ["matplotlib", "scipy"],
    # `kronsae train --tensorboard`, `--wandb` and `--trackio`.
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "trackio": ["trackio"],
    # `kronsae explore --serve`.
    "serve": ["starlette", "uvicorn"],
    # `--image-column`.
    "images": ["pillow"],
    # Our SAEs in SAELens.
    "sae-lens": ["sae-lens>=6.54,<7"],
    # Our SAEs in SAEBench, which wants numpy < 2 and datasets < 4: an environment of its own.
    "sae-bench": ["sae-bench==0.6.0", "sae-lens>=6.54,<7"],
    # Other libraries that the benchmarks time; they live in one environment. dictionary-learning
    # brings torchvision, which must fit torch and its build: benchmarks/README.md.
    "peers": ["sae-lens==6.54.*", "eai-sparsify==1.3.*", "dictionary-learning==0.1.0"],
}


def long_description() -> str:
    """README.md with absolute links: to pages of the repository, and to its pictures as files."""

    def absolute(link: re.Match) -> str:
        picture, text, target = link.groups()
        if target.startswith("#"):
            return f"[{text}]({REPOSITORY}{target})"
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({REPOSITORY}/{kind}/main/{target})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)", absolute, text)


if __name__ == "__main__":
    setup(
        name="kronsae",
        version=VERSION,
        description="Sparse autoencoders with very large dictionaries for language models",
        long_description=long_description(),
        long_description_content_type="text/markdown",
        url=REPOSITORY,
        project_urls={
            "Documentation": f"{REPOSITORY}/tree/main/docs",
            "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
            "Issues": f"{REPOSITORY}/issues",
            "Paper": "https://arxiv.org/abs/2505.22255",
        },
        keywords=[
            "sparse autoencoder",
            "SAE",
            "KronSAE",
            "transcoder",
            "mechanistic interpretability",
            "dictionary learning",
            "language models",
        ],
        classifiers=[
            "Development Status :: 3 - Alpha",
            "Environment :: Console",
            "Intended Audience :: Science/Research",
            "Operating System :: OS Independent",
            "Programming Language :: Python :: 3 :: Only",
            "Programming Language :: Python :: 3.10",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
        ],
        license_expression="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        # An editable install is then a path of its own, and the folder of a clone, where Python
        # looks first, does not hide the package of the same name.
        package_dir={"": "."},
        packages=find_packages(
            include=["kronsae", "kronsae.*", "kronsae_kernels", "kronsae_kernels.*"]
        ),
        include_package_data=False,
        package_data=PACKAGE_DATA,
        install_requires=[
            "torch>=2.7",
            "numpy",
            "safetensors>=0.4.5",
            "transformers>=4.48",
            "datasets>=3.0",
            "huggingface_hub",
            "httpx2>=2,<3",
            "rich",
            "filelock",
            "jinja2",
        ],
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["kronsae = kronsae.__main__:main"]},
    )
