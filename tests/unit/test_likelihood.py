"""From logits to score matrices, against plain Python sums; and the group type with its row format, every refusal included."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import SHAM, Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.core.scores import score_matrix, token_logprobs
from cfvlm_ds.data.cfgroup import from_row, to_row
from cfvlm_ds.models.chunked_logprobs import head_logprobs

torch.set_num_threads(1)

ROOT = Path("/data/root")


def layout(num_tokens: list[list[list[int]]], match: list[list[list[int]]] | None = None) -> GroupLayout:
    tokens = torch.tensor(num_tokens)
    truth = torch.zeros_like(tokens, dtype=torch.int8) if match is None else torch.tensor(match, dtype=torch.int8)
    return GroupLayout(tokens > 0, truth, tokens, torch.zeros_like(tokens), torch.ones(len(tokens)))


# Tokens -----------------------------------------------------------------------------------------------------------------------------


def test_token_logprobs_equals_a_loop_in_float64_with_its_gradient():
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    expected = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        expected.append(row[target] - math.log(sum(math.exp(value) for value in row)))
    found = token_logprobs(logits.requires_grad_(), targets)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, torch.nn.functional.one_hot(targets, 11) - logits.softmax(-1), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(token_logprobs, (logits, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast_before_the_softmax(dtype):
    """Exactly the fp32 result of the same logits; log_softmax in the narrow type is off by far more than a margin allows."""
    torch.manual_seed(1)
    logits, targets = (3 * torch.randn(64, 5000)).to(dtype).requires_grad_(), torch.randint(5000, (64,))
    found = token_logprobs(logits, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_logprobs(logits.detach().float(), targets))
    exact = token_logprobs(logits.detach().double(), targets)
    narrow = logits.detach().log_softmax(-1)[range(64), targets].double()
    assert (found - exact).abs().max() < 1e-5 < 1e-3 < (narrow - exact).abs().max()
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == dtype and gradient.abs().sum() > 0


def test_large_logits_are_stable():
    logits = torch.tensor([[1e4, 1e4, 0.0], [-3e38, 0.0, 0.0], [3e38, 0.0, 0.0]], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([0, 1, 0]))
    assert found.tolist() == pytest.approx([-math.log(2), -math.log(2), 0.0], abs=1e-3)
    assert torch.isfinite(torch.autograd.grad(found.sum(), logits)[0]).all()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 4, 6, 100])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)])
def test_head_logprobs_equal_those_of_all_logits(rows, frozen, cap, monkeypatch):
    """In parts of any size, several targets at one state and one of them twice, squeezed or not: values and gradients, float64."""
    monkeypatch.setattr("cfvlm_ds.models.chunked_logprobs.LOGITS", rows * 11)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    predicted_by, targets = torch.tensor([3, 0, 0, 0, 5, 1, 2, 4, 3]), torch.tensor([1, 2, 3, 2, 10, 0, 4, 4, 9])
    trained = [t.requires_grad_() for name, t in {"hidden": hidden, "weight": weight}.items() if name not in frozen]
    factors = torch.randn(9, dtype=torch.float64)
    found = head_logprobs(hidden, weight, predicted_by, targets, cap)
    logits = hidden @ weight.T if cap is None else cap * (hidden @ weight.T / cap).tanh()
    expected = token_logprobs(logits[predicted_by], targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((out * factors).sum(), trained) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(head_logprobs, (hidden, weight, predicted_by, targets, cap))


def divergence(kind: Divergence, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of one pair of logits [V], as the papers write it."""
    p, q = own.softmax(-1), other.softmax(-1)
    if kind.sharpened is None:
        return (p * (p / q).log()).sum()
    alpha, beta = kind.sharpened
    kept = [v for v in range(len(p)) if p[v] >= beta * p.max()]
    raw = torch.stack([p[v] * (p[v] / q[v]) ** alpha for v in kept]).detach()
    return sum(((t / raw.sum()) * (t / raw.sum() / p[v]).log() for v, t in zip(kept, raw, strict=True)), torch.zeros(()))


