"""Cases for any engine and weight sync, through the adapter alone: nothing here is about vgen."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ..errors import CheckError
from .session import Bench, Case, WrongWeights
from .subject import generate

SYNC_CASES: list[Case] = []
"""The portable cases, in the order in which they run."""


def case(name: str, *, cause: str, fix: str, needs: tuple[str, ...] = (), into: list[Case] = SYNC_CASES) -> Any:
    """Make a case of a function; its docstring is the summary."""

    def register(function: Callable[[Bench], object]) -> Callable[[Bench], object]:
        summary = " ".join((function.__doc__ or "").split())
        into.append(Case(name, summary, function, cause, fix, frozenset(needs)))
        return function

    return register


_STALE: dict[str, Any] = dict(
    cause="the sync does not reach every parameter, or the engine computes with a copy that was made at load time",
    fix="look for the parameter that keeps its old value; vgen: sync_weights(verify='bits') names it",
)


@case("fresh sync", **_STALE)
def _(bench: Bench) -> None:
    """New weights in every parameter, and one sync."""
    bench.train()
    bench.sync()
    bench.expect_right()


@case(
    "the check sees a stale layer",
    cause="the noise is as large as the effect of a whole layer: degenerate weights, or a coarse dtype",
    fix="use a model with weights of usual size; nothing that this run calls right is proven",
)
def _(bench: Bench) -> None:
    """The trainer changes one layer and does not sync: the comparison must fail. It shows that the check can fail."""
    bench.sync()
    layers = _layer_names(bench.model)
    with bench.weights_kept():
        bench.train(lambda name: f".{layers[len(layers) // 2]}." in f".{name}")
        seen = bench.measure()
    if seen.right:
        raise CheckError(f"a stale layer measures only {seen.ratio:.3g} times the noise: this run cannot find faults")
    bench.note = f"a stale layer measures {seen.ratio:.3g}"
    bench.expect_right("with the weights put back")


@case(
    "second and third sync",
    cause="only the first load is complete: later ones write into weights that were repacked, or use stale addresses",
    fix="load later weights the way the first ones came, or record where the first load wrote",
)
def _(bench: Bench) -> None:
    """Three syncs of new weights each, as a trainer makes them."""
    for number in range(3):
        bench.train()
        bench.sync()
        bench.expect_right(f"sync {number + 1}")


@case("sync of unchanged weights", **_STALE)
def _(bench: Bench) -> None:
    """A second sync of the same weights changes nothing."""
    bench.sync()
    bench.sync()
    bench.expect_right()


@case(
    "warm prefix cache",
    cause="keys and values that the old weights computed are still in the engine's prefix cache, or in a KV store",
    fix="reset the prefix cache after the weights are in place (vLLM: reset_prefix_cache), KV connectors included",
)
def _(bench: Bench) -> None:
    """The same prompts before and after a sync of new weights, so that their prefixes are cached."""
    bench.generate()
    bench.generate()
    bench.train()
    bench.sync()
    bench.expect_right()


@case("only one layer is new", **_STALE)
def _(bench: Bench) -> None:
    """Only the middle layer changes between two syncs."""
    layers = _layer_names(bench.model)
    bench.sync()
    bench.train(lambda name: f".{layers[len(layers) // 2]}." in f".{name}")
    bench.sync()
    bench.expect_right()


def _only(part: Callable[[Any], Any]) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        bench.sync()
        identities = {id(tensor) for tensor in part(bench.model)}
        chosen = {name for name, parameter in bench.model.named_parameters() if id(parameter) in identities}
        bench.train(chosen.__contains__)
        bench.sync()
        bench.expect_right()

    return run


_ITS_NAME = "send this tensor under the name that the engine's loader knows, tied or not"
SYNC_CASES += [
    Case(
        "only the output head is new",
        "Only the output head changes between two syncs; the embedding too, where they are one.",
        _only(lambda model: [model.get_output_embeddings().weight]),
        "the engine's head is a packed copy, or is tied to the embedding by an earlier look",
        _ITS_NAME,
    ),
    Case(
        "only the embedding is new",
        "Only the embedding changes between two syncs; the output head too, where they are one.",
        _only(lambda model: [model.get_input_embeddings().weight]),
        "the engine's embedding is another tensor than the head that the sync reached",
        _ITS_NAME,
    ),
    Case(
        "only norms and biases are new",
        "Only vectors change between two syncs.",
        _only(lambda model: [parameter for parameter in model.parameters() if parameter.dim() == 1]),
        "the sync passes matrices only, or the loader drops biases that it does not know",
        _ITS_NAME,
    ),
]


@case(
    "an optimizer step",
    cause="the sync reads a copy of the weights (a flat buffer, a state dict) that the optimizer does not update",
    fix="read the parameters anew in each sync",
)
def _(bench: Bench) -> None:
    """Backward pass and one large step of AdamW instead of new random weights."""
    bench.sync()
    model = bench.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = float(max(trained, key=lambda parameter: parameter.numel()).detach().float().std())
    optimizer = torch.optim.AdamW(trained, lr=bench.session.strength * size, eps=1e-4)  # 1e-8 is 0 in float16
    ids = torch.tensor([bench.session.prompts[0]], device=next(model.parameters()).device)
    with bench.weights_kept():
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)
        bench.sync()
        bench.expect_right()


@case(
    "storage replaced",
    cause="the sync remembers addresses of the first time; `p.data = …`, as optimizers with offloading do, moves them",
    fix="look at each tensor's address in each sync",
)
def _(bench: Bench) -> None:
    """Every parameter's data is another tensor than at the last sync."""
    bench.sync()
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.data = parameter.data.clone()
    bench.train()
    bench.sync()
    bench.expect_right()


