"""Models small enough to be made in a test, without a download, and loadable by vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

EOS, PAD = 256, 257
LAYERS: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
"""The language model of both. Its head size is 32, the smallest that vLLM's attention on a CPU supports."""
VISION_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %};"
    "{% endfor %}{% if tools %}T{{ tools|length }}{% endif %}a:"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte (ids 0 to 255), `<eos>` (256) and `<pad>` (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": EOS, "<pad>": PAD}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_model(
    directory: str | Path, *, seed: int = 0, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Make a Qwen2 of 0.3 M random float32 weights; save it with its tokenizer in `directory`, for vLLM to load.

    The vocabulary has 272 tokens, of which `byte_tokenizer` uses the first 258. `config` overrides fields of
    `Qwen2Config`. The same `seed` gives the same weights; torch's global random state stays as it is.

        model, tokenizer = tiny_model(tmp_path)
        generation = ColocateGeneration(model, processing_class=tokenizer, max_model_length=512)
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields: dict[str, Any] = dict(vocab_size=272, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"])
    tokenizer = byte_tokenizer()
    return _saved(Qwen2ForCausalLM, Qwen2Config(**LAYERS | fields | config), tokenizer, directory, seed), tokenizer


def tiny_vision_model(directory: str | Path, *, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make an Idefics3 of random float32 weights; save it with its processor in `directory`, for vLLM to load.

    A prompt holds the placeholder `<image>` (token id 259) once for each image. The processor scales an image to 64
    pixels on its longer side, and cuts it into 2 or 4 tiles of 32 × 32; each tile and an overview are 4 tokens.
    vLLM runs this architecture also where torchvision is not installed.
    """
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer()
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=VISION_TEMPLATE)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    config = Idefics3Config(
        text_config=LAYERS | dict(model_type="llama", vocab_size=304),
        vision_config=vision | dict(patch_size=8),
        image_token_id=processor.image_token_id,
        pad_token_id=PAD,
        architectures=["Idefics3ForConditionalGeneration"],
    )
    return _saved(Idefics3ForConditionalGeneration, config, processor, directory, seed).eval(), processor


def _saved(model_class: Any, config: Any, processor: Any, directory: str | Path, seed: int) -> PreTrainedModel:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    model.config._name_or_path = str(directory)  # ColocateGeneration starts vLLM from this path
    return model
