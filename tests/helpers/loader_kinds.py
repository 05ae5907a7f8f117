"""Loaders of the kinds that vLLM's models have, each over a small model, for the tests that account for elements."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

Metadata: TypeAlias = list[tuple[str, tuple[int, ...], torch.dtype]]
Shapes: TypeAlias = dict[str, tuple[int, ...]]


class Engine(nn.Module):
    """A model with parameters of the given shapes, and a loader that a subclass writes as `load(name, tensor)`."""

    SHAPES: ClassVar[Shapes] = {}
    SENT: ClassVar[Shapes] = {}
    """What a right trainer sends."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in self.SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def place(self, name: str) -> torch.Tensor:
        return getattr(self, name).data

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.load(name, tensor)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        self.place(name).copy_(tensor)

    @classmethod
    def sent(cls, dtype: torch.dtype = torch.float32, **changed: Any) -> Metadata:
        """What a trainer sends, with other shapes or dtypes for some names; None leaves a name out."""
        described = [(name, shape, dtype) for name, shape in cls.SENT.items() if name not in changed]
        return [*described, *(_entry(name, what, dtype) for name, what in changed.items() if what is not None)]


def _entry(name: str, what: Any, dtype: torch.dtype) -> tuple[str, tuple[int, ...], torch.dtype]:
    shape, dtype = what if isinstance(what[-1], torch.dtype) else (what, dtype)
    return name, tuple(shape), dtype


class DefaultCopies(Engine):
    """vLLM's default loader: the shapes must be equal. Unknown biases are skipped without a word."""

    SHAPES: ClassVar[Shapes] = {"down": (8, 16), "norm": (8,)}
    SENT: ClassVar[Shapes] = SHAPES

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name.endswith("_bias") and name not in self._parameters:
            return
        parameter = self._parameters[name]
        assert parameter is not None
        assert parameter.shape == tensor.shape, f"{list(tensor.shape)} into {list(parameter.shape)}"
        parameter.data.copy_(tensor)


class FusedProjections(Engine):
    """q, k and v become one weight, gate and up another; each is narrowed to its shard, so that more rows are cut."""

    SHAPES: ClassVar[Shapes] = {"qkv": (16, 8), "gate_up": (32, 8)}
    SENT: ClassVar[Shapes] = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "gate": (16, 8), "up": (16, 8)}
    SHARDS: ClassVar[dict[str, tuple[str, int, int]]] = {
        "q": ("qkv", 0, 8),
        "k": ("qkv", 8, 4),
        "v": ("qkv", 12, 4),
        "gate": ("gate_up", 0, 16),
        "up": ("gate_up", 16, 16),
    }

    def load(self, name: str, tensor: torch.Tensor) -> None:
        target, start, size = self.SHARDS[name]
        place = self.place(target).narrow(0, start, size)
        place.copy_(self.changed(tensor).narrow(0, 0, size))

    def changed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class CastProjections(FusedProjections):
    """The same, with a cast before the shard is taken, twice over."""

    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor)
        super().load(name, tensor)

    def changed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float64)


class OneRank(Engine):
    """The second of two ranks: rows of the first weight, columns of the second, each narrowed."""

    SHAPES: ClassVar[Shapes] = {"column": (4, 8), "row": (8, 4), "norm": (8,)}
    SENT: ClassVar[Shapes] = {"column": (8, 8), "row": (8, 8), "norm": (8,)}

    rank = 1

    def load(self, name: str, tensor: torch.Tensor) -> None:
        dim = {"column": 0, "row": 1}.get(name)
        tensor = tensor if dim is None else tensor.narrow(dim, self.rank * 4, 4)
        self.place(name).copy_(tensor)


class TransposedRank(OneRank):
    """As `OneRank`, of a checkpoint that keeps its matrices transposed."""

    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor.t().contiguous() if tensor.dim() == 2 else tensor)


class Experts(Engine):
    """Experts that come one by one; `w13` has the first and the third matrix."""

    SHAPES: ClassVar[Shapes] = {"w13": (4, 12, 8), "w2": (4, 8, 6)}
    SENT: ClassVar[Shapes] = {f"{e}.{w}": (6, 8) if w != "w2" else (8, 6) for e in range(4) for w in ("w1", "w3", "w2")}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        expert, _, which = name.partition(".")
        if which == "w2":
            self.place("w2")[int(expert)].copy_(tensor)
        else:
            self.place("w13")[int(expert)].narrow(0, 0 if which == "w1" else 6, 6).copy_(tensor)