@case(
    "parameters replaced",
    cause="the sync holds the Parameter objects of the first time",
    fix="walk named_parameters() in each sync",
)
def _(bench: Bench) -> None:
    """Every parameter is another `nn.Parameter` object than at the last sync, ties kept."""
    bench.sync()
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in bench.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = replaced.setdefault(id(parameter), new)
    bench.train()
    bench.sync()
    bench.expect_right()


@case(
    "weights that are not contiguous",
    cause="bytes are copied as if each tensor were contiguous, or strides are remembered from the first sync",
    fix="copy by elements, or make each tensor contiguous first",
)
def _(bench: Bench) -> None:
    """Matrices lie transposed in memory, and one vector is a single number expanded."""
    bench.sync()
    bench.train()
    before = {name: parameter.data for name, parameter in bench.model.named_parameters()}
    with torch.no_grad():
        for parameter in bench.model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()
        vector = next((p for n, p in bench.model.named_parameters() if p.dim() == 1 and "norm" in n), None)
        if vector is not None:
            vector.data = torch.full((1,), 1.25).to(vector).expand(vector.shape)
    try:
        bench.sync()
        bench.expect_right()
    finally:
        with torch.no_grad():
            for name, parameter in bench.model.named_parameters():
                parameter.data = before[name]


@case(
    "half of the weights frozen",
    cause="the sync sends only parameters that require gradients, or only those of the optimizer",
    fix="send all parameters, or prove that the rest is unchanged",
)
def _(bench: Bench) -> None:
    """Every second parameter has `requires_grad=False`; all have new values."""
    before = [(parameter, parameter.requires_grad) for parameter in bench.model.parameters()]
    try:
        for number, (parameter, _) in enumerate(before):
            parameter.requires_grad_(number % 2 == 0)
        bench.train()
        bench.sync()
        bench.expect_right()
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


@case(
    "training mode with gradient checkpointing",
    cause="the sync, or its verification, runs a forward pass with dropout, or loses the training mode",
    fix="switch modes around such a pass, and back",
)
def _(bench: Bench) -> None:
    """The model is in training mode, and recomputes activations."""
    model = bench.model
    with suppress(ValueError):  # some architectures have none
        model.gradient_checkpointing_enable()
    model.train()
    try:
        bench.train()
        bench.sync()
        if not model.training:
            raise WrongWeights("the sync has left the trainer's model in evaluation mode")
        bench.expect_right()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@case(
    "sync within autocast",
    cause="tensors are converted by autocast on their way, or a verification compares results of two dtypes",
    fix="switch autocast off around the sync",
)
def _(bench: Bench) -> None:
    """The caller is inside `torch.autocast`, as under mixed precision."""
    bench.train()
    with torch.autocast(next(bench.model.parameters()).device.type, torch.bfloat16):
        bench.sync()
    bench.expect_right()


