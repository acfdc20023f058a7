"""The router balance loss: transformers' own on each text alone, one gradient however a step is cut, and the load of each expert."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.demo.family_checkpoints import write_small
from cfvlm_ds.engine.setup import recompute_activations
from cfvlm_ds.models import Scorer, check_balanced, family_of, load_model
from cfvlm_ds.models.forest_attention import stock_attention
from cfvlm_ds.training.gradient_cache import forward
from cfvlm_ds.training.meter import Meter, measure
from cfvlm_ds.training.router_balance import RouterBalance
from cfvlm_ds.training.step import Measured


@pytest.fixture(scope="module", params=["qwen3_vl_moe", pytest.param("qwen3_5_moe", marks=pytest.mark.long)])
def folder(request, tmp_path_factory):
    return write_small(request.param, tmp_path_factory.mktemp("experts") / request.param)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Of which the first and the last show one picture: together they have one prefix, apart two."""
    where = tmp_path_factory.mktemp("images")
    for name, size in {"a": (60, 40), "b": (90, 30)}.items():
        Image.effect_noise(size, 90).convert("RGB").save(where / f"{name}.png")
    found = []
    for k, name in enumerate("aba"):
        texts = (Candidate("describe", f"a red circle {k}"), Candidate("describe", "two blue dogs on a lawn"))
        found.append(CounterfactualGroup(f"g{k}", ((where / f"{name}.png",),), texts, ((1, 0),)))
    return found


def alone_texts(groups: list[CounterfactualGroup]) -> list[CounterfactualGroup]:
    return [replace(group, candidates=(text,), match=((1,),)) for group in groups for text in group.candidates]


class Engine:
    """A Scorer with what a step asks of DeepSpeed's engine."""

    def __init__(self, folder: Path, recompute: bool = False) -> None:
        model = load_model(ModelConfig(str(folder), attn_implementation="sdpa"), torch.float32)
        if recompute:
            recompute_activations(model)
        self.module, self.forwards = Scorer(model, family_of(model.config)).train(), 0

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.forwards += 1
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


def test_it_is_the_librarys_of_each_text_alone(folder, groups, alone):
    """Value and gradient of all groups in one row, by the library's function on the logits that its own forward gives for a row of each
    text; fp32, relative 1e-5."""
    engine, collator = Engine(folder), load_collator(ModelConfig(str(folder)))
    model: Any = engine.module.model
    rows = []
    for single in alone_texts(groups):
        inputs = collator([single]).model_inputs
        with stock_attention(model):
            encoded = model.get_image_features(**inputs["image_inputs"], return_dict=True)
            output = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                mm_encoder_outputs={"image": encoded},
                output_router_logits=True,
            )
        rows.append(output.router_logits)
    library, text = importlib.import_module(type(model).__module__), model.config.text_config
    layers = tuple(torch.cat(layer) for layer in zip(*rows, strict=True))
    theirs = library.load_balancing_loss_func(layers, text.num_experts, text.num_experts_per_tok)
    trained = [p for name, p in model.named_parameters() if ".gate." in name or "embed_tokens" in name]
    batch, balance = collator(groups), RouterBalance(engine, 1.0, alone)
    engine(**batch.model_inputs)
    ours: Any = balance.term(batch, True)
    assert batch.num_tokens < 0.8 * len(layers[0]), "prefixes are shared"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for mine, other in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm() != 0
    share, routed = balance.taken()
    assert share is not None and share.item() == pytest.approx(ours.item()) and len(routed) == 1


