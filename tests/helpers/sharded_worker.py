"""What each rank of `test_sharded.py` runs under torchrun: `sharded_worker.py FOLDER CASE...`."""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from helpers.tiny_models import fill, tiny
from vgen import WeightSyncError
from vgen.weights.source.module_source import one_pass, source_of
from vgen.weights.source.probe_forward import probe_logprobs
from vgen.weights.verification.logprob_check import noise_ratio

POISON = float("nan")
PROBE = [7 * n % 62 + 2 for n in range(48)]


def plain(kind: str, adapters: bool) -> Any:
    """The same model on every rank, with fresh random weights in all of it."""
    model = tiny(kind)
    if adapters:
        targets = ["q_proj", "down_proj"] if kind == "qwen2" else ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"]))
    return fill(model)


def layers_of(model: Any) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


def fsdp1(model: Any, *, original: bool = True) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    kinds = {type(layer) for layer in layers_of(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(original and parameter.requires_grad)  # without it all must be alike
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: type(module) in kinds),
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


def fsdp1_by_peft(model: Any) -> Any:
    """PEFT's own policy: each trainable leaf is an instance of its own."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = type(layers_of(model)[0]).__name__
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu")
    )


def fsdp2(model: Any, *, ignored: bool = False, everywhere: bool = False) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = MixedPrecisionPolicy() if ignored else MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    left_out = {p for name, p in model.named_parameters() if name.endswith("norm.weight")} if ignored else set()
    for layer in layers_of(model):
        if everywhere:
            for module in [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]:
                fully_shard(module, mp_policy=mixed)
        fully_shard(layer, mp_policy=mixed, ignored_params=left_out)
    fully_shard(model, mp_policy=mixed, ignored_params=left_out, reshard_after_forward=False)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))  # leaves the outermost parameters whole, in bfloat16
    return model


def checkpointed(model: Any) -> Any:
    kinds = tuple({type(layer) for layer in layers_of(model)})
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    return model


def zero3(model: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 20},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


CASES: dict[str, tuple[Callable[[Any], Any], str, bool]] = {
    "fsdp1": (fsdp1, "qwen2", False),
    "fsdp1 flat": (functools.partial(fsdp1, original=False), "qwen2", False),
    "fsdp1 moe": (fsdp1, "qwen3_moe", False),
    "fsdp1 peft": (fsdp1, "qwen2", True),
    "fsdp1 flat peft": (fsdp1_by_peft, "qwen2", True),
    "fsdp1 checkpointed": (lambda model: fsdp1(checkpointed(model)), "qwen2", False),
    "fsdp1 tied": (fsdp1, "tied", False),
    "fsdp2": (fsdp2, "qwen2", False),
    "fsdp2 ignored": (functools.partial(fsdp2, ignored=True), "qwen2", False),
    "fsdp2 moe": (fsdp2, "qwen3_moe", False),
    "fsdp2 peft": (fsdp2, "qwen2", True),
    "fsdp2 peft everywhere": (functools.partial(fsdp2, everywhere=True), "qwen2", True),
    "fsdp2 checkpointed peft": (lambda model: fsdp2(checkpointed(model)), "qwen2", True),
    "fsdp2 tied": (fsdp2, "tied", False),
    "zero3": (zero3, "qwen2", False),
    "zero3 moe": (zero3, "qwen3_moe", False),
    "zero3 peft": (zero3, "qwen2", True),
    "zero3 tied": (zero3, "tied", False),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """What FSDP1 and DeepSpeed free is overwritten first, so that nothing which still looks at it stays right."""
    import torch.distributed.fsdp._flat_param as flat

    def poisoning(free: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def replacement(tensor: torch.Tensor) -> None:
            data = tensor.data
            whole = torch.empty(0, dtype=data.dtype).set_(data.untyped_storage())  # pyright: ignore
            whole.fill_(POISON)
            free(tensor)

        return replacement

    places: list[tuple[Any, str]] = [(flat, "_free_storage")]
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.zero import partition_parameters

        places.append((partition_parameters, "free_param"))
    kept = [getattr(place, name) for place, name in places]
    for (place, name), free in zip(places, kept, strict=True):
        setattr(place, name, poisoning(free))
    try:
        yield
    finally:
        for (place, name), free in zip(places, kept, strict=True):
            setattr(place, name, free)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check(case: str) -> dict[str, Any]:
    shard, kind, adapters = CASES[case]
    reference = plain(kind, adapters)
    expected = {name: tensor.clone() for name, tensor in source_of(reference)}
    source = source_of(shard(plain(kind, adapters)))
    described = source.metadata()
    wrong: list[str] = [] if source.collective else ["not collective"]
    said = source.probe_logprobs(PROBE)
    rounded = said.unit == 2**-9
    own = probe_logprobs(reference, PROBE, 2**-9 if rounded else 0.0)
    ratio = noise_ratio(own.logprobs - said.logprobs, said)
    spread = float(said.noise.abs().mean() / own.noise.abs().mean())  # the noise gets into sharded modules too
    if not (ratio < 2 and 0.5 < spread < 4) or rounded != (case.startswith("fsdp2") and case != "fsdp2 ignored"):
        wrong.append(f"asked for log-probabilities: {ratio} times the noise, {spread} of it, rounded: {rounded}")
    with poisoned():
        for _ in range(2):
            found = list(source)  # held on to until after the pass
            if [(name, tuple(t.shape), t.dtype) for name, t in found] != described:
                wrong.append("metadata")
            if sorted(name for name, _ in found) != sorted(expected):
                wrong.append(f"names {sorted({name for name, _ in found} ^ set(expected))}")
            wrong += [name for name, tensor in found if bits(tensor) != bits(expected[name])]
        left = leave_early(source, expected)
    return {"wrong": wrong, "tensors": len(described), "left": left}


def leave_early(source: Any, expected: dict[str, torch.Tensor]) -> list[str]:
    """Rank 1's receiver fails, in the middle or before it has begun; then both are in step again."""
    problems: list[str] = []
    for failing in (None, 3, 0):
        count = 0
        try:
            with one_pass(source):
                if dist.get_rank() == 1 and failing is None:
                    raise OSError("the receiver is not there")
                for count, (name, tensor) in enumerate(source, 1):
                    if dist.get_rank() == 1 and count - 1 == failing:
                        raise OSError("the receiver went away")
                    if bits(tensor) != bits(expected[name]):
                        problems.append(name)
        except OSError:
            if dist.get_rank() == 0:
                problems.append("rank 0 failed too")
        if dist.get_rank() == 0 and count != len(expected):
            problems.append(f"rank 0 had {count} tensors")
        dist.barrier()
    for _ in source:
        break  # on both ranks, and nobody drains: the next pass must
    if [name for name, tensor in source if bits(tensor) != bits(expected[name])]:
        problems.append("after a break")
    try:
        stale = iter(source)
        next(stale)
        list(source)
        next(stale)
        problems.append("a pass went on beside another")
    except WeightSyncError:
        pass
    source.drain()
    return problems


def main(folder: str, cases: list[str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if any(case.startswith("zero3") for case in cases):
        import deepspeed
        import deepspeed.comm.torch

        # Without DeepSpeed's own kernel for shared memory: it is compiled at the first use, under a file lock that
        # outlives a process that was killed, and its ranks wait for each other without a timeout. Gloo does the same.
        deepspeed.comm.torch.build_shm_op = lambda: None
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    else:
        dist.init_process_group("gloo")
    found = {case: check(case) for case in cases}
    with open(os.path.join(folder, f"rank-{dist.get_rank()}.json"), "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    # A rank that waits for ever says where, before the test that started it gives up and kills it without a word.
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
    os._exit(0)  # threads of DeepSpeed's that outlive the interpreter were seen to abort it