@case(
    "sync within inference mode",
    cause="inference tensors cannot be written to, or saved for views, outside of that mode",
    fix="leave inference mode, or clone",
)
def _(bench: Bench) -> None:
    """The caller is inside `torch.inference_mode`."""
    bench.train()
    with torch.inference_mode():
        bench.sync()
    bench.expect_right()


@case("large weights", **_STALE)
def _(bench: Bench) -> None:
    """Values of every size are carried: one row of each matrix is 4 times as large."""
    with bench.weights_kept():
        with torch.no_grad():
            for parameter in bench.model.parameters():
                if parameter.dim() == 2 and parameter.is_floating_point():
                    parameter[0].mul_(4)
        bench.sync()
        bench.expect_right()


@case(
    "greedy tokens",
    cause="the engine decodes with other weights than it prefills with, as graphs do that hold old addresses",
    fix="keep addresses over syncs, or capture graphs again",
)
def _(bench: Bench) -> None:
    """After a sync each greedy token is the one that the trainer's model finds most likely, up to rounding."""
    bench.train()
    bench.sync()
    completions = bench.generate(temperature=0.0)
    bench.expect_right("greedy decoding", completions)
    lag = _behind_the_likeliest(bench, completions)
    if lag > (allowed := 2 * bench.measurements[-1].bound * max(m.noise for m in bench.measurements) + 1e-3):
        raise WrongWeights(
            f"a greedy token is {lag:.2g} nats less likely than the likeliest one; {allowed:.2g} is allowed"
        )


@case(
    "many prompts at once",
    cause="a batch that is larger than the graphs or kernels that were updated uses others, with old weights",
    fix="update what every batch size uses",
)
def _(bench: Bench) -> None:
    """After a sync 40 prompts are completed in one batch."""
    bench.train()
    bench.sync()
    base = bench.session.prompts
    prompts = [prompt[number:] + prompt[:number] for number in range(5) for prompt in base]
    bench.expect_right(prompts=prompts)


@case(
    "sync from another thread",
    cause="the sync depends on thread-local state: the current device, gradient mode, an event loop",
    fix="set that state in the call itself",
)
def _(bench: Bench) -> None:
    """The call comes from a thread that never used the engine."""
    bench.train()
    errors: list[BaseException] = []

    def sync() -> None:
        try:
            bench.sync()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    bench.expect_right()


@case(
    "a tensor too many",
    cause="the engine's loader ignores names that it does not know; vLLM drops any unknown bias without a word",
    fix="account for every element that is sent, and refuse what is not consumed",
)
def _(bench: Bench) -> None:
    """The trainer adds a bias that the engine has no place for: right results, or an error."""
    bench.sync()
    layer = _linear_without_bias(bench.model)
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features).to(layer.weight))
    try:
        bench.expect_right_or_refused("a bias that the engine does not have")
    finally:
        layer.register_parameter("bias", None)
    bench.sync()
    bench.expect_right("after the bias was taken away again")


@case(
    "a tensor of another shape",
    cause="the engine's loader narrows a tensor that is too large to the place that it has",
    fix="compare shapes before anything is copied",
)
def _(bench: Bench) -> None:
    """A matrix gets more rows, and what follows more columns, than the engine has: right results, or an error."""
    bench.sync()
    pair = _widened(bench.model)
    before = [(layer, layer.weight.data) for layer in pair]
    with torch.no_grad():
        for layer in pair:
            rows, columns = layer.weight.shape
            wider = (rows, columns + 32) if layer is pair[-1] else (rows + 32, columns)
            layer.weight.data = 0.05 * torch.randn(wider).to(layer.weight)
    try:
        bench.expect_right_or_refused("a wider matrix")
    finally:
        for layer, weight in before:
            layer.weight.data = weight
    bench.sync()
    bench.expect_right("after the matrix had its shape again")


