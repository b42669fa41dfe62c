"""Checks of numbers in settings, by their dotted names."""

import math

from megatron_m3.errors import ConfigError


def check_range(section: str, config: object, low: float, high: float, *names: str) -> None:
    """Refuse fields outside [low, high], infinity and nan, by their dotted names."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high or value == math.inf:
            allowed = f"at least {low}, and finite" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{section}.{name}={value}: must be {allowed}")


def check_positive(section: str, config: object, *names: str) -> None:
    """Refuse fields that are not above 0 and finite, by their dotted names."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{section}.{name}={getattr(config, name)}: must be above 0, and finite")
