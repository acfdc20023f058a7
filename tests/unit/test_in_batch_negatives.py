"""Texts of other groups of an optimizer step: who gets which, what they score, and the loss that compares over the whole step."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE as ALONE
from conftest import PROMPT, draw, plain_logp
from torch import Tensor

from cfvlm_ds.batching.batch_layout import group_layout, stored_scores, with_blank_picture, with_in_batch_negatives
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import GroupSampler, PackedSampler
from cfvlm_ds.data.stored_scores import ScoresOfSources, StoredScores
from cfvlm_ds.models import load_processor
from cfvlm_ds.objectives import BatchAlign, batch_terms, denominators, required_cells, weighted_loss
from cfvlm_ds.objectives.align import Align
from cfvlm_ds.objectives.csd import Csd
from cfvlm_ds.objectives.fcd import Fcd
from cfvlm_ds.training.in_batch_negatives import CrossRankScores, StepPart, WholeSteps, WithNegatives

TERMS = {"batch_align": 3}


def group(name: str, *texts: str, images: int = 0, prompt: str = PROMPT, **more: Any) -> CounterfactualGroup:
    """Image k shows text k; ``images`` more show text 0."""
    match = [tuple(int(i == c) for c in range(len(texts))) for i in range(len(texts))]
    match += [match[0]] * images
    pictures = tuple((Path(f"/{name}-{i}.png"),) for i in range(len(match)))
    return CounterfactualGroup(name, pictures, tuple(Candidate(prompt, text) for text in texts), tuple(match), **more)


def in_a_step(
    groups: Sequence[Any], terms: dict[str, int] = TERMS, seed: int = 0, places: Sequence[int] | None = None
) -> list[CounterfactualGroup]:
    step = tuple(range(len(groups)))
    found = WithNegatives(groups, terms, seed)
    return [found.__getitems__(StepPart(step, range(place, place + 1)))[0] for place in (step if places is None else places)]


def drawn(group: CounterfactualGroup) -> list[str]:
    assert group.in_step is not None
    return [negative.text for negative in group.in_step.in_batch]


def many(number: int, seed: int = 0) -> list[CounterfactualGroup]:
    """Groups of one to three texts, shams among them, some with a second prompt, a weight, or an image of which all texts are false."""
    rng, groups = random.Random(seed), []
    for g in range(number):
        count = rng.choice((1, 2, 2, 3))
        made = group(f"g{g}", *(f"text {g} {k}" for k in range(count)), images=g % 3 == 0, weight=1 + g % 2 / 2)
        if g % 4 == 1:
            asked = (*made.candidates, Candidate("another question", "yes"))
            made = replace(made, candidates=asked, match=tuple((*row, int(i == 0)) for i, row in enumerate(made.match)))
        if g % 5 == 3:
            other, false = (Path(f"/g{g}-other.png"),), (0,) * len(made.candidates)
            made = replace(made, images=(*made.images, other), match=(*made.match, false))
        groups.append(made)
    return groups


# Who gets which -----------------------------------------------------------------------------------------------------------------------


def test_texts_of_others_that_answer_the_same_prompt_and_are_not_excluded():
    groups = [
        group("a", "a red cat", "a blue cat", exclude=("dogs", "A  Green cat")),
        group("b", "A red  cat", "a dog"),  # the first says what a says
        group("c", "a dog", "a grey dog", keys=("", "dogs")),
        group("d", "a green cat"),
        group("e", "a car", "a bus", prompt="What is it?"),
        group("f", "a horse", objectives=("align",)),
        group("text alone", "a word"),
        group("a", "a red cat", "a blue cat"),
    ]
    groups[6] = replace(groups[6], images=((),), match=((1,),))
    found = in_a_step(groups, {"batch_align": 99})
    assert sorted(drawn(found[0])) == ["a dog"], "once, though b and c have it; d's text and c's second are excluded"
    assert sorted(" ".join(text.lower().split()) for text in drawn(found[3])) == ["a blue cat", "a dog", "a grey dog", "a red cat"]
    assert not drawn(found[4]) and not drawn(found[5]) and not drawn(found[6])
    assert "a red cat" not in drawn(found[7]) and "a green cat" in drawn(found[7]), "the same group at another place of the step"
    assert {negative.source_group for each in found for negative in each.in_step.in_batch if negative.group == "a"} == {0}
    assert {negative.share for negative in found[3].in_step.in_batch} == {0.5}, "half of each group of two texts"


def test_a_text_that_is_known_to_be_true_is_never_drawn():
    """What shares a key says the same, whether a row excludes it or not; what another row says of a picture holds for that picture here."""
    by_key = [group("a", "a red cat", "a blue cat", keys=("cat", "")), group("b", "a crimson feline", keys=("cat",))]
    by_key += [group("c", "an azure cat", "a dog", keys=("a blue cat", ""))]
    assert [sorted(drawn(each)) for each in in_a_step(by_key)] == [
        ["a dog"],
        ["a blue cat", "a dog", "an azure cat"],
        ["a crimson feline", "a red cat"],
    ], "a key may be what another text says"
    first = group("a", "a red cat", "a blue cat")
    again = replace(group("b", "a cat on a sofa", "a dog on a sofa"), images=(first.images[1], (Path("/other.png"),)))
    assert [drawn(each) for each in in_a_step([first, again])] == [["a dog on a sofa"], ["a red cat"]]


def test_a_question_about_two_pictures_is_another_one():
    two = replace(group("two", "the left one is red"), images=((Path("/p.png"), Path("/q.png")),))
    more = replace(group("more", "both"), images=((Path("/r.png"), Path("/q.png")),))
    found = in_a_step([group("a", "a red cat"), two, group("b", "a dog"), more])
    assert [drawn(each) for each in found] == [["a dog"], ["both"], ["a red cat"], ["the left one is red"]]


def test_as_many_as_are_wanted_and_not_always_the_same():
    groups = many(12)
    found = in_a_step(groups)
    assert all(len(drawn(each)) == 3 == len(set(drawn(each))) for each in found)
    assert len({negative.group for each in found for negative in each.in_step.in_batch}) > 8
    assert [drawn(each) for each in in_a_step(groups, seed=1)] != [drawn(each) for each in found]
    assert in_a_step(groups) == found


def test_the_choice_depends_on_the_groups_of_the_step_alone():
    """Their order, and how ranks and micro-batches share them, change nothing; rows that cannot be read offer nothing."""
    groups = many(12)
    expected = {each.id: drawn(each) for each in in_a_step(groups)}
    assert {each.id: drawn(each) for each in in_a_step(groups[::-1])} == expected
    whole = WithNegatives(groups, TERMS, 0)
    together = whole.__getitems__(StepPart(tuple(range(12)), range(4, 9)))
    assert [drawn(each) for each in together] == [expected[f"g{g}"] for g in range(4, 9)]
    assert [each.in_step.place for each in together] == [4, 5, 6, 7, 8]
    later = [drawn(each) for each in whole.__getitems__(StepPart(tuple(range(3, 9)), range(2, 6)))]
    assert later == [drawn(each) for each in in_a_step(groups[3:9])[2:]], "the next step of one worker has its own groups"

    class Broken(list):
        def __getitem__(self, index):
            if index == 3:
                raise DataError("row 3 is no group")
            return super().__getitem__(index)

    broken = in_a_step(Broken(groups))
    assert isinstance(broken[3], DataError)
    assert not any(negative.group == "g3" for k, each in enumerate(broken) if k != 3 for negative in each.in_step.in_batch)


@pytest.mark.parametrize("packed", [False, True])
def test_every_rank_knows_the_whole_step(packed):
    """WholeSteps yields the sampler's own micro-batches, each with its places in a step that is the same on all ranks."""

    def sampler(rank, world, steps):
        place = {"rank": rank, "world_size": world, "gradient_accumulation_steps": steps, "seed": 3}
        if packed:
            return PackedSampler(tokens=[5 + 3 * (g % 7) for g in range(50)], max_tokens=64, **place)
        return GroupSampler(num_groups=50, groups_per_micro_batch=8 // (world * steps), **place)

    steps = {}
    for world, accumulation in ((1, 4), (2, 2), (4, 1)):
        streams = [sampler(rank, world, accumulation) for rank in range(world)]
        for of in streams:
            of.advance()
        with_steps = [list(itertools.islice(WholeSteps(of), 3 * accumulation)) for of in streams]
        alone = [list(itertools.islice(of, 3 * accumulation)) for of in streams]
        assert [[[each.step[place] for place in each.places] for each in rank] for rank in with_steps] == alone
        found = [each for taken in zip(*with_steps, strict=True) for each in taken]
        covered = [place for each in found[:4] for place in each.places]
        assert sorted(covered) == list(range(len(found[0].step)))
        steps[world, accumulation] = [each.step for each in found]
    assert len({str(each) for each in steps.values()}) == 1


# The loss over the step -----------------------------------------------------------------------------------------------------------------


def layout_of(groups: Sequence[CounterfactualGroup]) -> GroupLayout:
    """As a collator makes it; a text has as many tokens as its number says."""

    def encoded(text):
        return Encoded("", (1,), (7,) * (2 + len(text) % 3), (0,))

    own = [[encoded(each.text) for each in group.candidates] for group in groups]
    return with_in_batch_negatives(
        group_layout(groups, own, "star"), groups, [[encoded(text) for text in drawn(group)] for group in groups]
    )


class Table:
    """Log-likelihoods of texts on images as one parameter, and priors of texts."""

    def __init__(self, groups: Sequence[CounterfactualGroup]) -> None:
        pictures = sorted({image for group in groups for image in group.images})
        texts = sorted({each.text for group in groups for each in group.candidates})
        rng = torch.Generator().manual_seed(0)
        self.values = (-torch.rand(len(pictures), len(texts), generator=rng, dtype=torch.float64) * 9).requires_grad_()
        self._prior = {text: -9 * torch.rand((), generator=rng, dtype=torch.float64).item() for text in texts}
        self._row, self._column = ({each: k for k, each in enumerate(listed)} for listed in (pictures, texts))

    def __call__(self, image: Any, text: str) -> Tensor:
        return self.values[self._row[image], self._column[text]]

    def prior(self, text: str) -> float:
        return self._prior[text]

    def scores(self, groups: Sequence[CounterfactualGroup]) -> Scores:
        layout = layout_of(groups)
        names = [
            [*[each.text for each in group.candidates], *[""] * (layout.num_own - len(group.candidates)), *drawn(group)] for group in groups
        ]
        logp = torch.zeros(layout.valid.shape, dtype=torch.float64)
        prior = torch.zeros(layout.valid.shape[0], layout.valid.shape[2], dtype=torch.float64)
        for g, i, c in layout.valid.nonzero().tolist():
            logp[g, i, c] = self(groups[g].images[i], names[g][c])
            prior[g, c] = self.prior(names[g][c])
        return Scores(layout, logp, torch.zeros_like(logp), torch.zeros_like(logp), prior)


def softmax_loss(violations: list[Tensor]) -> Tensor:
    return torch.log(sum((violation.exp() for violation in violations), torch.ones((), dtype=torch.float64)))


def naive_step(groups: Sequence[CounterfactualGroup], table: Table, o: BatchAlign) -> Tensor:
    """The loss of the whole step in one graph, by loops over its groups."""
    total, units = torch.zeros((), dtype=torch.float64), 0.0
    size = lambda text: (2 + len(text) % 3) if o.len_norm == "own" else 1  # noqa: E731
    for place, own in enumerate(groups):
        here = [c for c, each in enumerate(own.candidates) if each.prompt == own.candidates[0].prompt]
        known = {(i, c) for i, row in enumerate(own.match) for c, truth in enumerate(row) if truth == 1 or i == 0 or c == 0}
        names = [each.text for each in own.candidates]
        by_text = lambda i, text: (table(own.images[i], text) - o.pmi * table.prior(text)) / size(text) / o.temperature  # noqa: B023, E731
        by_image = lambda image, text: table(image, text) / size(text) / o.temperature  # noqa: E731
        texts, images = [], []
        for i, c in itertools.product(range(len(own.images)), here):
            if own.match[i][c] == 1:
                false = [names[d] for d in here if own.match[i][d] == 0 and (i, d) in known] + drawn(own)
                texts.append(softmax_loss([by_text(i, text) - by_text(i, names[c]) for text in false]))
        for c in here:
            at_home = next((i for i in range(len(own.images)) if own.match[i][c] == 1), None)
            if at_home is None:
                continue
            others = [own.images[i] for i in range(len(own.images)) if own.match[i][c] == 0 and (i, c) in known]
            for host in groups:
                if any((negative.source_group, negative.number) == (place, c) for negative in host.in_step.in_batch):
                    others += host.images
            images.append(softmax_loss([by_image(each, names[c]) - by_image(own.images[at_home], names[c]) for each in others]))
        total = total + own.weight * (sum(texts) / len(texts) + sum(images) / len(images)) / 2
        units += own.weight
    return total / units


OPTIONS = [{}, {"pmi": 0.0, "temperature": 3.0}, {"len_norm": "own", "pmi": 0.5, "temperature": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [[range(9)], [[0, 1], [2, 3, 4], [5], [6, 7, 8]], [[k] for k in (8, 3, 5, 1, 0, 2, 4, 6, 7)]], ids=len)
def test_the_loss_over_a_step_equals_one_graph_of_it(parts, options):
    """Value and gradient, however micro-batches and ranks share the step; a group that the step has twice included."""
    groups = in_a_step([*many(8), many(8)[2]])
    table, objective = Table(groups), {"batch_align": BatchAlign(**options, weight=1.0, warmup=0.0)}
    expected = naive_step(groups, table, objective["batch_align"])
    (gradient,) = torch.autograd.grad(expected, table.values)
    micro_batches = [table.scores([groups[k] for k in part]) for part in parts]
    units = {"batch_align": sum(denominators(objective, each.layout)["batch_align"] for each in micro_batches)}
    seen = CrossRankScores(micro_batches, ALONE)
    losses = [weighted_loss(objective, seen.added_to(each), units)[0] for each in micro_batches]
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-6)  # shares are float32
    (found,) = torch.autograd.grad(sum(losses), table.values)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-9)
    without = sum(weighted_loss(objective, each, units)[0] for each in micro_batches)
    assert abs(without.item() - expected.item()) > 0.01, "images of other groups must matter, or this proves nothing"


