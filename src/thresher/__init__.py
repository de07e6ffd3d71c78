"""Read a long document once, keep its KV cache as a file, ask it anything, fast, on a CPU."""

from thresher.engine.llm import LLM, Completion, Context
from thresher.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Context", "SamplingParams"]