KINDS = [Divergence("false", (1.0, 0.1)), Divergence("sham"), Divergence("blank", (0.5, 1e-9)), Divergence("false", (2.0, 1.0))]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)])
def test_divergences_equal_those_of_whole_distributions(rows, frozen, cap, monkeypatch):
    """Beside log-probs, in parts of any size, with a state in several pairs; values and gradients, float64."""
    monkeypatch.setattr("cfvlm_ds.models.chunked_logprobs.LOGITS", rows * 11)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    predicted_by, targets = torch.tensor([3, 0, 0, 5]), torch.tensor([1, 2, 3, 2])
    pairs = [torch.tensor([[0, 0, 3, 1], [1, 2, 4, 0], [7, 7, 7, 7]])[:, :most] for most in (4, 2, 3, 0)]
    compared = dict(zip(KINDS, pairs, strict=True))
    trained = [t.requires_grad_() for name, t in {"hidden": hidden, "weight": weight}.items() if name not in frozen]
    found = head_logprobs(hidden, weight, predicted_by, targets, cap, compared)
    logits = hidden @ weight.T if cap is None else cap * (hidden @ weight.T / cap).tanh()
    each = [divergence(kind, logits[a], logits[b]) for kind, states in compared.items() for a, b, _ in states.T.tolist()]
    expected = torch.cat([token_logprobs(logits[predicted_by], targets), torch.stack(each)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[4:] > 1e-3).all()
    factors = torch.randn(len(found), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * factors).sum(), trained) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    plain = {Divergence("sham"): pairs[0]}
    assert torch.autograd.gradcheck(lambda *heads: head_logprobs(*heads, predicted_by, targets, cap, plain), (hidden, weight))


def test_a_sharpened_target_by_hand():
    """p = (1/2, 3/8, 1/16, 1/16) and q = (1/4, 3/8, 3/16, 3/16): with beta 1/2 two tokens remain, whose p (p / q) are 1 and 3/8."""
    p, q = (torch.tensor(each, dtype=torch.float64).log() for each in ([8, 6, 1, 1], [4, 6, 3, 3]))
    states, target = torch.stack([p, q]).requires_grad_(), [8 / 11, 3 / 11]
    compared = {Divergence("false", (1.0, 0.5)): torch.tensor([[0], [1], [0]])}
    found = head_logprobs(states, torch.eye(4, dtype=torch.float64), torch.tensor([0]), torch.tensor([0]), None, compared)[1]
    assert found.item() == pytest.approx(sum(t * math.log(t / each) for t, each in zip(target, (1 / 2, 3 / 8), strict=True)))
    (gradient,) = torch.autograd.grad(found, states)
    assert gradient[0].tolist() == pytest.approx([1 / 2 - 8 / 11, 3 / 8 - 3 / 11, 1 / 16, 1 / 16]) and not gradient[1].any()


