"""One engine for a model: a queue that any thread may fill, and one thread that runs what is in it."""

import atexit
import contextlib
import itertools
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from thresher.engine.requests import Event, Request
from thresher.engine.scheduler import Scheduler

_running: "weakref.WeakSet[Engine]" = weakref.WeakSet()  # those to be stopped before the interpreter goes away


@dataclass(frozen=True)
class _Submit:
    requests: Sequence[Request]
    stream: "Stream"
    threads: int


@dataclass(frozen=True)
class _Cancel:
    request: int


class Stream(Iterator[Event]):
    """Events of requests that were submitted together, as they come, until the last of them has ended.

    Close it, or let it go, and what still runs is cancelled within one pass.
    """

    def __init__(self, engine: "Engine", requests: Sequence[Request]) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._samples = {r.id: r.params.n for r in requests}  # that have not ended

    def __next__(self) -> Event:
        if not self._samples:
            raise StopIteration
        return self._note(self._events.get())

    def _note(self, event: Event) -> Event:
        if event.finish_reason:
            self._samples[event.request] -= 1
            if not self._samples[event.request]:
                del self._samples[event.request]
        return event

    def cancel(self, request: int | None = None) -> None:
        """End one request, or all; their last events say "cancelled" (or what came before that)."""
        for id in list(self._samples) if request is None else [request]:
            self._engine.post(_Cancel(id))

    def close(self) -> None:
        """Cancel, and wait until nothing runs any more."""
        self.cancel()
        while self._samples and self._engine.alive:
            with contextlib.suppress(queue.Empty):
                self._note(self._events.get(timeout=0.1))
        self._samples.clear()

    def put(self, event: Event) -> None:
        """For the engine."""
        self._events.put(event)

    def __del__(self) -> None:
        if self._samples:
            self.cancel()


class Engine:
    """Runs requests of any number of threads in common passes.

    Its thread lives while there is work and ends when there is none, so an engine that is let go leaves nothing behind.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._inbox: queue.SimpleQueue[_Submit | _Cancel] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._lock = threading.RLock()  # of whether a thread runs; a stream may be let go while it is held
        self._thread: threading.Thread | None = None
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self._stopping = False

    def new_id(self) -> int:
        """A name for a request, never given twice."""
        return next(self._ids)

    def check(self, request: Request) -> None:
        """Raises UsageError or CapacityError if a request could never run."""
        self._scheduler.check(request)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests; they run beside all others. Raises UsageError or CapacityError if one could never run, and
        then none does."""
        for request in requests:
            self._scheduler.check(request)
        stream = Stream(self, requests)
        if requests:
            self.post(_Submit(requests, stream, torch.get_num_threads()))
        return stream

    def post(self, message: "_Submit | _Cancel") -> None:
        """Hand a message to the engine's thread, which is started if there is none."""
        with self._lock:
            if isinstance(message, _Cancel) and self._thread is None:
                return
            self._inbox.put(message)
            if self._thread is None:
                self._stopping = False
                self._thread = threading.Thread(target=self._run, name="thresher-engine", daemon=True)
                _running.add(self)
                self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None

    def stop(self) -> None:
        """End what runs after the present pass. For the end of the process."""
        with self._lock:
            thread = self._thread
            self._stopping = True
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            try:
                while not self._stopping:
                    self._take_messages()
                    if not self._scheduler.busy:
                        break
                    self._deliver(self._scheduler.step())
            except BaseException as error:  # a fault of ours: nobody may wait for ever
                self._fail_all(error)
            with self._lock:
                if self._stopping or (self._inbox.empty() and not self._scheduler.busy):
                    self._thread = None
                    return

    def _take_messages(self) -> None:
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Cancel):
                self._deliver(self._scheduler.cancel(message.request))
                continue
            if torch.get_num_threads() != message.threads:  # a setting of each thread; the callers' counts
                torch.set_num_threads(message.threads)
            for request in message.requests:
                self._streams[request.id] = weakref.ref(message.stream)
                self._scheduler.add(request)
            del message  # or the stream would live until the next one comes

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            reference = self._streams.get(event.request)
            stream = reference() if reference else None
            if stream is not None:
                stream.put(event)
        for request in {event.request for event in events if event.finish_reason}:
            if not self._scheduler.runs(request):
                self._streams.pop(request, None)

    def _fail_all(self, error: BaseException) -> None:
        raised = error if isinstance(error, Exception) else RuntimeError(f"the engine was stopped: {error!r}")
        for request in list(self._streams):
            self._deliver(self._scheduler.fail(request, raised))


@atexit.register
def _stop_all() -> None:
    for engine in list(_running):
        engine.stop()
