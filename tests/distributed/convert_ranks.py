"""Ranks of test_convert_layouts: logits and greedy tokens of checkpoints in several layouts, against transformers'."""

import json
import sys
from pathlib import Path

import torch

from megatron_m3.platform import select


def main() -> None:
    """``convert_ranks JOBS OUTPUT``: JOBS is JSON, a list of (checkpoint, expectations, tensor, pipeline)."""
    torch.set_num_threads(1)
    select()
    from megatron.core import parallel_state

    from ckpt_convert.sides import OurSide, is_first, open_side
    from ckpt_convert.verify import compare_logits, greedy_agreement
    from megatron_m3.platform.distributed import shut_down

    found = []
    for checkpoint, expectations, tensor, pipeline in json.loads(sys.argv[1]):
        side = open_side(Path(checkpoint), tensor, pipeline)
        assert isinstance(side, OurSide)
        texts, expected = torch.load(expectations)
        logits = [side.logits([*prompt, *answer]) for prompt, answer in texts]
        found.append([compare_logits(expected, logits), greedy_agreement(texts, logits)])
        first = is_first()
        parallel_state.destroy_model_parallel()
    if first:
        Path(sys.argv[2]).write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
