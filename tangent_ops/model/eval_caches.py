"""Clears what models cache in eval mode; a stale entry would drop the tangent.

Some forward passes compute a tensor from the weights and keep it: LeViT's gathered attention
biases, a transposed or a normalized weight. Its tangent ends with that call. A later call would use
the tensor without a tangent, and the result would silently lack a part of the derivative.
"""

from __future__ import annotations

import contextlib
import operator
from collections import deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from tangent_ops.errors import UnsupportedError

_CONTAINERS = (dict, list, deque, set)
_OPAQUE = (type(None), bool, int, float, complex, str, bytes, type, Tensor, nn.Module)
_OPAQUE += (FunctionType, MethodType, ModuleType)
_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}


def clear_caches(model: nn.Module) -> None:
    """Clear the caches of modules that clear them in ``train()`` (LeViT's); modes stay as set."""
    for module in [m for m in model.modules() if type(m).train is not nn.Module.train]:
        modes = [(each, each.training) for each in module.modules()]
        module.train(module.training)
        for each, mode in modes:
            each.training = mode


class Kept:
    """The places where modules of a model can cache tensors, and their contents between calls."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_modules()]
        self._places = [_places(module) for module in model.modules()]
        self._between: dict[int, list[Any]] = {}  # contents of modules that cached a tensor

    @contextlib.contextmanager
    def nothing(self) -> Iterator[None]:
        """Context of one call, at whose start and end no cached tensor depends on the weights.

        It must end before the forward-mode level does.

        Raises:
            UnsupportedError: the call changed a tensor of the model in place so that it depends on
                the weights, which cannot be undone.
        """
        self.put_back()
        before = [[_content(place) for place in places] for places in self._places]
        versions = self._versions()
        try:
            yield
        finally:
            for index, (places, contents) in enumerate(zip(self._places, before, strict=True)):
                if any(map(_has_gained, places, contents)):
                    self._between[index] = contents
            self.put_back()
        for name, tensor, version in versions:
            if tensor._version != version and _depends(tensor):
                raise UnsupportedError(
                    f"the forward pass changes {name} in place, and makes it depend on the trained "
                    "parameters: the next call would treat it as a constant. Compute a new tensor "
                    "instead"
                )

    def put_back(self) -> None:
        """Restore the contents from before the calls, including calls of the anchor itself."""
        for index, contents in self._between.items():
            for place, content in zip(self._places[index], contents, strict=True):
                _put_back(place, content)

    def _versions(self) -> list[tuple[str, Tensor, int]]:
        return [
            (f"{name}.{key}".lstrip("."), value, value._version)
            for name, places in zip(self._names, self._places, strict=True)
            for place in places[:2]
            for key, value in place.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        ]


def _places(module: nn.Module) -> list[Any]:
    """The module's attributes, its buffers, and the containers and objects that it holds."""
    found: list[Any] = [vars(module), module._buffers]
    seen = set(map(id, found))
    queue = [value for name, value in vars(module).items() if name not in _OF_TORCH]
    while queue:
        value = queue.pop()
        if isinstance(value, _OPAQUE):
            continue
        if isinstance(value, tuple):
            queue.extend(value)
            continue
        place = value if isinstance(value, _CONTAINERS) else getattr(value, "__dict__", None)
        if isinstance(place, _CONTAINERS) and id(place) not in seen:
            seen.add(id(place))
            found.append(place)
            queue.extend(_values(place))
    return found


def _values(place: Any) -> Any:
    return place.values() if isinstance(place, dict) else place


def _content(place: Any) -> Any:
    return dict(place) if isinstance(place, dict) else list(place)


def _put_back(place: Any, content: Any) -> None:
    if isinstance(place, list):
        place[:] = content
        return
    place.clear()
    place.extend(content) if isinstance(place, deque) else place.update(content)


def _has_gained(place: Any, content: Any) -> bool:
    """Whether something in the place is new, and depends on the weights."""
    values, old = _values(place), _values(content)
    if len(place) == len(content) and all(map(operator.is_, values, old)):
        return False
    known = set(map(id, old))
    return any(_holds_dependent(value) for value in values if id(value) not in known)


def _holds_dependent(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return _depends(value)
    if isinstance(value, _OPAQUE) or depth == 0:
        return False
    inside = value if isinstance(value, (*_CONTAINERS, tuple)) else getattr(value, "__dict__", ())
    return any(_holds_dependent(each, depth - 1) for each in _values(inside))


def _depends(tensor: Tensor) -> bool:
    if tensor.requires_grad or is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None
