"""The model that lmms-eval loads by its name ``cfvlm_ds``; nothing else imports this file."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch

from cfvlm_ds.cli.models import load_scorer
from cfvlm_ds.cli.options import ImageLimits, model_named
from cfvlm_ds.core.distributed import World, own_device
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.evaluation.lmms_requests import Answers
from cfvlm_ds.evaluation.suite.asked import MAX_TOKENS

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ConfigError(f"lmms-eval is not installed, or not all of it ({error}); pip install 'cfvlm-ds[lmms]'") from error


class Scored(tuple[float, bool]):
    """A value and whether the text is greedy, which lmms-eval unpacks."""

    __slots__ = ()

    def strip(self) -> tuple[()]:
        """Nothing: lmms-eval's response cache asks a result for its text so, and keeps none that is empty. What it keeps comes back as a
        list, which lmms-eval 0.7 then makes a string of, and fails."""
        return ()


class LmmsModel(lmms):
    """Likelihoods by this package's scorer, text by transformers' own ``generate``, on prompts by the model's own chat template.

    Args:
        pretrained: model folder or hub name, run folder, or folder of adapters.
        batch_size: pictures, with all texts about them, in a batch of likelihoods.
        max_tokens_per_forward: tokens of a forward of likelihoods at most.
        per_token: likelihoods are means, as of lmms-eval's own models, and not sums.
        min_pixels, max_pixels, max_tiles: bounds on the visual tokens of a picture, as in training.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        max_tokens_per_forward: int = MAX_TOKENS,
        per_token: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size {batch_size}: it is a number of pictures; give one of at least 1")
        if not pretrained:
            raise ConfigError("the model's arguments lack pretrained=MODEL; add it")
        model, adapter = model_named(str(pretrained), ImageLimits(min_pixels, max_pixels, max_tiles))
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # each rank has a whole model, and its share of the requests
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            self._device = self.accelerator.device
        else:
            self._device = torch.device(device or own_device())
        world = World(self._rank, 1, 0, self._device)
        scorer, collator, world = load_scorer(model, adapter, max_pixels=MAX_PIXELS, world=world)
        self._answers = Answers(scorer, collator, world, int(batch_size), int(max_tokens_per_forward), bool(per_token))

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers there."""
        return self._device

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Pairs of a value and whether the text is greedy, in a wrapper: lmms-eval 0.7 makes a string of every other pair."""
        return [GenerationResult(Scored(pair)) for pair in self._answers.loglikelihood(requests, self.task_dict)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts."""
        return self._answers.generate_until(requests, self.task_dict)

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Not answered."""
        raise NotImplementedError("this model answers no tasks of several rounds; leave them out of --tasks")
