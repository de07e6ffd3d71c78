"""Methods by name, and the text that chooses one: `streaming:sinks=4,window=1024`."""

import difflib
import math

from thresher.attention.auto import Auto
from thresher.attention.base import AttentionMethod, parameter_types
from thresher.attention.block_topk import BlockTopK
from thresher.attention.clusters import Clusters
from thresher.attention.dense import Dense
from thresher.attention.lsh import LSH
from thresher.attention.quest import Quest
from thresher.attention.sample import Sample
from thresher.attention.sign import Sign
from thresher.attention.snapkv import SnapKV
from thresher.attention.streaming import Streaming
from thresher.attention.topk import TopK
from thresher.attention.verified import Verified
from thresher.errors import UsageError

METHODS: dict[str, type[AttentionMethod]] = {
    method.name: method
    for method in (Dense, Auto, LSH, Sign, Verified, Clusters, Quest, BlockTopK, SnapKV, Streaming, TopK, Sample)
}


def parse_method(text: str) -> AttentionMethod:
    """`name` or `name:parameter=value,...`. Raises UsageError that names what is unknown and the nearest known."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise UsageError(f"attention '{name}': {_unknown(name, list(METHODS))}")
    method = METHODS[name]
    types = parameter_types(method)
    chosen: dict[str, int | float | str] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in types:
            raise UsageError(f"attention '{name}', parameter '{key}': {_unknown(key, list(types))}")
        kind = types[key]
        try:
            chosen[key] = number(value) if kind is float else kind(value)
        except ValueError:
            raise UsageError(f"attention '{name}', {key}={value}: not a {_kind(kind)}") from None
    return method(**chosen)


def number(text: str) -> int | float:
    """A whole number stays one, so that it is written as it was given. Raises ValueError if it is not finite."""
    try:
        return int(text)
    except ValueError:
        if not math.isfinite(x := float(text)):
            raise
        return x


def _kind(kind: type) -> str:
    return {int: "whole number", float: "number"}.get(kind, kind.__name__)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"not known; did you mean '{near[0]}'?" if near else f"not known; there is {', '.join(known) or 'none'}"
