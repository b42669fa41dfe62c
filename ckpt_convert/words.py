"""Words without an option's name on the command line of a conversion: ``m3 convert from-hf SOURCE OUTPUT``."""

import dataclasses
import sys
import typing
from collections.abc import Sequence

from megatron_m3.config import parse


def parse_words[T](cls: type[T], argv: Sequence[str] | None, job: str, description: str, names: Sequence[str]) -> T:
    """Parse ``argv`` into the dataclass ``cls``; words that belong to no option are the fields ``names``, in order."""
    hints = typing.get_type_hints(cls)
    flags = {f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(typing.cast("type[typing.Any]", cls))
             if hints[one.name] is bool} | {"-h", "--help"}
    left, words, is_value = list(names), [], False
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") or word == "-h":
            is_value = "=" not in word and word.replace("_", "-") not in flags
            words.append(word)
        elif is_value or not left:
            is_value = False
            words.append(word)
        else:
            words.append(f"--{left.pop(0).replace('_', '-')}={word}")
    places = " ".join(name.upper() for name in names)
    return parse(cls, words, job, f"{description}\n\nThe words {places} may stand without the options' names.")
