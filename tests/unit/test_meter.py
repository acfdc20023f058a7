"""The metrics of a step: exact sums, and nothing in a micro-batch that waits for a GPU."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cfvlm_ds.batching.batch import Batch, MicroBatch
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.objectives import OBJECTIVES, denominators, scored_besides, weighted_loss
from cfvlm_ds.training.gradient_cache import forward
from cfvlm_ds.training.meter import Meter, measure
from cfvlm_ds.training.step import Measured

OBJECTIVE = {name: objective() for name, objective in OBJECTIVES.items()}


def test_a_micro_batch_fetches_nothing_from_its_device(model_dir, manifests):
    """On the meta device, whose tensors have no contents: whatever asks for a value of one, or for a copy elsewhere, raises."""
    objective = OBJECTIVE | {"csd": OBJECTIVES["csd"](token_credit=True)}
    groups = read_manifest(manifests["train"])[:4]
    collated = load_collator(ModelConfig(str(model_dir))).of_run("full", None, None, **scored_besides(objective))(groups)
    device = torch.device("meta")
    batch = collated.to(device)
    batch = Batch(
        **{
            **vars(batch),
            "reference": torch.zeros(shape := batch.layout.valid.shape, device=device),
            "prior": torch.zeros(shape[::2], device=device),
        }
    )

    class Engine:
        set_gradient_accumulation_boundary = staticmethod(lambda last: None)

        def __call__(self, **inputs: Any) -> torch.Tensor:
            pairs = sum(states.shape[1] for states in inputs["compared"].values())
            return torch.zeros(len(batch.cell) + pairs, device=device, requires_grad=True)

        def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
            loss.backward()

    flops: Any = SimpleNamespace(of=lambda inputs, scored: 1e12 * scored)
    meter, engine = Meter(None), Engine()

    for last in (False, True):
        scores, backward = forward(engine, MicroBatch((batch,)), 1, device, lambda _: None, last)
        counts = denominators(objective, batch.layout)
        loss, shares = weighted_loss(objective, scores, counts, 2, 0.5)
        compared = {name: count > 0 for name, count in counts.items()}
        measure(meter, Measured(MicroBatch((batch,)), scores, loss, shares, compared), objective, 0.25, flops)
        backward(loss)
    with pytest.raises((NotImplementedError, RuntimeError)):  # what the check rests on
        float(batch.layout.weight.sum())
    assert {"loss/csd", "loss/fcd", "loss/align", "loss/dpo", "logp/lp_00"} <= {name for name, *_ in meter._sums}


def test_sums_are_those_of_float64(alone):
    """Numbers and tensors of several types, as sums and as counts, against Python's own additions; rates are per second of the clock."""
    chance, meter = random.Random(0), Meter(None)
    sums: dict[str, tuple[float, float]] = {}
    for _ in range(50):
        for name, kind in (("a", torch.float32), ("b", torch.int64), ("c", torch.float64), ("d", None)):
            total = torch.tensor(chance.uniform(-9, 9)).to(kind or torch.float32)
            count = chance.uniform(0, 1) if kind != torch.int64 else torch.tensor(chance.randrange(5))
            meter.add(name, total if kind else float(total), count)
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(count))
    meter.add("none", torch.tensor(1.0), 0)
    meter.add("throughput/groups_per_s", 7, None)
    meter.since -= 10
    metrics = meter.reduce(alone)
    rate = metrics.pop("throughput/groups_per_s")
    assert metrics.pop("throughput/data_wait_share") == 0 and 7 / 11 < rate <= 7 / 10
    assert metrics == {name: total / count for name, (total, count) in sums.items()}
    assert not len(meter)


