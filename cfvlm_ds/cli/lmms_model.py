"""The model that lmms-eval loads under the name ``cfvlm_ds``. Only lmms-eval imports this module."""

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
from cfvlm_ds.evaluation.suite.runner import MAX_TOKENS

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ConfigError(f"lmms-eval is not installed, or incomplete ({error}); run pip install 'cfvlm-ds[lmms]'") from error


class Scored(tuple[float, bool]):
    """Pair that lmms-eval unpacks: a text's log-likelihood, and whether greedy decoding yields the text."""

    __slots__ = ()

    def strip(self) -> tuple[()]:
        """Return an empty tuple, so that lmms-eval's response cache does not store the result.

        The cache calls ``strip`` to detect empty results, which it does not store. It would return a stored pair as a list, which lmms-eval
        0.7 would convert to a string.
        """
        return ()


class LmmsModel(lmms):
    """Model for lmms-eval. This package's scorer computes likelihoods, and transformers' ``generate`` generates texts. Both use the model's
    chat template.

    Args:
        pretrained: model folder or hub name, run folder, or folder of adapters.
        batch_size: pictures per batch (with all their texts) when likelihoods are computed.
        max_tokens_per_forward: maximum number of tokens in a forward pass when likelihoods are computed.
        per_token: return log-likelihoods per token instead of sums, as lmms-eval's own models do.
        min_pixels, max_pixels, max_tiles: limits on the visual tokens of a picture, as in training.
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
            raise ConfigError(f"--batch_size {batch_size} must be at least 1 (pictures)")
        if not pretrained:
            raise ConfigError("the model's arguments lack pretrained=MODEL; add it")
        model, adapter = model_named(str(pretrained), ImageLimits(min_pixels, max_pixels, max_tiles))
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # each rank has the full model and a share of the requests
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
        """Device of the model, on which lmms-eval gathers results."""
        return self._device

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Return a ``Scored`` pair for each text, because lmms-eval 0.7 would convert any other pair to a string."""
        return [GenerationResult(Scored(pair)) for pair in self._answers.loglikelihood(requests, self.task_dict)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the generated texts."""
        return self._answers.generate_until(requests, self.task_dict)

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Raise NotImplementedError."""
        raise NotImplementedError("this model does not support tasks with several rounds; remove them from --tasks")
