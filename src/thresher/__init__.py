"""Read a long document once, keep its KV cache as a file, ask it anything, fast, on a CPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.engine.llm import LLM, Completion, Context
    from thresher.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Context", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `thresher --help` should not."""
    if name in ("LLM", "Completion", "Context"):
        from thresher.engine import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from thresher.engine.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'thresher' has no attribute '{name}'")
