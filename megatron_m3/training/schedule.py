"""What changes with the step, as pure functions of it: the learning rate (sections 5 and 6), the kept tokens, the
references' gradient."""

import math

from megatron_m3.config import MemoryConfig, ScheduleConfig, TrainingConfig


def rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the highest rate at ``step`` of ``steps``, counted from 0.

    The rate rises linearly over the first ``warmup_fraction`` of the steps and reaches its height on the last of them.
    Then ``wsd`` stays there until the last ``decay_fraction`` of the steps, over which it falls linearly; ``cosine``
    falls along half a cosine; ``constant`` stays. Both falls end at ``min_ratio`` on the last step.
    """
    warmup = math.ceil(schedule.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.style == "constant":
        return 1.0
    decay = steps - warmup
    if schedule.style == "wsd":
        decay = min(decay, math.ceil(schedule.decay_fraction * steps))
    fallen = min(1.0, max(0.0, (step + 1 - (steps - decay)) / max(decay, 1)))
    share = 1 - fallen if schedule.style == "wsd" else (1 + math.cos(math.pi * fallen)) / 2
    return schedule.min_ratio + (1 - schedule.min_ratio) * share


def learning_rate(step: int, steps: int, highest: float, schedule: ScheduleConfig) -> float:
    """The learning rate at ``step`` of ``steps``, counted from 0, with ``highest`` as its largest value."""
    return highest * rate_factor(step, steps, schedule)


def kept_tokens(step: int, steps: int, memory: MemoryConfig) -> int:
    """Tokens kept of a full reference at ``step`` of ``steps``, counted from 0: a curriculum from all to few."""
    falling = memory.curriculum * steps
    if step >= falling:
        return memory.num_kept_tokens
    return round(memory.reference_length * (memory.num_kept_tokens / memory.reference_length) ** (step / falling))


def gradient_in_references(step: int, training: TrainingConfig) -> bool:
    """Whether the gradient of ``step``, counted from 0, flows through the references."""
    every = training.reference_gradient_every
    return every > 0 and step % every == 0
