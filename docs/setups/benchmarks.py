"""The code of benchmarks/README.md starts from this: what the files bench_*.py import."""

import importlib
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_attention import Attention, AttentionSuite, _flash_jvp_is_missing
from benchmarks.bench_layers import layer
from benchmarks.ops import Pair, Tensors, in_dual_level

SUITE = AttentionSuite()  # a new one: that of bench_attention.py has this rival
