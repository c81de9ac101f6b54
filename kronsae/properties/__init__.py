"""Properties of a run's latents on a text: frequency, entropy, examples, relations, geometry."""

from kronsae.properties.examples import WINDOW, Examples
from kronsae.properties.gather import Examined, MeasureConfig, Properties, measure
from kronsae.properties.geometry import LogitEffects, Nearest, logit_effects, nearest_rows
from kronsae.properties.store import FOLDER, Stored, load_properties, save_properties
from kronsae.properties.summary import gates, summarise

__all__ = [
    "FOLDER",
    "WINDOW",
    "Examined",
    "Examples",
    "LogitEffects",
    "MeasureConfig",
    "Nearest",
    "Properties",
    "Stored",
    "gates",
    "load_properties",
    "logit_effects",
    "measure",
    "nearest_rows",
    "save_properties",
    "summarise",
]
