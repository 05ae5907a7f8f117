"""A load format that gives the engine's own model random weights and a draft model those of its checkpoint.

A sync brings the weights of the target, not of the draft of speculative decoding. vLLM loads a standalone draft by the
target's load format, whatever `draft_load_config` says, so that `dummy` would leave it with random weights.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import replace
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from .initial_checkpoint import DUMMY_TARGET


@register_model_loader(DUMMY_TARGET)
class DummyTargetLoader(DummyModelLoader):
    """Random weights, except for a draft model, which is loaded as its `draft_load_config` says."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """See vLLM's `BaseModelLoader`."""
        speculative = vllm_config.speculative_config
        draft = getattr(speculative, "draft_model_config", None)
        config = getattr(speculative, "draft_load_config", None)
        # Methods without a model of their own have the target's configuration here.
        if config is None or model_config is not draft or draft is speculative.target_model_config:
            return super().load_model(vllm_config, model_config, prefix)
        of_draft: Any = replace(vllm_config, load_config=config)
        return get_model_loader(config).load_model(of_draft, model_config, prefix)
