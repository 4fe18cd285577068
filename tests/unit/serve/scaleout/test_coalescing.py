"""Pieces become fewer where nobody takes them, and none is lost, late or out of order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scaleout.coalescing import coalesced, in_pieces_of


async def source(pieces: list[bytes | None], error: Exception | None = None) -> AsyncIterator[bytes]:
    """None stands for a wait."""
    for piece in pieces:
        if piece is None:
            await asyncio.sleep(0)
        else:
            yield piece
    if error is not None:
        raise error


@given(st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=4)), max_size=30), st.booleans())
def test_nothing_is_lost(pieces: list[bytes | None], slow: bool) -> None:
    async def work() -> list[bytes]:
        taken = []
        async for piece in coalesced(source(pieces)):
            taken.append(piece)
            if slow:
                await asyncio.sleep(0)
        return taken

    taken = asyncio.run(work())
    assert b"".join(taken) == b"".join(piece for piece in pieces if piece is not None)
    assert b"" not in taken


def test_what_is_there_goes_on_together() -> None:
    async def work() -> list[bytes]:
        return [piece async for piece in coalesced(source([b"a", b"b", b"c"]))]

    assert asyncio.run(work()) == [b"abc"]


def test_one_that_is_waited_for_goes_on_at_once() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for piece in (b"a", b"b"):
            yield piece
            await asyncio.sleep(0.05)

    async def work() -> list[bytes]:
        return [piece async for piece in coalesced(slow())]

    assert asyncio.run(work()) == [b"a", b"b"]


def test_an_error_comes_after_what_was_there() -> None:
    taken = []

    async def work() -> None:
        async for piece in coalesced(source([b"a", None, b"b"], ValueError("cut"))):
            taken.append(piece)

    with pytest.raises(ValueError, match="cut"):
        asyncio.run(work())
    assert b"".join(taken) == b"ab"


def test_who_takes_no_more_ends_the_source() -> None:
    ended = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"a"
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    async def work() -> None:
        pieces = coalesced(endless())
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)

    asyncio.run(work())
    assert ended


@given(st.lists(st.binary(max_size=5), max_size=30))
def test_an_upload_goes_in_pieces_of_a_size(pieces: list[bytes]) -> None:
    async def work() -> list[bytes]:
        return [piece async for piece in in_pieces_of(4, source(list(pieces)))]

    taken = asyncio.run(work())
    assert b"".join(taken) == b"".join(pieces)
    assert all(4 <= len(piece) <= 8 for piece in taken[:-1])
