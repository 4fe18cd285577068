"""Runs that take turns in one thread, and wait for each other where their work can be done together.

Each run is written as if it were alone, and is a greenlet, of which one goes on at any time. What it asks for
is answered when every other run has asked as well or is finished, for all of them at once. Generators and
whatever else belongs to a whole process are a run's own while it has its turn, so that it draws the numbers
that it would draw alone. Threads instead would each have cores and memory of their own to warm up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from greenlet import getcurrent, greenlet

from train.joint.own_state import OwnState


class Lane:
    """One run. `result` is what its work gave back, `error` what ended it instead."""

    result: Any
    error: BaseException | None

    def __init__(self, name: str, work: Callable[[Lane], Any], state: OwnState) -> None:
        self.name, self.result, self.error = name, None, None
        self.is_finished = False
        self.question: Any = None
        self._work, self._state = work, state
        self._greenlet = greenlet(self._run, getcurrent())

    def ask(self, question: Any) -> Any:
        """Called by the run: wait for the answer to `question`, which is raised if it is an exception."""
        self.question = question
        answer = self._greenlet.parent.switch()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def go_on(self, answer: Any) -> None:
        """Called from outside: give the run its turn, until it asks again or is finished."""
        self.question = None
        self._state.enter()
        self._greenlet.switch(answer)
        self._state.leave()

    def _run(self, answer: Any) -> None:
        try:
            self.result = self._work(self)
        except BaseException as error:  # told by `run_together`, where something can be done about it
            self.error = error
        finally:
            self.is_finished = True


def run_together(lanes: Sequence[Lane], answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Let all lanes run to their end; `answer` is given what they ask for, by name, whenever all wait.

    What `answer` gives back for a name may be an exception, for that lane alone. Ctrl+C is raised in every
    lane that is not finished, and then here.
    """
    answers: Mapping[str, Any] = {}
    try:
        while waiting := [lane for lane in lanes if not lane.is_finished]:
            for lane in waiting:
                lane.go_on(answers.get(lane.name))
                if isinstance(lane.error, KeyboardInterrupt):
                    raise lane.error
            asked = {lane.name: lane.question for lane in lanes if not lane.is_finished}
            answers = answer(asked) if asked else {}
    except KeyboardInterrupt as interrupt:
        for lane in lanes:
            while not lane.is_finished and lane.question is not None:
                lane.go_on(interrupt)
        raise
