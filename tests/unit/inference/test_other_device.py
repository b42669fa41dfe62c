"""A checkpoint is read where what computed its attention in training cannot run."""

from megatron_m3.config import replace_fields
from tests.tiny_model import sentence, tiny_model


def test_a_model_trained_with_a_cards_attention_generates_here(tmp_path):
    from megatron_m3.inference.engine import Engine
    from megatron_m3.model.checkpoint import load_model, save_checkpoint

    made = tiny_model(tmp_path)
    config = replace_fields(made.config, {"model.attention": "te", "data.tokenizer": str(tmp_path / "tokenizer")})
    save_checkpoint(tmp_path / "run", 1, [made.model], config)
    loaded = load_model(tmp_path / "run")
    found, expected = (Engine(one).generate([sentence(1, 9)], 8)[0] for one in (loaded, made))
    assert found == expected
