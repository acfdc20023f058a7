"""Groups as rows: every cell's score and gradient equals one plain forward of the library, and bad input is refused by name."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROMPT, caption, draw, plain_distributions, plain_logp
from PIL import Image
from tiny_llava import CHAT_TEMPLATE
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.batching import image_source
from cfvlm_ds.batching.batch import BLANK, Batch, MicroBatch, blinded
from cfvlm_ds.batching.batch_layout import with_changed_tokens
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import SHAM, Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.core.scores import Scores, token_logprobs
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.stored_scores import StoredScores
from cfvlm_ds.models import Scorer, load_processor
from cfvlm_ds.models.forest import Forest
from cfvlm_ds.models.forest_attention import stock_attention
from cfvlm_ds.objectives import denominators, weighted_loss
from cfvlm_ds.objectives.align import Align

RED, BLUE, GREEN = ("red", "circle"), ("blue", "square"), ("green", "circle")
QUESTION = "What is in the image?"
GREY = Image.new("RGB", (336, 336), (128, 128, 128))


@pytest.fixture(scope="module")
def processor(model_dir):
    return load_processor(ModelConfig(str(model_dir)))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Ragged: two counterfactuals, an unknown cell and a sham; texts only (one of a single token); images only; one pair, which shares an
    image with the first group and asks another question."""
    folder = tmp_path_factory.mktemp("images")
    scenes = [[RED, BLUE], [BLUE, BLUE], [GREEN, RED], [RED, GREEN], [BLUE, GREEN], [GREEN, GREEN], [GREEN, BLUE]]
    files = [draw(folder / f"{k}.png", scene) for k, scene in enumerate(scenes)]
    sham = folder / "sham.png"
    Image.open(files[0]).rotate(3).save(sham)
    texts = [Candidate(PROMPT, caption(scene)) for scene in scenes]
    edits = (Edit("colour", 1, 1), Edit("colour", 2, 2), Edit(SHAM, 3))
    short = (Candidate(PROMPT, "a"), Candidate(PROMPT, "a blue square"), Candidate(QUESTION, "a green circle and a red square"))
    full_match = ((1, 0, 0), (0, 1, None), (0, 0, 1), (1, 0, 0))
    return [
        CounterfactualGroup("many", tuple((file,) for file in (*files[:3], sham)), tuple(texts[:3]), full_match, edits, weight=2.0),
        CounterfactualGroup("texts", ((files[3],),), short, ((1, 0, 0),)),
        CounterfactualGroup("images", tuple((file,) for file in files[4:7]), (texts[4],), ((1,), (0,), (0,))),
        CounterfactualGroup("one", ((Path(str(files[0])),),), (Candidate(QUESTION, caption(scenes[0])),), ((1,),)),
    ]


@pytest.fixture(scope="module")
def make(model_dir):
    def make(cells="full", **changes):
        limit = changes.pop("max_pixels", MAX_PIXELS)
        collator = load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa"), limit).building(cells, None)
        for name, value in changes.items():
            assert hasattr(collator, name)
            setattr(collator, name, value)
        return collator

    return make


def scored(scorer: Scorer, batch: Batch, **changes: Tensor) -> Scores:
    return batch.scores(scorer(**(batch.model_inputs | changes)))


def by_cell(scores: Scores, groups: list[CounterfactualGroup]) -> dict[tuple[str, int, int], tuple[Tensor, Tensor]]:
    """(group id, image, text) -> (log p of the text, of its end), every scored cell."""
    return {(groups[g].id, i, c): (scores.logp[g, i, c], scores.end_logp[g, i, c]) for g, i, c in scores.layout.valid.nonzero().tolist()}


