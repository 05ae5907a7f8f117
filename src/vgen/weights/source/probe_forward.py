"""The log-probabilities that the trainer's own model gives to a probe's tokens, and how much rounding moves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...engine_protocol import CannotProbe, ProbeLogprobs
from .rounding_noise import TENSOR_FLOAT32, UNITS, observed_dtypes, rounding_noise, rounding_unit
from .unwrap_model import unwrapped, unwrapped_once

NOISE_PASSES = 3
"""Forward passes with noise. With one alone, the tokens that happen to change experts would be too few to count."""
EXPERTS_FACTOR = 4.0
"""How many times the noise is larger with experts, up to that of bf16.

The finer the rounding, the fewer tokens change experts by it: perhaps one in the engine, and none in the passes with
noise, whose own change and that of the tokens after it would look like a fault.
"""
ROWS = 32
"""Rows of logits that are converted to float32 at a time: a whole float32 copy of the logits could exhaust memory."""
SMALL_BUFFER = 1 << 20
"""Largest buffer, in elements, that is saved during a probe. A forward pass does not write larger ones: weights."""
PACKS_IN_FORWARD = "support_avx512bf16_for_cpu"
"""The attribute of bitsandbytes' `Linear4bit` that lets a forward pass repack the weights."""
WITHOUT_AUTOCAST = "_original_forward"
"""Where accelerate keeps the forward of a model whose `forward` it has replaced by one within autocast."""
FRAMEWORKS = ("torch.", "accelerate.", "deepspeed.", "peft.", "transformers.")
"""Modules whose forward hooks move, gather or count tensors and change no result."""


def probe_logprobs(model: torch.nn.Module, token_ids: list[int], unit: float = 0.0) -> ProbeLogprobs:
    """Run the trainer's model on a probe. All ranks of a sharded model must call it together.

    `unit` is the relative rounding error of the engine, such as 2⁻⁹ for bf16; the model's own counts where it is
    larger. Autocast is off, because the engine computes in the dtype of its weights. The model, its modules' modes, its
    weights, its buffers and the random states are afterwards as before.

    Raises:
        CannotProbe: The forward pass fails.
    """
    hooks = tuple(forward_hooks(model).values())
    with _forward_pass(model):
        return _probe(model, token_ids, unit, hooks)


def model_logprobs(model: torch.nn.Module, token_ids: list[int], temperature: float = 1.0) -> list[float]:
    """The log-probability of each token but the first, in nats, of logits divided by `temperature`.

    As for `probe_logprobs`, all ranks call it together, autocast is off, and the model is left as it was. Raises
    `CannotProbe`.
    """
    with _forward_pass(model):
        return _forward(model, token_ids, temperature).tolist()


@contextmanager
def _forward_pass(model: torch.nn.Module) -> Iterator[None]:
    """A block that runs the model's forward pass. What fails in it is a `CannotProbe`."""
    try:
        with _undisturbed(model):
            yield
    except CannotProbe:
        raise
    except torch.OutOfMemoryError as error:
        raise CannotProbe("no memory for the trainer model's own forward pass") from error
    except Exception as error:
        raise CannotProbe(f"the trainer model's own forward pass fails with {type(error).__name__}") from error
    finally:
        _reshard(model)