def test_a_text_whose_group_is_left_out_of_the_step_is_compared_with_nothing():
    """Nor is it with the stand-in of a rank that has lost its only group, the step's first."""
    groups = in_a_step(many(6), {"b": 9})
    table, objective = Table(groups), {"batch_align": BatchAlign(weight=1.0, warmup=0.0)}
    scores, stand_in = table.scores(groups[1:]), table.scores(groups[:1])
    stand_in = replace(stand_in, layout=replace(stand_in.layout, in_batch=None))
    seen = CrossRankScores([scores, stand_in], ALONE).added_to(scores)
    orphans = seen.layout.in_batch.source_group[..., 0] == 0
    assert orphans.any() and (seen.cross_group[:, seen.layout.num_own :][orphans] == float("-inf")).all()
    loss, _ = weighted_loss(objective, seen, denominators(objective, seen.layout))
    assert torch.autograd.grad(loss, table.values)[0].isfinite().all()


def test_report_by_hand():
    """Two plain captions on their own pictures: S = log 4 on the own image, 0 on the other's."""
    groups = in_a_step([group("a", "one"), group("b", "two")])
    layout = layout_of(groups)
    logp = torch.tensor([[[math.log(4), 0.0]], [[math.log(4), 0.0]]], dtype=torch.float64)
    scores = Scores(layout, logp, torch.zeros_like(logp))
    scores = CrossRankScores([scores], ALONE).added_to(scores)
    assert scores.cross_group.flatten().tolist() == pytest.approx([0.0, math.log(4)] * 2)
    report = {name: (float(total), int(count)) for name, (total, count) in BatchAlign(pmi=0.0, texts=1).report(scores).items()}
    assert report == {"violated/batch_align": (0, 2), "batch_align/texts": (2, 2)}


