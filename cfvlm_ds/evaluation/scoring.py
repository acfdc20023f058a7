"""Scoring groups with a model that may be spread over ranks: the same forward as in training, without gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.batching.batch import Batch, blinded
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.batching.out_of_memory import explain_out_of_memory
from cfvlm_ds.cluster.signals import shield_worker
from cfvlm_ds.core.distributed import World, gather_objects, isolated_rng
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.core.text import few
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.data.stored_scores import StoredScores
from cfvlm_ds.evaluation.loss import EvaluationLoss

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class GroupScores:
    """One group's full score matrix: ``logp`` [I, C] and ``blank`` [C] (the texts on a blank image), in nats.

    ``shuffled`` [C] are the texts on another group's image: empty if there is none, None if that was not requested. A score that is not
    finite becomes NaN, which wins no comparison.
    """

    logp: Tensor
    blank: Tensor
    shuffled: Tensor | None = None

    def __post_init__(self) -> None:
        for name, scores in vars(self).items():
            if scores is not None:
                object.__setattr__(self, name, scores.where(scores.isfinite(), torch.nan))

    @property
    def finite(self) -> bool:
        """Whether all scores are numbers."""
        return all(bool(part.isfinite().all()) for part in (self.logp, self.blank, self.shuffled) if part is not None)

    def stored(self) -> StoredScores:
        """The same as plain numbers, for a scores file."""
        return StoredScores(tuple(map(tuple, self.logp.tolist())), tuple(self.blank.tolist()))


Packed = tuple[tuple[int, int, int], bytes]
"""A group's scores in four bytes each, after its numbers of images, texts and shuffled texts, -1 where none were asked for."""


def packed(scores: GroupScores) -> Packed:
    """What ``unpacked`` reads."""
    parts = [each.flatten() for each in (scores.logp, scores.blank, scores.shuffled) if each is not None]
    images, texts = scores.logp.shape
    return (images, texts, -1 if scores.shuffled is None else len(scores.shuffled)), torch.cat(parts).float().numpy().tobytes()


def unpacked(given: Packed) -> GroupScores:
    """The scores of a group."""
    (images, texts, others), values = given
    seen, blank, shuffled = torch.tensor(np.frombuffer(values, np.float32)).split([images * texts, texts, max(others, 0)])
    return GroupScores(seen.view(images, texts), blank, shuffled if others >= 0 else None)


def guarded(
    collator: Collator, max_tokens: int | None = None
) -> Callable[[Sequence[CounterfactualGroup | DataError]], list[Batch] | DataError]:
    """``Collator.parts`` for a worker process: a DataError, of a row that could not be read too, is returned as a value, because raised in
    a worker it would lose its message."""

    def collate(groups: Sequence[CounterfactualGroup | DataError]) -> list[Batch] | DataError:
        try:
            for group in groups:
                if isinstance(group, DataError):
                    raise group
            return collator.parts(groups, max_tokens)  # type: ignore[arg-type]
        except DataError as error:
            return error

    return collate


def score_groups(
    forward: Forward,
    collator: Collator,
    groups: Sequence[CounterfactualGroup],
    world: World,
    batch_size: int = 16,
    num_workers: int = 0,
    label: str = "scoring",
    *,
    max_tokens: int | None = None,
    shuffled: bool = False,
    remedy: str = "lower the batch size",
    loss: EvaluationLoss | None = None,
) -> Sequence[GroupScores]:
    """Every cell of every group, and every text on a blank image, in the order of ``groups``; the same on every rank.

    ``forward`` is an engine or a Scorer in evaluation mode; ``batch_size`` counts groups per rank, which are scored in forwards of at most
    ``max_tokens`` tokens. Every rank runs the same number of forwards, as ZeRO-3 requires. ``shuffled`` scores every text on
    another group's image too, one more per group; ``loss`` is told the scores on the groups' own images.

    Raises DataError as the collator does, on all ranks, and OutOfMemory with the ``remedy`` where memory runs out.
    """
    batches = [range(start, min(start + batch_size, len(groups))) for start in range(0, len(groups), batch_size)]
    donors, scored_here = other_images(groups) if shuffled else None, dict[int, Packed]()
    progress = Progress(world.say, label, len(groups), "groups")
    options: dict[str, Any] = {"max_tokens": max_tokens, "remedy": remedy, "reference": None if loss is None else loss.reference}
    turns = scored_batches(forward, collator, groups, seen_as(groups, donors), batches, world, num_workers, label, **options)
    for number, (indices, scored) in enumerate(turns):
        if loss is not None and indices:
            loss.add(indices, [groups[index] for index in indices], scored[0])
        scored_here |= {index: packed(scores) for index, scores in matrices(groups, indices, scored, donors).items()}
        progress.advance(min(batch_size * world.size, len(groups) - number * batch_size * world.size))
    every = {index: each for part in gather_objects(scored_here, world) for index, each in part.items()}
    found = Lazy(lambda index: unpacked(every[index]), len(groups))
    warn_of_nonfinite(groups, found, world, label)
    return found


def warn_of_nonfinite(groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores], world: World, label: str) -> None:
    """Count the groups whose scores are no numbers, and name some."""
    if broken := [group.id for group, found in zip(groups, scores, strict=True) if not found.finite]:
        world.say(f"warning: {label}: scores of {len(broken)} of {len(groups)} groups are not finite, and count as wrong: {few(broken)}")


