"""What CUDA refuses, and what of an operation is a launch, a copy or a wait: the rules of the device that is not there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
NO_LAUNCH = {"detach", "lift_fresh", "_local_scalar_dense", "empty", "empty_like", "new_empty", "empty_strided"}
# How often the host waits inside an operation.
WAITS = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "masked_select": 1,
    "equal": 1,
    "bincount": 2,
    "_unique2": 1,
    "unique_dim": 1,
    "unique_consecutive": 1,
}
# These add by atomics: with floats one seed would be several models.
ATOMIC = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "put", "histc", "bincount", "cumsum"}
ATOMIC |= {"embedding_dense_backward", "_embedding_bag_dense_backward", "median", "kthvalue"}


class DeviceError(RuntimeError):
    """What would fail on CUDA, or give another number every time."""


def refuse(record: Any, func: Any, name: str, args: Any, ours: list[Any], theirs: list[Any]) -> None:
    """DeviceError for what CUDA would refuse, or would add up in another order every time; indices are sent to the device."""
    if ours and theirs:
        if func in INDEXING:
            if not args[0].is_cuda:
                raise DeviceError(
                    f"{name}: indices should be either on cpu or on the same device as the indexed tensor"
                )
            indices = {id(x) for x in args[1] if x is not None and not x.is_cuda}
            record.add(record.copies, "up", len(indices))
            record.add(record.waits, "index sent", len(indices))
            theirs = [x for x in theirs if id(x) not in indices]
        pointwise = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "index_put", "fill_", "where"))
        if any(x.dim() > 0 or not pointwise for x in theirs):
            raise DeviceError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu!")
    if not has_kernel(str(func)):
        raise DeviceError(f"{name}: torch has no kernel for CUDA")
    if name.rstrip("_") in ATOMIC and func is not aten.median.default and any(x.is_floating_point() for x in ours):
        raise DeviceError(f"{name}: CUDA adds these numbers in another order every time")
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        _refuse_bags(name, args)
    if name == "_fused_adam_":
        _refuse_moments(name, args)


def _refuse_bags(name: str, args: Any) -> None:
    """CUDA ignores the last offset: its bag goes on to the last index."""
    table, indices, offsets, weights = args[0], args[1], args[2], args[6] if len(args) > 6 else None
    if len(args) > 7 and args[7] and int(offsets.elem[-1]) != indices.numel():
        raise DeviceError(f"{name}: the last offset is not the number of indices")
    if indices.dtype != offsets.dtype or (weights is not None and weights.dtype != table.dtype):
        raise DeviceError(f"{name}: dtypes differ")


def _refuse_moments(name: str, args: Any) -> None:
    """A fused optimiser needs parameters, gradients and moments of one layout, and its steps on the device."""
    for group in zip(*args[:4], strict=True):
        layouts = {(x.dtype, tuple((n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)) for x in group}
        if len(layouts) > 1:
            raise DeviceError(f"{name}: params, grads and moments must have the same dtype, device, and layout")
    if not all(x.is_cuda for x in args[5]):
        raise DeviceError(f"{name}: state_steps must be on the device")


def count(
    record: Any,
    func: Any,
    name: str,
    args: Any,
    kwargs: Any,
    ours: list[Any],
    theirs: list[Any],
    on_cuda: bool,
    found: Any,
) -> None:
    """Note the launch, copy and waits of an operation, of which `found` came."""
    outputs = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]
    if func in CROSSING and (bool(theirs) or not on_cuda):
        if not any(x.numel() for x in outputs):
            return
        record.add(record.copies, "up" if on_cuda else "down")
        asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if not (asynchronous and on_cuda and getattr(theirs[0], "pinned", False)):
            record.add(record.waits, "copy")
        return
    record.add(record.waits, name, WAITS.get(name, 0))
    if name == "prod" and args[1:] and torch.is_grad_enabled():
        record.add(record.waits, "prod, backwards")  # it counts the zeros
    if func in INDEXING:
        masks = sum(x is not None and x.dtype == torch.bool for x in args[1])
        record.add(record.waits, "boolean index", masks)
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        record.add(record.waits, name)
    held = {x.elem.untyped_storage().data_ptr() for x in ours if x.numel()}
    is_view = not func._schema.is_mutable and any(x.numel() and x.untyped_storage().data_ptr() in held for x in outputs)
    if not is_view and name not in NO_LAUNCH:
        record.add(record.launches, name)


@cache
def _kernels() -> dict[str, str]:
    """Backends of torch's operations, by name with overload; none where torch came without its table."""
    try:
        import torchgen
        import yaml
    except ImportError:
        return {}
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {
        each["func"].split("(")[0]: each
        for each in yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    }
    found = {}
    for name, entry in entries.items():
        of = entries.get(entry.get("structured_delegate", ""), entry)
        found[name] = ",".join(of.get("dispatch") or {"Composite": ""})
    return found


def has_kernel(name: str) -> bool:
    """Whether CUDA computes ``aten.name.overload``; what torch's table does not know counts as computed."""
    base, overload = name.split(".")[1:3]
    backends = _kernels().get(base if overload == "default" else f"{base}.{overload}", "Composite")
    return "CUDA" in backends or "Composite" in backends
