"""Which calls may use an engine now: which of them exclude each other, and which wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from ..engine_protocol import EngineState, StateMachine
from ..errors import EngineStateError

SYNC_SECONDS = 600.0
"""How long a generation waits for a weight sync in progress."""


class EngineUse:
    """Reserves an engine for calls.

    An engine in this process runs one call at a time. A concurrent engine (servers) generates for any number of
    threads; all other calls still run one at a time. A call that cannot run now raises `EngineStateError`.
    """

    def __init__(self, states: StateMachine, *, concurrent: bool) -> None:
        self._states, self._concurrent, self._process = states, concurrent, os.getpid()
        self.busy = threading.Lock()
        """Held by each call that is not a generation, and by a generation of an engine that is not concurrent."""
        self._changed = threading.Condition()
        self._open: list[tuple[str, int]] = []
        """The generations that have begun, some of which wait for the engine: the call, and its thread."""
        self.held_back = 0
        """How many calls wait for the end of all generations, so that no other generation begins."""

    @contextmanager
    def exclusive(self, call: str, wait_seconds: float = 0.0) -> Iterator[None]:
        """Reserve the engine for a call that is not a generation.

        Raises `EngineStateError` if it is in use, and still is after `wait_seconds`.
        """
        self.refuse_in_child(call)
        if not self.busy.acquire(timeout=wait_seconds):
            raise self._in_use(call)
        try:
            yield
        finally:
            self.busy.release()

    @contextmanager
    def alone(self, call: str, wait_seconds: float = 0.0) -> Iterator[None]:
        """Reserve the engine for a call that would cut generations off: `exclusive`, and no generation is open.

        Waits up to `wait_seconds` for those that are, and lets no other begin meanwhile. Raises `EngineStateError`.
        """
        self.refuse_in_child(call)
        self.refuse_within_generation(call)
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            self.held_back += 1
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._open, wait_seconds):
                    raise self._generating(call, len(self._open), wait_seconds)
            with self.exclusive(call, max(deadline - time.monotonic(), 0.0)):
                yield
        finally:
            with self._changed:
                self.held_back -= 1
                self._changed.notify_all()

    @contextmanager
    def generating(self, call: str) -> Iterator[None]:
        """Reserve the awake engine for a generation.

        A concurrent engine is shared with other generations; this waits for a weight sync in progress. Any other
        engine is reserved for this thread alone; this waits for another thread's generation, and raises
        `EngineStateError` for a second one of the same thread, which would wait for itself.
        """
        self.refuse_in_child(call)
        if not self._concurrent:
            self.refuse_within_generation(call)
        entry = call, threading.get_ident()
        with self._changed:
            # One that is within another of the same thread would wait for itself.
            self._changed.wait_for(lambda: not self.held_back or self._own() is not None)
            self._open.append(entry)
        try:
            with nullcontext() if self._concurrent else self.busy:
                if self._concurrent:
                    self._states.wait_while(EngineState.SYNCING, SYNC_SECONDS)
                self._states.require(call, EngineState.AWAKE)
                yield
        finally:
            with self._changed:
                self._open.remove(entry)
                self._changed.notify_all()

    def exclusive_within_generation(self) -> AbstractContextManager[object]:
        """Exclude other threads from a part of a generation. Without a concurrent engine they are excluded already."""
        return self.busy if self._concurrent else nullcontext()

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, which has neither the engine's threads nor its device."""
        return os.getpid() != self._process

    def refuse_in_child(self, call: str) -> None:
        """Raise `EngineStateError` in a forked child."""
        if self.inherited:
            hint = "a forked child cannot use it: construct it in the child, or start the process by spawn"
            raise EngineStateError(call, "in the process that constructed it", hint)

    def refuse_within_generation(self, call: str) -> None:
        """Raise `EngineStateError` if this thread itself has a generation open: waiting for that would not end."""
        if self._own() is not None:
            raise self._in_use(call)

    def _own(self) -> str | None:
        """The generation that this thread has open."""
        thread = threading.get_ident()
        return next((generation for generation, owner in tuple(self._open) if owner == thread), None)

    def _in_use(self, call: str) -> EngineStateError:
        """The error of a call that finds the engine reserved: it says by what, and what must end first."""
        own = self._own()
        streams = not self._concurrent and any(generation == "stream" for generation, _ in tuple(self._open))
        if own == "stream" or (own is None and streams):
            where = "another thread" if own is None else "this thread"
            hint = "finish the stream's iterator, or call its close(), first"
            return EngineStateError(call, f"held by a stream that {where} has open", hint)
        if own is not None:
            return EngineStateError(call, "generating in this thread", "call it after generate() has returned")
        return EngineStateError(call, "at work in another thread", "wait for that call to return")

    def _generating(self, call: str, count: int, waited: float) -> EngineStateError:
        """The error of a call that would cut `count` generations off."""
        after = f" after {waited:g} s" if waited else ""
        calls = "a call of another thread" if count == 1 else f"{count} calls of other threads"
        hint = f"wait until they return, finish or close open streams, or pass {call}(wait_seconds=...)"
        return EngineStateError(call, f"generating for {calls}{after}", hint)
