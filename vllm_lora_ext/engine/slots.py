"""Which adapter's weights are in which slot of a module, and which rows of a step use which slot.

On the CPU a slot needs no memory of its own: it points to the adapter's tensors,
which lie in the same memory. So activating an adapter copies nothing, and a large
`--max-lora-rank` costs nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_lora_ext import grouped
from vllm_lora_ext.engine import native
from vllm_lora_ext.grouped import LoraPair

_NO_ADAPTER = -1
_WEIGHTS = np.dtype([("a", "u8"), ("b", "u8"), ("a_stride", "i8"), ("b_stride", "i8"), ("rank", "i8")])


_FUNCTIONS = {torch.float32: "add_lora_float32", torch.bfloat16: "add_lora_bfloat16"}


class _CModule(ctypes.Structure):
    """`Module` of native.cpp."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("slices", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )


class _CStep(ctypes.Structure):
    """`Step` of native.cpp."""

    _fields_ = (
        ("groups", ctypes.c_int64),
        ("slot", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
    )


class Step:
    """The rows of one step, grouped by slot once, for all modules. Rows without an adapter are not in it."""

    def __init__(self, max_rows: int) -> None:
        self._slot = np.empty(max_rows, np.int32)
        self._start = np.zeros(max_rows + 1, np.int32)
        self._row = np.empty(max_rows, np.int32)
        self.native = _CStep(0, self._slot.ctypes.data, self._start.ctypes.data, self._row.ctypes.data)
        self.address = ctypes.addressof(self.native)
        self.groups = 0
        self.last_row = -1

    def group(self, slots: np.ndarray) -> None:
        """Take the rows' slots (rows,), -1 for a row without an adapter."""
        order = np.argsort(slots, kind="stable").astype(np.int32)
        with_adapter = order[int(np.count_nonzero(slots == _NO_ADAPTER)) :]
        used, first = np.unique(slots[with_adapter], return_index=True)
        self.groups = self.native.groups = len(used)
        self._slot[: self.groups] = used
        self._start[: self.groups] = first
        self._start[self.groups] = len(with_adapter)
        self._row[: len(with_adapter)] = with_adapter
        self.last_row = int(with_adapter.max()) if len(with_adapter) else -1

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each slot in use with its rows."""
        for group in range(self.groups):
            yield int(self._slot[group]), self._row[self._start[group] : self._start[group + 1]]


class LoraModule:
    """One module of the model that LoRA can reach, and for each slot the adapter's A and B.

    `widths` are the output features of its slices (q, k, v; gate, up; else one).
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        widths: Sequence[int],
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.in_features, self.widths, self.max_rank = name, in_features, tuple(widths), max_rank
        self.dtype = dtype
        self._offset = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        self._weights = np.zeros((slots, len(self.widths)), _WEIGHTS)
        # What the addresses in _weights point to stays alive here.
        self._a: list[list[torch.Tensor | None]] = [[None] * len(self.widths) for _ in range(slots)]
        self._b_t: list[list[torch.Tensor | None]] = [[None] * len(self.widths) for _ in range(slots)]
        self._native = _CModule(
            in_features, len(self.widths), self._offset.ctypes.data, self._weights.ctypes.data
        )
        self.address = ctypes.addressof(self._native)
        self.kernel_calls = 0

    def clear(self, slot: int, index: int) -> None:
        """Nothing is in this slot for slice `index` any more."""
        self._weights[slot, index] = 0
        self._a[slot][index] = self._b_t[slot][index] = None

    def put_a(self, slot: int, index: int, a: torch.Tensor) -> None:
        """A of slice `index`, (rank, in_features).

        Raises:
            ValueError: another shape than the module's.
        """
        if a.ndim != 2 or a.shape[1] != self.in_features or a.shape[0] > self.max_rank:
            expected = f"(rank <= {self.max_rank}, {self.in_features})"
            raise ValueError(f"{self.name}: lora_A is {tuple(a.shape)}, must be {expected}")
        self._a[slot][index] = a if a.stride(1) == 1 else a.contiguous()
        self._connect(slot, index)

    def put_b(self, slot: int, index: int, b: torch.Tensor) -> None:
        """B of slice `index`, (width, rank); kept transposed, and copied only if it does not lie so already.

        Raises:
            ValueError: another shape than the module's.
        """
        width = self.widths[index]
        if b.ndim != 2 or b.shape[0] != width or b.shape[1] > self.max_rank:
            expected = f"({width}, rank <= {self.max_rank})"
            raise ValueError(f"{self.name}: lora_B is {tuple(b.shape)}, must be {expected}")
        b_t = b.t()
        self._b_t[slot][index] = b_t if b_t.stride(1) == 1 else b_t.contiguous()
        self._connect(slot, index)

    def _connect(self, slot: int, index: int) -> None:
        a, b_t = self._a[slot][index], self._b_t[slot][index]
        if a is None or b_t is None:
            return  # a pair counts when it is whole
        if a.shape[0] != b_t.shape[0]:
            raise ValueError(f"{self.name}: lora_A has rank {a.shape[0]}, lora_B {b_t.shape[0]}")
        self._weights[slot, index] = (a.data_ptr(), b_t.data_ptr(), a.stride(0), b_t.stride(0), a.shape[0])

    def pairs(self, slot: int) -> list[LoraPair]:
        """The slot's weights for the slices that the adapter has."""
        found = []
        for index, (a, b_t) in enumerate(zip(self._a[slot], self._b_t[slot], strict=True)):
            if a is not None and b_t is not None:
                found.append(LoraPair(a, b_t, int(self._offset[index])))
        return found

    def add_lora(self, step: Step, y: torch.Tensor, x: torch.Tensor) -> None:
        """y[row] += B(A x[row]) for the step's rows; `y` (rows, out_features) in place, `x` (rows, in)."""
        self._check(step, y)
        if kernel := self._kernel(y, x):
            kernel(self.address, step.address, y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), None)
            return
        for slot, rows in step:
            grouped.add_lora(y, x, rows, self.pairs(slot))

    def add_embedding(self, step: Step, y: torch.Tensor, tokens: torch.Tensor) -> None:
        """y[row] += B(A[:, tokens[row]]); `y` is (rows, hidden), in place, `tokens` (rows,)."""
        self._check(step, y)
        if kernel := self._kernel(y, y):
            tokens = tokens.long().contiguous()
            kernel(self.address, step.address, y.data_ptr(), y.stride(0), None, 0, tokens.data_ptr())
            return
        for slot, rows in step:
            for pair in self.pairs(slot):
                grouped.add_embedding(y, tokens, rows, pair)

    def _check(self, step: Step, y: torch.Tensor) -> None:
        """Raises RuntimeError rather than let a kernel write behind the end of `y`."""
        self.kernel_calls += 1
        if step.last_row >= y.shape[0]:
            raise RuntimeError(f"{self.name}: row {step.last_row} of the step, but only {y.shape[0]} rows")

    def _kernel(self, y: torch.Tensor, x: torch.Tensor) -> Callable[..., None] | None:
        """The native function for these tensors; None where torch has to do it."""
        name = _FUNCTIONS.get(self.dtype)
        if name is None or not x.dtype == y.dtype == self.dtype or x.stride(-1) != 1 or y.stride(-1) != 1:
            return None
        kernels = native.kernels()
        return None if kernels is None else getattr(kernels, name)


