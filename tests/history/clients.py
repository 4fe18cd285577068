"""Clients: they ask through the official client, and record how each request ended."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from tests.history.recorder import now
from tests.history.world import REQUEST_TIMEOUT_S, World

BASE = "base"
# The last is longer than a block of the prefix cache.
PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8], [9] * 12, [1 + i % 15 for i in range(260)])
ROUTES = ("completions", "chat")
LONGEST = 48
_USERS = 6


@dataclass(frozen=True)
class Request:
    """`name` is None for the base; `cancel` after so many pieces, or so many hundredths of a second."""

    model: str
    name: str | None
    pin: str | None = None
    route: str = "completions"
    prompt: int = 0
    max_tokens: int = 4
    stream: bool = False
    user: str | None = None
    cancel: int | None = None


class Client:
    """One of many; `chance` decides what it asks."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world, self._chance = world, chance

    def draw(self) -> Request:
        """What to ask next."""
        chance = self._chance
        name: str | None = None
        pin = None
        kind = chance.random()
        if kind < 0.1:
            model = BASE
        elif kind < 0.14:
            model = name = f"nobody-{chance.randrange(100)}"
        else:
            known = chance.choice(self._world.names)
            model = name = known.name
            if kind < 0.32:
                # One that is served, or one that was once.
                versions = known.state["versions"] if chance.random() < 0.85 else [*known.markers]
                pin = chance.choice(versions or ["0" * 12])
                model = f"{name}@{pin}"
        is_long = chance.random() < 0.1
        return Request(
            model=model,
            name=name,
            pin=pin,
            route=ROUTES[chance.random() < 0.25],
            prompt=chance.randrange(len(PROMPTS)),
            max_tokens=chance.randint(16, LONGEST) if is_long else chance.randint(1, 6),
            stream=is_long or chance.random() < 0.4,
            user=f"user-{chance.randrange(_USERS)}" if chance.random() < 0.3 else None,
            cancel=chance.randint(0, 6) if chance.random() < 0.1 else None,
        )

    async def ask(self, request: Request) -> dict[str, Any]:
        """Ask, and record how it ended; what was recorded."""
        recorder = self._world.recorder
        number = recorder.number()
        recorder.write("sent", id=number, start=now(), **vars(request))
        seen: dict[str, Any] = {"tokens": [], "finish": [], "model": None, "version": None, "first": None}
        fault: dict[str, Any] = {}
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                fault = await self._outcome(request, seen)
        except (TimeoutError, openai.APITimeoutError) as error:
            fault = {"outcome": "hang", "text": repr(error)}
        except openai.APIStatusError as error:
            retry = error.response.headers.get("retry-after")
            fault = {"outcome": "refused", "status": error.status_code, "code": error.code}
            fault |= {"retry_after": retry, "text": str(error)}
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            fault = {"outcome": "broken", "text": repr(error)}
        except openai.APIError as error:
            fault = {"outcome": "stream_error", "status": None, "code": error.code, "text": str(error)}
        ended = {"id": number, "end": now(), **seen, **fault}
        recorder.write("ended", **ended)
        return ended

    async def _outcome(self, request: Request, seen: dict[str, Any]) -> dict[str, Any]:
        if request.stream:
            was_cancelled = await self._stream(request, seen)
        elif request.cancel is None:
            await self._whole(request, seen)
            was_cancelled = False
        else:
            task = asyncio.create_task(self._whole(request, seen))
            await asyncio.wait([task], timeout=request.cancel / 100)
            task.cancel()
            was_cancelled = True
            with suppress(asyncio.CancelledError):
                await task
                was_cancelled = False
        if was_cancelled:
            return {"outcome": "cancelled"}
        return {"outcome": "answer" if seen["finish"] else "cut"}

    async def _send(self, request: Request, seen: dict[str, Any]) -> Any:
        routes = {"completions": self._world.openai.completions, "chat": self._world.openai.chat.completions}
        prompt = PROMPTS[request.prompt]
        asked: dict[str, Any] = {"prompt": prompt}
        if request.route == "chat":
            text = "".join(chr(ord("a") + token) for token in prompt)  # a letter is a token
            asked = {"messages": [{"role": "user", "content": text}]}
        if request.user is not None:
            asked["user"] = request.user
        answer = await routes[request.route].with_raw_response.create(
            model=request.model,
            max_tokens=request.max_tokens,
            temperature=0.0,
            stream=request.stream,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            **asked,
        )
        seen["first"], seen["version"] = now(), answer.headers.get("x-adapter-version")
        return answer.parse()

    async def _whole(self, request: Request, seen: dict[str, Any]) -> None:
        _note(await self._send(request, seen), seen)

    async def _stream(self, request: Request, seen: dict[str, Any]) -> bool:
        """Whether we left before its end."""
        pieces = 0
        async with await self._send(request, seen) as stream:
            if request.cancel == 0:
                return True
            async for piece in stream:
                _note(piece, seen)
                pieces += 1
                if pieces == request.cancel and not seen["finish"]:
                    return True
        return False


def _note(answer: Any, seen: dict[str, Any]) -> None:
    """Add an answer or a piece of one; pieces that differ in their model are told as such."""
    seen["model"] = (
        answer.model if seen["model"] in (None, answer.model) else f"{seen['model']}, {answer.model}"
    )
    for choice in answer.choices:
        seen["tokens"] += (choice.model_extra or {}).get("token_ids") or []
        if choice.finish_reason is not None:
            seen["finish"].append(choice.finish_reason)
