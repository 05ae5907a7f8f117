"""Every error that vgen raises on purpose.

    VgenError
    ├── MissingExtraError (ImportError)     an optional package is not installed; says the pip command
    ├── PromptError (ValueError)            a prompt that the engine could not take; `index`, `limit`
    ├── EngineStateError (RuntimeError)     the call does not fit the engine's state; `state`
    ├── EngineError (RuntimeError)          the engine could not start, or broke while it worked
    │   └── ServerError                     a server did not answer, or refused; `url`, `status`, `retryable`
    ├── WeightSyncError (RuntimeError)      weights did not arrive whole; `phase`, `parameter`, `receiver`
    └── RankError (RuntimeError)            another trainer rank failed, went away or did not come in time; `rank`

A value of `Sampling` outside its range is a plain `ValueError` that names the field. No message ever
holds the text or the tokens of a prompt or a completion.
"""

from __future__ import annotations


class VgenError(Exception):
    """The base of all of them: `except VgenError` catches what vgen reports and nothing else."""


class MissingExtraError(VgenError, ImportError):
    """An optional package is missing. The message holds the command that installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'vgen[{extra}]'")


class PromptError(VgenError, ValueError):
    """A prompt was refused, by vgen or by the engine. Others of the same call are not touched by it.

    `index` is its place in the list that was passed to `generate`; `limit` is the bound that it broke
    (the longest prompt in tokens, or the size of the vocabulary), or None where it broke none.
    """

    def __init__(self, index: int, problem: str, limit: int | None = None) -> None:
        super().__init__(f"prompt {index} {problem}")
        self.index = index
        self.problem = problem
        self.limit = limit


class EngineStateError(VgenError, RuntimeError):
    """The engine is in a state in which this call makes no sense; `state` names it."""

    def __init__(self, call: str, state: str, hint: str = "") -> None:
        super().__init__(f"{call} is not possible while the engine is {state}" + (f": {hint}" if hint else ""))
        self.call = call
        self.state = state


class EngineError(VgenError, RuntimeError):
    """The engine could not be started, or failed while it worked. `__cause__` is the engine's own error."""


class WeightSyncError(VgenError, RuntimeError):
    """New weights did not arrive whole, so the engine's weights are unknown and it refuses to generate.

    `problem` is what happened, `phase` where (a span name's last word), `parameter` the first parameter concerned,
    `receiver` which engine or server. The next full sync that succeeds brings the engine back.
    """

    def __init__(self, problem: str, *, phase: str, parameter: str | None = None, receiver: str = "engine") -> None:
        where = f" at parameter {parameter!r}" if parameter else ""
        super().__init__(f"weight sync failed in phase {phase!r} of {receiver}{where}: {problem}")
        self.problem = problem
        self.phase = phase
        self.parameter = parameter
        self.receiver = receiver


class RankError(VgenError, RuntimeError):
    """A trainer rank that shares the engine failed, went away, or did not come to the call in time; `rank` says which.

    What another rank raised on purpose is raised here as what it was.
    """

    def __init__(self, problem: str, *, rank: int) -> None:
        super().__init__(problem)
        self.rank = rank


class ServerError(EngineError):
    """A server could not be reached, did not answer in time, or refused; the message holds its own words.

    `url` names it (never with credentials), `status` is the HTTP status or None without an answer, `said` what
    it answered, and `retryable` whether the same call may succeed elsewhere or later.
    """

    def __init__(
        self, problem: str, *, url: str, status: int | None = None, said: str = "", retryable: bool = False
    ) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.status = status
        self.said = said
        self.retryable = retryable
