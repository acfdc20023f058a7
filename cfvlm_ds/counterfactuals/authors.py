"""Authors: models that write texts about pictures, either in this process or on a server with an OpenAI-compatible API."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import PICTURE, Prompt, Turn, messages
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import Pictures
from cfvlm_ds.counterfactuals.chat_server import CallFailed, ChatServer, check_url, image_part
from cfvlm_ds.counterfactuals.edit.base import sha256_of
from cfvlm_ds.counterfactuals.options import SampleOptions
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.decoding import MAX_BYTES
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.evaluation.generation import Written, write_several

_LONGEST_SIDE = 2048
"""Largest side, in pixels, of a picture that is sent to a server; larger pictures are scaled down."""


class Author(Protocol):
    """A model that writes texts. ``write`` can be called from ``threads`` threads at once."""

    threads: int

    def write(self, shown: Pictures, prompt: Prompt, options: SampleOptions) -> list[Written]:
        """Write ``options.n`` texts in answer to a prompt about the pictures ``shown``. A text that cannot be used for training,
        because it contains a control token or a server has filtered it, is returned as "". Raises DataError if the texts cannot be written.
        """


def _seed(shown: Pictures, prompt: Prompt, options: SampleOptions) -> int:
    try:
        return seed_of(options.seed, *(sha256_of(picture_bytes(picture, MAX_BYTES)) for picture in shown), prompt)
    except OSError as error:
        raise DataError(f"{', '.join(map(str, shown))}: it cannot be read ({error.strerror}); restore the file") from error


class LocalAuthor:
    """A model in this process."""

    threads = 1

    def __init__(self, model: Any, collator: Collator, world: World) -> None:
        self._model, self._collator, self._device = model, collator, world.device

    def write(self, shown: Pictures, prompt: Prompt, options: SampleOptions) -> list[Written]:
        torch.manual_seed(_seed(shown, prompt, options))
        written = write_several(
            self._model, self._collator, self._device, shown, prompt, options.max_new_tokens, do_sample=True,
            temperature=options.temperature, top_p=options.top_p, top_k=0, num_return_sequences=options.n,
        )  # fmt: skip
        return [Written(text if self._is_accepted(prompt, text, len(shown)) else "", ended) for text, ended in written]

    def _is_accepted(self, prompt: Prompt, text: str, num_pictures: int) -> bool:
        try:
            self._collator.prompts.encoded(prompt, text.strip(), num_pictures, "a text")
        except DataError:
            return False
        return True


class ServerAuthor:
    """A model on a server. Raises ConfigError if the options do not name the model, or if ``url`` is not an address."""

    def __init__(self, url: str, options: SampleOptions, max_pixels: int) -> None:
        if not options.served_model:
            raise ConfigError(f"{url} is a server; name its model with --served_model")
        self.threads = options.calls
        self._server = ChatServer(check_url(url, "MODEL"), options.timeout_s, options.attempts)
        self._max_pixels = max_pixels

    def write(self, shown: Pictures, prompt: Prompt, options: SampleOptions) -> list[Written]:
        """Raises also ConfigError if the server does not work at all (see ``ChatServer.ask``)."""
        turns = (Turn("user", (*[PICTURE] * len(shown), prompt)),) if isinstance(prompt, str) else prompt
        pictures = (image_part(picture, _LONGEST_SIDE, self._max_pixels) for picture in shown)
        content = messages(turns)
        for message in content:
            message["content"] = [next(pictures) if part["type"] == "image" else part for part in message["content"]]
        seed, written = _seed(shown, prompt, options) % 2**31, list[Written]()
        body = {
            "model": options.served_model,
            "messages": content,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
        }
        try:
            while (missing := options.n - len(written)) > 0:  # many servers ignore n and write one text
                written += self._server.ask(body | {"n": missing, "seed": (seed + len(written)) % 2**31}, _texts)[:missing]
        except CallFailed as failure:
            raise DataError(f"no usable reply: {failure}") from failure
        return written


def _texts(reply: Any) -> list[Written]:
    """Return the texts in a reply. Raises CallFailed if there are none."""
    try:
        choices = [(choice["message"]["content"] or "", choice["finish_reason"]) for choice in reply["choices"]]
        for text, _ in choices:
            text.encode()
    except (KeyError, TypeError, AttributeError):
        raise CallFailed("the reply has no choices with a finish_reason and a text") from None
    except UnicodeEncodeError:
        raise CallFailed("the reply contains half of a surrogate pair") from None
    if not choices:
        raise CallFailed("the reply has no choices")
    return [Written("" if ended == "content_filter" else text, ended != "length") for text, ended in choices]