def assert_same(found: dict[Any, tuple[Tensor, Tensor]], expected: dict[Any, tuple[Tensor, Tensor]], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert [v.item() for v in values] == pytest.approx([v.item() for v in expected[key]], rel=rel), key


def gradient(value: Tensor, scorer: Scorer) -> Tensor:
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(scope="module")
def plain(scorer, processor, groups):
    """(score, end score, gradient of the score) of every cell, each by a forward and backward of its own."""
    cells = {}
    for group in groups:
        for i, image in enumerate(group.images):
            for c, candidate in enumerate(group.candidates):
                tokens, end = plain_logp(scorer.model, processor, image, candidate.prompt, candidate.text)
                cells[group.id, i, c] = (tokens.sum().detach(), end.detach(), gradient(tokens.sum(), scorer))
    return cells


# Scores and gradients -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False])
def share_prefix(request, monkeypatch):
    """False: each text gets a tree of its own, with its own copy of the prefix."""
    if not request.param:
        monkeypatch.setattr("cfvlm_ds.batching.collator._tree_of", lambda *given: object())
    return request.param


def test_08_every_cell_and_its_gradient_equal_one_plain_forward(share_prefix, make, scorer, groups, plain):
    batch = make()(groups)
    assert len(batch.model_inputs["forest"].roots) - 1 == (8 if share_prefix else 19)
    cells = by_cell(scored(scorer, batch), groups)
    assert_same(cells, {key: values[:2] for key, values in plain.items()})
    for key, (logp, _) in cells.items():
        expected = plain[key][2]
        assert (gradient(logp, scorer) - expected).norm() < 1e-4 * expected.norm(), key


@pytest.mark.parametrize("fault", ["leak", "positions", "prefix"])
def test_08_a_fault_in_the_tree_would_be_noticed(fault, make, scorer, processor, groups, plain):
    """Siblings seen, positions that run on, a prefix that is not seen: each moves every text it touches by more than 1e-3 nats."""
    batch = make()(groups[:1])
    forest = batch.model_inputs["forest"]
    changes = {
        "leak": {"forest": Forest(forest.lengths, tuple(node - 1 if parent >= 0 else -1 for node, parent in enumerate(forest.parents)))},
        "positions": {"position_ids": torch.cat([torch.arange(length) for length in forest.tree_lengths]).unsqueeze(0)},
        "prefix": {"forest": Forest(forest.lengths, (-1,) * len(forest.parents))},
    }[fault]
    cells = by_cell(scored(scorer, batch, **changes), groups)
    for key, values in cells.items():
        off = abs(values[0].item() - plain[key][0].item())
        touched = fault == "prefix" or key[2] > 0  # nothing comes before the first branch
        assert off > 1e-3 if touched else off < 1e-3, (key, off)


# Tokens -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ünïcode 猫", "two  spaces", "a\nb", "x < y & {z}", "USER: Describe the image. ASSISTANT: a red circle"])
def test_odd_texts_are_scored_letter_by_letter(text, make, scorer, processor, groups):
    group = replace(groups[3], candidates=(Candidate(PROMPT, text),))
    batch = make()([group])
    assert processor.tokenizer.decode(batch.model_inputs["targets"][~batch.is_end]).removeprefix(" ") == text
    tokens, end = plain_logp(scorer.model, processor, group.images[0], PROMPT, text)
    scores = scored(scorer, batch)
    assert [scores.logp.item(), scores.end_logp.item()] == pytest.approx([tokens.sum().item(), end.item()], rel=1e-4)


# Cells --------------------------------------------------------------------------------------------------------------------------------

MANY = {(i, c) for i in range(4) for c in range(3)}
CELLS = {
    "anchor": ({(0, 0)}, {(0, 0)}, {(0, 0)}, {(0, 0)}),
    "matched": ({(0, 0), (1, 1), (2, 2), (3, 0)}, {(0, 0)}, {(0, 0)}, {(0, 0)}),
    "star": (
        {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0), (1, 1), (2, 2)},
        {(0, 0), (0, 1), (0, 2)},
        {(0, 0), (1, 0), (2, 0)},
        {(0, 0)},
    ),
    "full": (MANY, {(0, 0), (0, 1), (0, 2)}, {(0, 0), (1, 0), (2, 0)}, {(0, 0)}),
}


