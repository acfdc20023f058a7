"""Text generation for pictures, with transformers' ``generate`` and the model's chat template.

Each prompt is processed alone with its pictures, so neither padding nor another prompt can change the text.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import torch

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.errors import DataError, OutOfMemory, is_failure
from cfvlm_ds.core.groups import Pictures, Prompt
from cfvlm_ds.models.forest_attention import stock_attention


def writing_digest(model: Any) -> str:
    """Return a hash of the model's generation config, whose options, such as a repetition penalty, affect every generated text."""
    options = {name: value for name, value in model.generation_config.to_diff_dict().items() if name != "transformers_version"}
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


class Written(NamedTuple):
    """A generated text. ``ended`` is False if it was cut off at the maximum number of tokens."""

    text: str
    ended: bool


def write(*arguments: Any, **options: Any) -> str:
    """Generate a single text. For the arguments, see ``write_several``."""
    return write_several(*arguments, **options)[0].text


def write_several(
    model: Any, collator: Collator, device: torch.device, shown: Pictures, prompt: Prompt, max_new_tokens: int, **options: Any
) -> list[Written]:
    """Generate texts for a prompt and the pictures ``shown``. ``options``, such as ``num_return_sequences``, are passed to transformers'
    ``generate``. Beam search is off unless ``num_beams`` is passed, even if the model's generation_config.json enables it.

    ``model`` must be in evaluation mode. If it is partitioned, all ranks must call this with the same arguments and the option
    ``synced_gpus``. If the chat template opens a thinking block, the block stays empty, as in scoring. Raises DataError for input that the
    model cannot process, and OutOfMemory if memory runs out.
    """
    tokenizer = collator.processor.tokenizer
    encoded = collator.prompts.encoded(prompt, "yes", len(shown), "a question")
    images = [collator.files.open((picture, len(shown) > 1)) for picture in shown]
    has_bos = tokenizer.bos_token is not None and encoded.prompt.startswith(tokenizer.bos_token)
    pictures: dict[str, Any] = {"images": [images]} if images else {}
    options = {"num_beams": 1, "pad_token_id": tokenizer.eos_token_id, "return_dict_in_generate": False} | options
    try:
        inputs = collator.processor(text=[encoded.prompt], add_special_tokens=not has_bos, return_tensors="pt", **pictures).to(device)
        if inputs.input_ids.shape[1] + max_new_tokens > collator.max_length:
            raise DataError(
                f"a prompt of {inputs.input_ids.shape[1]} tokens and an answer of {max_new_tokens} tokens exceed the model's window of "
                f"{collator.max_length} tokens; lower max_new_tokens"
            )
        inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad(), stock_attention(model):
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        files = ", ".join(map(str, shown))
        raise OutOfMemory(f"out of memory while generating a text about {files}; limit visual tokens (--model.max_pixels)") from error
    except DataError:
        raise
    except BaseException as error:  # processors raise many kinds of errors for unusual picture sizes
        if not is_failure(error):
            raise
        raise DataError(f"{', '.join(map(str, shown))}: the model cannot generate a text ({type(error).__name__}: {error})") from error
    texts = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    own_end = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own_end if isinstance(own_end, list) else [own_end])}
    return [Written(tokenizer.decode(ids, skip_special_tokens=True), not ends.isdisjoint(ids[-1:])) for ids in texts]
