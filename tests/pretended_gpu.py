"""A GPU that is only pretended: tensors remember on which device they would be, and operations that mix devices fail.

CUDA refuses such operations, and a machine without a GPU does not notice. What may be mixed there may be mixed here: a
tensor may be indexed by one on the CPU, and numbers of no dimension go anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")
#: A random generator of the CPU cannot fill a tensor of the GPU.
WITH_GENERATOR = "a generator and a tensor are on different devices"


def put(tensor: Tensor, gpu: bool = True) -> Tensor:
    tensor.__dict__["on_gpu"] = gpu
    return tensor


def is_there(tensor: Tensor) -> bool:
    return bool(tensor.__dict__.get("on_gpu", False))


class PretendedGpu(TorchFunctionMode):
    """While it lasts, ``.to("cuda")`` and ``device="cuda"`` work, as far as anyone can tell."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        if name == "__get__" and func.__self__ is Tensor.device:
            return GPU if is_there(args[0]) else torch.device("cpu")
        if name in ("to", "cpu"):
            return _moved(name, *args, **kwargs)
        if name == "numpy" and is_there(args[0]):
            raise AssertionError("numpy() of a tensor on the GPU")
        if kwargs.get("device") is not None:
            gpu = _gpu(kwargs.pop("device"))
            assert not (gpu and "generator" in kwargs), WITH_GENERATOR
            return _all_put(func(*args, **kwargs), gpu)
        here = [tensor for tensor in _tensors([args, kwargs]) if tensor.ndim]
        if name in ("__getitem__", "__setitem__"):
            mixed = any(is_there(index) > is_there(args[0]) for index in _tensors(args[1]) if index.ndim)
            here = [args[0]]
        else:
            mixed = len({is_there(tensor) for tensor in here}) > 1 and name != "copy_"
        assert not mixed, f"{name} mixes devices: {[(tuple(part.shape), is_there(part)) for part in here]}"
        gpu = is_there(args[0]) if name.startswith("new_") else any(map(is_there, here or _tensors([args, kwargs])))
        return _all_put(func(*args, **kwargs), gpu)


def _moved(name: str, tensor: Tensor, *where: Any, **kwargs: Any) -> Tensor:
    gpu, dtype = is_there(tensor) and name != "cpu", kwargs.get("dtype", tensor.dtype)
    for target in (*where, kwargs.get("device")):
        if isinstance(target, str | torch.device):
            gpu = _gpu(target)
        elif isinstance(target, Tensor):
            gpu, dtype = is_there(target), target.dtype
        elif isinstance(target, torch.dtype):
            dtype = target
    moved = tensor.to(dtype)
    return put(moved.clone() if moved is tensor and gpu != is_there(tensor) else moved, gpu)


def _gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _all_put(value: Any, gpu: bool) -> Any:
    for tensor in _tensors(value):
        put(tensor, gpu)
    return value
