"""Cases about vgen's own engines: what its generation objects promise beyond a weight sync."""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import EngineStateError, WeightSyncError
from ..profiling import ProfilingContext, semconv
from ..testing import MemorySink
from ..types import LoRARequest, Sampling
from .elsewhere import own_engine
from .session import Bench, Case, WrongWeights, save
from .subject import Sampled
from .sync_cases import case
from .training import randomize, train
from .vgen_subjects import MAX_MODEL_LENGTH, engine_options

VGEN_CASES: list[Case] = []
"""Need a `vgen.checks.vgen_subjects.VgenSubject`."""

_VGEN, _INPROCESS, _SERVER = ("vgen",), ("vgen", "in process"), ("vgen", "server")
_REPORT = "report it to vgen, with the output of this command"


@case(
    "tokens before the first sync",
    needs=_INPROCESS,
    cause="the engine starts from a checkpoint by name, and the model in memory is another (resumed, resized, fresh)",
    fix="sync before the first generation",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A new engine generates without a sync, for a model whose weights are not those of its folder."""
    model = bench.variant(seed=3)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        model.config._name_or_path = folder  # as after from_pretrained
        train(model, 30, bench.session.strength)
        with bench.fresh(model) as other:
            other.expect_right()


@case(
    "a vocabulary resized in memory",
    needs=_INPROCESS,
    cause="the engine is built from the checkpoint's configuration, and has no rows for the new tokens",
    fix="start the engine with the live configuration",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """The model has more tokens than its checkpoint."""
    model = bench.variant(seed=4)
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + 24, mean_resizing=False)
    randomize(model, 4)
    with bench.fresh(model) as other:
        other.train()
        other.sync()
        other.expect_right()


@case(
    "layers removed in memory",
    needs=_INPROCESS,
    cause="the engine is built from the checkpoint's configuration, and has layers that no sync reaches",
    fix="start the engine with the live configuration",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """The model has lost its last layer."""
    model = bench.variant(seed=6)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or model.config.get_text_config().num_hidden_layers != len(layers):
        raise unittest.SkipTest("the model keeps its layers elsewhere")
    del layers[-1]
    model.config.num_hidden_layers = len(layers)
    with bench.fresh(model) as other:
        other.sync()
        other.expect_right()


@case(
    "a checkpoint as the first weights",
    needs=_INPROCESS,
    cause="the checkpoint is taken for the model without a look at its tensors",
    fix="compare sampled rows of every tensor, and sync if one differs",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """`initial_weights="checkpoint"`: no sync if the model is the checkpoint, a sync if it is not."""
    with tempfile.TemporaryDirectory() as folder:
        for trained in (False, True):
            model = bench.variant(seed=7)
            save(model, folder)
            model.config._name_or_path = folder
            if trained:
                train(model, 70, 0.6)
            sink = MemorySink()
            options = {"initial_weights": "checkpoint", "profiling": ProfilingContext([sink])}
            with bench.fresh(model, **options) as other:
                other.expect_right("trained" if trained else "as saved")
            options["profiling"].close()
            if (syncs := len(sink.named(semconv.WEIGHT_SYNC))) != trained:
                raise WrongWeights(f"{syncs} syncs of a model that {'was trained' if trained else 'is its checkpoint'}")


@case(
    "a frozen engine",
    needs=_INPROCESS,
    cause="an engine without a trainer takes a sync, or shares memory with one that does",
    fix=_REPORT,
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A teacher keeps the weights of its folder while the trainer trains and syncs, and refuses a sync."""
    from ..generation import ColocateGeneration

    teacher = bench.variant(seed=8)
    with tempfile.TemporaryDirectory() as folder:
        save(teacher, folder)
        options = {"max_model_length": MAX_MODEL_LENGTH, "gpu_memory_utilization": 0.3}
        options["engine_kwargs"] = engine_options(teacher)
        with ColocateGeneration(folder, **options) as frozen:
            bench.train()
            bench.sync()
            sampling = Sampling(max_tokens=16, ignore_eos=True)
            answers = [Sampled(c.token_ids, c.logprobs or []) for c in frozen.generate(bench.session.prompts, sampling)]
            other = Bench(bench.session, teacher, bench.subject, bench.measurements)
            other.expect_right("the frozen engine", answers)
            try:
                frozen.sync_weights()
            except EngineStateError:
                return
            raise WrongWeights("a frozen engine took a sync")


@case(
    "version labels",
    needs=_VGEN,
    cause="a completion is labelled when it is read, not when it is sampled",
    fix="take the version from the engine's own output",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """Each completion carries the version of the weights that sampled it."""
    generation = bench.subject.generation
    for version in ("check-a", "check-b"):
        bench.train()
        generation.sync_weights(version=version)
        completions = generation.generate(bench.session.prompts[:3], Sampling(max_tokens=4, ignore_eos=True))
        labels = {completion.weight_version for completion in completions} | {generation.weight_version}
        if labels != {version}:
            raise WrongWeights(f"completions of version {version} are labelled {sorted(map(str, labels))}")
    bench.expect_right()


@case(
    "verification finds a stale layer",
    needs=_VGEN,
    cause="the bound is wider than the effect of a layer",
    fix=_REPORT,
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """`verify()` passes after a sync, and raises once the trainer has changed a layer."""
    bench.sync()
    generation = bench.subject.generation
    generation.verify()
    with bench.weights_kept():
        bench.train(lambda name: ".1." in name)
        try:
            generation.verify()
        except WeightSyncError as error:
            bench.note = str(error).split(":", 1)[-1].strip()[:100]
        else:
            raise WrongWeights("verify() passed with a stale layer")
    bench.expect_right("after the verification that failed")


@case(
    "verification by bits",
    needs=_INPROCESS,
    cause="an element that no copy reaches",
    fix="sync_weights(verify='bits') names the tensor",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """Every element is compared with its source, where the engine was loaded by a record."""
    bench.train()
    bench.note = f"verified by {bench.subject.generation.sync_weights(verify='bits').verified}"
    bench.expect_right()


@case(
    "a weight that is NaN",
    needs=_VGEN,
    cause="values are not looked at",
    fix="find out where training produced it; the error names the tensor",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A verified sync refuses it by name, and the next sync is right."""
    bench.sync()
    parameter = next(p for p in bench.model.parameters() if p.dim() == 2)
    value = parameter.data[0, 0].clone()
    parameter.data[0, 0] = float("nan")
    try:
        bench.subject.generation.sync_weights(verify="logprobs")
    except WeightSyncError as error:
        bench.note = f"refused: {error}"
    else:
        raise WrongWeights("a NaN weight passed a verified sync")
    finally:
        parameter.data[0, 0] = value
    bench.sync()
    bench.expect_right("after the NaN was gone")


@case(
    "a parametrized layer",
    needs=_VGEN,
    cause="the parameter that is sent is not the weight that the trainer computes with",
    fix="remove the parametrization, or send the computed weight",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """`weight_norm` on one layer: right, or refused by name; right again once it is removed."""
    from torch.nn.utils import parametrizations, parametrize

    bench.sync()
    layer = next((m for m in bench.model.modules() if type(m) is torch.nn.Linear), None)
    if layer is None:
        raise unittest.SkipTest("the model has no linear layer")
    parametrizations.weight_norm(layer)
    try:
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)  # pyright: ignore
        bench.expect_right_or_refused("a parametrized layer")
    finally:
        parametrize.remove_parametrizations(layer, "weight")
    bench.sync()
    bench.expect_right("after the parametrization was removed")


@case(
    "a forward hook that changes results",
    needs=_VGEN,
    cause="the engine does not run the trainer's hooks",
    fix="remove the hook, or put what it does into the weights",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """The next sync, which is verified because of the hook, says so."""
    bench.sync()
    layer = next(m for m in bench.model.modules() if type(m) is torch.nn.Linear)

    def half_more(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return output * 1.5

    handle = layer.register_forward_hook(half_more)
    try:
        bench.expect_right_or_refused("a hook")
    finally:
        handle.remove()
    bench.sync()
    bench.expect_right("after the hook was removed")


@case(
    "end-of-sequence tokens of the model",
    needs=_INPROCESS,
    cause="`generation_config` is lost when the engine starts from a configuration in memory",
    fix="pass the end tokens on",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A completion ends at each of the end tokens that the model's `generation_config` has in memory."""
    model = bench.variant(seed=9)
    model.generation_config.eos_token_id = [model.config.get_text_config().eos_token_id or 256, 7]
    with bench.fresh(model) as other:
        sampling = Sampling(max_tokens=40, temperature=1.0, extra={"logit_bias": {7: 100.0}})
        (completion,) = other.subject.generation.generate([bench.session.prompts[0]], sampling)
        if completion.finish_reason != "stop" or len(completion.token_ids) > 1:
            raise WrongWeights(f"a completion did not end at an end token: {completion.finish_reason}")
        other.expect_right()


@case(
    "scores of given completions",
    needs=_VGEN,
    cause="log-probabilities of prompts come from cached prefixes, or are shifted by one",
    fix=_REPORT,
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """`score` gives the trainer's log-probabilities of completions that another model sampled."""
    bench.train()
    bench.sync()
    prompts = bench.session.prompts
    given = [prompt[::-1][:12] for prompt in prompts]
    scores = bench.subject.generation.score(prompts, given)
    bench.expect_right("scores", [Sampled(ids, values) for ids, values in zip(given, scores, strict=True)])


@case(
    "streamed completions",
    needs=_VGEN,
    cause="completions are matched to prompts by the order in which they end",
    fix=_REPORT,
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """`stream` yields each completion once, under the right prompt."""
    bench.train()
    bench.sync()
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    streamed = {c.prompt_index: c for c in bench.subject.generation.stream(bench.session.prompts, sampling)}
    answers = [Sampled(streamed[i].token_ids, streamed[i].logprobs or []) for i in range(len(bench.session.prompts))]
    bench.expect_right("streamed", answers)


@case(
    "a wake-up that fails",
    needs=(*_INPROCESS, "sleep mode"),
    cause="the engine is left half awake, and neither wake_up nor sync_weights may be called",
    fix="free memory and call wake_up again, or close() the engine and make a new one",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """vLLM raises in a wake-up. Afterwards the engine is right, or says what to do; it never samples wrong tokens."""
    model = bench.variant(seed=10)
    with bench.fresh(model) as other:
        other.sync()
        other.sleep(1)
        llm = other.subject.generation.engine.llm
        original = llm.wake_up

        def fail(*args: Any, **kwargs: Any) -> None:
            llm.wake_up = original
            raise RuntimeError("out of memory, as this case makes believe")

        llm.wake_up = fail
        with suppress(Exception):
            other.wake_up()
        llm.wake_up = original
        try:
            other.wake_up()
            other.sync()
        except Exception as error:
            bench.note = other.note = f"refused: {error}"
        else:
            other.expect_right("after the second wake-up")


@contextmanager
def _peft(bench: Bench, *, tied: bool, **settings: Any) -> Generator[Bench]:
    """An engine for a model with PEFT adapters; `settings` are `LoraConfig`'s."""
    try:
        import peft
    except ImportError:
        raise unittest.SkipTest("PEFT is not installed") from None

    base = bench.variant(seed=11, tie_word_embeddings=tied)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if tied and (head is None or head.weight is not embedding.weight):
        raise unittest.SkipTest("the architecture does not tie its embeddings")
    if settings.get("target_modules") != "all-linear":
        names = [name.rpartition(".")[2] for name, m in base.named_modules() if m is head or m is embedding]
        field = "modules_to_save" if "modules_to_save" in settings else "target_modules"
        settings = {**settings, field: names}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))  # pyright: ignore
    with bench.fresh(model) as other:
        yield other


def _adapter_cycle(bench: Bench, may_refuse: bool) -> None:
    for number in range(2):
        train(bench.model, 110 + number, 0.6, lambda name: "lora_" in name or "modules_to_save" in name)
        if may_refuse:
            bench.expect_right_or_refused("adapters on tied tensors")
        else:
            bench.sync()
            bench.expect_right(f"sync {number + 1}")


def _peft_case(**settings: Any) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        tied = settings.get("target_modules") != "all-linear"
        with _peft(bench, tied=tied, **settings) as other:
            _adapter_cycle(other, may_refuse=tied)

    return run


_MERGED = "adapters are merged into copies of the weights once, or ties are taken from before the adapters were trained"
_LOOK = "merge in each sync, and look at ties in each sync"
VGEN_CASES += [
    Case(
        "PEFT: adapters on all linear layers",
        "Two syncs with adapters that were trained in between.",
        _peft_case(target_modules="all-linear"),
        _MERGED,
        _LOOK,
        frozenset(_INPROCESS),
    ),
    Case(
        "PEFT: embedding and head saved apart",
        "`modules_to_save` on both of a tied pair, trained: right, or refused.",
        _peft_case(target_modules=["q_proj"], modules_to_save=[]),
        _MERGED,
        _LOOK,
        frozenset(_INPROCESS),
    ),
    Case(
        "PEFT: adapters on a tied embedding and head",
        "Adapters on both of a tied pair, trained: right, or refused.",
        _peft_case(target_modules=[]),
        _MERGED,
        _LOOK,
        frozenset(_INPROCESS),
    ),
]


@case(
    "an adapter reloaded under its name",
    needs=_INPROCESS,
    cause="the engine keeps the adapter that it has under that name, or keys and values that the old one computed",
    fix="load changed folders anew, under a new id, and reset the prefix cache",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A LoRA adapter is trained, saved in the same folder, and asked for by the same name."""
    try:
        import peft
    except ImportError:
        raise unittest.SkipTest("PEFT is not installed") from None

    base = bench.variant(seed=12)
    names = {n.rpartition(".")[2] for n, m in base.named_modules() if type(m) is torch.nn.Linear}
    wanted = [name for name in ("q_proj", "v_proj", "o_proj") if name in names]
    if not wanted:
        raise unittest.SkipTest("the model has no projections under the usual names")
    options = {"engine_kwargs": {"enable_lora": True, "max_lora_rank": 8}}
    with tempfile.TemporaryDirectory() as folder, bench.fresh(base, **options) as other:
        other.sync()
        adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=wanted))
        judge = Bench(bench.session, adapted, other.subject, bench.measurements)
        for number in range(3):
            train(adapted, 120 + number, 0.9, lambda name: "lora_" in name)
            adapted.save_pretrained(folder)
            answers = other.subject.generate(
                bench.session.prompts,
                max_tokens=16,
                temperature=1.0,
                lora_request=LoRARequest(lora_name="policy", lora_path=folder),
            )
            judge.expect_right(f"adapter {number + 1}", [Sampled(*answer) for answer in answers])


@case(
    "the connection cut in the middle of an update",
    needs=_SERVER,
    cause="the server keeps half-written weights, or stays paused, and answers with them",
    fix="refuse to generate until a full sync, and begin that one anew",
    into=VGEN_CASES,
)
def _(bench: Bench) -> None:
    """A proxy cuts every connection during a sync; the next sync, without the proxy, must be right."""
    proxy = bench.subject.proxy
    bench.sync()
    cuts = 0
    for call in (1, 2, 3, 4):
        bench.train()
        proxy.arm(call)
        try:
            bench.subject.sync(bench.model)
        except Exception as error:
            bench.note = f"refused: {type(error).__name__}: {str(error)[:80]}"
        else:
            bench.expect_right(f"a sync that raised nothing although its call {call} was cut")
        finally:
            proxy.disarm()
        cuts += proxy.cut.is_set()
        bench.sync()
        bench.expect_right(f"the sync after call {call} was cut")
    if not cuts:
        raise unittest.SkipTest("no call of the sync goes through the connection")


VGEN_CASES[:] = [own_engine(case) if case.name == "a wake-up that fails" else case for case in VGEN_CASES]
