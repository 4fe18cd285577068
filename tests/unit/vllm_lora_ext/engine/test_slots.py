"""The CPU LoRA step: right for every rank and batch, and no row feels another row's adapter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lora_ext.engine import native
from vllm_lora_ext.engine.slots import LoraModule, SlotTable, Step

MAX_RANK = 512
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to compute it; the native one is skipped where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("no C++ compiler")
    yield request.param


def make_module(
    ranks: list[int], in_features: int, widths: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> LoraModule:
    """Slot i holds an adapter of ranks[i]; rank 0 leaves the slot empty."""
    chance = torch.Generator().manual_seed(seed)
    module = LoraModule("layer", in_features, widths, len(ranks), MAX_RANK, dtype)
    for slot, rank in enumerate(ranks):
        for index, width in enumerate(widths if rank else ()):
            scale = (in_features * rank) ** -0.25
            module.put_a(slot, index, (torch.randn(rank, in_features, generator=chance) * scale).to(dtype))
            module.put_b(slot, index, (torch.randn(width, rank, generator=chance) * scale).to(dtype))
    return module


def step_of(slots: list[int]) -> Step:
    step = Step(len(slots))
    step.group(np.array(slots))
    return step


def batch(rows: int, in_features: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, in_features, generator=chance).to(dtype)
    return x, torch.randn(rows, width, generator=chance).to(dtype)


def reference(module: LoraModule, slots: list[int], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y + B(Ax) row by row, in float64."""
    result = y.double()
    for row, slot in enumerate(slots):
        for pair in module.pairs(slot) if slot >= 0 else ():
            low_rank = pair.a.double() @ x[row].double()
            result[row, pair.offset : pair.offset + pair.b_t.shape[1]] += low_rank @ pair.b_t.double()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 200])
@pytest.mark.parametrize(
    ("in_features", "widths"), [(64, (64,)), (896, (896, 128, 128)), (100, (37, 5)), (33, (1,))]
)
def test_each_row_gets_its_own_adapter(
    kernels: str, dtype: torch.dtype, rows: int, in_features: int, widths: tuple[int, ...]
) -> None:
    ranks = [8, 1, 64, 0, 13]
    module = make_module(ranks, in_features, widths, dtype)
    slots = [row % (len(ranks) + 1) - 1 for row in range(rows)]
    x, y = batch(rows, in_features, sum(widths), dtype)
    expected = reference(module, slots, x, y)
    module.add_lora(step_of(slots), y, x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("hidden", [128, 2049, 3456])
@pytest.mark.parametrize(
    ("adapters", "rank", "requests", "tokens"),
    [(1, 8, 1, 128), (4, 16, 4, 32), (32, 32, 16, 1), (128, 8, 16, 1)],
)
def test_the_cases_of_vllms_own_operator_tests(
    dtype: torch.dtype, slices: int, hidden: int, adapters: int, rank: int, requests: int, tokens: int
) -> None:
    """Odd widths, many adapters, prefill and decode (vllm's tests/lora/test_punica_ops.py, by shape)."""
    module = make_module([rank] * adapters, hidden, (hidden,) * slices, dtype)
    slots = np.repeat(np.random.default_rng(0).integers(0, adapters, requests), tokens).tolist()
    x, y = batch(len(slots), hidden, hidden * slices, dtype)
    expected = reference(module, slots[:8], x[:8], y[:8])
    module.add_lora(step_of(slots), y, x)
    torch.testing.assert_close(y[:8].double(), expected, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("rank", [1, 7, 8, 64, 320, 512])
def test_every_rank_up_to_512(kernels: str, rank: int) -> None:
    module = make_module([rank], 256, (96,), torch.float32)
    x, y = batch(20, 256, 96, torch.float32)
    expected = reference(module, [0] * 20, x, y)
    module.add_lora(step_of([0] * 20), y, x)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_rows_without_an_adapter_keep_their_bits_whatever_is_in_the_slots(
    kernels: str, dtype: torch.dtype, poison: float
) -> None:
    module = make_module([4, 4], 64, (48,), dtype)
    for slot in (0, 1):
        module.put_a(slot, 0, torch.full((4, 64), poison, dtype=dtype))
    x, y = batch(9, 64, 48, dtype)
    y[2, :] = float("nan")
    before = y.clone()
    slots = [-1, 0, -1, 1, -1, 0, -1, 1, -1]
    module.add_lora(step_of(slots), y, x)
    for row, slot in enumerate(slots):
        if slot == -1:
            assert torch.equal(y[row].view(torch.uint8), before[row].view(torch.uint8))
        else:
            assert not torch.equal(y[row], before[row])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 70))
