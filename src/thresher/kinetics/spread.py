"""Where samples are taken: in this process, in several on this machine, or on the machines of a Ray cluster."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from thresher.errors import UsageError
from thresher.kinetics.experiment import Entry, Experiment, Round, Run, answer, chunks, judged
from thresher.kinetics.tasks import Problem

if TYPE_CHECKING:
    from thresher.engine.llm import LLM

AT_ONCE = 64  # sequences that decode together
_ASKING = 4  # threads that ask for them


def here(llm: "LLM", experiment: Experiment) -> Run:
    """One sample after another, as they end. Threads ask for a few questions each, so that where one has only its
    longest answers left the others fill the passes."""

    def run(rounds: Sequence[Round]) -> Iterator[Entry]:
        parts: queue.SimpleQueue[list[Round]] = queue.SimpleQueue()
        for part in chunks(rounds, AT_ONCE // _ASKING):
            parts.put(part)
        done: queue.SimpleQueue[tuple[Problem, Entry] | Exception | None] = queue.SimpleQueue()
        left = threading.Event()

        def ask() -> None:
            try:
                while not left.is_set():
                    for entry in answer(llm, experiment, parts.get_nowait()):
                        done.put(entry)
                        if left.is_set():
                            return
            except queue.Empty:
                pass
            except Exception as error:
                done.put(error)
            finally:
                done.put(None)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(_ASKING)]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                found = done.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield judged(*found)
        finally:
            left.set()

    return run


@contextmanager
def processes(source: str, experiment: Experiment, count: int, threads: int) -> Iterator[Run]:
    """In so many processes of so many threads, each with weights of its own; samples come with their chunk.

    Raises what loading and answering do, from the first process that fails.
    """
    task = partial(answered, source, experiment, threads)
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))

    def run(rounds: Sequence[Round]) -> Iterator[Entry]:
        futures = [pool.submit(task, part) for part in _dealt(rounds, count)]
        for future in as_completed(futures):
            yield from future.result()

    try:
        yield run
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def on_ray(source: str, experiment: Experiment, address: str | None, threads: int) -> Run:
    """As tasks of Ray, which keeps the process that has loaded the model. address: of a cluster, "auto" for the one of
    this machine, None for one that is started. Raises UsageError if Ray is not installed or cannot be reached."""
    try:
        import ray
    except ImportError:
        raise UsageError("spreading over machines needs Ray; install it with: pip install 'thresher[ray]'") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"Ray at {address}: {str(error).splitlines()[0]}") from None
    remote = ray.remote(num_cpus=threads)(answered)

    def run(rounds: Sequence[Round]) -> Iterator[Entry]:
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        waiting = [remote.remote(source, experiment, threads, part) for part in _dealt(rounds, workers)]
        while waiting:
            done, waiting = ray.wait(waiting)
            for one in done:
                try:
                    yield from ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None

    return run


def answered(source: str, experiment: Experiment, threads: int, rounds: Sequence[Round]) -> list[Entry]:
    """The samples of some requests, in a process that keeps its model."""
    return [judged(*found) for found in answer(_loaded(source, experiment.weights, threads), experiment, rounds)]


@cache
def _loaded(source: str, weights: str, threads: int) -> "LLM":
    from thresher.engine.llm import LLM

    torch.set_num_threads(threads)
    return LLM(source, weights=weights)


def _dealt(rounds: Sequence[Round], workers: int) -> list[list[Round]]:
    """Chunks, at least one for each worker where there are requests enough."""
    most = max(1, -(-sum(r.count for r in rounds) // workers))
    return list(chunks(rounds, min(AT_ONCE, most)))
