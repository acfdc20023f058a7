"""Dry run: a report on a run's parameters and its memory per GPU, computed without weights, data or other ranks.

The memory of the model's states follows DeepSpeed's formulas. The memory of a forward and backward pass is measured on meta tensors.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfvlm_ds import engine
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import own_device
from cfvlm_ds.deepspeed_compat import settings
from cfvlm_ds.models import MODULES, attention, family_of, meta_model, parameter_counts
from cfvlm_ds.models.adapters import BYTES_OF_4BIT, linear_weights
from cfvlm_ds.models.chunked_logprobs import LOGITS

_GPUS = (1, 2, 4, 8, 16, 32, 64)
_GPUS_PER_NODE = 8
_TOKENS = 8192
_GIB = 1 << 30
_LOGIT_BYTES = 12
"""Bytes per logit: the logit, its probability and its gradient, each in float32."""
_CONTEXT = 3 << 29


def dry_run(config: RunConfig) -> str:
    """Resolve the configuration and the DeepSpeed JSON, build the model on the meta device, and return the report. Raises the same
    ConfigErrors as a run.

    The memory for the model's states (weights, gradients, optimizer) is DeepSpeed's own estimate for mixed precision. The memory for
    activations is the language model's peak during a forward and backward pass in bfloat16.
    """
    from cfvlm_ds.training.validation import validate  # imported here, because benchmarks/gpu.py runs without Pillow

    validate(config, None)
    resolved = engine.resolve(engine.read_json(config.deepspeed), config, 1, torch.device("cpu"), engine.hidden_size(config), 1)
    model = meta_model(config.model, torch.bfloat16, attention_without_data())
    lines = [f"model type       {model.config.model_type}", f"attention        {attention(config.model.attn_implementation, model.config)}"]
    lines += [f"objective        {config.loss}", *config.model.unused, ""]
    counts = parameter_counts(model, family_of(model.config))
    lines.append(f"{'module':<16} {'parameters':>16} {'trainable':>16} {'tuning':>8} {'learning rate':>14}")
    for module in MODULES:
        options = getattr(config.model, module)
        rate = config.train.learning_rate if options.learning_rate is None else options.learning_rate
        shown = "" if options.tuning == "frozen" else f"{rate:.2g}"
        lines.append(f"{module:<16} {counts[module][0]:>16,} {counts[module][1]:>16,} {options.tuning:>8} {shown:>14}".rstrip())
    total_parameters, trainable = (sum(count[k] for count in counts.values()) for k in (0, 1))
    lines += [f"{'all':<16} {total_parameters:>16,} {trainable:>16,}", ""]
    ds_config, recompute = resolved.config, config.model.gradient_checkpointing
    tokens = config.data.max_tokens_per_forward or config.data.max_tokens_per_micro_batch or _TOKENS  # prompts and images included
    working = working_memory(model, ds_config, tokens, recompute)
    quantised = config.model.lora.load_in_4bit and linear_weights(model, family_of(model.config))
    stage, names = ds_config.get("zero_optimization", {}).get("stage", 0), {"optimizer": "optimizer", "param": "weights"}
    moved = " and ".join(names[name] for name, is_offloaded in engine.offloaded(ds_config).items() if is_offloaded)
    without = f", {moved} offloaded" if moved else ""
    lines.append(
        f"memory of the model's states, ZeRO-{stage}, {_GPUS_PER_NODE} GPUs per node{without}; peak with {tokens} tokens per forward"
    )
    lines.append(f"{'GPUs':>6} {'GiB per GPU':>12} {'peak':>8} {'GiB of host memory per node':>28}")
    for gpus in _GPUS:
        card, host = model_states(model, ds_config, gpus, _GPUS_PER_NODE)
        card -= int(quantised * (2 - BYTES_OF_4BIT))
        lines.append(f"{gpus:>6} {card / _GIB:>12.1f} {(card + sum(working.values())) / _GIB:>8.1f} {host / _GIB:>28.1f}")
    if config.model.vision_tower.tuning != "frozen":
        lines.append("not counted: activations of the vision tower, which is trained")
    if config.train.bf16 is False:
        lines.append("all sizes are for bfloat16; train.bf16 is false, and weights and activations in float32 take twice as much")
    if own_device().type == "cpu":
        lines.append("the table is for GPUs; this machine has none, and a run on its CPUs has no CUDA or NCCL")
    if model_states(model, ds_config, 1, _GPUS_PER_NODE)[0] < sum(working.values()) / 20:
        lines.append("the model is so small that more GPUs do not lower the peak")
    sizes = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in working.items())
    other = activations(model, tokens, not recompute) / _GIB
    lines.append(
        f"in addition to the states: {sizes} GiB; activations {'without' if recompute else 'with'} gradient checkpointing: {other:.1f} GiB"
    )
    return "\n".join(lines)


# Memory -------------------------------------------------------------------------------------------------------------------------------


def model_states(model: torch.nn.Module, ds_config: dict[str, Any], gpus: int, gpus_per_node: int) -> tuple[int, int]:
    """Estimate the memory for weights, gradients and optimizer states in mixed precision. Return bytes per GPU and host bytes per node."""
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    is_offloaded, nodes = engine.offloaded(ds_config), max(1, gpus // gpus_per_node)
    layout = min(gpus, gpus_per_node), nodes
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    layer = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    card, host = settings.model_states(stage, num_trained, layer, *layout, is_offloaded)
    if stage == 3:
        node = zero.get("zero_hpz_partition_size", 1)
        copy = 2 * (num_trained + num_frozen) // min(gpus, node) if node > 1 else 0  # a copy of all weights, partitioned within a node
        card += 0 if is_offloaded["param"] else 2 * num_frozen // gpus + copy
        host += 2 * num_frozen // nodes if is_offloaded["param"] else 0
    else:
        card += 2 * num_frozen
        if stage == 1:  # every GPU holds all gradients, summed in float32
            card += 4 * num_trained * (gpus - 1) // gpus
    return card, host


def attention_without_data() -> str:
    """Register a transformers attention function for models on the meta device, and return its name. For the backward pass, the function
    saves the same tensors as flash attention.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("no_data", _attention)
    return "no_data"


