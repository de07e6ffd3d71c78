"""Read a long document once, keep its KV cache as a file, ask it anything, fast, on a CPU."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.decoding.sampling import SamplingParams
    from thresher.engine.llm import LLM, Completion, Context

# Threads of torch's own operations wait for each other by spinning, without end by default: a neighbour on one of their
# processors then stops them all. Read when torch loads its OpenMP runtime, so too late if torch is already imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Context", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `thresher --help` should not."""
    if name in ("LLM", "Completion", "Context"):
        from thresher.engine import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from thresher.decoding.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'thresher' has no attribute '{name}'")
