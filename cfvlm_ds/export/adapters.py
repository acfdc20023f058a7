"""Adapters of a checkpoint: merged into the base weights, or written in peft's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from cfvlm_ds.checkpoint import incomplete
from cfvlm_ds.core.config import LoraConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.untrusted import replaced
from cfvlm_ds.export.folder import place_card
from cfvlm_ds.export.source import skeleton
from cfvlm_ds.export.zero import ZeroWeights
from cfvlm_ds.models import family_of, is_adapter, peft_config

_A, _B, _LENGTH = (f"lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector"))


class MergedWeights(ZeroWeights):
    """A checkpoint's weights with merged adapters, in float32, keyed by their names in the model without adapters.

    W' = W + scaling * B A. DoRA then scales every row to its trained norm (arXiv 2402.09353, equation 5).
    """

    def __init__(self, checkpoint: Path, lora: LoraConfig | None) -> None:
        super().__init__(checkpoint)
        adapters = [name for name in self.weights if is_adapter(name)]
        if adapters and lora is None:
            raise ConfigError(f"{checkpoint} has adapters, such as {adapters[0]}; give the LoraConfig that they were trained with")
        self._scaling = lora.scaling if lora else 1.0
        self.weights = {name.replace(".base_layer.", "."): weight for name, weight in self.weights.items()}
        adapted = {name[: name.index(".lora_")] + ".weight" for name in adapters}
        self.trained = adapted | {name.replace(".base_layer.", ".") for name in self.trained if not is_adapter(name)}

    def blocks(self, name: str) -> Iterator[Tensor]:
        layer = name.removesuffix("weight")
        if layer + _A not in self.weights:
            yield from super().blocks(name)
            return
        if layer + _LENGTH not in self.weights:
            yield from (block for block, _ in self._added(name, layer))
            return
        squares = torch.zeros(self.weights[name].shape[0])
        for block, row in self._added(name, layer):
            squares.index_add_(0, row, block.square())
        factor = self.tensor(layer + _LENGTH, torch.float32).reshape(-1) / squares.sqrt()
        yield from (block * factor[row] for block, row in self._added(name, layer))

    def _added(self, name: str, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield W + scaling * B A in flat blocks, each with the row index of every element."""
        a, b = self.tensor(layer + _A, torch.float32), self.tensor(layer + _B, torch.float32)
        columns, start = a.shape[1], 0
        for block in super().blocks(name):
            stop = start + block.numel()
            first, last = start // columns, -(-stop // columns)
            update = (self._scaling * b[first:last] @ a).reshape(-1)[start - first * columns : stop - first * columns]
            yield block.float() + update, torch.arange(start, stop).div_(columns, rounding_mode="floor")
            start = stop


def export_adapter(
    checkpoint: Path,
    source: str,
    out_dir: Path,
    lora: LoraConfig,
    say: Say = print_line,
    alive: Alive = no_op,
    card: str | None = None,
) -> Path:
    """Write the adapters of ``checkpoint`` to ``out_dir`` in peft's format and float32, and return ``out_dir``.
    ``PeftModel.from_pretrained`` can load them onto ``source``.

    The folder is written under a temporary name and replaces older adapters only when it is complete. ``alive`` and ``card`` have the same
    meaning as in ``export_hf``. Raises ConfigError if the checkpoint is incomplete, has no adapters, or also has other trained weights,
    which peft's format cannot store. Raises StorageError if the folder cannot be written.
    """
    if defect := incomplete(checkpoint):
        raise ConfigError(f"{checkpoint}: {defect}; export another checkpoint")
    zero = ZeroWeights(checkpoint)
    adapters = sorted(name for name in zero.weights if is_adapter(name))
    if not adapters:
        raise ConfigError(f"{checkpoint} has no adapters; export it without --adapter")
    if others := sorted(zero.trained - set(adapters)):
        raise ConfigError(f"{checkpoint} also trained {len(others)} weights in full, such as {others[0]}; export it without --adapter")
    model = skeleton(source)
    family = family_of(model.config)
    modules = sorted({family.module_of(name) for name in adapters})
    with replaced(out_dir, "adapter_config.json", (Path(source).resolve(), checkpoint.resolve())) as partial:
        tensors = {}
        for name in adapters:
            alive()
            # peft omits the adapter's name and, in DoRA's magnitude vectors, ".weight"
            saved = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default.", ".")
            tensors[f"base_model.model.{saved}"] = zero.tensor(name, torch.float32)
        with create(
            partial / "adapter_model.safetensors"
        ) as handle:  # safetensors' save_file creates files that only their owner can read, and does not raise OSError
            handle.write(save(tensors, {"format": "pt"}))
        adapter_config = peft_config(model, family, modules, source, lora)
        adapter_config.inference_mode = True
        adapter_config.save_pretrained(partial)
        place_card(partial, out_dir, card)
    say(f"export: {len(tensors)} adapter tensors of {', '.join(modules)}")
    return out_dir