@case(
    "a sync that breaks off, and the next",
    cause="what a failed sync left behind (half-written weights, a paused engine, a lock) is not cleared by the next",
    fix="make a sync complete by itself, whatever the one before it did",
)
def _(bench: Bench) -> None:
    """A parameter without data makes the sync fail; the next sync must be right."""
    bench.sync()
    path, _, leaf = list(bench.model.named_parameters())[-2][0].rpartition(".")
    table = bench.model.get_submodule(path)._parameters
    whole = table[leaf]
    assert whole is not None
    table[leaf] = torch.nn.Parameter(whole.detach().to("meta"))
    try:
        bench.sync()
        bench.note = "the sync of a parameter on the meta device raised nothing"
    except Exception as error:
        bench.note = f"refused: {error}"
    finally:
        table[leaf] = whole
    bench.train()
    bench.sync()
    bench.expect_right("the sync after the one that failed")


@case(
    "a head untied by training",
    needs=("more engines",),
    cause="ties are remembered from the configuration or from the first sync; one of two tensors is then sent for both",
    fix="two names are tied only while their tensors share memory; look in each sync",
)
def _(bench: Bench) -> None:
    """A model with tied embeddings; between two syncs head and embedding become two tensors: right, or an error."""
    model = bench.variant(tie_word_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        raise unittest.SkipTest("the architecture does not tie its embeddings")
    with bench.fresh(model) as other:
        other.sync()
        other.expect_right("tied")
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        other.train()
        other.expect_right_or_refused("an untied head")


@case(
    "tied embeddings",
    needs=("more engines",),
    cause="the engine's head is a packed copy of the embedding, or the stream carries the shared tensor once",
    fix="load the shared tensor under both names, or tie again after each load",
)
def _(bench: Bench) -> None:
    """A model with tied embeddings, over three syncs."""
    model = bench.variant(tie_word_embeddings=True)
    with bench.fresh(model) as other:
        for number in range(3):
            other.train()
            other.sync()
            other.expect_right(f"sync {number + 1}")


@case(
    "two engines of one process",
    needs=("more engines",),
    cause="state of one sync (names, addresses, a group) is global, so that the second engine uses the first one's",
    fix="keep it with the engine",
)
def _(bench: Bench) -> None:
    """Two engines of two trainers are synced in turns, and do not disturb each other."""
    model = bench.variant(seed=5)
    with bench.fresh(model) as other:
        for each in (other, bench, other):
            each.train()
            each.sync()
            each.expect_right()
        bench.expect_right("the first engine after the second one's sync")


@case(
    "the checkpoint, reloaded",
    cause="loading weights that were saved and read again differs in names, ties or dtypes from those in memory",
    fix="send what save_pretrained would write",
)
def _(bench: Bench) -> None:
    """Weights go back to those of the start, by `load_state_dict`."""
    bench.train()
    bench.sync()
    bench.model.load_state_dict(bench.session.original)
    bench.sync()
    bench.expect_right()


def _sleep(level: int, *, syncs: int, train: bool = True) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        bench.train()
        bench.sync()
        bench.sleep(level)
        if train and syncs:
            bench.train()
        bench.wake_up()
        if not syncs:
            bench.expect_right("after waking up")
        for number in range(syncs):
            if number:
                bench.train()
            bench.sync()
            bench.expect_right(f"sync {number + 1} after waking up")

    return run


def _cycles(bench: Bench) -> None:
    for number, level in enumerate((1, 2, 2, 1, 2)):
        bench.sleep(level)
        bench.train()
        bench.wake_up()
        bench.sync()
        bench.expect_right(f"cycle {number + 1}, level {level}")


_LOST = "sleep discards or moves memory that is no parameter: buffers, scales, packed copies, addresses in graphs"
_SLEEP = frozenset({"sleep mode"})
SYNC_CASES += [
    Case(
        "sleep level 1",
        "Sleep and wake up without a sync: the weights are those of before.",
        _sleep(1, syncs=0),
        _LOST,
        "keep that memory over the sleep, or compute it anew after waking",
        _SLEEP,
    ),
    Case(
        "sleep level 1 and two syncs",
        "The trainer trains while the engine sleeps; two syncs follow.",
        _sleep(1, syncs=2),
        _LOST,
        "sync after waking, and verify the first one",
        _SLEEP,
    ),
    Case(
        "sleep level 2 and three syncs",
        "The sleep discards the weights; three syncs follow.",
        _sleep(2, syncs=3),
        _LOST,
        "bring back what no loader writes: buffers, constants, scales",
        _SLEEP,
    ),
    Case(
        "sleep level 2, unchanged weights",
        "The sleep discards the weights, and the trainer's have not changed since the last sync.",
        _sleep(2, syncs=1, train=False),
        "the sync is skipped, or reduced to what changed, although the engine lost everything",
        "after a level-2 sleep send all",
        _SLEEP,
    ),
    Case(
        "five cycles of sleep and sync",
        "Sleep at changing levels, train, wake up, sync, five times.",
        _cycles,
        "memory is mapped at another address after a later sleep, or a record of addresses is made once",
        "check addresses after each wake-up",
        _SLEEP,
    ),
]


@case(
    "an update in flight",
    needs=("updates in flight",),
    cause="requests lose their place when the engine pauses: tokens are lost, or sampled from half-new weights",
    fix="pause the scheduler at a token, and keep requests with their KV blocks (vLLM: pause with mode keep)",
)
def _(bench: Bench) -> None:
    """A sync of unchanged weights while completions are generated: they are the same tokens as without it."""
    bench.sync()
    prompts, tokens = bench.session.prompts[:4], 160
    expected = bench.generate(tokens, 0.0, prompts)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(generate(bench.subject, prompts, tokens, 0.0)), daemon=True)
    thread.start()
    thread.join(0.1)  # into the middle of the generation; if that is over already, nothing was shown
    running = thread.is_alive()
    try:
        bench.sync()
    finally:
        thread.join()
    if not running:
        raise unittest.SkipTest("the generation ended before the update began")
    if not answers:
        raise WrongWeights("generate raised while a sync was under way")
    bench.expect_right("completions during the update", answers[0], prompts)
    lag = max(_behind_the_likeliest(bench, answers[0], prompts), 0.0)
    same = [tuple(a.token_ids) == tuple(b.token_ids) for a, b in zip(answers[0], expected, strict=True)]
    bench.note = f"{sum(same)} of {len(same)} completions have the same tokens; greedy lag {lag:.2g} nats"
    if lag > 2 * bench.measurements[-1].bound * bench.measurements[-1].noise + 1e-3:
        raise WrongWeights(f"a token during the update is {lag:.2g} nats less likely than the likeliest one")