class SlotTable:
    """Stands where vLLM keeps the stacked tensor of A or B of one slice, and takes what is copied into it.

    vLLM writes `table[slot, ...].copy_(tensor)` and `table[slot] = 0` (lora/layers/*.py, `set_lora`
    and `reset_lora`), after its own slicing for tensor parallelism and packed layers.
    """

    def __init__(
        self, module: LoraModule, index: int, part: str, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self.module, self.index, self.part = module, index, part
        self.shape, self.dtype = shape, dtype
        self.number = -1  # of the module among those the compiled model calls, see cpu_lora

    def __getitem__(self, key: Any) -> _Slot:
        return _Slot(self, key[0] if isinstance(key, tuple) else key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if value != 0:
            raise TypeError(f"{self.module.name}: a slot is reset with 0 and filled with copy_")
        self.module.clear(key, self.index)

    def put(self, slot: int, tensor: torch.Tensor) -> None:
        """Let the slot point to `tensor`, converted only if its dtype differs."""
        tensor = tensor.to(self.dtype)
        if self.part == "b":
            self.module.put_b(slot, self.index, tensor)
        else:
            self.module.put_a(slot, self.index, tensor.t() if self.part == "a_t" else tensor)


class _Slot:
    """One slot of a table, as vLLM's `set_lora` sees it."""

    def __init__(self, table: SlotTable, slot: int) -> None:
        self._table, self._slot = table, slot
        self.shape, self.dtype = table.shape[1:], table.dtype

    def copy_(self, tensor: torch.Tensor, non_blocking: bool = False) -> None:
        """Take the tensor; nothing is copied."""
        self._table.put(self._slot, tensor)
