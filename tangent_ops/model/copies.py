"""Copies of models that share nothing with the original, functions on instances included.

``copy.deepcopy`` copies no functions. A forward method kept on the instance (``m.forward =
torch.compile(m.forward)``, a lambda, a decorated method) or a hook goes on with the module and the
parameters that its closure holds: those of the original.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import operator
import weakref
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tangent_ops.errors import UnsupportedError

_LEAVES = (type(None), bool, int, float, complex, str, bytes, type)
_LEAVES += (CodeType, FrameType, ModuleType, Tensor)


def independent_copy(model: nn.Module) -> Any:
    """A deep copy, in whose functions the copies of modules and tensors stand for the originals.

    Functions are looked for in attributes and hooks; what they close over, their defaults, their
    attributes (``__wrapped__``) and the modules among their globals are followed. A compiled
    function is copied as what it compiles. Computed tensors (old weight_norm's and pruning's
    weights) are copied as they are.

    Raises:
        UnsupportedError: a module is scripted or lazy, or the copy would still use something of the
            original; the error names it.
    """
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{where} is a TorchScript module, whose parameters cannot be made dual: pass the "
                "Python module that it was made of"
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise UnsupportedError(
                f"{where} is lazy and has no weights yet: run the model once on an input first"
            )
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _computed_tensors(model)}
    anchor = copy.deepcopy(model, memo)
    originals = _Originals(model, memo)
    fresh = {id(anchor), *map(id, memo.values())}
    _Rebinding(originals, fresh).inside(anchor)
    _check_shares_nothing(anchor, originals)
    return anchor


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Attributes with a history, which deepcopy refuses."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


class _Originals:
    """The modules, parameters and buffers of a model, and what a deep copy made of them."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.names: dict[int, str] = {}
        self.copies: dict[int, Any] = {}
        self.kept: set[int] = set()  # what deepcopy leaves as it is
        self.references: dict[int, Any] = {}  # id of a weak reference -> the copy of its referent
        self._globals: dict[int, bool] = {}
        named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
        for name, thing in named:
            self.names[id(thing)] = name or f"the {type(thing).__name__}"
            if memo.get(id(thing)) is thing:
                self.kept.add(id(thing))
            elif id(thing) in memo:
                self.copies[id(thing)] = memo[id(thing)]
                for reference in weakref.getweakrefs(thing):
                    self.references[id(reference)] = memo[id(thing)]

    def among_globals(self, function: FunctionType) -> dict[str, Any]:
        """What the function reads of its globals, if there is an original among those."""
        known = function.__globals__
        if id(known) not in self._globals:
            self._globals[id(known)] = any(id(value) in self.names for value in known.values())
        if not self._globals[id(known)]:
            return {}
        names = set(_names(function.__code__))
        return {name: known[name] for name in names & known.keys()}


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function reads, and the functions that are defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Rebinding:
    """Replaces originals by their copies in the functions that a copied model holds."""

    def __init__(self, originals: _Originals, fresh: set[int]) -> None:
        self._originals = originals
        self._fresh = fresh  # ids of what deepcopy has made: nothing else may be changed
        self._done: dict[int, Any] = {}

    def inside(self, holder: Any) -> None:
        """In the attributes of a copied module or object, in its lists and dicts."""
        if id(holder) not in self._fresh:
            return
        self._fresh.discard(id(holder))
        for place in (holder, getattr(holder, "__dict__", None)):
            if isinstance(place, (dict, list)):
                items = place.items() if isinstance(place, dict) else enumerate(place)
                for key, value in list(items):
                    new = place[key] = self.rebound(value)
                    self.inside(new)
        if isinstance(holder, tuple):
            for value in holder:
                self.inside(value)
        if isinstance(holder, MethodType):
            self.inside(holder.__self__)

    def rebound(self, value: Any) -> Any:
        """What stands for a value in the copy: itself, if it refers to no original."""
        for known in (self._originals.copies, self._done):
            if id(value) in known:
                return known[id(value)]
        if id(value) in self._originals.references:
            make: Any = weakref.ref if isinstance(value, weakref.ref) else weakref.proxy
            return make(self._originals.references[id(value)])
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            owner = self.rebound(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if type(value) is tuple:
            parts = dict(enumerate(value))
            new = self._all(parts)
            return value if new is parts else tuple(new.values())
        if isinstance(value, functools.partial):
            parts = {"": value.func, **dict(enumerate(value.args)), **value.keywords}
            new = self._all(parts)
            if new is parts:
                return value
            keywords = {name: new[name] for name in value.keywords}
            return functools.partial(new[""], *map(new.get, range(len(value.args))), **keywords)
        return value

    def _all(self, parts: dict[Any, Any]) -> dict[Any, Any]:
        """The same dict if nothing in it changes."""
        new = {key: self.rebound(part) for key, part in parts.items()}
        return parts if all(new[key] is part for key, part in parts.items()) else new

    def _function(self, function: FunctionType) -> Any:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return self.rebound(compiled)
        self._done[id(function)] = function  # for what leads back here by a global name
        names = self._originals.among_globals(function)
        bound = self._all(names)
        known = function.__globals__
        cells = function.__closure__ or ()
        closure = tuple(CellType() for _ in cells)
        new = FunctionType(
            function.__code__,
            known if bound is names else {**known, **bound},
            function.__name__,
            closure=closure,
        )
        self._done[id(function)] = new  # for what leads back here by a closure
        parts = (
            {i: content for i, cell in enumerate(cells) for content in _contents(cell)},
            dict(enumerate(function.__defaults__ or ())),
            function.__kwdefaults__ or {},
            vars(function),
        )
        found = [self._all(part) for part in parts]
        if bound is names and all(map(operator.is_, parts, found)):
            self._done[id(function)] = function
            return function
        for i, content in found[0].items():
            closure[i].cell_contents = content
        new.__defaults__ = tuple(found[1].values()) or None
        new.__kwdefaults__ = found[2] or None
        new.__dict__.update(found[3])
        new.__qualname__, new.__module__ = function.__qualname__, function.__module__
        return new


def _contents(cell: CellType) -> Iterator[Any]:
    """What is in the cell, if it is not empty."""
    with contextlib.suppress(ValueError):
        yield cell.cell_contents


def _check_shares_nothing(anchor: nn.Module, originals: _Originals) -> None:
    """Raise UnsupportedError if something of the original can be reached from its copy."""
    seen: set[int] = set()
    for name, module in anchor.named_modules():
        for attribute, value in vars(module).items():
            queue = [value]
            while queue:
                value = queue.pop()
                if id(value) in originals.names and id(value) not in originals.kept:
                    where = f"{name}.{attribute}".lstrip(".")
                    raise UnsupportedError(
                        f"{where} uses {originals.names[id(value)]} of the model itself, also in a "
                        "copy, whose weights it would not see. Let it get the module as an "
                        "argument, or define it in the class"
                    )
                if id(value) not in seen and not isinstance(value, _LEAVES):
                    seen.add(id(value))
                    queue.extend(_referents(value, originals))


def _referents(value: Any, originals: _Originals) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        own = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        closed = (content for cell in value.__closure__ or () for content in _contents(cell))
        return (*own, *closed, *vars(value).values(), *originals.among_globals(value).values())
    if isinstance(value, weakref.ReferenceType):
        return (value(),)
    return gc.get_referents(value)