def test_a_term_counts_only_in_steps_with_its_comparisons(alone, model_dir, manifests):
    """A loss of 0 without a comparison would be averaged in: three steps by hand, for a term of one part and one of two."""
    batch = load_collator(ModelConfig(str(model_dir))).of_run("full", None, None)(read_manifest(manifests["train"])[:1])
    logp = -torch.ones(batch.layout.valid.shape)
    scores, meter = Scores(batch.layout, logp, logp), Meter(None)
    flops: Any = SimpleNamespace(of=lambda inputs, scored: 0.0)
    csd = {"csd": OBJECTIVES["csd"]()}
    for one, two, some in (([0.0], [1.0, 0.0], False), ([2.0], [3.0, 4.0], True), ([0.0], [2.0, 2.0], True)):
        shares = {"one": torch.tensor(one), "two": torch.tensor(two), "none": torch.zeros(1)}
        compared = {"one": torch.tensor([some]), "two": torch.tensor([True, some]), "none": torch.tensor([False])}
        measure(meter, Measured(MicroBatch((batch,)), scores, torch.ones(()), shares, compared), csd, 1.0, flops)
    stand_in = Scores(replace(batch.layout, ids=()), logp, logp)
    measure(meter, Measured(MicroBatch((batch,)), stand_in, torch.ones(()), {}, {}), csd, 1.0, flops)
    found = meter.reduce(alone)
    assert all(math.isfinite(value) for value in found.values()), "a stand-in is not measured"
    assert (found["loss/one"], found["loss/two"]) == (1.0, 2.0 + 3.0) and "loss/none" not in found
    assert meter.incomplete == {}
    shares, compared = {"two": torch.tensor([1.0, 0.0])}, {"two": torch.tensor([True, False])}
    measure(meter, Measured(MicroBatch((batch,)), scores, torch.ones(()), shares, compared), {}, 1.0, flops)
    assert meter.reduce(alone)["loss/two"] == 1.0 and meter.incomplete["loss/two"] == " (1 of 2 parts)"


def test_losses_by_source_are_those_of_its_groups_alone(alone, model_dir, manifests):
    """Against the loss of the same groups without the others, each term with its own global denominators; two micro-batches."""
    groups = [replace(group, source="ab"[n % 3 == 0]) for n, group in enumerate(read_manifest(manifests["train"])[:8])]
    groups = [replace(group, objectives=("align",)) if group.source == "b" else group for group in groups]
    collate = load_collator(ModelConfig(str(model_dir))).of_run("full", None, None, blank=True)
    flops: Any = SimpleNamespace(of=lambda inputs, scored: 0.0)
    chance, meter = torch.Generator().manual_seed(0), Meter(None)
    drawn: dict[str, torch.Tensor] = {}

    def scored(some: list[Any]) -> Any:
        batch = collate(some)
        for group in some:
            drawn.setdefault(group.id, -torch.rand(5, 4, generator=chance) * 9)  # the last on the blank picture
        images, texts = batch.layout.valid.shape[1:]
        logp = torch.stack([drawn[group.id][[*range(images - 1), -1], :texts] for group in some])
        divergences = dict.fromkeys(scored_besides(OBJECTIVE)["divergences"], logp / 3)
        return batch, Scores(batch.layout, logp, logp / 9, logp * 0.9, logp[:, 0] - 1, divergences=divergences)

    for half in (groups[:4], groups[4:]):
        batch, scores = scored(half)
        measure(meter, Measured(MicroBatch((batch,)), scores, torch.zeros(()), {}, {}), OBJECTIVE, 0.5, flops, ("a", "b", "c"))
    found = meter.reduce(alone)
    for source in "ab":
        _, scores = scored([replace(group, objectives=None) for group in groups if group.source == source])
        _, shares = weighted_loss(OBJECTIVE, scores, denominators(OBJECTIVE, scores.layout))
        for name, share in shares.items():
            if (source == "b" and name != "align") or name == "sham":  # these groups have no sham
                assert f"loss/{name}/{source}" not in found
            else:
                assert found[f"loss/{name}/{source}"] == pytest.approx(float(share.sum()), rel=1e-5)
    assert not any(name.endswith("/c") for name in found)