class FusedExperts(Engine):
    """Experts that come in 3-D tensors, transposed, with both first matrices side by side."""

    SHAPES: ClassVar[Shapes] = Experts.SHAPES
    SENT: ClassVar[Shapes] = {"gate_up": (4, 8, 12), "down": (4, 6, 8)}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.transpose(-1, -2)
        for expert in range(4):
            if name == "down":
                self.place("w2")[expert].copy_(tensor[expert])
                continue
            for half, part in enumerate(tensor[expert].chunk(2, dim=0)):
                self.place("w13")[expert, 6 * half : 6 * half + 6].copy_(part)


class Composed(Engine):
    """A loader that copies and then changes what it has copied, as Mamba's for `A`, in float32."""

    SHAPES: ClassVar[Shapes] = {"a": (8,), "norm": (8,)}
    SENT: ClassVar[Shapes] = SHAPES

    def load(self, name: str, tensor: torch.Tensor) -> None:
        parameter = self.place(name)
        if name == "a":
            parameter.copy_(tensor)
            parameter.copy_(-torch.exp(parameter.float()))
        else:
            parameter.copy_(tensor.float() + 1)


class Padded(Engine):
    """A vocabulary that is padded with zeros. With `tied` both names are one parameter, of which the last stays."""

    SHAPES: ClassVar[Shapes] = {"embed": (12, 8), "head": (12, 8)}
    SENT: ClassVar[Shapes] = {"embed": (10, 8), "head": (10, 8)}

    def __init__(self, *, tied: bool = False, knows_head: bool = True) -> None:
        super().__init__()
        self.knows_head = knows_head
        if tied:
            self.head = self.embed

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "head" and not self.knows_head:
            raise KeyError(name)
        parameter = self.place(name)
        assert tensor.shape[0] == 10
        parameter[:10].copy_(tensor)
        parameter[10:].fill_(0)


class ReadsValues(DefaultCopies):
    """A loader that looks at a value, as those of some scales."""

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "norm" and tensor[0].item() < 0:
            raise ValueError(name)
        super().load(name, tensor)


class Registers(Engine):
    """A loader that registers what it was given: a parameter, a copy as a parameter, and a buffer."""

    SHAPES: ClassVar[Shapes] = {"same": (8, 4), "copy": (8, 4)}
    SENT: ClassVar[Shapes] = SHAPES | {"table": (3,), "filled": (2, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3))
        self.register_parameter("filled", None)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "table":
            self.table = tensor
        elif name == "filled":
            self.filled = nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
            self.place("filled").copy_(tensor)
        else:
            setattr(self, name, nn.Parameter(tensor if name == "same" else tensor.clone(), requires_grad=False))


class Scalars(Engine):
    """A scalar for a whole parameter, by a copy, a fill and an assignment."""

    SHAPES: ClassVar[Shapes] = {"copied": (4,), "filled": (4,), "assigned": (4,)}
    SENT: ClassVar[Shapes] = {"copied": (), "filled": (), "assigned": (1,)}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        parameter = self.place(name)
        if name == "filled":
            parameter.fill_(tensor)
        elif name == "copied":
            parameter.copy_(tensor)
        else:
            parameter[:] = tensor


class Concatenated(Engine):
    """A loader that keeps all tensors, and copies them when it has joined them."""

    SHAPES: ClassVar[Shapes] = {"qkv": (16, 8)}
    SENT: ClassVar[Shapes] = {"q": (8, 8), "k": (4, 8), "v": (4, 8)}

    def load_weights(self, weights: Any) -> None:
        tensors = dict(weights)
        self.place("qkv").copy_(torch.cat([tensors["q"], tensors["k"], tensors["v"]]))


class Quantized(Engine):
    """Weights of 8 bits with a scale; one is kept as it is, of the other the engine keeps the product."""

    SHAPES: ClassVar[Shapes] = {"weight": (8, 8), "scale": (8, 1)}
    SENT: ClassVar[Shapes] = SHAPES

    def __init__(self, *, dequantizes: bool = False) -> None:
        super().__init__()
        self.dequantizes = dequantizes
        if dequantizes:
            del self._parameters["scale"]
        else:
            self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.waiting: dict[str, torch.Tensor] = {}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if not self.dequantizes:
            super().load(name, tensor)
            return
        self.waiting[name] = tensor
        if len(self.waiting) == 2:
            self.place("weight").copy_(self.waiting["weight"].to(torch.float32) * self.waiting["scale"])


class Bytes(Engine):
    """Scales of 8-bit exponents, which the engine keeps as bytes."""

    SENT: ClassVar[Shapes] = {"scale": (8, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(8, 2, dtype=torch.uint8), requires_grad=False)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        self.place("scale").copy_(tensor.view(torch.uint8))