@pytest.mark.parametrize("rows", [8, 100])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_heads_in_half_precision_give_no_rounded_logits(device, rows, monkeypatch):
    """Logits of up to 40, whose bfloat16 is a tenth of a nat off, are those of float64; so are the gradients, but for their type."""
    monkeypatch.setattr("cfvlm_ds.models.chunked_logprobs.LOGITS", rows * 5000)
    torch.manual_seed(1)
    hidden, weight = (torch.randn(size, 64, device=device).bfloat16().requires_grad_() for size in (20, 5000))
    predicted_by, targets = torch.arange(20, device=device).repeat(2), torch.randint(5000, (40,), device=device)
    found = head_logprobs(hidden, weight, predicted_by, targets)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    exact = token_logprobs((wide[0] @ wide[1].T)[predicted_by], targets)
    rounded = token_logprobs((hidden @ weight.T).detach()[predicted_by], targets)
    assert (found - exact).abs().max() < 1e-4 < 0.05 < (rounded - exact).abs().max()
    for ours, theirs in zip(torch.autograd.grad(found.sum(), (hidden, weight)), torch.autograd.grad(exact.sum(), wide), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


# Score matrix -------------------------------------------------------------------------------------------------------------------------


def test_09_score_matrix_equals_sums_of_lists():
    """Ragged texts (1 to 4 tokens, 0 to 2 end tokens) of 3 x 2 x 4 cells, some cells empty, tokens in any order."""
    rng, shape = random.Random(2), (3, 2, 4)
    texts = defaultdict(list)
    ends = defaultdict(list)
    rows = []
    for index, cell in enumerate((g, i, c) for g in range(3) for i in range(2) for c in range(4)):
        if index % 5 == 3:
            continue
        for store, count, is_end in ((texts, rng.randint(1, 4), False), (ends, rng.randint(0, 2), True)):
            for _ in range(count):
                value = -rng.expovariate(1)
                store[cell].append(value)
                rows.append((value, index, is_end))
    rng.shuffle(rows)
    values, cells, flags = zip(*rows, strict=True)
    token_logp = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    logp, end_logp = score_matrix(token_logp, torch.tensor(cells), torch.tensor(flags), layout([[[1] * 4] * 2] * 3))
    assert logp.shape == end_logp.shape == shape
    for g, i, c in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        assert logp[g, i, c].item() == pytest.approx(sum(texts[g, i, c]))
        assert end_logp[g, i, c].item() == pytest.approx(sum(ends[g, i, c]))
    weight = torch.arange(24, dtype=torch.float64).view(shape)
    (gradient,) = torch.autograd.grad((weight * logp).sum() + (100 * weight * end_logp).sum(), token_logp)
    assert gradient.tolist() == [cell * (100 if is_end else 1) for _, cell, is_end in rows]


def test_score_matrix_without_tokens_is_zero():
    """A rank whose micro-batch holds nothing still gets matrices to run backward through."""
    empty = torch.zeros(0, requires_grad=True)
    logp, end_logp = score_matrix(empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), layout([[[0, 0]]]))
    assert logp.tolist() == end_logp.tolist() == [[[0.0, 0.0]]]
    (logp + end_logp).sum().backward()
    assert empty.grad.shape == (0,)


# Groups -------------------------------------------------------------------------------------------------------------------------------

ROW = {
    "schema": "cfgroup/1",
    "id": "dog-17",
    "source": "mine",
    "prompt": "Describe the image.",
    "images": [{"id": "i0", "path": "img/17.jpg"}, {"id": "i1", "path": "img/17_edit.jpg"}, {"id": "i2", "path": "img/17_again.jpg"}],
    "texts": [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs"}],
    "match": [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1], ["i2", "t0", 1]],
    "edits": [{"type": "count", "image": "i1", "text": "t1", "from": "two", "to": "three"}, {"type": SHAM, "image": "i2"}],
    "weight": 2.5,
}
GROUP = CounterfactualGroup(
    id="dog-17",
    images=((ROOT / "img/17.jpg",), (ROOT / "img/17_edit.jpg",), (ROOT / "img/17_again.jpg",)),
    candidates=(Candidate("Describe the image.", "two dogs"), Candidate("Describe the image.", "three dogs")),
    match=((1, 0), (0, 1), (1, None)),
    edits=(Edit("count", 1, 1, "two", "three"), Edit(SHAM, 2)),
    weight=2.5,
    source="mine",
)


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """ROW with the value at ``path`` replaced (or removed, where ``to`` is Ellipsis)."""
    row = copy.deepcopy(ROW)
    at = row
    for key in path[:-1]:
        at = at[key]
    if to is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return row


def test_row_to_group():
    assert from_row(ROW, ROOT) == GROUP


@pytest.mark.parametrize(
    "group",
    [
        GROUP,
        CounterfactualGroup("one", ((ROOT / "a.jpg",),), (Candidate("", "x"),), ((1,),)),
        CounterfactualGroup("text alone", ((),), (Candidate("", "x"), Candidate("", "y")), ((1, 0),)),
        CounterfactualGroup(
            "two pictures", ((ROOT / "a.jpg", ROOT / "b.jpg"), (ROOT / "b.jpg", ROOT / "a.jpg")), (Candidate("", "x"),), ((1,), (0,))
        ),
        CounterfactualGroup(
            "questions",
            ((ROOT / "a.jpg",), (ROOT / "b.jpg",)),
            (Candidate("Is it red?", "Yes"), Candidate("Is it blue?", "Yes"), Candidate("", "Yes")),
            ((1, None, 0), (None, 0, 1)),
            edits=(Edit("attribute", None, 1), Edit("attribute", 1, None, "red", "blue")),
        ),
    ],
    ids=lambda group: group.id,
)
def test_row_round_trip_survives_json(group):
    row = to_row(group, ROOT, meta={"seed": 3})
    assert row["meta"] == {"seed": 3} and "meta" not in to_row(group, ROOT)
    assert from_row(json.loads(json.dumps(row)), ROOT) == dataclasses.replace(group, meta='{"seed":3}')