def test_columns_of_guests():
    """They answer the prompt of the group's first text, and the blank picture, whose columns of own texts are scored, does not see them."""
    groups = in_a_step(many(6), {"batch_align": 2})
    layout = layout_of(groups)
    own, exists = layout.num_own, layout.in_batch.source_group[..., 0] >= 0
    assert exists.all(1).any() and (layout.prompt[:, 0] != layout.prompt[:, 1]).any()
    assert torch.equal(layout.prompt[:, own:], torch.where(exists, layout.prompt[:, :1], -1))
    blank = with_blank_picture(layout, groups).valid[:, -1]
    assert blank[:, :own].any() and not blank[:, own:].any()


def test_other_terms_do_not_see_the_guests():
    """Loss, denominators and gradients are the same bits with and without texts of others beside the group's own."""
    plain = many(6)
    hosting = in_a_step(plain)
    objectives = {"align": Align(), "csd": Csd(warmup=0.0), "fcd": Fcd(warmup=0.0)}
    assert required_cells({**objectives, "b": BatchAlign()}) == "star" and batch_terms({**objectives, "b": BatchAlign(texts=5)}) == {"b": 5}
    table = Table(hosting)
    found = []
    for groups in ([replace(each, in_step=None).in_the_step(k, ()) for k, each in enumerate(hosting)], hosting):
        scores = table.scores(groups)
        units = denominators(objectives, scores.layout)
        loss, _ = weighted_loss(objectives, scores, units)
        found.append([loss.detach(), *units.values(), torch.autograd.grad(loss, table.values)[0]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# Through the collator and a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    colours = ("red", "green", "blue", "yellow")
    groups = []
    for g, (first, second) in enumerate(itertools.pairwise(colours)):
        texts = (f"a {first} circle and a {second} square", f"a {second} circle and a {second} square")
        made = group(f"g{g}", *texts)
        files = [draw(folder / f"{g}-{k}.png", [(each, "circle"), (second, "square")]) for k, each in enumerate((first, second))]
        groups.append(made.with_images(tuple((file,) for file in files)))
    return groups


def test_a_guest_scores_on_an_image_what_it_scores_there_alone(model_dir, scorer, pictured):
    """Against the library's own forward of one image and one string; own cells are as without in-batch negatives; parts add up."""
    collator, groups = load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa")).building("star", None), in_a_step(pictured)
    processor = load_processor(ModelConfig(str(model_dir)))
    batch = collator(groups)
    with torch.no_grad():
        scores = batch.scores(scorer(**batch.model_inputs))
        layout = scores.layout
        assert layout.num_own == 2 and layout.valid[:, :, 2:].all() and (layout.match[:, :, 2:] == -1).all()
        for g, each in enumerate(groups):
            for i, k in itertools.product(range(2), range(3)):
                logp, end = plain_logp(scorer.model, processor, each.images[i], PROMPT, drawn(each)[k])
                assert scores.logp[g, i, 2 + k].item() == pytest.approx(logp.sum().item(), rel=1e-4)
                assert scores.end_logp[g, i, 2 + k].item() == pytest.approx(end.item(), rel=1e-4, abs=1e-5)
                assert layout.num_tokens[g, i, 2 + k] == len(logp)
        alone = collator(pictured)
        own = alone.scores(scorer(**alone.model_inputs))
        torch.testing.assert_close(scores.logp[:, :, :2], own.logp, rtol=1e-4, atol=1e-4)
        parts = collator.parts(groups, 120)
        assert len(parts) > 2
        joined = Scores.joined([part.scores(scorer(**part.model_inputs)) for part in parts])
        torch.testing.assert_close(joined.logp, scores.logp, rtol=1e-4, atol=1e-4)


def test_guests_that_do_not_fit_the_window_are_left_out(model_dir, pictured):
    """Of the group they visit, that is: a text that fits behind its own pictures is no error behind larger ones."""
    collator, groups = (
        load_collator(ModelConfig(str(model_dir))).building("star", None),
        in_a_step([*pictured, group("long", "a circle " * 40)], {"b": 9}),
    )
    (visited,) = (each for each in groups if "a circle " * 40 in drawn(each) and each.id == "g0")
    column = 2 + drawn(visited).index("a circle " * 40)
    longest = max(collator.row_length(PROMPT, text.text, ((48, 48),)) for text in visited.candidates)
    assert collator([visited]).layout.valid[0, :, column].all()
    narrow = collator._changed(max_length=longest)
    layout = narrow([visited]).layout
    assert not layout.valid[0, :, column].any() and layout.valid.sum() == layout.valid[0].numel() - 2
    with pytest.raises(DataError, match="the model's window of"):
        collator._changed(max_length=longest - 1)([visited])


def test_a_text_that_cannot_be_encoded_costs_its_own_group_alone(model_dir, pictured):
    """It is named there, and no group that it would have visited is left out with it."""
    groups = in_a_step([*pictured, group("bad", "a red </s> circle")], {"b": 9})
    assert all("a red </s> circle" in drawn(each) for each in groups[:3])
    collator = load_collator(ModelConfig(str(model_dir))).building("star", None)
    batch = collator.without_unreadable(groups)
    assert batch.layout.ids == ("g0", "g1", "g2") and [name for name, _ in batch.dropped] == ["bad"]
    assert batch.layout.in_batch is not None and batch.layout.in_batch.source_group[..., 0].max() == 2
    batch = collator.without_unreadable([*groups[:3], DataError("rows.jsonl:9: broken")])
    assert batch.layout.ids == ("g0", "g1", "g2") and batch.dropped == (("rows.jsonl:9", "rows.jsonl:9: broken"),), "nor does a row"


def test_the_prior_of_a_guest_is_that_of_its_own_group(pictured):
    groups = in_a_step(pictured)
    stored = {f"g{g}": StoredScores(((-1.0, -2.0),) * 2, (-10.0 * g - 1, -10.0 * g - 2)) for g in range(3)}
    layout = layout_of(groups)
    reference, prior = stored_scores(stored, groups, layout)
    assert not reference[:, :, 2:].any() and (reference[:, :, :2] < 0).all()
    for g, each in enumerate(groups):
        assert prior[g].tolist() == [-10.0 * g - 1, -10.0 * g - 2, *(-10.0 * int(x.group[1]) - 1 - x.number for x in each.in_step.in_batch)]


def test_a_guest_of_a_source_without_scores_has_no_prior():
    """In a mixture whose other terms need scores of one source, and batch_align none."""
    groups = in_a_step([group("x/a", "one"), replace(group("y/b", "two"), objectives=("batch_align",))])
    scores = ScoresOfSources({"x": {"a": StoredScores(((-1.0,),), (-2.0,))}})
    reference, prior = stored_scores(scores, groups, layout_of(groups))
    assert reference.tolist() == [[[-1.0, 0.0]], [[0.0, 0.0]]] and prior.tolist() == [[-2.0, 0.0], [0.0, 0.0]]
