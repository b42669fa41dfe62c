"""Builds Transformer Engine's real modules on the CPU, where they cannot compute, and passes checkpoints both ways.

A process of its own: the stand-ins for the CPU hide Transformer Engine, so it is imported before them, and its modules
are told that there is a card.
"""

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch  # noqa: F401, first, since it loads the CUDA libraries that Transformer Engine needs

try:
    import transformer_engine.pytorch  # noqa: F401
except (ImportError, OSError) as error:
    print(f"skipped: {error}")
    sys.exit()

from megatron_m3.config import replace_fields
from megatron_m3.platform import cpu, select
from tests.tiny_model import joined_world, sentence, tiny_config

TE = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformer_engine"}
FIELDS = {"model__qkv_bias": "true", "model__qk_norm": "true", "training__dtype": "bf16"}


def main() -> None:
    """Write with each kind of layer, read with the other."""
    stand_in = cpu._stand_in_for_torch_cuda
    with patch.object(cpu, "_stand_in_for_torch_cuda", lambda: (sys.modules.update(TE), stand_in())):
        select()

    from megatron_m3.model import layers
    from megatron_m3.model.checkpoint import load_weights, save_checkpoint
    from megatron_m3.model.gpt import build_model
    from megatron_m3.model.weights_hash import weights_hash
    from megatron_m3.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as name, joined_world():
        folder = Path(name)
        train_tokenizer([sentence(seed, 200) for seed in range(20)], 512, folder / "tokenizer")
        config = tiny_config(**FIELDS, data__tokenizer=str(folder / "tokenizer"))
        hashes = []
        for step, (writer, reader) in enumerate((("local", "transformer_engine"), ("transformer_engine", "local"))):
            models = []
            for kind, seed in ((writer, "1"), (reader, "2")):
                fields = {"training.transformer_impl": kind, "training.seed": seed}
                with (patch("torch.cuda.is_available", lambda: True),
                      patch.object(layers, "check_transformer_engine", lambda: None)):
                    models += build_model(replace_fields(config, fields))
            one, other = models
            checkpoint = save_checkpoint(folder, step, [one], config)
            assert weights_hash([other]) != weights_hash([one])
            hashes.append(load_weights(checkpoint, [other]))
            assert hashes[-1] == weights_hash([other]) == weights_hash([one])
            kinds = [type(model.decoder.layers[0].mlp.linear_fc1).__name__ for model in models]
            assert sorted(kinds) == ["ColumnParallelLinear", "TELayerNormColumnParallelLinear"], kinds
        assert hashes[0] == hashes[1]
    print("passed both ways")


if __name__ == "__main__":
    main()
