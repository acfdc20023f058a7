"""What lmms-eval asks of a model, answered by this package: likelihoods by its scorer, text by transformers' own ``generate``.

Read in lmms-eval 0.7.3, which has two meanings for what its ``loglikelihood`` returns. Of a multiple choice it takes the option with the
*least* value (``np.argmin`` in ``ConfigurableTask.process_results``, and so do the tasks that choose themselves), for ``acc_norm`` after a
division by the option's characters: the value is the sum of -log p. Of one text, whose target the task computes, the metric ``perplexity``
is exp(-mean): the value is log p.
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
"""Where a task's text shows a picture."""
MAX_NEW_TOKENS = 1024
"""Of a text, where a task does not say."""
_TOGETHER = 256  # requests whose pictures are on disk at a time
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OPTIONS = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens", "early_stopping")

Documents = Mapping[str, Mapping[str, Sequence[Any]]]
"""Task -> split -> its rows, as lmms-eval gives them to a model."""


@dataclass(frozen=True)
class Answers:
    """A model that answers lmms-eval's requests, each of which has ``args``.

    Args:
        batch_size: pictures, with all texts about them, in a batch.
        max_tokens: tokens of a forward at most.
        per_token: divide a likelihood by its tokens: the mean loss that lmms-eval's own models return, by which ``acc_norm`` divides twice.
    """

    scorer: Scorer
    collator: Collator
    world: World
    batch_size: int = 1
    max_tokens: int | None = None
    per_token: bool = False
    _unused: set[str] = field(default_factory=set)

    def loglikelihood(self, requests: Sequence[Any], documents: Documents) -> list[tuple[float, bool]]:
        """The value of each text (see above), and whether greedy decoding would write it. One that is not a number counts as unlikely.

        Raises DataError naming task and row.
        """
        progress, found, broken = Progress(self.world.say, "scoring", len(requests), "texts"), list[tuple[float, bool]](), 0
        for start in range(0, len(requests), _TOGETHER):
            part = requests[start : start + _TOGETHER]
            packing = Packing()
            with tempfile.TemporaryDirectory() as folder:
                places = [packing.add(*_question(request, documents, folder)) for request in part]
                given = likelihoods(self, packing.groups(), places)
            for request, each in zip(part, given, strict=True):
                value = each.logp / (each.tokens if self.per_token else 1)
                finite = math.isfinite(value)
                broken += not finite
                value = value if finite else -math.inf
                found.append((-value if isinstance(request.args[1], str) else value, each.greedy and finite))
            progress.advance(len(part))
        if broken:
            self.world.say(f"warning: {broken} of {len(requests)} likelihoods are not finite, and count as those of the unlikeliest texts")
        return found

    def generate_until(self, requests: Sequence[Any], documents: Documents) -> list[str]:
        """What the model writes for each request, one at a time, up to the first of the strings that end it.

        Raises DataError naming task and row.
        """
        progress, found = Progress(self.world.say, "writing", len(requests), "texts"), list[str]()
        for request in progress.over(requests):
            context, given, visual, number, task, split = request.args
            until, limit, options = self._options(given)
            named = f"task {task!r}, row {number}"
            with tempfile.TemporaryDirectory() as folder:
                pictures = _as_files(_shown(visual, documents, task, split, number), folder, named)
                prompt = _prompt(context, len(pictures))
                try:
                    text = write(self.scorer.model, self.collator, self.world.device, pictures, prompt, limit, **options)
                except DataError as error:
                    raise DataError(f"{named}: {error}") from error
            for end in until:
                text = text.partition(end)[0]
            found.append(text)
        return found

    def _options(self, given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Strings that end a text, its tokens at most, and the options of ``generate``. What is not used is said once."""
        asked = {name: value for name, value in given.items() if value is not None}
        until = asked.pop("until", [])
        limit = int(asked.pop("max_new_tokens", asked.pop("max_gen_toks", MAX_NEW_TOKENS)))
        temperature, sampled = asked.get("temperature"), asked.pop("do_sample", None)
        options: dict[str, Any] = {"do_sample": bool(sampled) if temperature is None else temperature > 0 and sampled is not False}
        wanted = (*_OPTIONS, *_SAMPLING) if options["do_sample"] else _OPTIONS
        options |= {"num_beams": 1} | {name: asked[name] for name in wanted if name in asked}
        for name in sorted(asked.keys() - {*_OPTIONS, *_SAMPLING} - self._unused):
            self._unused.add(name)
            self.world.say(f"warning: the task's option {name} ({asked[name]!r}) is not used")
        return [end for end in ([until] if isinstance(until, str) else until) if end], limit, options


class Likelihood(NamedTuple):
    """log p of a text in nats, without the end of the turn; its tokens; whether each of them is the likeliest one in its place."""

    logp: float
    tokens: int
    greedy: bool


def likelihoods(model: Answers, groups: Sequence[CounterfactualGroup], places: Sequence[Place]) -> list[Likelihood]:
    """What the model gives the texts at some places of the groups; this process alone, whatever others there are.

    Raises DataError for a text or a picture that cannot be scored, OutOfMemory where memory runs out.
    """
    found: dict[Place, Likelihood] = {}
    size = model.batch_size
    with _misses(model.scorer) as missed:
        options: dict[str, Any] = {"max_tokens": model.max_tokens, "remedy": f"lower the batch size ({size})", "reference": missed}
        for pictured in (True, False):
            mine = [number for number, group in enumerate(groups) if bool(group.num_pictures) == pictured]
            batches = [mine[start : start + size] for start in range(0, len(mine), size)]
            turns = scored_batches(model.scorer, model.collator, groups, [groups], batches, model.world, 0, "scoring", **options)
            for indices, (scores,) in turns:
                assert scores.reference is not None
                for j, number in enumerate(indices):
                    for c in range(len(groups[number].candidates)):
                        wrong, tokens = scores.reference[j, 0, c].item(), int(scores.layout.num_tokens[j, 0, c])
                        found[number, (c,)] = Likelihood(scores.logp[j, 0, c].item(), tokens, wrong == 0)
    return [found[place] for place in places]


@contextmanager
def _misses(scorer: Scorer) -> Iterator[Callable[[Batch], Tensor]]:
    """A function that says of the batch that was scored last how many tokens of each cell are not the likeliest in their places."""
    head: Any = scorer.model.get_output_embeddings()
    wrong: list[Tensor] = []

    def compare(module: Any, given: tuple[Tensor, Tensor, Tensor], result: Tensor) -> None:
        hidden, predicted_by, targets = given
        wrong[:] = [(likeliest(hidden, module.weight)[predicted_by] != targets).float()]

    hook = head.register_forward_hook(compare)
    try:
        yield lambda batch: batch.scores(wrong[0]).logp
    finally:
        hook.remove()


def _question(request: Any, documents: Documents, folder: str) -> tuple[str, tuple[Pictures, ...], tuple[Candidate, ...]]:
    """A request's name, by which an error names it, pictures and text."""
    if len(request.args) != 6:
        raise DataError(
            "the metric acc_mutual_info takes the largest of differences where lmms-eval's other metrics take the least value, so that no "
            "model can answer both; take it out of the task, or ask by `cfvlm-ds evaluate --probes caption:mode=pmi`"
        )
    context, target, visual, number, task, split = request.args
    named = f"task {task!r}, row {number}"
    text = str(target if isinstance(target, str) else target(documents[task][split][number])).strip()
    if not text:
        raise DataError(f"{named}: the text whose likelihood is asked for is empty; correct the task's options")
    pictures = _as_files(_shown(visual, documents, task, split, number), folder, named)
    return named, (pictures,), (Candidate(_prompt(context, len(pictures)), text),)


def _shown(visual: Any, documents: Documents, task: str, split: str, number: int) -> Sequence[Any]:
    return (visual(documents[task][split][number]) if callable(visual) else visual) or ()


def _prompt(context: str, num_pictures: int) -> Prompt:
    """The task's text with pictures at the places that it marks, if it has a place for each, or else before it."""
    pieces = [piece.strip() for piece in context.split(IMAGE)]
    if not num_pictures or len(pieces) - 1 != num_pictures:
        return context
    parts: list[Part] = [part for piece in pieces for part in (PICTURE, piece)][1:]
    return simplest((Turn("user", tuple(part for part in parts if part)),))


def _as_files(visuals: Sequence[Any], folder: str, named: str) -> Pictures:
    """Pictures in memory as files, which is what groups name: the same one for the same picture, but within a row."""
    found: list[Path] = []
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise DataError(
                f"{named} shows a {type(visual).__name__}, and pictures alone can be shown; leave out tasks of videos and sound"
            )
        written = io.BytesIO()
        (visual if visual.mode in _AS_PNG else visual.convert("RGB")).save(written, "PNG", compress_level=1)
        name = hashlib.sha256(written.getvalue()).hexdigest()
        path = next(path for k in range(len(visuals)) if (path := Path(folder, f"{name}-{k}.png")) not in found)
        if not path.exists():
            path.write_bytes(written.getvalue())
        found.append(path)
    return tuple(found)
