"""`kronsae COMMAND`: every command of the package. `python -m kronsae.COMMAND` does the same."""

import difflib
import sys
from importlib import import_module

from kronsae.commandline import as_command
from kronsae_kernels import __version__

COMMANDS = {
    "train": "train an SAE, or a sweep of them, on a model's activations",
    "harvest": "write activations to the disk once, and train on them many times",
    "evaluate": "judge runs on held-out text, beside each other",
    "explore": "look at all that a run learned, in one HTML file",
    "properties": "measure what its latents do on a text (explore does so, too)",
    "intervene": "ablate, set and steer latents in the running language model",
    "interpret": "let a language model explain latents, and score the explanations",
    "export": "to SAELens, sparsify, dictionary_learning or the Hugging Face hub",
    "experiments": "check the statements of the KronSAE paper",
    "doctor": "what this machine can do, and whether the kernels are right",
}

HELP = """kronsae {version}: train sparse autoencoders with very large dictionaries

Start with:
  kronsae train              an SAE on a small model of ours, in minutes
  kronsae explore runs/...   look at what it learned

Commands:
{commands}

kronsae COMMAND --help lists the flags of one, with an example.
"""


@as_command()
def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status, or 2 if there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {what}" for command, what in COMMANDS.items()]
        print(HELP.format(version=__version__, commands="\n".join(lines)), end="")
        return 0
    if name in ("--version", "version"):
        print(f"kronsae {__version__}")
        return 0
    if name not in COMMANDS and name != "interop.sae_bench":
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "kronsae --help lists all"
        print(f"error: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    module = import_module(f"kronsae.{name}")
    if hasattr(module, "__path__"):  # a folder
        module = import_module(f"kronsae.{name}.__main__")
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
