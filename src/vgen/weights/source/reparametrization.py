"""Modules of the trainer's model that compute a weight from others: by `torch.nn.utils.parametrize`, or by pruning.

Their state dict has what the weight is computed from (`weight_orig` and `weight_mask`, say), for which no engine has a
place. A weight that is computed in each forward pass cannot be sent as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize, prune

from .gather_error import gather_error
from .unwrap_model import clean

_REMOVERS = {
    "BasePruningMethod": "torch.nn.utils.prune.remove(module, {name!r})",
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module, {name!r})",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module, {name!r})",
}
"""By the class of the forward hook that computes a tensor: the call that makes a parameter of it again."""
_SUFFIXES = ("_orig", "_mask", "_g", "_v", "_u")
"""What such hooks append to a tensor's name, for the tensors that they compute it from."""


class Computed(NamedTuple):
    """A tensor that a module computes from others before each forward pass."""

    path: str
    """The module's."""
    kind: str
    """The class of what computes it."""
    remover: str
    """The call that makes a parameter of it again, with `module` for the module."""


def refuse_computed(root: torch.nn.Module, names: Iterable[str]) -> None:
    """Raise `WeightSyncError` if one of the tensors `names` is only what a module of `root` computes a weight from."""
    sources = {source: computed for source, computed in _computed(root)}
    for name in names if sources else ():
        # parametrizations.weight.original0: the tensor's own name is what follows last
        computed = sources.get(name) or sources.get(name.rpartition(".")[0])
        if computed is not None:
            raise gather_error(
                f"it is not a weight itself: the module {computed.path!r} computes one from it in each forward pass "
                f"({computed.kind}), so the engine has no place for it. Make it a plain parameter before the sync, by "
                f"{computed.remover}; or leave the module out: source_of(model, include=...)",
                name,
            )


def _computed(root: torch.nn.Module) -> Iterator[tuple[str, Computed]]:
    """Names of tensors, or of lists of them, that a weight is computed from, each with that weight."""
    for path, module in root.named_modules(remove_duplicate=False):
        path = clean(path)
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            for name, steps in parametrizations.items():
                remover = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                kind = ", ".join(type(step).__name__ for step in steps)
                yield f"{prefix}parametrizations.{name}", Computed(path, kind, remover)
        for hook in module._forward_pre_hooks.values():
            kinds = [kind.__name__ for kind in type(hook).__mro__]
            remover = next((_REMOVERS[kind] for kind in kinds if kind in _REMOVERS), None)
            if remover is not None:
                name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else getattr(hook, "name", "")
                computed = Computed(path, kinds[0], remover.format(name=name))
                yield from ((f"{prefix}{name}{suffix}", computed) for suffix in _SUFFIXES)
