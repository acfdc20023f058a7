"""Objectives against a naive twin: plain loops over one group at a time, written from sections 5.1 and 5.2 of the objectives' notes.

A number in a test's name is the property it proves (section 6 of the same notes). Groups are written as a short string of counterfactuals,
in order: ``b`` image and text, ``t`` text only, ``i`` image only, ``s`` a sham image, ``u`` an image and a text of which nothing is known,
``h`` as b without a known (k, 0), ``g`` as b without a known (0, k). "" is a group with K = 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cfvlm_ds import objectives as registered
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives import (
    OBJECTIVES,
    BatchAlign,
    ContrastDistill,
    Dpo,
    Misp,
    Objective,
    Retain,
    Sham,
    Svco,
    SymMPO,
    denominators,
    likelihood_report,
    required_cells,
    token_credit,
    weighted_loss,
)

# Hand-worked cases are in the paper's form, whose arithmetic is linear.
PAPER = {"link": "hinge", "len_norm": "anchor"}
Align = functools.partial(registered.Align, counterfactual=0.5)
Csd = functools.partial(registered.Csd, **PAPER, margin=0.25)
Fcd = functools.partial(registered.Fcd, **PAPER, margin=0.30)

torch.set_num_threads(1)

Cell = tuple[int, int]
KINDS = ["b", "bbb", "", "tt", "i", "ii", "sb", "bsb", "tib", "u", "bu", "h", "g", "hgb"]


# Builders ---------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Group:
    """One group in plain Python. ``pairs`` holds (image, text) of each counterfactual, None for the half it lacks."""

    truth: dict[Cell, int]
    pairs: list[tuple[int | None, int | None]]
    tokens: list[int]
    ends: list[int]
    logp: dict[Cell, float]
    end: dict[Cell, float]
    reference: dict[Cell, float]
    prior: list[float]
    weight: float = 1.0

    @property
    def size(self) -> Cell:
        return 1 + max(i for i, _ in self.truth), 1 + max(c for _, c in self.truth)

    @property
    def blank(self) -> list[float]:
        return [-1.2 * n + c / 3 for c, n in enumerate(self.tokens)]

    def parts(self, i: int, c: int) -> list[float]:
        """The log-likelihood of each token, unequal, which sum to that of the text."""
        rng = random.Random(f"{i} {c}")
        shares = [rng.random() for _ in range(self.tokens[c])]
        return [self.logp[i, c] * share / sum(shares) for share in shares]


def group(kinds: str, seed: int = 0, weight: float = 1.0) -> Group:
    """A random group of star cells; log-likelihoods are about -1 nat a token."""
    truth, pairs, images, texts = {(0, 0): 1}, [], 1, 1
    for kind in kinds:
        a = images if kind in "bisuhg" else None
        b = texts if kind in "btuhg" else None
        if a is not None and kind != "h":
            truth[a, 0] = {"s": 1, "u": -1}.get(kind, 0)
        if b is not None and kind != "g":
            truth[0, b] = -1 if kind == "u" else 0
        if kind in "bhg":
            truth[a, b] = 1
        if kind not in "su":
            pairs.append((a, b))
        images, texts = images + (a is not None), texts + (b is not None)
    rng = random.Random(f"{kinds}/{seed}")
    tokens, ends = [rng.randint(3, 6) for _ in range(texts)], [rng.randint(0, 2) for _ in range(texts)]

    def values(counts):
        return {(i, c): -rng.uniform(0.7, 1.3) * counts[c] for i, c in truth}

    prior = [-1.5 * n * rng.random() for n in tokens]
    return Group(truth, pairs, tokens, ends, values(tokens), values(ends), values(tokens), prior, weight)


def quad(l00: float, l01: float, l10: float, l11: float, **changes: Any) -> Group:
    """K = 1 with one-token texts, so scores are the given log-likelihoods under every length norm."""
    logp = {(0, 0): l00, (0, 1): l01, (1, 0): l10, (1, 1): l11}
    return dataclasses.replace(group("b"), **({"tokens": [1, 1], "ends": [0, 0], "logp": logp, "prior": [0.0, 0.0]} | changes))


def collate(groups: list[Group], pad: Cell = (0, 0), fill: float = 0.0, blank: bool = False) -> Scores:
    """Groups as float64 tensors, padded to at least ``pad``; ``fill`` is stored wherever a cell is not scored or not known.

    With ``blank``, the last image is the blank picture. Texts are changed in their last token.
    """
    sizes = [g.size for g in groups]
    shape = (len(groups), max(pad[0], *(i for i, _ in sizes)) + blank, max(pad[1], *(c for _, c in sizes)))
    most = max(max(g.tokens) for g in groups)
    parts, changed = torch.full((*shape, most), fill, dtype=torch.float64), torch.zeros((*shape[::2], most), dtype=torch.bool)
    valid, match = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1, dtype=torch.int8)
    tokens, ends = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    logp, end, reference = (torch.full(shape, fill, dtype=torch.float64) for _ in range(3))
    prior = torch.full(shape[::2], fill, dtype=torch.float64)
    for x, g in enumerate(groups):
        for (i, c), truth in g.truth.items():
            valid[x, i, c], match[x, i, c] = True, truth
            tokens[x, i, c], ends[x, i, c] = g.tokens[c], g.ends[c]
            if truth >= 0 or not fill:
                logp[x, i, c], end[x, i, c], reference[x, i, c] = g.logp[i, c], g.end[i, c], g.reference[i, c]
                parts[x, i, c] = 0
                parts[x, i, c, : g.tokens[c]] = torch.tensor(g.parts(i, c), dtype=torch.float64)
        for c in range(g.size[1]):
            changed[x, c, g.tokens[c] - 1] = True
            if blank:
                valid[x, -1, c], logp[x, -1, c], reference[x, -1, c] = True, g.blank[c], g.prior[c]
                tokens[x, -1, c] = g.tokens[c]
        prior[x, : len(g.prior)] = torch.tensor(g.prior, dtype=torch.float64)
    weight = torch.tensor([g.weight for g in groups], dtype=torch.float64)
    layout = GroupLayout(valid, match, tokens, ends, weight, changed=changed, blank=blank)
    return apart(Scores(layout, logp.requires_grad_(), end.requires_grad_(), reference, prior, tokens=parts))


def apart(scores: Scores) -> Scores:
    """The scores with divergences that are squared differences of log-likelihoods, so that they have a gradient; times 2 if sharpened."""
    own = torch.where(scores.layout.own, scores.logp, 0).sum(1, keepdim=True)
    found = {kind: (1 + bool(kind.sharpened)) * (own - scores.logp) ** 2 for kind in DIVERGENCES}
    return dataclasses.replace(scores, divergences=found)


DIVERGENCES = [Divergence("false", (1.0, 0.1)), Divergence("blank", (0.5, 0.1)), Divergence("sham")]
everything = functools.partial(collate, blank=True)
"""What any objective may need."""


def run(objectives: dict[str, Objective], scores: Scores, units: dict[str, torch.Tensor] | None = None, **kw: Any) -> tuple[float, list]:
    """Loss, and per group {("logp" or "end", image, text): gradient} of its scored cells; the blank picture is image -1."""
    scores = apart(scores)  # of a graph of its own
    loss, _ = weighted_loss(objectives, scores, units or denominators(objectives, scores.layout), **kw)
    by_name = dict(zip(("logp", "end"), torch.autograd.grad(loss, (scores.logp, scores.end_logp), allow_unused=True), strict=True))
    found, layout = [{} for _ in scores.layout.valid], scores.layout
    counted = layout.positive | layout.negative
    if layout.blank:
        counted[:, -1] = layout.valid[:, -1]
    for name, gradient in by_name.items():
        for x, i, c in layout.valid.nonzero().tolist():
            image = -1 if layout.blank and i == layout.valid.shape[1] - 1 else i
            found[x][name, image, c] = 0.0 if gradient is None else gradient[x, i, c].item()
        assert gradient is None or (gradient[~counted] == 0).all()
    return loss.item(), found


def assert_same(left: tuple[float, list], right: tuple[float, list], rtol: float = 1e-9) -> None:
    assert left[0] == pytest.approx(right[0], rel=rtol, abs=1e-12)
    assert len(left[1]) == len(right[1])
    for one, other in zip(left[1], right[1], strict=True):
        assert one == pytest.approx(other, rel=rtol, abs=1e-12)


def loss_of(objective: Objective, *groups: Group) -> float:
    return run({"x": dataclasses.replace(objective, weight=1.0, warmup=0.0)}, collate(list(groups)))[0]


def logp_gradient(objective: Objective, one: Group) -> dict[Cell, float]:
    gradient = run({"x": dataclasses.replace(objective, weight=1.0, warmup=0.0)}, collate([one]))[1][0]
    return {(i, c): value for (name, i, c), value in gradient.items() if name == "logp"}


# The naive twin: (total, units) of each part, for one group ---------------------------------------------------------------------------


def token_weights(g: Group, i: int, c: int) -> list[float]:
    opposite, parts = [k for k in range(g.size[0]) if g.truth.get((k, c)) == 1 - g.truth[i, c]], g.parts(i, c)
    if not opposite:
        return [1.0] * len(parts)
    s = [own - mean([g.parts(k, c)[t] for k in opposite]) for t, own in enumerate(parts)]
    return [0.5 + 1 / (1 + math.exp(-x)) if g.truth[i, c] else 1.5 - 1 / (1 + math.exp(-x)) for x in s]


def S(g: Group, o: Any, i: int, c: int) -> float:
    divisor = {"anchor": g.tokens[0], "own": g.tokens[c], "none": 1}[o.len_norm]
    credit = getattr(o, "token_credit", False)
    logp = sum(w * p for w, p in zip(token_weights(g, i, c), g.parts(i, c), strict=True)) if credit else g.logp[i, c]
    return (logp - o.pmi * g.prior[c]) / divisor


def h(g: Group, o: Any, violation: float) -> float:
    m = o.margin
    if o.link == "logsigmoid":
        return -math.log(1 / (1 + math.exp(o.beta * (m + violation)))) / o.beta
    return min(max(0.0, m + violation), o.hinge_cap * m if o.hinge_cap else math.inf)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def nll(g: Group, i: int, c: int) -> float:
    return -(g.logp[i, c] + g.end[i, c])


def twin_align(g: Group, o: Align) -> list[tuple[float, float]]:
    others = [cell for cell, truth in g.truth.items() if truth == 1 and cell != (0, 0)]
    count = lambda c: g.tokens[c] + g.ends[c]  # noqa: E731
    return [
        (nll(g, 0, 0), count(0)),
        (o.counterfactual * mean([nll(g, i, c) for i, c in others]), mean([count(c) for _, c in others])),
    ][: 2 if o.counterfactual else 1]


def twin_csd(g: Group, o: Csd) -> list[tuple[float, float]]:
    terms = []
    for i, c in g.pairs:
        if o.mode == "cross":
            if c is not None and g.truth.get((0, c)) == 0:
                terms.append(h(g, o, S(g, o, 0, c) - S(g, o, 0, 0)))
            if i is not None and c is not None and g.truth.get((i, 0)) == 0:
                terms.append(h(g, o, S(g, o, i, 0) - S(g, o, i, c)))
        elif i is not None and c is not None:
            terms.append(h(g, o, S(g, o, i, c) - S(g, o, 0, 0)))
    return [(mean(terms), units(g, o) * bool(terms))]


def units(g: Group, o: Csd | Fcd) -> float:
    return float(g.tokens[0] + g.ends[0] if o.len_norm == "none" else 1)


def twin_fcd(g: Group, o: Fcd) -> list[tuple[float, float]]:
    first = [S(g, o, i, 0) - S(g, o, 0, 0) for i, _ in g.pairs if i is not None and g.truth.get((i, 0)) == 0]
    second = [S(g, o, 0, c) - S(g, o, i, c) for i, c in g.pairs if i is not None and c is not None and g.truth.get((0, c)) == 0]
    halves = [h(g, o, max(v)) for v in ([first, second] if o.symmetric else [first]) if v]
    return [(mean(halves), units(g, o) * bool(halves))]


def text_gaps(g: Group, r: Callable[[int, int], float]) -> Iterator[float]:
    """Of each true text above a false one: of the factual image, and of each counterfactual one."""
    for i, c in g.pairs:
        if c is not None and g.truth.get((0, c)) == 0:
            yield r(0, 0) - r(0, c)
        if i is not None and c is not None and g.truth.get((i, 0)) == 0:
            yield r(i, c) - r(i, 0)


def image_rows(g: Group) -> Iterator[tuple[Cell, Cell]]:
    """Cells of a text on its image and on another: of the factual text, and of each counterfactual one."""
    for i, c in g.pairs:
        if i is not None and g.truth.get((i, 0)) == 0:
            yield (0, 0), (i, 0)
        if i is not None and c is not None and g.truth.get((0, c)) == 0:
            yield (i, c), (0, c)


def twin_dpo(g: Group, o: Dpo) -> list[tuple[float, float]]:
    r = lambda i, c: g.logp[i, c] - g.reference[i, c]  # noqa: E731
    loss = lambda gap: -math.log(1 / (1 + math.exp(-o.beta * gap)))  # noqa: E731
    text, image = [loss(gap) for gap in text_gaps(g, r)], [loss(r(*own) - r(*other)) for own, other in image_rows(g)]
    anchors = [loss(r(0, 0)), *(loss(r(i, c)) for i, c in g.pairs if i is not None and c is not None)]
    return [
        (o.text_side * mean(text), float(bool(text))),
        (o.image_side * mean(image), float(bool(image))),
        (o.anchor * mean(anchors), 1.0),
    ]


def twin_symmpo(g: Group, o: SymMPO) -> list[tuple[float, float]]:
    r = lambda i, c: g.logp[i, c] - g.reference[i, c]  # noqa: E731
    loss = lambda gap: -math.log(1 / (1 + math.exp(-o.beta * gap)))  # noqa: E731
    text = [loss(gap) for gap in text_gaps(g, r)]
    both, anchors = [], []
    for i, c in g.pairs:
        if i is not None and c is not None and g.truth.get((0, c)) == 0 == g.truth.get((i, 0)):
            here, there = r(0, 0) - r(0, c), r(i, c) - r(i, 0)
            both.append(o.symmetric * (loss(here) + loss(there)) + o.consistency * (here - there) ** 2)
            anchors.append(loss(r(i, c)))
    return [
        (o.text_side * mean(text), float(bool(text))),
        (mean(both), float(bool(both))),
        (o.anchor * loss(r(0, 0)), 1.0),
        (o.anchor * mean(anchors), float(bool(both))),
    ]


def twin_misp(g: Group, o: Misp) -> list[tuple[float, float]]:
    """The published form, -log sigmoid(-log sum_k exp(a_k)), whose sum over no image is left out."""
    r = lambda i, c: g.logp[i, c] - g.reference[i, c]  # noqa: E731
    loss = lambda gap: -math.log(1 / (1 + math.exp(-gap)))  # noqa: E731
    text, images = [loss(o.beta * gap) for gap in text_gaps(g, r)], {}
    for own, other in image_rows(g):
        images.setdefault(own, []).append(math.exp(o.beta * (r(*other) - r(*own))))
    listwise = [loss(-math.log(sum(each))) for each in images.values()]
    return [(o.text_side * mean(text), float(bool(text))), (o.image_side * mean(listwise), float(bool(images)))]


def twin_svco(g: Group, o: Svco) -> list[tuple[float, float]]:
    r = lambda i, c: g.logp[i, c] - g.reference[i, c] if i >= 0 else g.blank[c] - g.prior[c]  # noqa: E731
    loss = lambda gap: -math.log(1 / (1 + math.exp(-o.beta * gap)))  # noqa: E731
    attend, reject = [], []
    for c in range(g.size[1]):
        own = [i for i in range(g.size[0]) if g.truth.get((i, c)) == 1]
        if own:
            attend.append(loss(r(own[0], c) - r(-1, c)))
            reject += [loss(r(-1, c) - r(k, c)) for k in range(g.size[0]) if g.truth.get((k, c)) == 0]
    return [(o.attend * mean(attend), 1.0), (o.reject * mean(reject), float(bool(reject)))]


def twin_batch_align(g: Group, o: BatchAlign) -> list[tuple[float, float]]:
    """Of a group alone, without texts of others."""
    n = lambda c: g.tokens[c] if o.len_norm == "own" else 1  # noqa: E731
    by_text = lambda i, c: (g.logp[i, c] - o.pmi * g.prior[c]) / n(c) / o.temperature  # noqa: E731
    by_image = lambda i, c: g.logp[i, c] / n(c) / o.temperature  # noqa: E731
    texts, images = [], []
    for i, c in sorted(cell for cell, truth in g.truth.items() if truth == 1):
        false = [by_text(i, d) for d in range(g.size[1]) if g.truth.get((i, d)) == 0]
        texts.append(math.log(1 + sum(math.exp(s - by_text(i, c)) for s in false)))
    for c in range(g.size[1]):
        own = [i for i in range(g.size[0]) if g.truth.get((i, c)) == 1]
        false = [by_image(i, c) for i in range(g.size[0]) if g.truth.get((i, c)) == 0]
        if own:
            images.append(math.log(1 + sum(math.exp(s - by_image(own[0], c)) for s in false)))
    return [((mean(texts) + mean(images)) / 2, 1.0)]


def twin_contrast_distill(g: Group, o: ContrastDistill) -> list[tuple[float, float]]:
    pairs = list(image_rows(g))
    if o.contrast == "blank":
        owns = ([i for i in range(g.size[0]) if g.truth.get((i, c)) == 1] for c in range(g.size[1]))
        pairs = [((own[0], c), (-1, c)) for c, own in enumerate(owns) if own]
    logp = lambda i, c: g.logp[i, c] if i >= 0 else g.blank[c]  # noqa: E731
    each = [2 * (logp(*own) - logp(*other)) ** 2 / g.tokens[own[1]] for own, other in pairs]
    return [(mean(each), float(bool(each)))]


def twin_sham(g: Group, o: Sham) -> list[tuple[float, float]]:
    each = [(g.logp[0, 0] - g.logp[k, 0]) ** 2 / g.tokens[0] for k in range(1, g.size[0]) if g.truth.get((k, 0)) == 1]
    return [(mean(each), float(bool(each)))]


def twin_retain(g: Group, o: Retain) -> list[tuple[float, float]]:
    true = [cell for cell, truth in g.truth.items() if truth == 1]
    if o.rows == "plain" and 0 in g.truth.values():
        return [(0.0, 0.0)]
    ratio = {cell: (g.logp[cell] - g.reference[cell]) / g.tokens[cell[1]] for cell in true}
    return [(sum(g.tokens[c] * (math.exp(d) - 1 - d) for (_, c), d in ratio.items()), float(sum(g.tokens[c] for _, c in true)))]


TWINS = {
    "align": twin_align,
    "csd": twin_csd,
    "fcd": twin_fcd,
    "dpo": twin_dpo,
    "symmpo": twin_symmpo,
    "misp": twin_misp,
    "svco": twin_svco,
    "batch_align": twin_batch_align,
    "retain": twin_retain,
    "contrast_distill": twin_contrast_distill,
    "sham": twin_sham,
}

VARIANTS = {
    "align": [
        {},
        {"counterfactual": 0.0},
    ],
    "csd": [
        {},
        PAPER | {"margin": 0.25},
        PAPER | {"margin": 0.4, "hinge_cap": 0.0},
        PAPER | {"margin": 0.6, "len_norm": "own"},
        {"margin": 3.0, "beta": 2.0},
        {"margin": 0.6, "len_norm": "anchor"},
        {"pmi": 1.0, "len_norm": "anchor"},
        {"mode": "matched"},
        {"mode": "matched_sg"},
        {"token_credit": True},
        {"token_credit": True, "mode": "matched", "len_norm": "own", "pmi": 0.5},
    ],
    "fcd": [
        {},
        PAPER | {"margin": 0.3},
        PAPER | {"margin": 0.6, "hinge_cap": 1.1},
        {"symmetric": False},
        {"symmetric": False, "margin": 2.0, "len_norm": "anchor"},
        {"link": "hinge", "len_norm": "own", "margin": 0.5},
        {"pmi": 0.5},
        {"token_credit": True},
    ],
    "dpo": [
        {},
        {"token_credit": True, "image_side": 1.0},
        {"text_side": 0.0, "image_side": 1.0},
        {"anchor": 0.5, "beta": 0.7},
        {"image_side": 0.4, "anchor": 0.2},
    ],
    "symmpo": [{}, {"beta": 0.7, "consistency": 0.3}, {"text_side": 0.2, "symmetric": 2.0, "anchor": 0.0}],
    "misp": [{}, {"beta": 0.7}, {"text_side": 0.0, "image_side": 3.0}],
    "svco": [{}, {"beta": 0.7, "attend": 0.4, "reject": 2.0}],
    "retain": [{}, {"rows": "all"}],
    "contrast_distill": [{}, {"contrast": "blank", "alpha": 0.5}],
    "batch_align": [{}, {"pmi": 0.0, "temperature": 3.0}, {"len_norm": "own", "pmi": 0.5, "temperature": 0.2}],
}
CASES = [
    pytest.param(name, options, id=name + "".join(f"-{k}={v}" for k, v in options.items()))
    for name in OBJECTIVES
    for options in VARIANTS.get(name, [{}])
]
every_objective = pytest.mark.parametrize(("name", "options"), CASES)


def make(name: str, options: dict[str, Any]) -> dict[str, Objective]:
    return {name: OBJECTIVES[name](**{"weight": 0.7, "warmup": 0.0} | options)}


def ragged() -> list[Group]:
    return [group(kinds, seed, weight=1 + seed / 2) for seed, kinds in enumerate(KINDS)]


# The twin ---------------------------------------------------------------------------------------------------------------------------


@every_objective
def test_loss_and_units_equal_the_naive_twin(name, options):
    objectives, groups = make(name, options), ragged()
    parts = [[(g.weight * total, g.weight * units) for total, units in TWINS[name](g, objectives[name])] for g in groups]
    totals, units = ([sum(column) for column in zip(*([pair[side] for pair in group] for group in parts), strict=True)] for side in (0, 1))
    scores = everything(groups)
    assert denominators(objectives, scores.layout)[name].tolist() == pytest.approx(units)
    assert all(unit > 0 for unit in units)
    loss, shares = weighted_loss(objectives, scores, denominators(objectives, scores.layout))
    share = sum(total / unit for total, unit in zip(totals, units, strict=True))
    assert shares[name].sum().item() == pytest.approx(share, rel=1e-6)
    assert loss.item() == pytest.approx(0.7 * share, rel=1e-6) and not shares[name].requires_grad


@pytest.mark.parametrize("kinds", KINDS)
@every_objective
def test_each_kind_of_group_alone_equals_the_naive_twin(name, options, kinds):
    """Text-only (I = 1), image-only (C = 1), sham and one-sided groups; a part without a comparison is 0 whatever its units."""
    objectives, g = make(name, options), group(kinds, 5)
    parts = [total / units if units else 0.0 for total, units in TWINS[name](g, objectives[name])]
    assert run(objectives, everything([g]))[0] == pytest.approx(0.7 * sum(parts), rel=1e-6, abs=1e-12)


# Conformance of every registered objective ----------------------------------------------------------------------------------------------


@every_objective
def test_gradient_equals_finite_differences(name, options):
    if options.get("mode") == "matched_sg":
        return  # a stopped gradient differs from finite differences by definition: test_14_matched_sg_* compares it with matched
    objectives, scores = make(name, options), everything([group(kinds, 3) for kinds in ("bb", "t", "", "i", "sb", "bu")])
    units = denominators(objectives, scores.layout)

    def loss(logp, end_logp):
        return weighted_loss(objectives, apart(dataclasses.replace(scores, logp=logp, end_logp=end_logp)), units)[0]

    assert torch.autograd.gradcheck(loss, (scores.logp, scores.end_logp), eps=1e-6, atol=1e-6)
    assert torch.autograd.grad(loss(scores.logp, scores.end_logp), scores.logp)[0].abs().sum() > 0


@every_objective
def test_padding_changes_nothing(name, options):
    objectives = make(name, options)
    for kinds in KINDS:
        assert_same(run(objectives, everything([group(kinds)], pad=(7, 6), fill=1e6)), run(objectives, everything([group(kinds)])))


@every_objective
def test_a_group_that_names_other_objectives_counts_as_if_it_were_not_there(name, options):
    """Loss, denominators, gradients and reports, whichever groups of the batch are left out: some, or all of them."""
    objectives, groups = make(name, options), ragged()
    full = everything(groups)
    for kept in ([0, 2, 3, 7, 12], [1], []):
        named = tuple((name, "else") if x in kept else ("else",) if x % 2 else () for x in range(len(groups)))
        scores = dataclasses.replace(full, layout=dataclasses.replace(full.layout, objectives=named))
        loss, gradients = run(objectives, scores)
        assert [cell for x, found in enumerate(gradients) if x not in kept for cell in found.values() if cell] == []
        report = objectives[name].report(registered.scores_of(name, objectives[name], scores))
        if not kept:
            assert loss == 0 and not any(float(count) for _, count in report.values())
            continue
        alone = everything([groups[x] for x in kept])
        assert_same((loss, [gradients[x] for x in kept]), run(objectives, alone))
        both = denominators(objectives, scores.layout)[name], denominators(objectives, alone.layout)[name]
        assert both[0].tolist() == pytest.approx(both[1].tolist())
        for key, (total, count) in objectives[name].report(registered.scores_of(name, objectives[name], alone)).items():
            assert [float(v) for v in report[key]] == pytest.approx([float(total), float(count)])


@every_objective
def test_cells_are_all_that_an_objective_reads(name, options):
    """Not scoring any cell outside ``cells`` changes neither units nor loss; the truth table is known whole either way."""
    objectives, scores = make(name, options), everything(ragged())
    cells, layout = required_cells(objectives), scores.layout
    wanted = layout.positive if cells == "matched" else torch.full_like(layout.valid, cells in ("star", "full"))
    wanted[:, 0, 0] = True
    wanted[:, -1] |= wanted.any(1)  # the blank picture has every scored text
    reduced = dataclasses.replace(scores, layout=dataclasses.replace(layout, valid=layout.valid & wanted))
    assert run(objectives, reduced)[0] == pytest.approx(run(objectives, scores)[0], rel=1e-12)


@every_objective
def test_stored_scores_are_asked_for_exactly_when_needed(name, options):
    objectives, scores = make(name, options), everything(ragged())
    objective = objectives[name]
    expected = weighted_loss(objectives, scores, denominators(objectives, scores.layout))[0]
    for needed, field, word in [(objective.needs_reference, "reference", "reference"), (objective.needs_prior, "prior", "blind")]:
        without = dataclasses.replace(scores, **{field: None})
        if needed:
            with pytest.raises(ValueError, match=word):
                objective.numerator(without)
        else:
            assert weighted_loss(objectives, without, denominators(objectives, scores.layout))[0] == expected
    layout = dataclasses.replace(scores.layout, changed=None)
    bare = dataclasses.replace(scores, tokens=None, divergences={}, layout=layout).seen(True, False)
    if objective.needs_tokens or objective.needs_blank or objective.divergence:
        with pytest.raises(ValueError, match="collate the groups with"):
            objective.numerator(bare)
    else:
        assert weighted_loss(objectives, bare, denominators(objectives, bare.layout))[0] == expected, "bit for bit"


@every_objective
def test_report_adds_over_a_split_batch(name, options):
    objective, groups = make(name, options)[name], ragged()
    report = lambda some: objective.report(some) | likelihood_report(some)  # noqa: E731
    whole = report(everything(groups))
    parts = [report(everything(groups[part])) for part in (slice(0, 5), slice(5, 6), slice(6, None))]
    for key, (total, count) in whole.items():
        assert not total.requires_grad
        assert sum(part[key][0].item() for part in parts) == pytest.approx(total.item())
        assert sum(part[key][1].item() for part in parts) == count.item() > 0


# Property 2: mean and maximum over K ----------------------------------------------------------------------------------------------------


def test_02_only_the_hardest_image_carries_gradient_also_in_a_tie():
    tie = dataclasses.replace(group("ii"), tokens=[1], logp={(0, 0): -1.0, (1, 0): -0.9, (2, 0): -0.9})
    assert logp_gradient(Fcd(symmetric=False), tie) == dict.fromkeys(tie.truth, 0.0) | {(0, 0): -1.0, (1, 0): 1.0}


# Property 12: world size and accumulation -----------------------------------------------------------------------------------------------

MIX = {"align": Align(), "csd": Csd(warmup=0.0), "fcd": Fcd(warmup=0.0), "dpo": Dpo(weight=0.2, image_side=0.5, anchor=0.1)}
MIX |= {"symmpo": SymMPO(weight=0.3), "misp": Misp(weight=0.4), "batch_align": BatchAlign(weight=0.6, warmup=0.0), "retain": Retain()}
MIX |= {"svco": Svco(weight=0.8), "credited": Csd(warmup=0.0, token_credit=True)}
MIX |= {"contrast_distill": ContrastDistill(weight=0.3), "sham": Sham(weight=0.5)}
PARTITIONS = {  # ranks x micro-batches x group indices; 14 ragged groups, two of them without any counterfactual
    "1 rank, accumulation 4": [[range(0, 1), range(1, 3), range(3, 8), range(8, 14)]],
    "3 ranks, accumulation 2": [[[0, 13], [2]], [range(1, 2), range(3, 9)], [range(9, 12), [12]]],
    "one group at a time": [[[x]] for x in range(14)],
}


def split_step(partition: Sequence[Sequence[Sequence[int]]], groups: list[Group], units: dict | None) -> tuple[float, list]:
    """What DeepSpeed computes: gradients added over micro-batches and averaged over ranks. ``units`` None: each micro-batch its own."""
    total, gradients = 0.0, [{} for _ in groups]
    for rank in partition:
        for micro_batch in rank:
            loss, found = run(MIX, everything([groups[x] for x in micro_batch]), units, world_size=len(partition))
            total += loss / len(partition)
            for x, gradient in zip(micro_batch, found, strict=True):
                gradients[x] = {cell: value / len(partition) for cell, value in gradient.items()}
    return total, gradients


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_12_ranks_and_micro_batches_do_not_change_loss_or_gradient(partition):
    groups = ragged()
    layout = everything(groups).layout
    one = run(MIX, everything(groups))
    each = [denominators(MIX, everything([groups[x] for x in micro]).layout) for rank in partition for micro in rank]
    units = {name: torch.stack([found[name] for found in each]).sum(0) for name in MIX}
    assert all(torch.allclose(units[name], denominators(MIX, layout)[name]) for name in MIX)
    assert_same(split_step(partition, groups, units), one)
    assert abs(split_step(partition, groups, None)[0] - one[0]) > 1e-3, "means of a micro-batch of its own must be noticed"


# Property 14: what is frozen ------------------------------------------------------------------------------------------------------------


@every_objective
def test_14_reference_and_prior_never_carry_a_gradient(name, options):
    objectives, scores = make(name, options), everything(ragged())
    reference, prior = scores.reference.clone().requires_grad_(), scores.prior.clone().requires_grad_()
    with_leaves = dataclasses.replace(scores, reference=reference, prior=prior)
    weighted_loss(objectives, with_leaves, denominators(objectives, scores.layout))[0].backward()
    assert reference.grad is None and prior.grad is None
    assert scores.logp.grad.abs().sum() > 0


def test_14_matched_sg_raises_the_anchor_only():
    g = group("bbsbt", 3)
    for link in ("hinge", "logsigmoid"):
        matched, stopped = (Csd(mode=mode, link=link, margin=2.0, hinge_cap=0.0) for mode in ("matched", "matched_sg"))
        assert loss_of(stopped, g) == loss_of(matched, g)
        full, half = logp_gradient(matched, g), logp_gradient(stopped, g)
        assert half[0, 0] == full[0, 0] < 0
        assert all(value == 0 for cell, value in half.items() if cell != (0, 0))
        assert all(full[i, c] > 0 for i, c in g.pairs if i is not None and c is not None)


# Property 15: groups without counterfactuals ----------------------------------------------------------------------------------------------


@every_objective
def test_15_batch_without_any_comparison_has_finite_gradients(name, options):
    objectives, scores = make(name, options), everything([group(""), group("u"), group("s")], pad=(4, 4))
    loss, shares = weighted_loss(objectives, scores, denominators(objectives, scores.layout))
    loss.backward()
    assert torch.isfinite(scores.logp.grad).all()
    if name in ("csd", "fcd"):
        assert (loss, shares[name]) == (0, 0)
        assert not scores.logp.grad.any()


# Formulas by hand -----------------------------------------------------------------------------------------------------------------------


def test_svco_equals_the_published_loss():
    """The authors' sum of four terms (dpo_loss of their trainer.py) of one pair with beta 0.1, written out; ours is half of it.

    r_00 = 2, r_01 = -1, r_10 = 0.5, r_11 = 7, and 1 and -3 of the two texts on the blank picture.
    """
    g = quad(-3.0, -6.0, -4.0, -2.0, reference={(0, 0): -5.0, (0, 1): -5.0, (1, 0): -4.5, (1, 1): -9.0})
    b = [g.blank[0] - 1.0, g.blank[1] + 3.0]
    g = dataclasses.replace(g, prior=b)
    loss = lambda gap: -math.log(1 / (1 + math.exp(-0.1 * gap)))  # noqa: E731
    attend, reject = loss(2 - 1) + loss(7 + 3), loss(1 - 0.5) + loss(-3 + 1)
    assert run({"x": Svco()}, everything([g]))[0] == pytest.approx((attend + reject) / 2)
    assert run({"x": Svco(attend=2.0, reject=0.0)}, everything([g]))[0] == pytest.approx(attend)
    won = Svco().report(everything([g]))["svco/accuracy"]
    assert (won[0].item(), won[1].item()) == (3, 4)


def test_a_sham_differs_from_the_factual_image_in_no_known_truth():
    """Images 1 and 2 share the factual text, but text 1 is false of image 2 and true of the factual one; of image 1 it is unknown."""
    truth = {(0, 0): 1, (1, 0): 1, (2, 0): 1, (3, 0): 0, (0, 1): 1, (2, 1): 0, (3, 1): 1}
    logp = {cell: -1.0 - k for k, cell in enumerate(truth)}
    layout = collate([dataclasses.replace(group("t"), truth=truth, logp=logp, end=logp, reference=logp)]).layout
    assert layout.compared("sham").nonzero().tolist() == [[0, 1, 0]]
    assert layout.compared("false").nonzero().tolist() == [[0, 2, 1], [0, 3, 0]]
    assert not layout.compared("blank").any()


def test_token_credit_by_hand():
    """A text of two tokens at log p -1, -3 on its image and -1, -3 - log 3 on the other: s = 0, log 3, so its weights are 1 and 1.25."""
    scores = collate([dataclasses.replace(group("i"), tokens=[2])])
    tokens = torch.tensor([[-1.0, -3.0], [-1.0, -3.0 - math.log(3)]], dtype=torch.float64).view(1, 2, 1, 2)
    scores = dataclasses.replace(scores, tokens=tokens)
    total, count = token_credit.credit_report(scores, "csd")["credit/csd"]
    assert (total.item(), count.item()) == (pytest.approx(2.5), 2), "the last token of the text on two images"


@pytest.mark.parametrize("objective", [Csd(), Fcd(), Dpo(image_side=1.0)], ids=["csd", "fcd", "dpo"])
def test_token_credit_weights_the_gradient_of_each_token(objective):
    """By the weights of the naive twin, as constants: each token's gradient is its weight times that of its cell's score."""
    credited, groups = {"x": dataclasses.replace(objective, weight=1.0, warmup=0.0, token_credit=True)}, ragged()
    scores = collate(groups)
    of_cells = run(credited, scores)[1]
    tokens = scores.tokens.clone().requires_grad_()
    tied = dataclasses.replace(scores, tokens=tokens, logp=tokens.sum(-1))
    weighted_loss(credited, tied, denominators(credited, scores.layout))[0].backward()
    assert tokens.grad.abs().sum() > 0
    for x, g in enumerate(groups):
        for (i, c), truth in g.truth.items():
            weights = token_weights(g, i, c) if truth >= 0 else [0.0] * g.tokens[c]
            expected = [w * of_cells[x]["logp", i, c] for w in weights]
            assert tokens.grad[x, i, c, : g.tokens[c]].tolist() == pytest.approx(expected, abs=1e-12)


def test_ratio_of_retain_by_hand():
    """Captions of 2 tokens that lost 2 log 2 nats, and of 4 that gained 4 log 2."""
    fallen = dataclasses.replace(group(""), tokens=[2], logp={(0, 0): -5.0}, reference={(0, 0): -5.0 + 2 * math.log(2)})
    risen = dataclasses.replace(group(""), tokens=[4], logp={(0, 0): -5.0}, reference={(0, 0): -5.0 - 4 * math.log(2)})
    report = Retain().report(collate([fallen, risen]))["retain/ratio"]
    assert (report[0].item(), report[1].item()) == (pytest.approx(2 * math.log(2)), 6)


# The loss as a whole --------------------------------------------------------------------------------------------------------------------


def test_warmup_ramps_linearly():
    g = collate([group("bb", 2)])
    csd = Csd(weight=0.5, warmup=0.2, margin=2.0)
    units = denominators({"csd": csd}, g.layout)
    full, shares = weighted_loss({"csd": csd}, g, units)
    for progress, factor in [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)]:
        loss, unweighted = weighted_loss({"csd": csd}, g, units, progress=progress)
        assert loss.item() == pytest.approx(factor * full.item())
        assert unweighted["csd"] == shares["csd"] > 0
    assert full.item() == pytest.approx(0.5 * shares["csd"].item())
    assert weighted_loss({"csd": dataclasses.replace(csd, warmup=0.0)}, g, units, progress=0.0)[0] == full


def test_required_cells_is_the_largest_need():
    anchor, matched = Align(counterfactual=0.0), Align()
    assert required_cells({}) == "anchor"
    assert required_cells({"a": anchor}) == "anchor"
    assert required_cells({"a": matched, "b": anchor}) == "matched"
    assert required_cells({"a": anchor, "b": Csd(mode="matched")}) == "matched"
    for star in (Csd(), Fcd(), Dpo(), SymMPO(), Misp()):
        assert required_cells({"a": star, "b": matched}) == "star"


# Reports --------------------------------------------------------------------------------------------------------------------------------


def test_likelihood_report_by_hand():
    """Texts of 2 and 3 tokens; image 1 is a sham, image 2 the counterfactual. Sums of nats and tokens per kind of cell:

    lp_00 (-1, 2); lp_kk the sham (1, 0) and the pair (2, 1): -2 - 5 over 2 + 3; lp_k0 (2, 0): (-4, 2); lp_0k (0, 1): (-3, 3).
    """
    logp = {(0, 0): -1.0, (1, 0): -2.0, (0, 1): -3.0, (2, 0): -4.0, (2, 1): -5.0}
    g = dataclasses.replace(group("sb"), tokens=[2, 3], logp=logp)
    found = {name: (total.item(), count.item()) for name, (total, count) in likelihood_report(collate([g], pad=(4, 4), fill=1e6)).items()}
    assert found == {"logp/lp_00": (-1.0, 2), "logp/lp_kk": (-7.0, 5), "logp/lp_k0": (-4.0, 2), "logp/lp_0k": (-3.0, 3)}


def test_margin_and_dpo_reports_by_hand():
    """S_00 = S_11 = -1, S_01 = -1.1, S_10 = -1: text side gaps -.1 (active, not violated) and 0 (a tie counts as violated).

    Image side: text 0 on image 1: 0 (violated); text 1 on image 0: -.1. DPO with reference 0: r_00 - r_01 = .1, beta = .1,
    so the margin is .01, and r_11 - r_10 = 0, a tie.
    """
    first = quad(-1.0, -1.1, -1.0, -1.0, reference=dict.fromkeys(group("b").truth, 0.0))
    scores = collate([first, quad(-1.0, -5.0, -5.0, -1.0)])
    plain = lambda report: {name: (float(total), int(count)) for name, (total, count) in report.items()}  # noqa: E731
    assert plain(Csd().report(scores)) == {"active/csd": (2, 4), "violated/csd": (1, 4)}
    assert plain(Fcd().report(scores)) == {"active/fcd": (2, 4), "violated/fcd": (1, 4)}
    report = plain(Dpo().report(collate([first])))
    assert (report["dpo/accuracy"], report["dpo/margin"]) == ((1, 2), (pytest.approx(0.01), 2))
    report = plain(SymMPO().report(collate([first])))
    assert (report["symmpo/accuracy"], report["symmpo/margin"]) == ((1, 2), (pytest.approx(0.01), 2))
    report = plain(Misp().report(collate([first])))  # text 0 ties on the two images, text 1 has r_11 - r_01 = .1
    assert (report["misp/accuracy"], report["misp/margin"]) == ((1, 2), (pytest.approx(0.01), 2))