def working_memory(model: Any, ds_config: dict[str, Any], tokens: int, recompute: bool) -> dict[str, int]:
    """Estimate the memory that a forward and backward pass over ``tokens`` tokens needs in addition to ``model_states``, in bytes per GPU,
    keyed by purpose.

    The model must be on the meta device with ``attention_without_data``. ``recompute`` is True for gradient checkpointing. The activations
    of a trained vision tower are not counted. A frozen tower runs before the language model and saves no activations.
    """
    zero = ds_config.get("zero_optimization", {})
    sizes = {"activations": activations(model, tokens, recompute), "logits": _LOGIT_BYTES * LOGITS}
    stage = zero.get("stage", 0)
    if zero.get("contiguous_gradients", True):  # ZeRO-1 and 2 fill one buffer while they reduce another
        buffers = 2 if stage < 3 and zero.get("overlap_comm") else 1
        sizes["gradient buckets"] = 2 * buffers * int(zero.get("reduce_bucket_size", 5e8))
    if stage == 3:
        weights = sum(parameter.numel() for parameter in model.parameters())
        sizes["gathered weights"] = 2 * min(weights, int(zero.get("stage3_max_live_parameters", 1e9)))
    return sizes | {"CUDA and NCCL": _CONTEXT}


def activations(model: Any, tokens: int, recompute: bool) -> int:
    """Measure the peak memory of the language model's forward and backward pass over ``tokens`` tokens, in bytes.

    Weights and completed gradients are not counted. ``model`` and ``recompute`` are as in ``working_memory``.
    """
    if recompute:
        engine.recompute_activations(model)
    else:
        model.activation_checkpointing_disable()
    text, more_inputs = model.config.get_text_config(), {}
    hooks = [p.register_post_accumulate_grad_hook(_free_gradient) for p in model.parameters() if p.requires_grad]
    with _Peak() as memory:
        embedded = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
        if size := getattr(text, "hidden_size_per_layer_input", 0):  # per-layer token embeddings of Gemma 4
            more_inputs["per_layer_inputs"] = embedded.new_empty(1, tokens, text.num_hidden_layers, size)
        state = model.train().get_decoder()(inputs_embeds=embedded, use_cache=False, **more_inputs).last_hidden_state
        state.backward(torch.empty_like(state))
    for hook in hooks:
        hook.remove()
    return memory.peak


def _free_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Peak(TorchDispatchMode):
    """Dispatch mode that tracks the current and peak memory of the tensors created within it, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in inputs and storage not in self._seen:
                self._seen.add(storage)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, size: int) -> None:
        self._now -= size


class _Attention(torch.autograd.Function):
    """Attention that saves the same tensors as flash attention: its inputs, its output and a float32 log-sum-exp per query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, output.new_empty(output.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None
