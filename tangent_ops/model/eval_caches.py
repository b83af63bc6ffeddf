"""What a model in eval mode keeps from call to call: tensors that must not outlive a call here.

A tensor that a forward pass computes of the weights and keeps (LeViT's gathered attention biases, a
transposed or a normalized weight) has the tangent of that call. In the next call it has none, and
its part of the derivative would be missing without a word.
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


def forget(model: nn.Module) -> None:
    """Has the modules that do more in ``train()`` than most (LeViT's) forget what they keep.

    Every mode stays as it is.
    """
    for module in [m for m in model.modules() if type(m).train is not nn.Module.train]:
        modes = [(each, each.training) for each in module.modules()]
        module.train(module.training)
        for each, mode in modes:
            each.training = mode


class Kept:
    """Where the modules of a model can keep something, and what is there between calls."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_modules()]
        self._places = [_places(module) for module in model.modules()]
        self._between: dict[int, list[Any]] = {}  # contents of modules that have kept something

    @contextlib.contextmanager
    def nothing(self) -> Iterator[None]:
        """A call, which neither finds nor leaves what depends on the weights by a derivative.

        It must end before the forward-mode level does.

        Raises:
            UnsupportedError: the call has changed a tensor of the model in place, and it depends on
                the weights now: it cannot be put back.
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
                    "parameters: the next call would take it for a constant. Let it compute a new "
                    "tensor"
                )

    def put_back(self) -> None:
        """Undo what any call has left, one of the anchor alone, too."""
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