@pytest.mark.parametrize("cells", CELLS)
def test_exactly_the_cells_asked_for_are_built(cells, make, scorer, groups):
    batch = make(cells)(groups)
    layout = batch.layout
    expected = {(g, *cell) for g, of_group in enumerate(CELLS[cells]) for cell in of_group}
    assert {tuple(cell) for cell in layout.valid.nonzero().tolist()} == expected
    assert {tuple(int(x) for x in torch.unravel_index(index, layout.valid.shape)) for index in batch.cell} == expected
    assert layout.ids == ("many", "texts", "images", "one") and layout.weight.tolist() == [2, 1, 1, 1]
    for g, group in enumerate(groups):
        for i, c in MANY:
            inside = i < len(group.images) and c < len(group.candidates)
            truth = group.match[i][c] if inside else None
            assert layout.match[g, i, c] == (-1 if truth is None else truth)
            assert (layout.num_tokens[g, i, c] > 0) == inside
    scores = scored(scorer, batch)
    for values in (scores.logp, scores.end_logp):
        assert (values[~layout.valid] == 0).all() and (values[layout.valid] < 0).all()
    if cells == "star":  # whose unknown cells of the first row and column are left out
        unknown = replace(groups[0], match=((1, None, 0), (0, 1, None), (None, 0, 1), (1, 0, 0)))
        known = {(0, 0), (0, 2), (1, 0), (1, 1), (2, 2), (3, 0)}
        assert {tuple(cell) for cell in make("star")([unknown]).layout.valid[0].nonzero().tolist()} == known
    if cells == "anchor":  # whose other pictures are not opened
        gone = replace(groups[0], images=(groups[0].images[0], *((Path(f"gone{k}.png"),) for k in range(3))))
        assert make("anchor")([gone]).num_images == 1
        with pytest.raises(DataError, match=r"gone0\.png"):
            make("matched")([gone])


def test_a_batch_comes_out_of_a_worker_as_it_went_in(make, groups):
    """Every tensor with its type and shape, empty ones and single numbers too, and all of them in one piece of shared memory."""
    stored = {
        group.id: StoredScores(((0.5,) * len(group.candidates),) * len(group.images), (0.25,) * len(group.candidates)) for group in groups
    }
    collator = make(stored=stored)
    (found,) = DataLoader(groups, batch_size=len(groups), collate_fn=collator, num_workers=1)  # type: ignore[arg-type]
    expected = collator(groups)

    def flat(value, name):
        if isinstance(value, dict | Batch | GroupLayout):
            for key, item in (value if isinstance(value, dict) else vars(value)).items():
                yield from flat(item, f"{name}.{key}")
        else:
            yield name, value

    ours, theirs = dict(flat(found, "batch")), dict(flat(expected, "batch"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name
    pieces = [value for value in ours.values() if isinstance(value, Tensor)]
    assert len({value.untyped_storage().data_ptr() for value in pieces}) == 1
    assert pieces[0].untyped_storage().nbytes() < sum(value.nbytes + 64 for value in pieces), "no larger than they are"
    moved = dict(flat(expected.to(torch.device("meta")), "batch"))
    assert {value.device.type for value in moved.values() if isinstance(value, Tensor)} == {"meta"}
    assert {name: value.dtype for name, value in moved.items() if isinstance(value, Tensor)} == {
        name: value.dtype for name, value in theirs.items() if isinstance(value, Tensor)
    }
    odd = replace(found, reference=torch.zeros(0, 3), prior=torch.tensor(7.0))
    again = pickle.loads(pickle.dumps(odd))
    assert again.reference.shape == (0, 3) and again.prior.item() == 7.0 and again.prior.shape == ()


# Images -------------------------------------------------------------------------------------------------------------------------------


def test_each_image_is_opened_and_encoded_once(share_prefix, make, scorer, groups, monkeypatch):
    """Also an image of two groups, of two prompts and of several texts."""
    opened = []
    original = image_source.open_image
    monkeypatch.setattr(image_source, "open_image", lambda path, limit: opened.append(path) or original(path, limit))
    batch = make()(groups)
    distinct = {picture for group in groups for pictures in group.images for picture in pictures}
    assert len(opened) == len(distinct) == 8 and set(opened) == distinct
    assert batch.model_inputs["image_inputs"]["pixel_values"].shape[0] == batch.num_images == 8
    encoded = []
    hook = scorer.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0])), with_kwargs=True
    )
    try:
        scored(scorer, batch)
    finally:
        hook.remove()
    assert encoded == [8]


# Stored scores ------------------------------------------------------------------------------------------------------------------------


