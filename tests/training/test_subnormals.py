"""Training flushes subnormal numbers, in every thread, and puts the setting back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tangent_ops.training.subnormals import flushed_subnormals

HALF = 1 << 19
TRAININGS = """
import json, sys
sys.path[:0] = {paths!r}
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from tangent_ops import fit, fit_grouped, linearize

try:
    from tangent_ops.privacy import Privacy, fit_private
except ImportError:
    Privacy = None  # its extra is not installed

torch.set_num_threads(2)
data = TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
smallest = torch.full((2 * {half},), torch.finfo(torch.float32).tiny)
during, fails = [], False


def kept():  # two threads halve smallest, a half each
    return int((smallest / 2).count_nonzero())


def loss(logits, targets):
    if torch.is_grad_enabled():
        during.append(kept())
        if fails:
            raise ArithmeticError
    return cross_entropy(logits, targets)


def tangent():
    return linearize(nn.Linear(3, 2), check=False)


def ordinary():
    fit(nn.Linear(3, 2), data, **options)


def grouped():
    fit_grouped(tangent(), {{"a": data, "b": TensorDataset(*data.tensors)}}, **options)


def private():
    privacy = Privacy(
        noise_multiplier=1.0, delta=1e-2, max_grad_norm=1.0, expected_batch_size=4, steps=3, seed=0
    )
    fit_private(tangent(), data, privacy, loss=loss, progress=False)


def run(name, training):
    during.clear()
    before = kept()
    try:
        training()
    except ArithmeticError:
        assert fails
    found[name] = [before, max(during), kept()]


options = dict(loss=loss, epochs=2, batch_size=4, progress=False)
found = {{}}
for training in (ordinary, grouped, private) if Privacy else (ordinary, grouped):
    run(training.__name__, training)
fails = True
run("failing", ordinary)
fails = False
torch.set_flush_denormal(True)
run("flushing before", ordinary)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    """Of each training: subnormal results before, at most during, and after it."""
    script = TRAININGS.format(paths=sys.path, half=HALF)
    environment = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only one thread flushes elsewhere")
@pytest.mark.parametrize("training", ["ordinary", "grouped", "private", "failing"])
def test_all_threads_flush_during_a_training_and_not_afterwards(
    training: str, found: dict[str, list[int]]
) -> None:
    if training == "private":
        pytest.importorskip("tangent_ops.privacy", exc_type=ImportError)
    assert found[training] == [2 * HALF, 0, 2 * HALF]


def test_a_setting_that_was_on_stays_on(found: dict[str, list[int]]) -> None:
    before, during, after = found["flushing before"]
    assert before < 2 * HALF  # PyTorch's own function reaches one thread of two
    assert (during, after) == (0, 0)


def test_other_devices_change_nothing_on_the_cpu() -> None:
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    with flushed_subnormals(torch.device("meta")):
        assert smallest / 2 > 0
    with flushed_subnormals(torch.device("cpu")):
        assert smallest / 2 == 0
    assert smallest / 2 > 0
