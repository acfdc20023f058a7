"""Simulated accelerator: its tensors hold real values in CPU memory, and behave as if they were on a device.

An operation on tensors of two devices raises an error, as on CUDA. Each wait of the host for the device is counted, by place in the code.
The module changes torch for the whole process, so tests use it in a separate process.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
import transformers
from conftest import varlen
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
WAITS: Counter[str] = Counter()
"""Number of host waits, keyed by model function, or by operation if the stack contains only the backward pass."""
CALLS: list[dict[str, Any]] = []
"""Arguments of the calls to flash-attn's kernel."""

_WAITING = {
    getattr(aten, name).default
    for name in (
        *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive", "unique_dim"),
        *("masked_scatter_backward", "bincount"),
    )
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def start() -> None:
    """Register the device with torch and make flash-attn importable, in this process."""
    _setup_privateuseone_for_python_backend("pretend")
    torch.utils.checkpoint._infer_device_type = lambda *arguments: "cpu"  # type: ignore[assignment]
    flash: Any = types.ModuleType("flash_attn")
    flash.__spec__, flash.flash_attn_varlen_func = importlib.machinery.ModuleSpec("flash_attn", None), flash_attn_varlen_func
    sys.modules["flash_attn"] = flash
    transformers.utils.is_flash_attn_2_available = lambda: True


def device() -> torch.device:
    """Return the device. ``start`` must have registered it."""
    return torch.device("pretend", 0)


class _Pretend(Tensor):
    there: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> _Pretend:
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype, "layout": data.layout}
        made: Any = Tensor._make_wrapper_subclass(cls, data.size(), device=device(), requires_grad=requires_grad, **layout)
        made.there = data
        return made

    def __repr__(self) -> str:
        return f"pretend {tuple(self.shape)}"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.there.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchDispatchMode):
    """Mode in which operations create tensors on the device, even if none of their arguments is on it."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(each, _Pretend) for each in tree_leaves((args, kwargs))) or _is_there(kwargs.get("device")):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_there(where: Any) -> bool:
    return where is not None and torch.device(where).type == "pretend"


def _wait(what: str) -> None:
    frame: Any = sys._getframe(1)
    while frame.f_back and any(part in frame.f_code.co_filename for part in ("pretend_device", "/torch/", "/unittest/", "<")):
        frame = frame.f_back
    ours = any(part in frame.f_code.co_filename for part in ("transformers", "cfvlm_ds"))
    WAITS[frame.f_code.co_name if ours else what] += 1


def _here(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, _Pretend)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    ours = {id(each.there): each for each in leaves if isinstance(each, _Pretend)}
    name = func._schema.name.removeprefix("aten::")
    if func is aten._to_copy.default:
        source, target = args[0], kwargs.pop("device", args[0].device)
        blocking = not kwargs.pop("non_blocking", False)
        copied = func(getattr(source, "there", source), **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        if _here(source) != (not _is_there(target)) and (blocking or not _is_there(target)):
            _wait("copy")
        return _Pretend(copied) if _is_there(target) else copied
    if func is aten.copy_.default and _here(args[0]) != _here(args[1]):
        if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])) or _here(args[0]):
            _wait("copy")
        getattr(args[0], "there", args[0]).copy_(getattr(args[1], "there", args[1]))
        return args[0]
    if (func in _WAITING and ours) or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        _wait(name)
    if func in _INDEXING:
        places = [each for each in args[1] if each is not None]
        if any(each.dtype == torch.bool or (_here(each) and each.dim()) for each in places):
            _wait(name)
    elif ours and (foreign := [tuple(each.shape) for each in leaves if _here(each) and each.dim()]):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} has tensors of the CPU, {foreign}")
    if func is aten.histc.default:  # CUDA supports integers here
        args = (args[0].float(), *args[1:])

    def inside(value: Any) -> Any:
        if isinstance(value, _Pretend):
            return value.there
        return torch.device("cpu") if isinstance(value, torch.device) and _is_there(value) else value

    def outside(value: Any) -> Any:
        return (ours[id(value)] if id(value) in ours else _Pretend(value)) if _here(value) else value

    found = func(*tree_map(inside, args), **{key: inside(value) for key, value in kwargs.items() if key != "pin_memory"})
    return tree_map(outside, found)


_tensor = torch.tensor


def _new(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    if _is_there(device):
        _wait("tensor")
        return _Pretend(_tensor(data, **options))
    return data.detach().clone() if isinstance(data, _Pretend) else _tensor(data, device=device, **options)


@contextmanager
def used() -> Iterator[None]:
    """Within the block, create tensors on the device, and count waits from zero."""
    WAITS.clear()
    with patch("torch.tensor", _new), _Made():
        yield


def move(module: nn.Module) -> None:
    """Move parameters and buffers to the device. Shared parameters stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                there = nn.Parameter(_Pretend(parameter.detach().clone()), requires_grad=parameter.requires_grad)
                each._parameters[name] = moved.setdefault(id(parameter), there)
        each._buffers.update({name: _Pretend(buffer.detach()) for name, buffer in each._buffers.items() if buffer is not None})


def there(tensor: Tensor) -> Tensor:
    """Return the values of a device tensor as a CPU tensor."""
    assert isinstance(tensor, _Pretend)
    return tensor.there


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """Compute flash-attn 2.8's kernel by definition, with the checks of its C++ code (mha_varlen_fwd in csrc/flash_attn/flash_api.cpp)."""
    for each in (q, k, v):
        assert each.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
        assert _is_there(each.device) and each.dim() == 3 and each.stride(-1) == 1, "contiguous last dimension on the device"
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[2] == k.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0
    for begins in (cu_seqlens_q, cu_seqlens_k):
        assert begins.dtype == torch.int32 and begins.is_contiguous() and _is_there(begins.device)
    at, of = (there(begins).tolist() for begins in (cu_seqlens_q, cu_seqlens_k))
    lengths = [[stop - start for start, stop in itertools.pairwise(begins)] for begins in (at, of)]
    assert type(max_seqlen_q) is int and type(max_seqlen_k) is int and max_seqlen_q >= max(lengths[0]) and max_seqlen_k >= max(lengths[1])
    assert (at[0], at[-1], of[0], of[-1], len(at)) == (0, len(q), 0, len(k), len(of)) and not dropout_p
    CALLS.append({"segments": len(at) - 1, "longest": (max_seqlen_q, max_seqlen_k), "causal": causal, "window": window_size})
    return varlen(q, k, v, at, of, softmax_scale or q.shape[-1] ** -0.5, (window_size[0], 0) if causal else window_size)