def test_rows_without_an_image(make, scorer):
    """The tower runs and takes part in the backward pass even if no row has an image."""
    texts = (Candidate("Name a colour.", "red"), Candidate("Name a colour.", "green and blue"))
    spoken = CounterfactualGroup("spoken", ((),), texts, ((1, 0),))
    alone = make()([spoken])
    scores = scored(scorer, alone)
    assert (alone.num_images, len(alone.model_inputs["image_inputs"]["pixel_values"])) == (0, 1)
    tower = [parameter for parameter in scorer.model.model.vision_tower.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(scores.logp.sum(), tower, allow_unused=True)
    assert sum(grad is not None for grad in grads) > 20 and not any(grad.any() for grad in grads if grad is not None)
    assert blinded(spoken).images == ((),)


def test_stored_scores_land_in_their_cells(make, scorer, groups):
    stored = {}
    for g, group in enumerate(groups):
        logp = tuple(tuple(-1.0 - 100 * g - 10 * i - c for c in range(len(group.candidates))) for i in range(len(group.images)))
        stored[group.id] = StoredScores(logp, tuple(-1000.0 - 100 * g - c for c in range(len(group.candidates))))
    collator = make("star", stored=stored)
    order = [groups[i] for i in (3, 1, 0, 2)]
    scores = scored(scorer, collator(order))
    assert scores.reference is not None and scores.prior is not None
    assert not scores.reference.requires_grad and not scores.prior.requires_grad, "14: stored data carries no gradient"
    for row, group in enumerate(order):
        g = groups.index(group)
        for i, c in MANY:
            inside = i < len(group.images) and c < len(group.candidates)
            assert scores.reference[row, i, c] == (-1.0 - 100 * g - 10 * i - c if inside else 0)
            assert scores.prior[row, c] == (-1000.0 - 100 * g - c if c < len(group.candidates) else 0)
    without = scored(scorer, make("star")(order))
    assert without.reference is None and without.prior is None
    everything = collator.scoring_everything()(order)
    assert everything.reference is None and everything.layout.valid.sum() == 19 and collator.cells == "star"


def test_tokens_and_the_blank_picture(make, scorer, processor, groups):
    """Each token of each scored cell by a plain forward, the last image a grey one; in one row, in divided ones, and packed again.

    What needs neither sees the same cells. Several groups share the tree of the blank picture.
    """
    stored = {
        group.id: StoredScores(((-1.0,) * len(group.candidates),) * len(group.images), (-7.0,) * len(group.candidates)) for group in groups
    }
    collator = make("star").of_run("star", stored, None, packs_again=True, tokens=True, blank=True)
    batch = collator(groups)
    scores, layout, last = scored(scorer, batch), batch.layout, batch.layout.valid.shape[1] - 1
    assert scores.tokens is not None and scores.reference is not None and layout.valid[:, last].equal(layout.valid[:, :last].any(1))
    for g, i, c in layout.valid.nonzero().tolist():
        group = groups[g]
        picture, candidate = GREY if i == last else group.images[i], group.candidates[c]
        tokens, end = plain_logp(scorer.model, processor, picture, candidate.prompt, candidate.text)
        assert scores.tokens[g, i, c, : len(tokens)].tolist() == pytest.approx(tokens.tolist(), rel=1e-4, abs=1e-5)
        assert not scores.tokens[g, i, c, len(tokens) :].any() and scores.end_logp[g, i, c].item() == pytest.approx(end.item(), rel=1e-5)
        assert scores.reference[g, i, c] == (-7 if i == last else -1)
    torch.testing.assert_close(scores.tokens.sum(-1), scores.logp, rtol=1e-6, atol=1e-6)
    parts = collator.parts(groups, 40)
    divided = Scores.joined([scored(scorer, part) for part in parts])
    torch.testing.assert_close(divided.tokens, scores.tokens, rtol=1e-4, atol=1e-5)
    kept = layout.valid.clone()
    kept[0, 1], kept[0, :, 1] = False, False
    again = collator.packed_again(MicroBatch(tuple(parts)), kept)
    found = again.scores([scorer(**part.model_inputs) for part in again.forwards])
    torch.testing.assert_close(found.tokens, torch.where(kept.unsqueeze(-1), scores.tokens, 0), rtol=1e-4, atol=1e-5)
    plain, seen = scored(scorer, make("star")(groups)), scores.seen(False, False)
    torch.testing.assert_close(plain.logp, seen.logp, rtol=1e-5, atol=1e-5)
    assert plain.layout.valid.equal(seen.layout.valid) and plain.layout.changed is None and plain.tokens is None
    assert sum(tree.pictures[0][0].parent == BLANK.parent for tree in batch.material.trees) == 1
    sizes = {picture: Image.open(picture).size for group in groups for (picture,) in group.images}
    for group in groups:
        assert collator.group_tokens(group, sizes).whole == collator([group]).num_tokens
    assert not collator.scoring_everything()(groups).layout.blank


def test_divergences(make, scorer, processor, groups):
    """Sums over the text's tokens, without its end, by plain forwards of both images; packed again, and with groups in any order."""
    kinds = Divergence("false", (1.0, 0.1)), Divergence("sham"), Divergence("blank", (0.5, 0.3))
    collator = make("star").of_run("star", None, None, packs_again=True, blank=True, divergences=kinds)
    batch = collator(groups)
    scores = scored(scorer, batch)

    def expected(kind: Divergence, group: CounterfactualGroup, own: int, other: int, c: int) -> float:
        shown = [GREY if i == len(group.images) else group.images[i] for i in (own, other)]
        p, q = (
            plain_distributions(scorer.model, processor, i, group.candidates[c].prompt, group.candidates[c].text)[0][:-1] for i in shown
        )
        if kind.sharpened is None:
            return float((p.exp() * (p - q)).sum())
        alpha, beta = kind.sharpened
        kept = p.exp() >= beta * p.exp().amax(-1, keepdim=True)
        target = torch.where(kept, p.exp() ** (1 + alpha) / q.exp() ** alpha, 0)
        target = target / target.sum(-1, keepdim=True)
        return float(torch.where(kept, target * (target.log() - p), 0).sum())

    cells = {
        kinds[0]: [("many", 0, 1, 0), ("many", 0, 2, 0), ("many", 1, 0, 1), ("many", 2, 0, 2), ("images", 0, 1, 0), ("images", 0, 2, 0)],
        kinds[1]: [("many", 0, 3, 0)],
        kinds[2]: [("many", 0, 4, 0), ("many", 1, 4, 1), ("many", 2, 4, 2), ("texts", 0, 1, 0), ("images", 0, 3, 0), ("one", 0, 1, 0)],
    }
    by_id, last = {group.id: group for group in groups}, batch.layout.valid.shape[1] - 1
    for kind, compared in cells.items():
        found, places = scores.divergences[kind], []
        for name, own, other, c in compared:
            group = by_id[name]
            places.append([groups.index(group), last if other == len(group.images) else other, c])
            assert found[tuple(places[-1])].item() == pytest.approx(expected(kind, group, own, other, c), rel=1e-4, abs=1e-7)
        assert found.nonzero().tolist() == sorted(places)
    turned = scored(scorer, collator(groups[::-1])).divergences
    kept = batch.layout.valid.clone()
    kept[0, 1], kept[0, :, 1] = False, False
    again = collator.packed_again(MicroBatch((batch,)), kept)
    cut = again.scores([scorer(**part.model_inputs) for part in again.forwards]).divergences
    for kind, found in scores.divergences.items():
        torch.testing.assert_close(turned[kind].flip(0), found, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cut[kind], torch.where(kept, found, 0), rtol=1e-4, atol=1e-6)
    assert not scored(scorer, collator.scoring_everything()(groups)).divergences and collator.divergences == kinds
    plain = scored(scorer, make("star").of_run("star", None, None, blank=True)(groups))
    assert plain.logp.equal(scores.logp) and plain.end_logp.equal(scores.end_logp)


def test_changed_tokens_lie_between_the_first_and_the_last_difference():
    """Text 1 replaces a token of text 0 and text 2 repeats one, which only it has; text 3 answers another prompt."""
    ids = ((1, 2, 3, 4), (1, 9, 3, 4), (1, 2, 2, 3, 4), (5, 6))
    group: Any = SimpleNamespace(prompt_ids=(0, 0, 0, 1))
    size = torch.zeros(1, 1, 4)
    layout = GroupLayout(size.bool(), size.char(), torch.tensor([[[4, 4, 5, 2]]]), size.long(), torch.ones(1))
    texts = [Encoded("", (), each, ()) for each in ids]
    changed = with_changed_tokens(layout, [group], [texts]).changed
    assert changed is not None and changed[0].nonzero().tolist() == [[0, 1], [1, 1], [2, 2]]


# Refusals -----------------------------------------------------------------------------------------------------------------------------


ANSWER = "ASSISTANT: {% for item in message['content'] %}{{ item['text'] }}"
TEMPLATES = {
    "alters the text": (ANSWER, ANSWER.replace("'] }}", "'] | trim }}"), "does not follow its prompt"),
    "has a prompt that is no prefix": ("%}ASSISTANT:{%", "%}BOT:{%", "does not follow its prompt"),
    "ends its prompt inside a token": ("%}ASSISTANT:{%", "%}ASSISTANT: {%", "changes the tokens of its prompt"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_after_which_no_text_can_be_scored_is_refused(case, make, groups):
    plain, collator, (right, wrong, named) = make(), make(), TEMPLATES[case]
    collator.processor.chat_template = CHAT_TEMPLATE.replace(right, wrong)
    spaces = ("a red circle ", " a red circle  ", "a red circle\n") if "alters" in case else (groups[3].candidates[0].text,)
    for text in spaces:
        group = replace(groups[3], candidates=(Candidate(PROMPT, text),))
        assert plain([group]).layout.num_tokens.item() > 0
        with pytest.raises(DataError, match=f"group 'one': text 0 .*{named}"):
            collator([group])
    if "alters" in case:
        collator([groups[3]])


def test_a_text_that_does_not_fit_the_window_is_refused(make, groups):
    """The limit is the longest prompt and text of one branch, not the shared row; it is never cut."""
    group = groups[0]
    lengths = [make().row_length(candidate.prompt, candidate.text, ((48, 48),)) for candidate in group.candidates]
    longest = max(range(3), key=lambda c: lengths[c])
    batch = make(max_length=max(lengths))([group])
    assert batch.model_inputs["input_ids"].shape[1] > max(lengths)
    with pytest.raises(DataError, match=rf"group 'many': text \d .* {lengths[longest]} tokens, .* {max(lengths) - 1}"):
        make(max_length=max(lengths) - 1)([group])
    long = replace(group, candidates=(*group.candidates[:2], Candidate(PROMPT, "red " * 600 + "circle")))
    with pytest.raises(DataError, match=r"group 'many': text 2 .* 512"):
        make()([groups[3], long])
    make("anchor")([long])  # the long text is not scored


def test_a_bad_image_is_refused_by_file(make, groups, tmp_path):
    (tmp_path / "junk.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"junk\.png"):
        make()([groups[0], replace(groups[3], images=((tmp_path / "junk.png",),))])
    with pytest.raises(DataError, match="48x48"):
        make(max_pixels=48 * 48 - 1)([groups[3]])
    make(max_pixels=48 * 48)([groups[3]])


# Losses and precision -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", ["anchor", "full"])
def test_15_align_is_the_librarys_own_supervised_loss(cells, make, scorer, processor, groups):
    """Token mean over the batch, end-of-turn included: value to 1e-6, gradient to 1e-5."""
    batch_of = [replace(group, weight=1.0) for group in groups]
    objectives = {"align": Align(counterfactual=0.0)}
    scores = scored(scorer, make(cells)(batch_of))
    loss, _ = weighted_loss(objectives, scores, denominators(objectives, scores.layout))
    heads = [f"USER: <image>\n{group.candidates[0].prompt} ASSISTANT:" for group in groups]
    images = [[Image.open(group.images[0][0])] for group in groups]
    whole = [f"{head} {group.candidates[0].text}</s>" for head, group in zip(heads, groups, strict=True)]
    processor.tokenizer.padding_side = "right"
    inputs = processor(images=images, text=whole, padding=True, return_tensors="pt")
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    for row, head in enumerate(heads):
        labels[row, : processor(images=images[row], text=[head], return_tensors="pt").input_ids.shape[1]] = -100
    with stock_attention(scorer.model):
        expected = scorer.model(**inputs, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = gradient(loss, scorer), gradient(expected, scorer)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.fixture(scope="module")
def narrow(scorer):
    return copy.deepcopy(scorer).to(torch.bfloat16)


def test_bf16_states_have_fp32_logits(make, narrow, groups):
    """Bit for bit what the head's product gives in fp32, and not what its bf16 logits give."""
    batch = make()(groups)
    inputs = batch.model_inputs | {"image_inputs": {"pixel_values": batch.model_inputs["image_inputs"]["pixel_values"].bfloat16()}}
    states = []
    hook = narrow.model.lm_head.register_forward_hook(lambda module, args, output: states.append(args[0]))
    with torch.no_grad():
        found = narrow(**inputs)
        hook.remove()
        logits = states[0].float() @ narrow.model.lm_head.weight.T.float()
        rounded = narrow.model.lm_head(states[0])
    chosen, targets = logits[inputs["predicted_by"]], inputs["targets"]
    assert rounded.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert len(states[0]) == len(inputs["scored"]) < inputs["input_ids"].numel(), "the output head runs on scored positions only"
    torch.testing.assert_close(found, chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert (found - token_logprobs(rounded[inputs["predicted_by"]], targets)).abs().max() > 1e-3
    assert torch.equal(found, token_logprobs(chosen, targets))
