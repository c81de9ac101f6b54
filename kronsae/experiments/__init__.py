"""The paper's statements, checked: `python -m kronsae.experiments NAME`.

Importing it registers the experiments. Another one is a file here with an `Experiment` (see
`kronsae.experiments.experiment`), or a `TrainingExperiment` where SAEs are trained on a language
model's activations, and its line below; one of your own is a file named by --plugin.
"""

from importlib import import_module

MODULES = (
    "toy",
    "correlation",
    "composition",
    "heads",
    "isoflop",
    "comparison",
    "layers",
    "sparsity",
    "hierarchical",
    "jumprelu",
    "convergence",
    "conversion",
)
"""Experiments, in the order to list them."""

for module in MODULES:
    import_module(f"{__name__}.{module}")