def _behind_the_likeliest(bench: Bench, completions: Any, prompts: Any = None) -> float:
    """How much less likely than the likeliest token, in nats, a token of these completions is for the trainer."""
    prompts = bench.session.prompts if prompts is None else prompts
    return bench.oracle.behind_the_likeliest(prompts, completions)


def _layer_names(model: Any) -> list[str]:
    """The paths of the model's layers: the elements of its longest `ModuleList`."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise unittest.SkipTest("the model has no list of layers")
    name, layers = min(lists, key=lambda each: (each[0].count("."), -len(each[1])))
    return [f"{name}.{index}" for index in range(len(layers))]


def _linear_without_bias(model: Any) -> torch.nn.Linear:
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and module.bias is None and "lm_head" not in name:
            return module
    raise unittest.SkipTest("every linear layer of the model has a bias")


def _widened(model: Any) -> list[torch.nn.Linear]:
    """Layers of one MLP, of which the last takes what the others give."""
    for module in model.modules():
        names = [
            name
            for name in ("gate_proj", "up_proj", "down_proj")
            if type(getattr(module, name, None)) is torch.nn.Linear
        ]
        if len(names) == 3:
            return [getattr(module, name) for name in names]
    raise unittest.SkipTest("the model has no gated MLP of linear layers")
