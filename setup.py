"""Packaging of kronsae and kronsae_kernels (see README.md for how to install)."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = (Path(__file__).parent / "kronsae_kernels" / "version.py").read_text().split('"')[1]

setup(
    name="kronsae",
    version=VERSION,
    description="Sparse autoencoders with very large dictionaries on language-model activations",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(
        include=["kronsae", "kronsae.*", "kronsae_kernels", "kronsae_kernels.*"]
    ),
    package_data={
        "kronsae.embedded": ["*/*"],
        "kronsae.explore": ["page/*"],
        "kronsae_kernels.triton_impl": ["*.json"],
    },
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy",
        "safetensors>=0.4.5",
        "transformers>=4.48",
        "datasets>=3.0",
        "huggingface_hub",
        "rich",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "expecttest",
            "ruff==0.17.6",
            "tensorboard",
            "matplotlib",
            "scipy",
            "selenium",
        ],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        # Other libraries that the benchmarks time; they live in one environment.
        # dictionary-learning (its newest is 0.1.0) brings torchvision, whose build must fit
        # torch's: for a CPU build of torch, install both from its index first.
        "peers": ["sae-lens==6.54.*", "eai-sparsify==1.3.*", "dictionary-learning==0.1.0"],
        # SAEs of ours in other libraries. sae-bench wants numpy < 2 and datasets < 4, and so
        # an environment of its own.
        "sae_lens": ["sae-lens>=6.54,<7"],
        "sae_bench": ["sae-bench==0.6.0", "sae-lens>=6.54,<7"],
        "report": ["matplotlib"],
        "experiments": ["matplotlib", "scipy"],
    },
    entry_points={"console_scripts": ["kronsae = kronsae.__main__:main"]},
)
