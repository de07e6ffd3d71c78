"""Which methods a run compares."""

from collections.abc import Sequence

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.attention.registry import parse_method


def parse_methods(texts: Sequence[str]) -> list[AttentionMethod]:
    """Methods from texts that may each hold several, separated by `;`. Dense comes first, asked for or not.

    Every figure of a method stands beside dense of the same run. Raises UsageError for an unknown method.
    """
    parts = [part.strip() for text in texts for part in text.split(";")]
    methods = [Dense(), *(parse_method(part) for part in parts if part)]
    return list(dict.fromkeys(methods))
