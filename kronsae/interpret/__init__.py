"""Explanations of latents by a language model, and scores of how well they predict.

A model describes a latent from examples of where it fires. Another prompt, without those examples,
then asks it which texts the description fits: whole texts (detection), or marked tokens of them
(fuzzing). A latent whose description says where it fires is interpretable. [KronSAE, App. D; Paulo
et al. 2024] Command line: `python -m kronsae.interpret RUN`.
"""

from kronsae.interpret.chat import Answers, Chat, Reply, ServerChat
from kronsae.interpret.delphi import encoders
from kronsae.interpret.examples import Example, LatentExamples, collect
from kronsae.interpret.local import LocalChat
from kronsae.interpret.scoring import Interpretation, Score, interpret

__all__ = [
    "Answers",
    "Chat",
    "Example",
    "Interpretation",
    "LatentExamples",
    "LocalChat",
    "Reply",
    "Score",
    "ServerChat",
    "collect",
    "encoders",
    "interpret",
]