def differences(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`some - others`, and 0 where both are the same infinity, as of a token that a model never gives."""
    return torch.where(some == others, 0.0, some - others)


def text_config(model: Any) -> Any:
    """The configuration of the model's text part, inside all wrappers."""
    config = unwrapped(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def forward_hooks(model: torch.nn.Module) -> dict[int, str]:
    """The forward hooks that frameworks did not register: by torch's number of each, its module and function.

    An engine does not run them.
    """
    return {
        number: f"{path or type(module).__name__}: {_name(hook)}"
        for path, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
        for number, hook in (module._forward_hooks | module._forward_pre_hooks).items()
        if not _of_a_framework(hook)
    }


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _of_a_framework(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(FRAMEWORKS)


def _probe(model: torch.nn.Module, token_ids: list[int], unit: float, hooks: tuple[str, ...]) -> ProbeLogprobs:
    with observed_dtypes(model) as dtypes:
        logprobs = _forward(model, token_ids)
    device_type = next(model.parameters()).device.type
    unit = max(unit, rounding_unit(dtypes, device_type))
    if _has_experts(model):
        unit = max(unit, min(EXPERTS_FACTOR * unit, UNITS[torch.bfloat16]), TENSOR_FLOAT32)
    changes: list[torch.Tensor] = []
    for seed in range(NOISE_PASSES):
        with rounding_noise(model, unit, seed):
            changes.append(differences(_forward(model, token_ids), logprobs))
    if not any(change.any() for change in changes):
        raise CannotProbe("rounding noise cannot be put into the trainer model's forward pass")
    return ProbeLogprobs(token_ids, logprobs, torch.stack(changes), unit, hooks)


def _forward(model: torch.nn.Module, token_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The log-probability of each token but the first, on the host."""
    inputs = torch.tensor([token_ids], device=next(model.parameters()).device)
    logits = _without_data_parallel(model)(input_ids=inputs, use_cache=False).logits[0, :-1]
    logprobs = [
        (rows.float() / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        for rows, targets in zip(logits.split(ROWS), inputs[0, 1:].split(ROWS), strict=True)
    ]
    return torch.cat(logprobs).cpu()


def _without_data_parallel(model: Any) -> Any:
    """The model inside wrappers that one rank alone must not call: DDP's forward broadcasts buffers to other ranks."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
        model = unwrapped_once(model)
    return model


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Everything that a forward pass of the block depends on, or could change, is set, and is afterwards as before."""
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device.index or 0]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # Code that was compiled without the hooks of `rounding_noise` would not run them.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for prepare in (_evaluating, _without_autocast, _buffers_kept):
            stack.enter_context(prepare(model))
        yield


@contextmanager
def _without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """Within the block the modules that `Accelerator.prepare` has wrapped have their own forward."""
    wrapped = [module for module in model.modules() if {WITHOUT_AUTOCAST, "forward"} <= vars(module).keys()]
    forwards = [module.forward for module in wrapped]
    for module in wrapped:
        module.forward = getattr(module, WITHOUT_AUTOCAST)
    try:
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            module.forward = forward


@contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards each module has the buffers that it had, with their content."""
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    small = [b for _, table in tables for b in table.values() if b is not None and b.numel() <= SMALL_BUFFER]
    saved = [(buffer, buffer._version, buffer.clone()) for buffer in small]
    try:
        yield
    finally:
        for buffers, table in tables:
            buffers.update(table)
        for buffer, version, content in saved:
            if buffer._version != version:
                buffer.copy_(content)


def _reshard(model: torch.nn.Module) -> None:
    # FSDP2 leaves the outermost parameters gathered after a forward pass, for a backward pass that never comes here.
    for module in model.modules():
        if (reshard := getattr(module, "reshard", None)) is not None and "FSDP" in type(module).__name__:
            reshard()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; afterwards each module is in its own mode again.

    Outside training bitsandbytes repacks 4-bit weights in a forward pass, on a CPU with AVX512-BF16, and cannot train
    the repacked weights. So repacking is switched off here.
    """
    training = [module for module in model.modules() if module.training]
    packing = [module for module in model.modules() if getattr(module, PACKS_IN_FORWARD, False)]
    model.eval()
    for module in packing:
        setattr(module, PACKS_IN_FORWARD, False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in packing:
            setattr(module, PACKS_IN_FORWARD, True)


def _has_experts(model: Any) -> bool:
    """Whether a router chooses experts: the least noise can then change a whole expert's part of a result."""
    fields = vars(text_config(model)).items()
    return any("experts" in name and "per_tok" not in name and isinstance(v, int) and v > 1 for name, v in fields)