def scored_batches(
    forward: Forward,
    collator: Collator,
    groups: Sequence[CounterfactualGroup],
    views: Sequence[Sequence[CounterfactualGroup]],
    batches: Sequence[Sequence[int]],
    world: World,
    num_workers: int,
    label: str,
    *,
    max_tokens: int | None,
    remedy: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> Iterator[tuple[Sequence[int], list[Scores]]]:
    """This rank's share of the ``batches``, which are places of groups: each batch, and its scores in each of its ``views`` (see
    ``seen_as``). Ranks take turns, and each gives as many: one that has none left scores a group again, and gives no places.

    Raises what ``score_batches`` raises.
    """
    places = range(world.rank, -(-len(batches) // world.size) * world.size, world.size)
    mine = [batches[place] if place < len(batches) else batches[-1][-1:] for place in places]
    loaders: list[Any] = [
        DataLoader(
            Unraised(view),  # type: ignore[arg-type]
            batch_sampler=mine,  # type: ignore[arg-type]
            collate_fn=guarded(collator.scoring_everything(), max_tokens),
            num_workers=num_workers,
            worker_init_fn=shield_worker,
            generator=isolated_rng(),
        )
        for view in views
    ]
    for place, indices, *parts in zip(places, mine, *loaders, strict=True):
        scored = score_batches(forward, parts, world, f"{label}, groups from {groups[indices[0]].id!r}", remedy, reference)
        yield (indices if place < len(batches) else ()), scored


def matrices(
    groups: Sequence[CounterfactualGroup], indices: Sequence[int], scored: Sequence[Scores], donors: Sequence[Pictures | None] | None
) -> dict[int, GroupScores]:
    """The score matrix of each group of a batch that was scored in every view. Without a view of a blank image, a text alone is its own."""
    seen, *others = (each.logp for each in scored)
    found = {}
    for j, index in enumerate(indices):
        size = (len(groups[index].images), len(groups[index].candidates))
        blank = others[0][j, 0, : size[1]] if others else seen[j, 0, : size[1]]
        foreign = None
        if donors is not None:
            foreign = others[1][j, 0, : size[1]] if donors[index] is not None and others else torch.empty(0)
        found[index] = GroupScores(seen[j, : size[0], : size[1]], blank, foreign)
    return found


def seen_as(groups: Sequence[CounterfactualGroup], donors: Sequence[Pictures | None] | None) -> list[Sequence[CounterfactualGroup]]:
    """The groups in every way in which they are scored: on their own images, on a blank one and, if wanted, on another group's."""
    views: list[Sequence[CounterfactualGroup]] = [groups, Lazy(lambda index: blinded(groups[index]), len(groups))]
    if donors is not None:
        views.append(Lazy(lambda index: shown_instead(groups[index], donors[index]), len(groups)))
    return views


def score_batches(
    forward: Forward,
    batches: Sequence[Sequence[Batch] | DataError],
    world: World,
    where: str,
    remedy: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> list[Scores]:
    """The scores of each batch, which comes in parts. Every rank calls it with the same number of batches, each of any number of parts.
    ``reference`` gives those of the first one reference scores.

    Raises DataError on all ranks if one of them has one.
    """
    sizes = [0 if isinstance(parts, DataError) else len(parts) for parts in batches]
    problem = next((str(parts) for parts in batches if isinstance(parts, DataError)), None)
    gathered = gather_objects((sizes, problem), world)
    if found := [each for _, each in gathered if each is not None]:
        raise DataError(found[0])
    scored: list[Scores] = []
    ready = [parts for parts in batches if not isinstance(parts, DataError)]
    for parts, *counts in zip(ready, *(each for each, _ in gathered), strict=True):
        compared = reference if not scored else None
        with torch.no_grad(), explain_out_of_memory(f"while {where} on rank {world.rank}", parts, remedy):
            found_parts, references = [], list[Tensor]()
            for k in range(max(counts)):
                prepared = parts[min(k, len(parts) - 1)]
                part = prepared.to(world.device)
                scores = part.scores(forward(**part.model_inputs))
                told = [] if compared is None else [compared(part).cpu()]
                if k < len(parts):
                    found_parts.append(Scores(prepared.layout, scores.logp.cpu(), scores.end_logp.cpu()))
                    references += told
        joined = Scores.joined(found_parts)
        scored.append(replace(joined, reference=torch.stack(references).sum(0)) if references else joined)
    return scored


def other_images(groups: Sequence[CounterfactualGroup], seed: int = 0) -> list[Pictures | None]:
    """For each group the factual image of another one that shows none of its own pictures; None where there is none.

    In an order drawn by ``seed`` each group takes the image of the next one, so that each image serves once. Groups that share pictures
    take the nearest image that fits; at most ``_TRIES`` neighbours are looked at.
    """
    found: list[Pictures | None] = [None] * len(groups)
    alike: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(group.num_pictures, []).append(index)
    draw = random.Random(seed)
    for num_pictures, members in sorted(alike.items()):
        draw.shuffle(members)
        for place, index in enumerate(members if num_pictures else ()):
            own = {picture for pictures in groups[index].images for picture in pictures}
            for step in range(1, min(len(members), _TRIES + 1)):
                donor = groups[members[(place + step) % len(members)]].images[0]
                if own.isdisjoint(donor):
                    found[index] = donor
                    break
    return found


_TRIES = 1000


def shown_instead(group: CounterfactualGroup, image: Pictures | None) -> CounterfactualGroup:
    """The group with one image in place of its own (None: a blank one); the truth is unknown for every text but the first."""
    blind = blinded(group)
    return blind if image is None else replace(blind, images=(image,))
