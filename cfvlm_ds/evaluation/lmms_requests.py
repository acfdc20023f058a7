"""Answers to lmms-eval requests: this package's scorer computes likelihoods, and transformers' ``generate`` generates text.

lmms-eval 0.7.3 uses the result of ``loglikelihood`` in two ways, so the sign of the result depends on the task:

- multiple choice: the value is -log p, summed over tokens. lmms-eval chooses the option with the *lowest* value (``np.argmin`` in
  ``ConfigurableTask.process_results`` and in tasks with their own rule). For ``acc_norm``, it first divides by the number of characters;
- single text (the request contains a function that returns the text): the value is log p. The metric ``perplexity`` is exp(-mean).
"""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import PICTURE, Part, Prompt, Turn, simplest
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.evaluation.asking import Packing, Place
from cfvlm_ds.evaluation.generation import write
from cfvlm_ds.evaluation.scoring import scored_batches
from cfvlm_ds.models import Scorer
from cfvlm_ds.models.chunked_logprobs import likeliest

IMAGE = "<image>"
"""Placeholder for a picture in a task's text."""
MAX_NEW_TOKENS = 1024
"""Default maximum number of generated tokens, for tasks that set no maximum."""
_TOGETHER = 256  # requests whose pictures are on disk at the same time
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OPTIONS = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens", "early_stopping")

Documents = Mapping[str, Mapping[str, Sequence[Any]]]
"""Task -> split -> rows, as lmms-eval passes them to a model."""


