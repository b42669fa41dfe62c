"""CPU or CUDA, chosen once, and the processes that share the work.

torch is imported with the first of these names, not by the modules beside them that do without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_m3.platform.platform import Platform, report, select

__all__ = ["Platform", "report", "select"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_m3.platform import platform

    return getattr(platform, name)
