"""Which counterfactuals are the hardest, and a row from which the others are cut: scores, layout and tokens of one that never had them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import write_manifest

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.training.hard_negatives import cut_to_hardest, hardest


def kept(match: Sequence[Sequence[int]], logp: Sequence[Sequence[float]], number: int, prompt: Sequence[int] | None = None) -> list[Any]:
    """Images and texts that stay of one group whose known cells are all scored; -1 in ``match`` is unknown."""
    truth = torch.tensor([match], dtype=torch.int8)
    ones = torch.ones_like(truth, dtype=torch.int64)
    asked = None if prompt is None else torch.tensor([prompt])
    layout = GroupLayout(truth >= 0, truth, ones, ones, torch.ones(1), prompt=asked)
    keep = hardest(Scores(layout, torch.tensor([logp]), torch.zeros(truth.shape)), number).cells[0]
    images, texts = keep.any(1), keep.any(0)
    assert torch.equal(keep, images.unsqueeze(1) & texts)
    return [images.nonzero().flatten().tolist(), texts.nonzero().flatten().tolist()]


def test_by_hand():
    """Three complete pairs and a sham (image 4). Text 2 beats the factual one on image 0 by 1; image 3 beats image 0 for it by 2; text 1
    loses everywhere. On its own image text 1 loses to the factual text by 3 in the second matrix, which makes it the hardest."""
    match = [[1, 0, 0, 0], [0, 1, -1, -1], [0, -1, 1, -1], [0, -1, -1, 1], [1, -1, -1, -1]]
    logp = [[-5.0, -9.0, -4.0, -9.0], [-9.0, -1.0, 0, 0], [-9.0, 0, -1.0, 0], [-3.0, 0, 0, -1.0], [-50.0, 0, 0, 0]]
    assert kept(match, logp, 1) == [[0, 3, 4], [0, 3]]
    assert kept(match, logp, 2) == [[0, 2, 3, 4], [0, 2, 3]]
    assert kept(match, logp, 3) == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    logp[1] = [-9.0, -12.0, 0, 0]
    assert kept(match, logp, 1) == [[0, 1, 4], [0, 1]]
    logp[1][1], logp[0][1] = -1.0, 5.0  # between images: text 1 is likelier on image 0 than on its own
    assert kept(match, logp, 1) == [[0, 1, 4], [0, 1]]


def test_one_sided_counterfactuals_and_what_always_stays():
    texts_only = [[1, 0, 0, 1, 0]]  # text 3 is a second true caption
    assert kept(texts_only, [[-5.0, -6.0, -4.0, -99.0, -7.0]], 1) == [[0], [0, 2, 3]]
    images_only = [[1], [0], [0], [1]]
    assert kept(images_only, [[-5.0], [-6.0], [-4.0], [-99.0]], 1) == [[0, 2, 3], [0]]
    unknown = [[1, -1, 0], [-1, 1, -1], [0, -1, 1]]  # of the first counterfactual nothing is compared
    assert kept(unknown, [[-1.0, 9.0, -9.0], [9.0, -1.0, 0], [-9.0, 0, -1.0]], 1) == [[0, 2], [0, 2]]
    neither = [[1, 1, 0, 0], [0, -1, 1, -1], [-1, 0, -1, -1]]  # nobody knows whether image 2 shows text 0; the second true text it does not
    assert kept(neither, [[-1.0, -1.0, -2.0, -3.0], [-9.0, 0, -1.0, 0], [0, -9.0, 0, 0]], 1) == [[0, 1, 2], [0, 1, 2]]
    shared = [[1, 0, 0], [0, 1, 1]]  # both texts are true of image 1
    assert kept(shared, [[-1.0, -9.0, -2.0], [-9.0, -1.0, -1.0]], 1) == [[0, 1], [0, 2]]
    tie = [[1, 0, 0]]
    assert kept(tie, [[-1.0, -2.0, -2.0]], 1) == [[0], [0, 1]]
    asked = [[1, 0, 0, 1]]
    assert kept(asked, [[-1.0, -2.0, -3.0, -9.0]], 1, [0, 0, 0, 1]) == [[0], [0, 1, 2, 3]], "two questions"


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa")).of_run("star", None, None, packs_again=True)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    made = read_manifest(write_manifest(tmp_path_factory.mktemp("hard") / "m.jsonl", 10, seed=3))
    asked = replace(made[0].candidates[0], prompt="What is it?")  # a second prompt, so that the tree has branches of prompts
    made[0] = replace(made[0], candidates=(*made[0].candidates, asked), match=tuple((*row, row[0]) for row in made[0].match))
    return made


def reduced(group: CounterfactualGroup, keep: torch.Tensor) -> CounterfactualGroup:
    """The group with those images and texts alone."""
    images, texts = keep.any(1).nonzero().flatten().tolist(), keep.any(0).nonzero().flatten().tolist()
    match = tuple(tuple(group.match[i][c] for c in texts) for i in images)
    return CounterfactualGroup(
        group.id, tuple(group.images[i] for i in images), tuple(group.candidates[c] for c in texts), match, weight=group.weight
    )


@pytest.mark.parametrize("max_tokens", [None, 90])
def test_a_row_packed_again_is_that_of_groups_without_those_cells(max_tokens, collator, groups, scorer):
    """Scores of the cells that stay, and as many tokens, scored positions and pictures as a row has that never had the others."""
    parts = collator.parts(groups, max_tokens)
    keep = torch.zeros_like(parts[0].layout.valid)
    keep[:, 0, :1] = True
    keep[::2, :2, :2] = True
    keep[0] = True
    with torch.no_grad():
        whole = Scores.joined([part.scores(scorer(**part.model_inputs)) for part in parts])
        left = collator.packed_again(MicroBatch(tuple(parts), (("x", "y"),)), keep)
        found = left.scores([scorer(**part.model_inputs) for part in left.forwards])
    valid = whole.layout.valid & keep
    assert torch.equal(found.layout.valid, valid) and left.dropped == (("x", "y"),) and len(left.forwards) <= len(parts)
    for name in ("logp", "end_logp"):
        torch.testing.assert_close(getattr(found, name), torch.where(valid, getattr(whole, name), 0), rtol=1e-4, atol=1e-4)
    if max_tokens is None:
        (fresh,) = collator.parts([reduced(group, each & inside) for group, each, inside in zip(groups, keep, valid, strict=True)])
        (row,) = left.forwards
        assert (row.num_tokens, row.num_scored, row.num_images) == (fresh.num_tokens, fresh.num_scored, fresh.num_images)
        assert row.model_inputs["image_inputs"]["pixel_values"].shape == fresh.model_inputs["image_inputs"]["pixel_values"].shape
        assert row.num_tokens < parts[0].num_tokens and sorted(row.model_inputs["targets"]) == sorted(fresh.model_inputs["targets"])


def test_a_micro_batch_is_cut_to_the_hardest_by_the_model(collator, groups, scorer):
    """In parts of unequal number on ranks: a repeat in front changes nothing; the mode of training comes back."""
    modes = []

    class Engine:
        def __call__(self, **inputs):
            modes.append(scorer.training)
            return scorer(**inputs)

        def eval(self):
            scorer.eval()

        def train(self):
            scorer.train()

    parts = collator.parts(groups, 120)
    with torch.no_grad():
        scores = Scores.joined([part.scores(scorer(**part.model_inputs)) for part in parts])
    expected = parts[0].layout.valid & hardest(scores, 1).cells
    micro_batches, pack = [MicroBatch(tuple(parts))], collator.packed_again
    cut, (chosen,) = cut_to_hardest(Engine(), micro_batches, [len(parts) + 2], torch.device("cpu"), 1, pack)
    assert torch.equal(cut[0].layout.valid, expected) and expected.sum() < parts[0].layout.valid.sum()
    pairs = [len(group.candidates) - 1 for group in groups[1:]]  # the first group asks two questions
    assert (chosen.proposed, chosen.entered) == (sum(pairs), sum(min(pair, 1) for pair in pairs)) and max(pairs) == 2
    assert modes == [False] * (len(parts) + 2) and scorer.training
    scorer.eval()


def test_candidates_without_pictures_stay_whole(collator):
    group = CounterfactualGroup(
        "words", ((),), tuple(Candidate("Which?", text) for text in ("a red circle", "a", "a blue circle")), ((1, 0, 0),)
    )
    batch = collator([group])
    keep = torch.tensor([[[True, False, True]]])
    (row,) = collator.packed_again(MicroBatch((batch,)), keep).forwards
    assert row.model_inputs["images_of_tree"] == [()] and len(row.model_inputs["visual_tokens"]) == 1
    assert row.num_tokens < batch.num_tokens
