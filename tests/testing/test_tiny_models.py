"""The tiny models: small, repeatable, saved, and made without touching the random state."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'vgen[cpu]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'vgen[cpu]'")

from vgen.testing import byte_tokenizer, tiny_model, tiny_vision_model  # noqa: E402


def test_the_tokenizer_has_one_token_for_each_byte():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aä")["input_ids"]
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "aä"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    assert len({tokenizer(chr(byte))["input_ids"][0] for byte in range(128)}) == 128


def test_a_model_is_saved_with_its_tokenizer_and_can_be_loaded(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = tiny_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.config._name_or_path == str(tmp_path / "model")
    saved = loaded.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 200_000 < sum(parameter.numel() for parameter in model.parameters()) < 500_000
    text = "the same"
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_seed_decides_the_weights_and_the_random_state_stays(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, same, other = (tiny_model(tmp_path, seed=seed)[0].lm_head.weight for seed in (3, 3, 4))
    assert torch.rand(1) == expected
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_fields_of_the_config_can_be_overridden(tmp_path):
    model, _ = tiny_model(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    assert len(model.model.layers) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_vision_model_has_the_placeholder_and_the_tiles_of_its_docstring(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'vgen[cpu]'")
    model, processor = tiny_vision_model(tmp_path)
    placeholder = processor.image_token_id
    assert placeholder == 259
    for size, tokens in (((8, 8), (4 + 1) * 4), ((64, 20), (2 + 1) * 4)):
        inputs = processor(text="a<image>b", images=[image.new("RGB", size)], return_tensors="pt")
        assert (inputs["input_ids"] == placeholder).sum() == tokens
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
    assert (tmp_path / "processor_config.json").exists() or (tmp_path / "preprocessor_config.json").exists()