def test_a_row_does_not_change_a_bit_with_its_neighbours(
    data: st.DataObject, dtype: torch.dtype, rows: int
) -> None:
    """Also not when a neighbour's adapter is full of NaN."""
    module = make_module([8, 3, 16, 64], 100, (40, 21), dtype)
    module.put_a(2, 0, torch.full((16, 100), float("nan"), dtype=dtype))
    slots = st.lists(st.integers(-1, 3), min_size=rows, max_size=rows)
    first, second = data.draw(slots), data.draw(slots)
    x, y = batch(rows, 100, 61, dtype)
    one, other = y.clone(), y.clone()
    module.add_lora(step_of(first), one, x)
    module.add_lora(step_of(second), other, x)
    for row in range(rows):
        if first[row] == second[row]:
            assert torch.equal(one[row].view(torch.uint8), other[row].view(torch.uint8))


def test_the_torch_form_is_as_independent_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    chance = np.random.default_rng(0)
    module = make_module([8, 3, 16, 64], 100, (40, 21), torch.float32)
    x, y = batch(40, 100, 61, torch.float32)
    for _ in range(20):
        first, second = chance.integers(-1, 4, 40), chance.integers(-1, 4, 40)
        one, other = y.clone(), y.clone()
        module.add_lora(step_of(list(first)), one, x)
        module.add_lora(step_of(list(second)), other, x)
        same = first == second
        assert torch.equal(one[same], other[same])


def test_an_embedding_takes_columns_of_a(kernels: str) -> None:
    vocabulary, hidden, rank = 50, 24, 4
    module = LoraModule("embed_tokens", vocabulary, (hidden,), 2, MAX_RANK, torch.float32)
    a, b = torch.randn(rank, vocabulary), torch.randn(hidden, rank)
    module.put_a(1, 0, a)
    module.put_b(1, 0, b)
    tokens = torch.tensor([3, 49, 0, 3])
    y = torch.zeros(4, hidden)
    module.add_embedding(step_of([1, -1, 1, 1]), y, tokens)
    expected = (b @ a[:, tokens]).t()
    expected[1] = 0
    torch.testing.assert_close(y, expected)


def test_a_slot_table_takes_what_vllm_copies_into_it_without_copying() -> None:
    module = LoraModule("layer", 8, (6,), 2, 4, torch.float32)
    a_table = SlotTable(module, 0, "a", torch.Size((2, 1, 4, 8)), torch.float32)
    b_table = SlotTable(module, 0, "b", torch.Size((2, 1, 6, 4)), torch.float32)
    a, b = torch.randn(3, 8), torch.randn(3, 6).t()  # B as the loader keeps it
    a_table[1, 0, :3, :8].copy_(a, non_blocking=True)
    assert module.pairs(1) == []  # a pair counts when it is whole
    b_table[1, 0, :6, :3].copy_(b, non_blocking=True)
    (pair,) = module.pairs(1)
    assert pair.a.data_ptr() == a.data_ptr() and pair.b_t.data_ptr() == b.data_ptr()
    a_table[1] = b_table[1] = 0
    assert module.pairs(1) == []
    x, y = batch(1, 8, 6, torch.float32)
    before = y.clone()
    module.add_lora(step_of([1]), y, x)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("part", "shape", "words"),
    [
        ("a", (3, 7), "lora_A is (3, 7), must be (rank <= 4, 8)"),
        ("a", (5, 8), "rank <= 4"),
        ("b", (5, 3), "lora_B is (5, 3), must be (6, rank <= 4)"),
        ("b", (6, 2), "lora_A has rank 3, lora_B 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(part: str, shape: tuple[int, int], words: str) -> None:
    module = LoraModule("model.layers.0.mlp", 8, (6,), 1, 4, torch.float32)
    put = module.put_b if part == "b" else module.put_a
    if part == "b":
        module.put_a(0, 0, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp") as error:
        put(0, 0, torch.zeros(shape))
    assert words in str(error.value)


def test_a_step_that_is_longer_than_the_batch_is_refused() -> None:
    module = make_module([2], 8, (8,), torch.float32)
    x, y = batch(2, 8, 8, torch.float32)
    with pytest.raises(RuntimeError, match="row 2 of the step, but only 2 rows"):
        module.add_lora(step_of([0, 0, 0]), y, x)
