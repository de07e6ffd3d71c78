"""Methods by name, and the text that chooses one: `streaming:sinks=4,window=1024`."""

import difflib
from dataclasses import fields

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.attention.streaming import Streaming
from thresher.errors import UsageError

METHODS: dict[str, type[AttentionMethod]] = {method.name: method for method in (Dense, Streaming)}


def parse_method(text: str) -> AttentionMethod:
    """`name` or `name:parameter=value,...`. Raises UsageError that names what is unknown and the nearest known."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise UsageError(f"attention '{name}': {_unknown(name, list(METHODS))}")
    method = METHODS[name]
    types = {f.name: f.type for f in fields(method)}
    chosen: dict[str, int | float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in types:
            raise UsageError(f"attention '{name}', parameter '{key}': {_unknown(key, list(types))}")
        try:
            chosen[key] = int(value) if types[key] in (int, "int") else float(value)
        except ValueError:
            raise UsageError(f"attention '{name}', {key}={value}: not a number") from None
    return method(**chosen)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"not known; did you mean '{near[0]}'?" if near else f"not known; there is {', '.join(known) or 'none'}"
