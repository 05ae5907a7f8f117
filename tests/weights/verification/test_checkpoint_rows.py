"""A checkpoint is taken for the model's own only if sampled rows of every tensor are equal."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.tiny_models import fill, tiny
from safetensors.torch import load_file, save_file

from vgen.weights import source_of
from vgen.weights.verification.checkpoint_rows import equal_checkpoint, first_difference


@pytest.fixture
def saved(tmp_path):
    model = fill(tiny("qwen2"))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_checkpoint_of_an_unchanged_model_is_equal(saved):
    model, folder = saved
    assert first_difference(source_of(model), folder) is None
    assert equal_checkpoint(source_of(model), str(folder), None, bool) == folder


def test_a_model_in_another_dtype_is_compared_in_that(saved):
    model, folder = saved
    assert first_difference(source_of(model.bfloat16()), folder) is None


def test_a_tied_head_is_compared_by_the_embeddings_that_it_is(tmp_path):
    model = fill(tiny("tied"))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert first_difference(source_of(model), tmp_path) is None
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert first_difference(source_of(model), tmp_path) == "the checkpoint has no lm_head.weight"


def test_every_tensor_is_compared(saved):
    model, folder = saved
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter[-1].clone()
            parameter[-1] += 0.01
            assert first_difference(source_of(model), folder) == f"{name} is different"
            parameter[-1] = before


@pytest.mark.parametrize("change", ["shape", "more", "none"])
@pytest.mark.fault(
    point="verification of weights",
    did="The checkpoint is not the model",
    happens="The weights are synced before the first token",
    within=60,
)
def test_another_shape_another_tensor_and_no_checkpoint_are_differences(saved, change, caplog):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    if change == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    elif change == "more":
        tensors["model.layers.9.weight"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    name = "/gone/away" if change == "none" else str(folder)
    with caplog.at_level(logging.WARNING):
        assert equal_checkpoint(source_of(model), name, None, bool) is None
    expected = {"shape": "model.norm.weight is different", "more": "the model has no model.layers.9.weight"}
    assert expected.get(change, "no checkpoint") in caplog.text


def test_all_ranks_must_find_it_equal(saved):
    others = iter([False, True])  # it has a folder, and its model is different
    model, folder = saved
    assert equal_checkpoint(source_of(model), str(folder), None, lambda own: own or next(others)) is None
