"""Micro-batches of a run, prepared by data workers while the engine computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster import signals
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, isolated_rng
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.objectives import batch_terms
from cfvlm_ds.training.in_batch_negatives import WholeSteps, WithNegatives


def micro_batches(
    groups: Sequence[CounterfactualGroup], sampler: GroupSampler, collator: Collator, config: RunConfig, world: World, num_workers: int
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of this rank from the sampler's position on.

    Raises WorkerLost when a data worker has died.
    """
    terms = batch_terms(config.objective)
    loader: Any = DataLoader(
        WithNegatives(groups, terms, config.train.seed) if terms else Unraised(groups),  # type: ignore[arg-type]
        batch_sampler=WholeSteps(sampler) if terms else sampler,  # type: ignore[arg-type]
        collate_fn=partial(collator.without_unreadable, max_tokens=config.data.max_tokens_per_forward),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=signals.shield_worker,
        generator=isolated_rng(),
    )
    iterator = iter(loader)
    if num_workers:
        signals.defer_worker_deaths()
    while True:
        with signals.worker_deaths(), signals.deferred_deaths_raised():
            micro_batch = next(iterator, None)
        if micro_batch is None:
            return
        yield micro_batch
