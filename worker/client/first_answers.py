"""
The first answers of a run: whether they say that the command is wrong, before thousands of lines are answered with it.

A wrong address, model or key gives every line the same error, and an error that is in the output counts as an answer.
So the errors among the first answers are held back, unwritten.  As soon as enough other answers have come they are all
written; when nearly all of the first answers are the same error, none is, and the run stops: a corrected command then
answers every line.

What the worker says about a line itself is no evidence about the command and is never held.
"""

import asyncio
import math
from collections import Counter

from worker.client.errors import ClientError
from worker.client.io.outputs import Answer
from worker.client.summary import ErrorExample, example_of

FIRST_ANSWERS = 20
"""House decision: some seconds of a run."""
SAME_SHARE = 0.9
"""House decision: odd lines, up to a tenth, do not hide a wrong model."""
_OF_THE_LINE = frozenset({"bad_message", "deadline_exceeded", "idempotency_conflict", "reply_too_large"})
"""Error classes that the worker gives without asking a server, or that follow from the line."""
_OF_THE_COMMAND = frozenset({"auth", "connect", "forbidden", "model_not_found", "quota"})
"""Error classes by which fewer than `FIRST_ANSWERS` lines are stopped too."""
_ROUNDING = 1e-9
"""20 * 0.9 is 18 and not a little more."""
_NO_SUCH_PLACE = frozenset({404, 405})
"""Statuses that say the same: the address is not that of the API."""


class SameErrorsError(ClientError):
    """
    The first answers are nearly all the same error; none of them was written; permanent until the command changes.

    Attributes:
        error_class: Of these answers.
        example: One of them.
    """

    def __init__(self, error_class: str, count: int, example: ErrorExample) -> None:
        self.error_class = error_class
        self.example = example
        what = f"the first {count} answers are" if count > 1 else "the first answer is"
        super().__init__(f"{what} {error_class} ({example}); none of them was written")


class FirstAnswers:
    """
    Holds back the first errors until it is known whether the command is wrong; not thread-safe.

    Args:
        count: Answers after which it is decided, from 1.
        share: Share of them, above 0 and up to 1, that must be the same error for the run to stop.
    """

    def __init__(self, count: int = FIRST_ANSWERS, share: float = SAME_SHARE) -> None:
        self._count = count
        self._max_others = count - math.ceil(count * share - _ROUNDING)
        self._classes: Counter[str | None] = Counter()
        self._examples: dict[str, ErrorExample] = {}
        self._may_be_the_command = True
        self._is_decided = asyncio.Event()
        self._failure: SameErrorsError | None = None
        self._is_free = asyncio.Event()
        self._is_free.set()
        self.held = 0
        """Answers held back now."""

    async def admit(self, answer: Answer, number: int) -> None:
        """
        Return when the answer to the line of this number may be written.

        Raises:
            SameErrorsError: It must not be written: the run stops.

        Cancellation: it was not written.
        """
        error_class = (answer.error_class or "unclassified") if answer.is_error else None
        if not self._is_decided.is_set() and error_class not in _OF_THE_LINE and not answer.is_local:
            self._add(answer, error_class, number)
            if error_class is not None:
                self.held += 1
                self._is_free.clear()
                try:
                    await self._is_decided.wait()
                finally:
                    self.held -= 1
                    if not self.held:
                        self._is_free.set()
        if self._failure is not None and answer.is_error:
            raise self._failure

    def _add(self, answer: Answer, error_class: str | None, number: int) -> None:
        self._classes[error_class] += 1
        if error_class is not None:
            self._examples.setdefault(error_class, example_of(answer, number))
            is_of_the_command = error_class in _OF_THE_COMMAND or answer.status_code in _NO_SUCH_PLACE
            self._may_be_the_command = self._may_be_the_command and is_of_the_command
        total, others = self._classes.total(), self._classes.total() - self._most()[1]
        if others > self._max_others:
            self._decide(is_wrong=False)
        elif total >= self._count:
            self._decide(is_wrong=True)

    async def wait_until_free(self) -> None:
        """Wait until no answer is held back.  Cancellation: changes nothing."""
        await self._is_free.wait()

    def decide(self) -> None:
        """Decide now: no further answer will come, or none can before the held ones are written; idempotent."""
        self._decide(is_wrong=self._may_be_the_command and len(self._classes) == 1 and None not in self._classes)

    def _decide(self, *, is_wrong: bool) -> None:
        if self._is_decided.is_set():
            return
        if is_wrong:
            error_class, count = self._most()
            self._failure = SameErrorsError(error_class, count, self._examples[error_class])
        self._is_decided.set()

    def _most(self) -> tuple[str, int]:
        """Return the most frequent error class and its count."""
        errors = ((name, count) for name, count in self._classes.items() if name is not None)
        return max(errors, key=lambda item: item[1], default=("", 0))

    async def watch(self) -> None:
        """
        Wait until it is decided.

        Raises:
            SameErrorsError: The run must stop.

        Cancellation: changes nothing.
        """
        await self._is_decided.wait()
        if self._failure is not None:
            raise self._failure
