"""Every kind of loader that vLLM has: what is right passes, and a tensor that is lost, cut or not sent is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import loader_kinds as kinds
from helpers.loader_kinds import Shapes

from vgen import WeightSyncError
from vgen.weights.load import load_audit
from vgen.weights.load.load_audit import LoadAudit, audit_load
from vgen.weights.load.tensor_accounting import Spans

FP8 = torch.float8_e4m3fn
TIED = {"head": "embed"}


def audited(model, metadata, ties=None) -> LoadAudit:
    """The audit, which must pass, and change nothing in the model."""
    ties = ties or {}
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        audit = audit_load(model, metadata, ties, "engine")
        audit.require(ties, "engine")
    finally:
        after = model.state_dict(keep_vars=True)
        assert after.keys() == before.keys()
        for name, (tensor, content) in before.items():
            assert after[name] is tensor
            assert not tensor.is_meta
            assert torch.equal(tensor.detach().view(torch.uint8), content.view(torch.uint8)), name
    return audit


def refusal(model, metadata, ties=None) -> WeightSyncError:
    with pytest.raises(WeightSyncError) as caught:
        audited(model, metadata, ties)
    assert (caught.value.phase, caught.value.receiver) == ("load", "engine")
    return caught.value


@pytest.mark.parametrize(
    "model",
    [
        kinds.DefaultCopies(),
        kinds.FusedProjections(),
        kinds.CastProjections(),
        kinds.Experts(),
        kinds.FusedExperts(),
        kinds.Composed(),
        kinds.Padded(),
        kinds.Registers(),
        kinds.Scalars(),
        kinds.Concatenated(),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_trainer_passes_with_every_kind_of_loader(model, dtype):
    audit = audited(model, model.sent(dtype))
    assert not audit.skipped
    assert audit.unread == audit.unwritten == audit.overwritten == audit.mistyped == {}
    assert not audit.nameless
    assert audit.report() == {"unaudited": "", "narrowed": []}


def test_the_order_in_which_tensors_come_does_not_matter():
    for kind in (kinds.FusedProjections, kinds.Experts, kinds.Concatenated):
        audited(kind(), kind.sent()[::-1])


@pytest.mark.parametrize(
    ("model", "changed", "parameter", "says"),
    [
        (kinds.DefaultCopies(), {"down_bias": (8,)}, "down_bias", ["no place for it (shape [8]", "include="]),
        (kinds.DefaultCopies(), {"value_head": (1, 8)}, "value_head", ["KeyError", "[1, 8]", "change the model back"]),
        (kinds.DefaultCopies(), {"down": (8, 15)}, "down", ["[8, 15]", "[8, 16]", "change the model back"]),
        (kinds.DefaultCopies(), {"norm": None}, "norm", ["does not provide it", "0 of its 8", "[8]"]),
        (
            kinds.FusedProjections(),
            {"gate": (20, 8), "up": (20, 8)},
            "gate",
            ["128 of its 160 elements (shape [20, 8])", "gate_up [32, 8]", "include="],
        ),
        (kinds.FusedProjections(), {"gate": (12, 8)}, "gate", ["[12, 8]", "change the model back"]),
        (kinds.FusedProjections(), {"q": (10, 8)}, "q", ["64 of its 80 elements (shape [10, 8])", "qkv [16, 8]"]),
        (kinds.CastProjections(), {"q": (16, 8)}, "q", ["64 of its 128 elements (shape [16, 8])", "qkv [16, 8]"]),
        (kinds.FusedProjections(), {"v": None}, "qkv", ["does not provide it", "96 of its 128", "[16, 8]"]),
        (kinds.Experts(), {"2.w1": None, "2.w2": None, "2.w3": None}, "w13", ["(2 such)", "288 of its 384", "[4, 12"]),
        (kinds.Experts(), {"3.w2": None}, "w2", ["does not provide it", "144 of its 192", "[4, 8, 6]"]),
        (kinds.FusedExperts(), {"gate_up": (5, 8, 12)}, "gate_up", ["384 of its 480", "[5, 8, 12]", "w13 [4, 12, 8]"]),
        (kinds.FusedExperts(), {"gate_up": (3, 8, 12)}, "gate_up", ["[3, 8, 12]", "IndexError"]),
        (kinds.FusedExperts(), {"down": None}, "w2", ["does not provide it", "[4, 8, 6]"]),
        (kinds.Composed(), {"a": None}, "a", ["does not provide it"]),
        (kinds.Composed(), {"a": (9,)}, "a", ["[9]", "[8]"]),
        (kinds.Padded(), {"embed": (11, 8)}, "embed", ["[11, 8]", "[12, 8]", "AssertionError"]),
        (kinds.Concatenated(), {"q": (9, 8)}, "k, q, v", ["[9, 8]", "change the model back"]),
        (kinds.Scalars(), {"filled": None}, "filled", ["does not provide it"]),
        (kinds.Registers(), {"copy": None}, "copy", ["does not provide it"]),
        (kinds.DefaultCopies(), {"norm": ((8,), torch.int64)}, "norm", ["int64", "float32", "in the dtype that"]),
        (kinds.DefaultCopies(), {"down": ((8, 16), FP8)}, "down", ["quantized (float8_e4m3fn)", "float32"]),
        (kinds.CastProjections(), {"v": ((4, 8), FP8)}, "v", ["quantized (float8_e4m3fn)", "float32"]),
        (kinds.DefaultCopies(), {"norm": ((8,), torch.complex64)}, "norm", ["complex64"]),
        (kinds.Quantized(), {"weight": ((8, 8), FP8), "scale": None}, "scale", ["does not provide it", "[8, 1]"]),
    ],
)
@pytest.mark.fault(
    point="tensors that a loader loses",
    did="A bias is lost, a matrix cut, an expert not sent",
    happens="`WeightSyncError` by name before anything changes",
    within=60,
)
def test_what_is_lost_cut_or_not_sent_is_refused_by_name(model, changed, parameter, says):
    error = refusal(model, model.sent(**changed))
    assert error.parameter == parameter
    for words in says:
        assert words in str(error), (words, str(error))
    audited(model, model.sent(**{"weight": ((8, 8), FP8)} if isinstance(model, kinds.Quantized) else {}))


def test_a_tied_head_passes_and_is_refused_once_it_is_untied():
    model, sent = kinds.Padded(tied=True), kinds.Padded.sent()
    audit = audited(model, sent, TIED)
    assert audit.overwritten == {"embed": "head"}
    with pytest.raises(WeightSyncError, match=r"one tensor for it and 'head'.*tie_word_embeddings=False") as caught:
        audit.require({}, "engine")
    assert caught.value.parameter == "embed"
    audited(model, kinds.Padded.sent(head=None))  # the engine's head is the embedding
    assert refusal(kinds.Padded(), kinds.Padded.sent(head=None)).parameter == "head"


def test_a_tied_head_whose_name_the_loader_does_not_know_is_left_out():
    model, sent = kinds.Padded(tied=True, knows_head=False), kinds.Padded.sent()
    audit = audited(model, sent, TIED)
    assert audit.nameless == {"head"}
    with pytest.raises(WeightSyncError, match="not tied to another") as caught:
        audit.require({}, "engine")
    assert caught.value.parameter == "head"
    error = refusal(model, sent)
    assert error.parameter == "head"
    assert isinstance(error.__cause__, KeyError)


def test_two_names_of_one_tensor_are_not_both_left_out():
    class KnowsNothing(kinds.Padded):
        def load(self, name, tensor):
            raise KeyError(name)

    assert refusal(KnowsNothing(), KnowsNothing.sent(), TIED).parameter in ("embed", "head")


def test_a_loader_that_looks_at_values_makes_the_load_unaudited():
    audit = audited(kinds.ReadsValues(), kinds.ReadsValues.sent())
    assert "its loader needs values" in audit.report()["unaudited"]


def test_tables_of_rotary_positions_may_be_ignored():
    class Ignores(kinds.DefaultCopies):
        def load(self, name, tensor):
            if "rotary_emb" not in name:
                super().load(name, tensor)

    audited(Ignores(), [*Ignores.sent(), ("layers.0.rotary_emb.inv_freq", (4,), torch.float32)])


def test_scales_of_attention_have_a_default():
    model = kinds.DefaultCopies()
    model.attention = torch.nn.Module()
    model.attention.k_scale = torch.nn.Parameter(torch.ones(1))
    audited(model, model.sent())
    model.attention.weight_scale = torch.nn.Parameter(torch.ones(1))
    assert refusal(model, model.sent()).parameter == "attention.weight_scale"


def test_a_quantized_weight_may_come_with_its_scale():
    audited(kinds.Quantized(), kinds.Quantized.sent(weight=((8, 8), FP8)))
    audited(kinds.Quantized(dequantizes=True), kinds.Quantized.sent(weight=((8, 8), FP8)))
    audited(kinds.Bytes(), kinds.Bytes.sent(scale=((8, 2), torch.float8_e8m0fnu)))


def test_a_few_tensors_that_the_trainer_keeps_wider_than_the_engine_are_listed():
    sent = kinds.DefaultCopies.sent(torch.bfloat16, norm=((8,), torch.float32))
    assert audited(kinds.DefaultCopies(torch.bfloat16), sent).narrowed == ("norm",)
    assert audited(kinds.DefaultCopies(), sent).narrowed == ()


def test_the_share_that_is_loaded_leaves_out_the_padding():
    assert audited(kinds.Padded(), kinds.Padded.sent()).loaded == {"embed": 10 / 12, "head": 10 / 12}


def test_parameters_of_no_elements_and_loaders_that_write_into_them_pass():
    class Empty(kinds.Engine):
        SHAPES: ClassVar[Shapes] = {"nothing": (0, 4), "norm": (8,)}
        SENT: ClassVar[Shapes] = SHAPES

    audited(Empty(), Empty.sent())


def test_without_ranks_only_the_other_half_is_refused_and_both_together_pass(monkeypatch):
    """The two ranks' audits run one after the other; the second gets what the first has read."""
    for kind in (kinds.OneRank, kinds.TransposedRank):
        assert refusal(kind(), kind.sent()).parameter in ("column", "row")
        parts: list[Any] = []

        def alone(partial, parts=parts):
            parts.append(partial)
            return partial

        for rank in range(2):
            monkeypatch.setattr(kind, "rank", rank)
            monkeypatch.setattr(load_audit, "_on_all_ranks", alone)
            audit_load(kind(), kind.sent(), {}, "engine")
        monkeypatch.setattr(load_audit, "_on_all_ranks", lambda _, parts=parts: load_audit._together(parts))
        audited(kind(), kind.sent())
        monkeypatch.undo()


