"""Sequences longer than a model's positions are refused if positions are a table, else they cause a warning."""

import pytest
import torch
import transformers

from helpers import recipe, save_small_model, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.cost.plan import plan
from olmoscope.errors import UserError
from olmoscope.model.positions import check_context, most_positions

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 32, "ffn_dim": 32}
CONFIGS = {
    "GPT2": lambda: transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4, n_positions=40),
    "OPT": lambda: transformers.OPTConfig(**SMALL, word_embed_proj_dim=32, max_position_embeddings=40),
    "GPTJ": lambda: transformers.GPTJConfig(vocab_size=100, n_embd=32, n_layer=1, n_head=4, n_positions=40,
                                            rotary_dim=4),
    "MPT": lambda: transformers.MptConfig(vocab_size=100, d_model=32, n_layers=1, n_heads=4, max_seq_len=40),
    "XGLM": lambda: transformers.XGLMConfig(vocab_size=100, d_model=32, num_layers=1, attention_heads=4, ffn_dim=32,
                                            max_position_embeddings=40),
    "Llama": lambda: transformers.LlamaConfig(**SMALL, max_position_embeddings=40),
    "BLOOM": lambda: transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_the_model_itself_does(name):
    """A refused length makes the model itself fail; any other length runs."""
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if name == "BLOOM":
        assert most_positions(config) is None and check_context(config, 10**6, name) is None
        return
    assert most_positions(config) == 40
    assert check_context(config, 40, name) is None
    ids = torch.randint(100, (1, 50))
    if name in ("GPT2", "OPT", "GPTJ", "MPT"):
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, use_cache=False)
        with pytest.raises(UserError, match=f"sequences of up to 50 tokens are longer than the 40 positions of {name}, "
                                            "which are a table that ends there; set lengths up to 40"):
            check_context(config, 50, name)
    else:
        model(ids, use_cache=False)
        assert "longer than the 40 positions" in check_context(config, 50, name)


def test_collect_and_plan_say_so_before_anything_is_packed(tmp_path, capsys):
    write_documents(tmp_path / "corpus")
    lengths = {"tokens__chunk_lengths": [(200, 300)], "tokens__batch_tokens": 512}
    table, rotary = (recipe(tmp_path / "corpus", model__name=str(save_small_model(name, tmp_path / name)),
                            activations__layers=[1], saes=[{"layer": 1, "d_sae": 64, "k": 4}], **lengths)
                     for name in ("GPT2", "Llama"))
    for run in (lambda: collect(table, "train", tmp_path / "store"), lambda: plan(table, tmp_path / "out")):
        with pytest.raises(UserError, match="sequences of up to 300 tokens are longer than the 256 positions"):
            run()
    assert not (tmp_path / "store" / "tokens").exists()
    assert len(plan(rotary, tmp_path / "out").warnings) == 1
    collect(rotary, "train", tmp_path / "rotary")
    assert "300 tokens are longer than the 256 positions" in " ".join(capsys.readouterr().err.split())