@dataclass(frozen=True)
class Answers:
    """Model that answers lmms-eval requests. The attribute ``args`` of a request holds its contents.

    Args:
        batch_size: number of groups in a batch; a group consists of a request's pictures and all texts about them.
        max_tokens: maximum number of tokens in a forward pass.
        per_token: divide each log-likelihood by the text's number of tokens, as lmms-eval's own models do, even for ``acc_norm``.
    """

    scorer: Scorer
    collator: Collator
    world: World
    batch_size: int = 1
    max_tokens: int | None = None
    per_token: bool = False
    _unused: set[str] = field(default_factory=set)

    def loglikelihood(self, requests: Sequence[Any], documents: Documents) -> list[tuple[float, bool]]:
        """Return a pair for each request: the text's value (see the module docstring), and whether greedy decoding would generate the text.

        A non-finite log-likelihood counts as -infinity. For an invalid request, raises a DataError that names its task and row.
        """
        progress, values, broken = Progress(self.world.say, "scoring", len(requests), "texts"), list[tuple[float, bool]](), 0
        for start in range(0, len(requests), _TOGETHER):
            part = requests[start : start + _TOGETHER]
            packing = Packing()
            with tempfile.TemporaryDirectory() as folder:
                places = [packing.add(*_question(request, documents, folder)) for request in part]
                scored = self._likelihoods(packing.groups(), places)
            for request, text in zip(part, scored, strict=True):
                value = text.logp / (text.tokens if self.per_token else 1)
                finite = math.isfinite(value)
                broken += not finite
                value = value if finite else -math.inf
                values.append((-value if isinstance(request.args[1], str) else value, text.greedy and finite))
            progress.advance(len(part))
        if broken:
            self.world.say(f"warning: {broken} of {len(requests)} likelihoods are not finite and count as those of the least likely texts")
        return values

    def _likelihoods(self, groups: Sequence[CounterfactualGroup], places: Sequence[Place]) -> list[Likelihood]:
        """Return the likelihoods of the texts that ``places`` lists by group and column.

        Raises DataError for a text or a picture that cannot be scored, and OutOfMemory if memory runs out.
        """
        by_place: dict[Place, Likelihood] = {}
        size = self.batch_size
        batches = [range(start, min(start + size, len(groups))) for start in range(0, len(groups), size)]
        with _misses(self.scorer) as missed:
            turns = scored_batches(
                self.scorer,
                self.collator,
                groups,
                [groups],
                batches,
                self.world,
                0,
                "scoring",
                max_tokens=self.max_tokens,
                remedy=f"lower the batch size ({size})",
                reference=missed,
            )
            for indices, (scores,) in turns:
                assert scores.reference is not None
                for j, number in enumerate(indices):
                    for c in range(len(groups[number].candidates)):
                        wrong, tokens = scores.reference[j, 0, c].item(), int(scores.layout.num_tokens[j, 0, c])
                        by_place[number, (c,)] = Likelihood(scores.logp[j, 0, c].item(), tokens, wrong == 0)
        return [by_place[place] for place in places]

    def generate_until(self, requests: Sequence[Any], documents: Documents) -> list[str]:
        """Generate a text for each request, one request at a time. A text is cut off before the first stop string.

        For an invalid request, raises a DataError that names its task and row.
        """
        progress, texts = Progress(self.world.say, "writing", len(requests), "texts"), list[str]()
        for request in progress.over(requests):
            context, task_options, visual, number, task, split = request.args
            until, limit, options = self._options(task_options)
            label = f"task {task!r}, row {number}"
            with tempfile.TemporaryDirectory() as folder:
                pictures = _as_files(_shown(visual, documents, task, split, number), folder, label)
                prompt = _prompt(context, len(pictures))
                try:
                    text = write(self.scorer.model, self.collator, self.world.device, pictures, prompt, limit, **options)
                except DataError as error:
                    raise DataError(f"{label}: {error}") from error
            for end in until:
                text = text.partition(end)[0]
            texts.append(text)
        return texts

    def _options(self, task_options: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Return a task's stop strings, maximum number of tokens, and options for ``generate``. Warn once about each unused option."""
        options_left = {name: value for name, value in task_options.items() if value is not None}
        until = options_left.pop("until", [])
        limit = int(options_left.pop("max_new_tokens", options_left.pop("max_gen_toks", MAX_NEW_TOKENS)))
        temperature, sampled = options_left.get("temperature"), options_left.pop("do_sample", None)
        options: dict[str, Any] = {"do_sample": bool(sampled) if temperature is None else temperature > 0 and sampled is not False}
        supported = (*_OPTIONS, *_SAMPLING) if options["do_sample"] else _OPTIONS
        options |= {name: options_left[name] for name in supported if name in options_left}
        for name in sorted(options_left.keys() - {*_OPTIONS, *_SAMPLING} - self._unused):
            self._unused.add(name)
            self.world.say(f"warning: the task's option {name} ({options_left[name]!r}) is not used")
        return [end for end in ([until] if isinstance(until, str) else until) if end], limit, options


class Likelihood(NamedTuple):
    """Log-likelihood of a text in nats, and the text's number of tokens. Neither includes end-of-turn tokens. ``greedy`` is True if every
    token is the likeliest at its position.
    """

    logp: float
    tokens: int
    greedy: bool


@contextmanager
def _misses(scorer: Scorer) -> Iterator[Callable[[Batch], Tensor]]:
    """Yield a function that counts, for each cell of the last scored batch, the tokens that differ from the greedy prediction."""
    head: Any = scorer.model.get_output_embeddings()
    wrong: list[Tensor] = []

    def compare(module: Any, arguments: tuple[Tensor, Tensor, Tensor], result: Tensor) -> None:
        hidden, predicted_by, targets = arguments
        wrong[:] = [(likeliest(hidden, module.weight)[predicted_by] != targets).float()]

    hook = head.register_forward_hook(compare)
    try:
        yield lambda batch: batch.scores(wrong[0]).logp
    finally:
        hook.remove()


def _question(request: Any, documents: Documents, folder: str) -> tuple[str, tuple[Pictures, ...], tuple[Candidate, ...]]:
    """Return (label, image, text); the label is used in error messages. Raises DataError for a request that cannot be scored."""
    if len(request.args) != 6:
        raise DataError(
            "the metric acc_mutual_info selects the largest difference, but lmms-eval's other metrics select the smallest value, so no "
            "model can answer both; remove it from the task, or use `cfvlm-ds evaluate --probes caption:mode=pmi`"
        )
    context, target, visual, number, task, split = request.args
    label = f"task {task!r}, row {number}"
    text = str(target if isinstance(target, str) else target(documents[task][split][number])).strip()
    if not text:
        raise DataError(f"{label}: the text to score is empty; correct the task's options")
    pictures = _as_files(_shown(visual, documents, task, split, number), folder, label)
    return label, (pictures,), (Candidate(_prompt(context, len(pictures)), text),)


def _shown(visual: Any, documents: Documents, task: str, split: str, number: int) -> Sequence[Any]:
    return (visual(documents[task][split][number]) if callable(visual) else visual) or ()


def _prompt(context: str, num_pictures: int) -> Prompt:
    """Replace each placeholder in a task's text with a picture. If the numbers of placeholders and pictures differ, put all pictures before
    the text.
    """
    pieces = [piece.strip() for piece in context.split(IMAGE)]
    if not num_pictures or len(pieces) - 1 != num_pictures:
        return context
    parts: list[Part] = [part for piece in pieces for part in (PICTURE, piece)][1:]
    return simplest((Turn("user", tuple(part for part in parts if part)),))


def _as_files(visuals: Sequence[Any], folder: str, label: str) -> Pictures:
    """Write pictures to files, because groups store paths, and return the paths. Identical pictures of different requests share a file;
    within a request, each picture has its own.
    """
    paths: list[Path] = []
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise DataError(f"{label} shows a {type(visual).__name__}, but only pictures can be shown; leave out tasks with video or audio")
        png = io.BytesIO()
        (visual if visual.mode in _AS_PNG else visual.convert("RGB")).save(png, "PNG", compress_level=1)
        name = hashlib.sha256(png.getvalue()).hexdigest()
        path = next(path for k in range(len(visuals)) if (path := Path(folder, f"{name}-{k}.png")) not in paths)
        if not path.exists():
            path.write_bytes(png.getvalue())
        paths.append(path)
    return tuple(paths)