def gradients(
    engine: Engine, micro_batches: Sequence[MicroBatch], forwards: list[int], world: World, weight: float
) -> tuple[torch.Tensor, float]:
    """Those of a step whose objective is the sum of all scores, and its balance."""
    engine.module.zero_grad()
    balance, total = RouterBalance(engine, weight, world), 0.0
    balance.look_ahead(micro_batches, forwards)
    for micro_batch, number in zip(micro_batches, forwards, strict=True):
        last = micro_batch is micro_batches[-1]
        scores, backward = forward(engine, micro_batch, number, world.device, lambda _: None, last, balance.term)
        backward(scores.logp.sum())
        total += float(balance.taken()[0] or 0)
    grads = [p.grad.flatten() for p in engine.module.parameters() if p.grad is not None]
    return torch.cat(grads), total


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_gradient_is_one_however_the_step_is_cut(recompute, folder, groups, alone):
    """In one micro-batch, in three, in parts with a repeat for another rank's sake: a picture has one prefix or several. A stand-in counts
    for nothing. fp32, relative 1e-4."""
    engine, collator = Engine(folder, recompute), load_collator(ModelConfig(str(folder)))
    at_once = [MicroBatch((collator(groups),))]
    whole, plain = gradients(engine, at_once, [1], alone, 300.0), gradients(engine, at_once, [1], alone, 0.0)
    assert (whole[0] - plain[0]).norm() > 0.01 * plain[0].norm(), "it matters here"
    parts = collator.parts(groups, max(collator(groups).model_inputs["forest"].tree_lengths) - 1)
    assert len(parts) == 3 and [len(part.model_inputs["images_of_tree"]) for part in parts] == [1, 1, 1]
    lost: Any = SimpleNamespace(ids=())
    stand_in = SimpleNamespace(model_inputs=parts[0].model_inputs, layout=lost)
    balance = RouterBalance(engine, 300.0, alone)
    for micro_batches, forwards in (
        ([[collator([group])] for group in groups], [1, 1, 1]),
        ([parts], [3]),
        ([parts[:2], parts[2:]], [3, 1]),
    ):
        engine.forwards = 0
        found = gradients(engine, [MicroBatch(tuple(each)) for each in micro_batches], forwards, alone, 300.0)
        assert (found[0] - whole[0]).norm() < 1e-4 * whole[0].norm() and found[1] == pytest.approx(whole[1], rel=1e-5)
        passes = [number if number == 1 else 2 * number - 1 for number in forwards]
        assert engine.forwards == sum(forwards) + sum(passes), "one forward of each is made ahead"
    engine(**parts[0].model_inputs)
    before = balance.term(parts[0], True)
    engine(**stand_in.model_inputs)
    assert before > 0 == balance.term(stand_in, True), "a stand-in"  # type: ignore[arg-type]


def test_loads_are_counted(folder, groups, alone):
    """By the experts that the routers' own outputs name for each text alone, with the loss left out; their mean is an even share."""
    engine, collator, chosen = Engine(folder), load_collator(ModelConfig(str(folder))), []
    hooks = [m.register_forward_hook(lambda m, i, o: chosen.append(o[2])) for m in engine.module.modules() if "Router" in type(m).__name__]
    singles = alone_texts(groups)
    for single in singles:
        engine(**collator([single]).model_inputs)
    assert len(hooks) * len(singles) == len(chosen)
    counts = torch.cat([each.flatten() for each in chosen])
    batch, balance, meter = collator(groups), RouterBalance(engine, 0.0, alone), Meter(None)
    logp = engine(**batch.model_inputs)
    assert balance.term(batch, True) == 0.0
    share, routed = balance.taken()
    assert share is None
    flops: Any = SimpleNamespace(of=lambda inputs, scored: 1e12)
    measure(meter, Measured(MicroBatch((batch,)), batch.scores(logp), torch.zeros(()), {}, {}, routed), {}, 1.0, flops)
    metrics = meter.reduce(alone)
    loads = {int(name[-3:]): value for name, value in metrics.items() if name.startswith("router/load/")}
    counts = counts.bincount(minlength=len(loads)).double()
    assert [loads[expert] for expert in range(len(loads))] == pytest.approx((counts * len(counts) / counts.sum()).tolist())
    assert sum(loads.values()) / len(loads) == pytest.approx(1)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="router_balance supports model types qwen3_vl_moe and qwen3_5_moe, not 'qwen3_vl'; leave"):
        check_balanced("qwen3_vl")