def test_a_text_may_carry_its_own_prompt_and_row_defaults_hold():
    row = changed("texts", 1, "prompt", to="Count.")
    assert [candidate.prompt for candidate in from_row(row, ROOT).candidates] == ["Describe the image.", "Count."]
    bare = {key: ROW[key] for key in ("id", "images", "texts", "match")}
    group = from_row(bare, ROOT)
    assert (group.weight, group.source, group.edits, group.candidates[0].prompt) == (1.0, "", (), "")


BAD_ROWS = {
    "unknown key, near name": (changed("imagse", to=[]), "'imagse'.*'images'"),
    "other schema": (changed("schema", to="cfgroup/9"), "'cfgroup/9'.*'cfgroup/1'"),
    "no id": (changed("id", to=...), "'id' is missing"),
    "image id twice": (changed("images", 1, "id", to="i0"), "images: id 'i0'"),
    "no path": (changed("images", 0, "path", to=...), "images: key 'path'"),
    "no image beside others": (changed("images", 0, "path", to=None), "image 1 has 1 pictures"),
    "two images without one": (changed("images", to=[{"id": i, "path": None} for i in ("i0", "i1", "i2")]), "one image entry"),
    "prompt null": (changed("prompt", to=None), "'prompt' .*None"),
    "match entry short": (changed("match", 0, to=["i0", "t0"]), r"match entry \['i0', 't0'\]"),
    "truth a boolean": (changed("match", 1, 2, to=False), r"match entry \['i0', 't1', False\]"),
    "match of unknown text": (changed("match", 1, 1, to="t9"), "'dog-17': match: .*'t9'.* t0, t1"),
    "match swaps image and text": (changed("match", 1, to=["t1", "i0", 0]), "'t1'.* i0, i1, i2"),
    "match contradicts itself": (changed("match", 2, to=["i0", "t0", 0]), r"both 0 and 1 for \(i0, t0\)"),
    "factual pair false": (changed("match", 0, 2, to=0), "the first image and the first text"),
    "image id a number": (changed("images", 1, "id", to=1), "images: 'id'.* 1"),
    "path not a string": (changed("images", 0, "path", to=7), "images: 'path' .* 7"),
    "weight infinite": (changed("weight", to=math.inf), "weight .* inf"),
    "weight zero": (changed("weight", to=0), "weight .* 0.0"),
    "weight a string": (changed("weight", to="1"), "weight .*'1'"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_refused_by_name(row, message):
    with pytest.raises(DataError, match=message):
        from_row(row, ROOT)


def test_the_same_text_under_another_prompt_is_another_candidate():
    row = changed("texts", 1, to={"id": "t1", "text": "two dogs", "prompt": "Or cats?"})
    assert len(from_row(row, ROOT).candidates) == 2


A, B = Candidate("p", "a"), Candidate("p", "b")


@pytest.mark.parametrize(
    ("images", "candidates", "match", "message"),
    [
        (((Path("x"),),), (), ((),), "at least one image and one text"),
        (((Path("x"),),), (A, B), ((1,),), "match must be 1 images x 2 texts"),
        (((Path("x"),),), (A, B), ((1, 2),), r"group 'g': match\[0\]\[1\] is 2; it must be 1, 0 or None"),
        (((Path("x"),),), (A,), ((None,),), "must match"),
    ],
)
def test_bad_group_is_refused_by_name(images, candidates, match, message):
    with pytest.raises(DataError, match=message):
        CounterfactualGroup("g", images, candidates, match)
