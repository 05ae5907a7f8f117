"""Keeps vLLM from changing the classes of the trainer's model.

vLLM's transformers backend builds the engine's model from the classes of transformers, and decorates the decoder's
class for torch.compile: the class itself gets another base, `__init__` and `__call__`. If it is the class of the
trainer's model too, the trainer's forward pass fails afterwards, and no further model of the class can be made. Here
the engine's modules get a subclass of their own, which is decorated in the place of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType
from typing import Any

from ...errors import EngineError

_BACKEND = "vllm.model_executor.models.transformers.base"
_SHARED = ("torch.", "builtins", "abc", "typing")
"""Modules of classes that both sides share and torch itself changes, as when it traces or compiles."""
_DECORATE, _MODEL_CREATED = "_decorate_cls_for_torch_compile", "_create_hf_to_vllm_mapper"
"""Methods of the backend's `Base`: the first decorates a class, the second runs when the modules have been made."""


@contextmanager
def unchanged_classes(modules: Iterable[Any]) -> Generator[None]:
    """Construct an engine in the block, and leave the classes of `modules`, the trainer's, as they are.

    Raises:
        EngineError: vLLM has changed the code of one of these classes in a way that is not known here. The class is
            restored, so the engine cannot be used.
    """
    kinds = {kind for module in modules for kind in type(module).__mro__ if not kind.__module__.startswith(_SHARED)}
    before = {kind: _attributes(kind) for kind in kinds}
    changed: list[str] = []
    try:
        with _subclasses_for_the_engine():
            yield
    finally:
        for kind, attributes in before.items():
            if _restore(kind, attributes):
                changed.append(f"{kind.__module__}.{kind.__qualname__}")
    if changed:
        raise EngineError(
            f"vLLM has changed {changed[0]}, a class of the trainer's model, which then computes something else. The "
            "class is restored, and this engine cannot be used: start it in a process of its own, by `vgen serve`"
        )


def _attributes(kind: type) -> dict[str, tuple[Any, Any]]:
    """The attributes of a class, and copies of those that are containers."""
    attributes = {name: value for name, value in vars(kind).items() if not name.startswith("_abc")}
    return {name: (value, _copy(value)) for name, value in {**attributes, "__bases__": kind.__bases__}.items()}


def _copy(value: Any) -> Any:
    return type(value)(value) if type(value) in (dict, list, set) else None


def _restore(kind: type, before: dict[str, tuple[Any, Any]]) -> bool:
    """Give a class the attributes back that it had. Returns whether its bases or a function were different."""
    now = _attributes(kind)
    missing = None, None
    names = before.keys() | now.keys()
    different = {name for name in names if before.get(name, missing)[0] is not now.get(name, missing)[0]}
    for name in different:
        if name in before:
            setattr(kind, name, before[name][0])
        else:
            delattr(kind, name)
    for value, contents in before.values():
        if contents is not None and value != contents:
            value.clear()
            value.extend(contents) if type(value) is list else value.update(contents)
    values = [each[name][0] for each in (before, now) for name in different if name in each]
    return "__bases__" in different or any(map(callable, values))


@contextmanager
def _subclasses_for_the_engine() -> Generator[None]:
    """Within the block, the transformers backend decorates subclasses, of which only the engine has modules."""
    try:
        backend = import_module(_BACKEND).Base
        decorate, created = getattr(backend, _DECORATE), getattr(backend, _MODEL_CREATED)
    except (ImportError, AttributeError):  # another version of vLLM: `unchanged_classes` checks what it does
        yield
        return
    decorations: dict[type, Callable[[type], None]] = {}

    def postpone(self: Any, cls: type, *arguments: Any, **keywords: Any) -> None:
        decorations[cls] = lambda kind: decorate(self, kind, *arguments, **keywords)

    def give_classes(self: Any) -> None:
        for module in list(self.model.modules()):
            if (decoration := decorations.get(type(module))) is not None:
                kind = _subclass(type(module))
                decoration(kind)
                module.__class__ = kind
                kind.__init__(module)  # the part that the decoration has added
        created(self)

    try:
        setattr(backend, _DECORATE, postpone)
        setattr(backend, _MODEL_CREATED, give_classes)
        yield
    finally:
        setattr(backend, _DECORATE, decorate)
        setattr(backend, _MODEL_CREATED, created)


def _subclass(kind: type) -> Any:
    """A class under the same name that does what `kind` does, for modules that have been initialized already.

    `forward` is a copy with a code object of its own, because vLLM exchanges that, and torch.compile caches by it.
    """
    attributes: dict[str, Any] = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    forward: Any = kind.forward  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(forward, FunctionType):
        own_code = forward.__code__.replace()
        copy = FunctionType(own_code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
        for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
            setattr(copy, name, getattr(forward, name))
        copy.__dict__.update(forward.__dict__)
        attributes["forward"] = copy
    return type(kind)(kind.__name__, (kind,), attributes | {"__init__": lambda self: None})
