"""Every error that vgen raises on purpose, and the form in which an error travels to another process.

    VgenError
    ├── MissingExtraError (ImportError)     an optional package is not installed; the message holds the pip command
    ├── ArgumentError (ValueError, TypeError)  an argument is wrong; `argument`, and what to pass instead
    ├── PromptError (ValueError)            the engine cannot take one prompt; `index`, `limit`
    ├── EngineStateError (RuntimeError)     the call does not fit the engine's state; `state`
    ├── EngineError (RuntimeError)          the engine could not start, or broke while it worked
    │   └── ServerError                     a server did not answer, or refused; `url`, `status`, `retryable`
    ├── CheckError (RuntimeError)           `vgen check` could not check: a wrong model, server or adapter, or a hang
    ├── WeightSyncError (RuntimeError)      the weights did not arrive whole; `phase`, `parameter`, `receiver`
    └── RankError (RuntimeError)            another trainer rank failed, went away or came too late; `rank`

No message ever holds the text or the tokens of a prompt or a completion.

Each class has a `code`, a name that never changes. `error_to_dict` and `error_from_dict` carry an error to another
process as its code and its constructor's arguments: the receiver parses no text and unpickles nothing.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class VgenError(Exception):
    """Base class of all vgen errors: `except VgenError` catches what vgen reports and nothing else.

    Every parameter of a subclass's constructor is an attribute of the same name: that is what `error_to_dict` reads.
    """

    code: ClassVar[str] = "vgen"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class MissingExtraError(VgenError, ImportError):
    """An optional package is missing. The message holds the command that installs it."""

    code = "missing_extra"

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'vgen[{extra}]'")
        self.what, self.package, self.extra = what, package, extra


@contextmanager
def needs_extra(what: str, package: str, extra: str) -> Iterator[None]:
    """Turn an `ImportError` of the block into a `MissingExtraError`: `what` needs `package`, which `extra` installs."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(what, package, extra) from error


class CheckError(VgenError, RuntimeError):
    """A check could not be made. The message says what was tried and what to do."""

    code = "check"


class ArgumentError(VgenError, ValueError, TypeError):
    """A caller passed a wrong argument. Nothing has reached an engine; the next right call succeeds.

    `argument` names it, as in `Sampling.max_tokens`. `problem` says what is wrong and what to pass instead.
    """

    code = "argument"

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument, self.problem = argument, problem


class PromptError(VgenError, ValueError):
    """vgen or the engine refused one prompt. The other prompts of the call are not affected.

    `index` is the prompt's place in the list that was passed to `generate`. `limit` is the bound that the prompt broke
    (the longest prompt in tokens, or the size of the vocabulary), or None where it broke none.
    """

    code = "prompt"

    def __init__(self, index: int, problem: str, limit: int | None = None) -> None:
        super().__init__(f"prompt {index} {problem}")
        self.index, self.problem, self.limit = index, problem, limit


class EngineStateError(VgenError, RuntimeError):
    """The call makes no sense in the engine's present state, which `state` names."""

    code = "engine_state"

    def __init__(self, call: str, state: str, hint: str = "") -> None:
        super().__init__(f"{call} is not possible while the engine is {state}" + (f": {hint}" if hint else ""))
        self.call, self.state, self.hint = call, state, hint


class EngineError(VgenError, RuntimeError):
    """The engine could not be started, or failed while it worked. `__cause__` is the engine's own error."""

    code = "engine"


class WeightSyncError(VgenError, RuntimeError):
    """New weights did not arrive whole. The engine's weights are unknown, and it refuses to generate.

    `problem` says what happened, `phase` where (the last word of a span's name), `parameter` names the first parameter
    concerned, and `receiver` the engine or server. `reason` is set where a caller must react to this very problem: a
    short name such as `unknown_handles` or `update_open`, to compare with instead of the text. The next full sync that
    succeeds makes the engine usable again.
    """

    code = "weight_sync"

    def __init__(
        self,
        problem: str,
        *,
        phase: str,
        parameter: str | None = None,
        receiver: str = "engine",
        reason: str | None = None,
    ) -> None:
        where = f" at parameter {parameter!r}" if parameter else ""
        super().__init__(f"weight sync failed in phase {phase!r} of {receiver}{where}: {problem}")
        self.problem, self.phase, self.parameter = problem, phase, parameter
        self.receiver, self.reason = receiver, reason


class RankError(VgenError, RuntimeError):
    """A trainer rank that shares the engine failed, went away, or did not come to the call in time; `rank` says which.

    An error of vgen's own that another rank raised is raised here with its own class, not as a `RankError`.
    """

    code = "rank"

    def __init__(self, problem: str, *, rank: int) -> None:
        super().__init__(problem)
        self.rank = rank


class ServerError(EngineError):
    """A server could not be reached, did not answer in time, or refused. The message quotes the server's own message.

    `url` names the server, without credentials. `status` is the HTTP status, or None without an answer. `reason` is the
    `error.type` of the answer's JSON, if it has one: programs compare with it, never with the message. `server_message`
    is the server's message, for people. `retryable` says whether the same call may succeed elsewhere or later.
    """

    code = "server"

    def __init__(
        self,
        problem: str,
        *,
        url: str,
        status: int | None = None,
        reason: str | None = None,
        server_message: str = "",
        retryable: bool = False,
    ) -> None:
        super().__init__(f"{url}: {problem}")
        self.problem, self.url, self.status, self.reason = problem, url, status, reason
        self.server_message, self.retryable = server_message, retryable


_CLASSES: Mapping[str, type[VgenError]] = {
    kind.code: kind
    for kind in (
        *(VgenError, MissingExtraError, ArgumentError, PromptError, EngineStateError, EngineError),
        *(WeightSyncError, RankError, ServerError, CheckError),
    )
}
_BUILT_IN = ("ArithmeticError", "IndexError", "KeyError", "LookupError", "OverflowError", "TypeError", "ValueError")
"""Python's own errors that keep their class in another process; a built-in error's code is the name of its class."""


def error_to_dict(error: BaseException) -> dict[str, Any]:
    """`error` as plain data for JSON or MessagePack: `{"code": ..., "fields": {...}}`.

    `fields` are the constructor's arguments of the class that the code stands for. An error that is neither vgen's nor
    one of a few built-in ones gets the code `vgen`; its message then begins with the name of its class.

    >>> error_to_dict(PromptError(3, "is empty"))
    {'code': 'prompt', 'fields': {'index': 3, 'problem': 'is empty', 'limit': None}}
    """
    if isinstance(error, VgenError):
        names = inspect.signature(_CLASSES[error.code]).parameters
        return {"code": error.code, "fields": {name: getattr(error, name) for name in names}}
    name, text = type(error).__name__, str(error)
    if name in _BUILT_IN:
        # The argument itself: `str` of a KeyError is its key in quotes.
        return {"code": name, "fields": {"problem": str(error.args[0]) if len(error.args) == 1 else text}}
    return {"code": VgenError.code, "fields": {"problem": ": ".join(filter(None, (name, text)))}}


def error_from_dict(data: Mapping[str, Any]) -> Exception:
    """The error that `error_to_dict` described, of the same class.

    A code that this version does not know becomes a `VgenError` that names the code.
    """
    code, fields = data["code"], data["fields"]
    if code in _CLASSES:
        return _CLASSES[code](**fields)
    if code in _BUILT_IN:
        return getattr(builtins, code)(fields["problem"])
    return VgenError(f"{code}: {fields.get('problem', 'no message')}")