@pytest.mark.fault(
    point="tensors that a loader loses",
    did="No rank reads a tensor",
    happens="It is refused on all ranks",
    within=60,
)
def test_what_no_rank_reads_is_refused_on_all():
    half, none = Spans.of(torch.empty(8, 8)[:4]), Spans()
    both = load_audit._together([{"a": (half, 0), "b": (none, 0)}, {"a": (half, 0)}])
    assert both.keys() == {"a"}
    assert (both["a"][0].elements(4), both["a"][1]) == (32, 0)


def test_hundreds_of_experts_are_audited_in_seconds():
    class Many(kinds.Experts):
        SHAPES: ClassVar[Shapes] = {"w13": (384, 12, 8), "w2": (384, 8, 6)}
        SENT: ClassVar[Shapes] = {
            f"{expert}.{name[2:]}": shape for expert in range(384) for name, shape in kinds.Experts.SENT.items()
        }

    start = time.process_time()
    audited(Many(), Many.sent())
    assert time.process_time() - start < 5
    assert refusal(Many(), [entry for entry in Many.sent() if entry[0] != "383.w3"]).parameter == "w13"


@pytest.mark.slow
@pytest.mark.real
def test_vllms_fp8_layers_with_block_wise_scales_want_every_scale():
    script = Path(kinds.__file__).with_name("fp8_audit.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")] or [done.stderr[-2000:]]
    answers = json.loads(line.removeprefix("ANSWERS "))
    assert answers["all"] is None
    name, problem = answers["one scale missing"]
    assert name == "gate_up.weight_scale_inv"
    assert "4 of its 8 elements (shape [4, 2]) are loaded, from gate.weight_scale_inv" in problem
    name, problem = answers["a bf16 trainer"]
    assert name == "gate_up.weight_scale_inv"
    assert "0 of its 8 elements" in problem
    assert "'quantization': 'fp8'" in problem
    assert answers["a scale too large"][0] == "up.weight_scale_inv"
