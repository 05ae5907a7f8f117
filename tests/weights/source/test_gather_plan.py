"""Which tensors are converted and gathered together, and when a plan is made anew."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import fill, tiny

from vgen import WeightSyncError
from vgen.weights.source import gather_plan
from vgen.weights.source.gather_plan import gather_plan_of


def plan_of(model, last=None, include=None, rename=None):
    return gather_plan_of(model, last, include, rename)[0]


def test_a_plan_is_kept_until_the_model_changes():
    model = tiny("qwen2")
    plan = plan_of(model)
    assert plan_of(fill(model), plan) is plan
    model.model.norm = model.model.norm.bfloat16()
    assert plan_of(model, plan) is not plan


def test_a_plan_holds_no_tensor_of_the_model():
    model = tiny("mixtral")
    plan = plan_of(model)
    tensors = [meta for batch in plan.batches for step in batch for part in step.parts for meta in part.metas.values()]
    assert all(tensor.is_meta for tensor in [*tensors, *(t.meta for _, t in plan.checkpoint_tensors)])


def test_tensors_made_of_the_same_parts_share_a_step_and_others_do_not(monkeypatch):
    def fuse(tensors):
        fused = {"ab": torch.cat([tensors[name] for name in ("a", "b")])} if {"a", "b"} <= tensors.keys() else {}
        return fused | {name: tensor for name, tensor in tensors.items() if name not in ("a", "b")}

    model = torch.nn.ParameterDict({name: torch.randn(2) for name in "abc"})
    monkeypatch.setattr(gather_plan, "revert_of", lambda root: fuse)
    plan, weights = gather_plan_of(model, None, None, None)
    steps = [step for batch in plan.batches for step in batch]
    assert [(step.sent_as, step.inputs) for step in steps] == [(("ab",), (0, 1)), (("c",), (2,))]
    tensors = {index: weight.gather([weight])[0] for index, weight in enumerate(weights)}
    assert torch.equal(dict(steps[0].run(tensors))["ab"], torch.cat([model["a"], model["b"]]))


@pytest.mark.fault(
    point="the trainer's model as a source",
    did="A conversion needs tensors of other layers",
    happens="`WeightSyncError` names the tensor",
    within=60,
)
def test_a_conversion_that_needs_other_layers_is_refused(monkeypatch):
    def depends(tensors):
        return {"a": tensors["a"] * (2 if "b" in tensors else 1), **({"b": tensors["b"]} if "b" in tensors else {})}

    def renames(tensors):
        return {f"{name}{len(tensors)}": tensor * 1 for name, tensor in tensors.items()}

    model = torch.nn.ParameterDict({name: torch.randn(2) for name in "ab"})
    monkeypatch.setattr(gather_plan, "revert_of", lambda root: renames)
    with pytest.raises(WeightSyncError, match="together with other layers") as caught:
        plan_of(model)
    assert caught.value.parameter == "a2"
    monkeypatch.setattr(gather_plan, "revert_of", lambda root: depends)  # of the same shape: not seen, and harmless
    plan_of(model)


def test_small_tensors_are_gathered_together_up_to_a_size(monkeypatch):
    class Sharded:
        """Makes every weight look as if it had to be gathered."""

    model = torch.nn.ParameterDict({str(number): torch.zeros(4) for number in range(5)})
    plan = plan_of(model)
    assert len(plan.batches) == 1  # nothing has to be gathered
    monkeypatch.setattr(gather_plan, "BATCH_BYTES", 40)
    weights = gather_plan.weights_of

    def sharded(top):
        return [gather_plan.Weight(w.name, w.shape, w.stride, w.dtype, Sharded, w.holder) for w in weights(top)]

    monkeypatch.setattr(gather_plan, "weights_of", sharded)
    assert [len(batch) for batch in plan_of(model).batches] == [2, 2, 1]


def test_a_filter_leaves_out_what_it_says_and_the_parts_for_it():
    plan = plan_of(tiny("qwen3_moe"), include=lambda name: name.endswith("norm.weight"))
    names = [name for name, _ in plan.checkpoint_tensors]
    assert names
    assert all(name.endswith("norm.weight") for name in names)
    with pytest.raises(ValueError, match="two tensors the name 'x'"):
        plan_of(tiny("qwen2"), rename=lambda name: "x")


def test_a_tie_is_found_behind_a_tensor_that_is_converted(monkeypatch):
    """Both stand in one step: the converted tensor `both` comes first."""

    def convert(tensors):
        both = {"both": tensors["a"] * 2 + tensors["b"]} if {"a", "b"} <= tensors.keys() else {}
        return both | tensors

    model = torch.nn.ParameterDict({name: torch.randn(2) for name in "ab"})
    model["c"] = model["a"]
    monkeypatch.setattr(gather_plan, "revert_of", lambda root: convert)
    assert plan_of(model).ties == {"c": "a"}


def test_weights_that_are_computed_of_the_same_holder_are_tied(monkeypatch):
    """A quantized weight is named by what holds it, and has no address of its own."""
    model = torch.nn.ParameterDict({name: torch.zeros(4) for name in "abc"})
    holders = {"a": model["a"], "b": model["a"], "c": model["c"]}
    weights = gather_plan.weights_of

    def computed(top):
        return [
            gather_plan.Weight(w.name, w.shape, w.stride, w.dtype, object, (holders[w.name], "part"))
            for w in weights(top)
        ]

    monkeypatch.setattr(gather_plan, "weights_of", computed)
    assert plan_of(model).ties == {"b": "a"}
