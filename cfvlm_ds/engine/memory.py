"""Memory of a model's states under ZeRO, by DeepSpeed's own estimates, and of what a forward keeps, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import torch

from cfvlm_ds.deepspeed_compat import settings as settings
from cfvlm_ds.engine.setup import recompute_activations


def offloaded(ds_config: dict[str, Any]) -> dict[str, bool]:
    """Whether ``optimizer`` states and ``param``, the weights, are kept elsewhere than on the GPU."""
    zero = ds_config.get("zero_optimization", {})
    return {name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param")}


def model_states(model: torch.nn.Module, ds_config: dict[str, Any], gpus: int, gpus_per_node: int) -> tuple[int, int]:
    """Bytes per GPU, and of host memory per node, of weights, gradients and optimizer states in mixed precision."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    away, nodes = offloaded(ds_config), max(1, gpus // gpus_per_node)
    place = min(gpus, gpus_per_node), nodes
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        layer = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        card, host = settings.states_of_stage_3(trained, layer, *place, away["optimizer"], away["param"])
        card += 0 if away["param"] else 2 * frozen // gpus
        host += 2 * frozen // nodes if away["param"] else 0
    else:
        card, host = settings.states_of_stage_2(trained, *place, away["optimizer"])
        card += 2 * frozen
    return card, host


def attention_without_data() -> str:
    """Register an attention for a model on the meta device, which keeps what flash attention keeps; its name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("no_data", _attention)
    return "no_data"


def activations(model: Any, tokens: int, recompute: bool) -> int:
    """Bytes that autograd keeps of a forward of the language model over so many tokens, weights excluded.

    The model is on the meta device with ``attention_without_data``; ``recompute`` is gradient checkpointing.
    """
    if recompute:
        recompute_activations(model)
    else:
        model.gradient_checkpointing_disable()
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # of which a linear layer keeps a transposed view

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    text, further = model.config.get_text_config(), {}
    embedded = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    if size := getattr(text, "hidden_size_per_layer_input", 0):  # embeddings of each layer's own, which tokens have (Gemma 4)
        further["per_layer_inputs"] = embedded.new_empty(1, tokens, text.num_hidden_layers, size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().get_decoder()(inputs_embeds=embedded, use_cache=False, **further)
    return sum(storage.nbytes() for storage in kept.values())


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output and a log-sum-exp in float32 for every query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, output.new_empty(output.shape[:-1], dtype=torch.float32))
        return output


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None
