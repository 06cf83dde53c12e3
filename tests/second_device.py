"""A second device for machines without a GPU: it computes on the CPU, and refuses what a GPU refuses.

`CARD` is a device that PyTorch knows and that has no kernels of its own in this process (`lazy`). A tensor on it holds
an ordinary tensor of the CPU, so results can be compared. An operation with one tensor there and another on the CPU
raises what CUDA raises. Every transfer of values to the host is noted in `SYNCS`, so tests can count how often the host
would wait for a GPU.
"""

import contextlib

import pytest
import torch
import torch._dynamo  # which reads what `second_device` replaces
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CARD = torch.device("lazy", 0)
SYNCS: list[str] = []
"""Names of the operations by which values came to the host, since a test cleared the list."""

# Copies, and indexing, take tensors of the CPU on CUDA too.
_MIXED = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# CUDA finds the sizes of these results on the device, so the host waits.
_WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2}


class OnCard(torch.Tensor):
    """A tensor on `CARD`, whose values are those of `inner` on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CARD,
        )
        made.inner = inner
        return made

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _context, _size, _stride):
        return cls(inner["inner"])

    def tolist(self):
        SYNCS.append("tolist")
        return self.inner.tolist()

    def __repr__(self, **_):
        return f"OnCard({self.inner!r})"

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        made = OnCard(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Sends operations that name the device, but have no tensor on it, the same way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = kwargs.get("device")
        if (named is not None and torch.device(named) == CARD) or any(
            isinstance(x, OnCard) for x in _leaves((*args, *kwargs.values()))
        ):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _FromNumbers(TorchFunctionMode):
    """Makes tensors from numbers on the CPU first: PyTorch makes them below what a dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == CARD:
            return func(*args, **kwargs | {"device": "cpu"}).to(CARD)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnCard):
            return torch.tensor(args[1], **{"dtype": args[0].dtype} | kwargs | {"device": "cpu"}).to(CARD)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnCard):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(x) if isinstance(x, list) else x for x in index)
            return func(args[0], index, *args[2:])
        if func in _PRODUCTS and isinstance(args[0], OnCard) and args[0].dim() == 1 < args[1].dim():
            return (args[0][None] @ args[1]).squeeze(-2)  # which PyTorch squeezes in place
        return func(*args, **kwargs)


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def _run(func, args, kwargs):
    packet = func.overloadpacket
    leaves = list(_leaves((*args, *kwargs.values())))
    there = {id(x.inner): x for x in leaves if isinstance(x, OnCard)}
    if there and packet not in _MIXED and any(x.dim() and not isinstance(x, OnCard) for x in leaves):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {CARD} and cpu! ({func})"
        )
    target = CARD if there else torch.device("cpu")
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu") if target == CARD else target}
    if packet is aten.copy_:
        target = args[0].device
    waits = packet in _WAITS or (there and target.type == "cpu" and not kwargs.get("non_blocking"))
    if waits:
        SYNCS.append(str(func))
    if packet is aten._fused_sdp_choice:
        return 0  # the path of plain operations
    found = func(*_inner(args), **{name: _inner(value) for name, value in kwargs.items()})
    assert torch.Tag.inplace_view not in func.tags, f"{func} would leave the shape of the outer tensor behind"
    if packet is aten.copy_:
        return args[0]
    return _outer(found, there) if target == CARD else found


def _leaves(given):
    for x in given:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _leaves(x)


def _inner(x):
    if isinstance(x, OnCard):
        return x.inner
    return type(x)(map(_inner, x)) if type(x) in (list, tuple) else x


def _outer(x, there):
    """The results on the device; what an operation changed in place is the tensor that it was given."""
    if isinstance(x, torch.Tensor):
        return there.get(id(x)) if id(x) in there else OnCard(x)
    return type(x)(_outer(y, there) for y in x) if type(x) in (list, tuple) else x


@contextlib.contextmanager
def second_device():
    """Make `CARD` usable inside a `with` block; clears `SYNCS`."""
    SYNCS.clear()
    patch = pytest.MonkeyPatch()
    fused, generator = optimizer._get_fused_kernels_supported_devices, torch.Generator
    patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), CARD.type])
    # Its random numbers are the CPU's.
    patch.setattr(torch, "Generator", lambda device="cpu": generator())
    # Inference tensors cannot be wrapped.
    patch.setattr(torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else torch.enable_grad())
    # Parameters keep their identity when they move, as they do on CUDA.
    patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    try:
        with _FromNumbers(), _Everything():
            yield CARD
    finally:
        patch.undo()
