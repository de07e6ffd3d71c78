"""What a user asks of speculation, and the text that says it: `self:auto,gamma=4`."""

from dataclasses import dataclass, replace

from thresher.attention.base import AttentionMethod, parameter_types
from thresher.attention.registry import METHODS, parse_method
from thresher.attention.sparse import SparseMethod
from thresher.errors import UsageError

DRAFTERS = ("auto", "self", "ngram", "model", "none")
MOST_GAMMA = 15  # with the token before it a draft is then verified by the split path of attention
_WEIGHTS = ("bf16", "int8", "float32")


@dataclass(frozen=True)
class Speculation:
    """How drafts are made. The tokens are those of the model without them (MagicDec, section 3).

    drafter: "self", the model itself with `method` as its view of the KV cache; "model", another model `model` in
    `weights`, its own cache read by `method`; "ngram", what followed the last tokens where they came before; "auto",
    whichever of those without a model of their own pays (and of `model`, if one is named). gamma: tokens of a draft;
    None, as many as pay, and none where none does. ngram: most tokens that are looked up.

    Raises UsageError on a value that makes no sense.
    """

    drafter: str = "auto"
    gamma: int | None = None
    method: AttentionMethod | None = None
    model: str | None = None
    weights: str | None = None
    ngram: int = 3

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS or self.drafter == "none":
            raise UsageError(f"speculate '{self.drafter}': choose from {', '.join(DRAFTERS)}")
        if self.gamma is not None and not 1 <= self.gamma <= MOST_GAMMA:
            raise UsageError(
                f"speculate, gamma={self.gamma}: a draft has 1 to {MOST_GAMMA} tokens; leave it out, and it is chosen"
            )
        if not 1 <= self.ngram <= 16:
            raise UsageError(f"speculate, ngram={self.ngram}: look up 1 to 16 tokens")
        if self.drafter == "model" and not self.model:
            raise UsageError("speculate 'model': name one, as model:ID")
        if self.drafter == "self" and not isinstance(self.method, SparseMethod):
            raise UsageError(
                "speculate 'self': name a sparse attention method, as self:auto; read densely, a draft saves nothing"
            )

    def check_target(self, method: AttentionMethod | None) -> None:
        """Raises UsageError if the model's own drafts cannot be verified by an attention method."""
        if self.drafter == "self" and isinstance(method, SparseMethod):
            raise UsageError(
                f"speculate '{self}' with attention '{method}': the model's own drafts are verified densely; use "
                "attention dense, or another drafter (ngram, model:ID)"
            )

    def check_budget(self, positions: int) -> None:
        """Raises UsageError if a draft may read more tokens than a sequence of the model can have."""
        if self.method is not None and (budget := getattr(self.method, "budget", 0)) > positions:
            raise UsageError(
                f"speculate '{self}': the budget of {budget:,} tokens is more than the context of the model, "
                f"{positions:,}; give fewer, or a share below 1"
            )

    def __str__(self) -> str:
        """What `parse_speculation` understands."""
        name, given = self.drafter, []
        if self.drafter == "self":
            name, _, parameters = str(self.method).partition(":")
            name = f"self:{name}"
            given += [parameters] if parameters else []
        elif self.drafter == "model":
            name = f"model:{self.model}"
            if self.method:
                method, _, parameters = str(self.method).partition(":")
                given += [f"attention={method}", *([parameters] if parameters else [])]
        elif self.model:
            given.append(f"model={self.model}")
        given += [f"weights={self.weights}"] if self.weights else []
        given += [f"ngram={self.ngram}"] if self.ngram != Speculation.ngram else []
        given += [f"gamma={self.gamma}"] if self.gamma is not None else []
        text = ",".join(given)
        return f"{name}{',' if ':' in name else ':'}{text}" if text else name


def parse_speculation(text: str) -> Speculation | None:
    """`none`, `auto`, `self:METHOD,...`, `model:ID,...` or `ngram`, then settings: gamma=, and where they apply ngram=,
    model=, weights=, attention= and the parameters of the method. Raises UsageError that names what is wrong."""
    drafter, _, rest = text.partition(":")
    if drafter == "none" and not rest:
        return None
    if drafter not in DRAFTERS or drafter == "none":
        raise UsageError(f"speculate '{text}': choose from {', '.join(DRAFTERS)}, as self:auto or auto")
    parts = list(filter(None, rest.split(",")))
    subject = parts.pop(0) if drafter in ("self", "model") and parts and "=" not in parts[0] else None
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key in given:
            raise UsageError(f"speculate '{text}': '{part}' is not a setting, as gamma=4, given once")
        given[key] = value
    made = Speculation("auto" if drafter in ("self", "model") else drafter)
    if drafter == "model":
        made = replace(made, drafter="model", model=subject or given.pop("model", None))
    if "gamma" in given:
        made = replace(made, gamma=_whole("gamma", given.pop("gamma")))
    if drafter in ("auto", "ngram") and "ngram" in given:
        made = replace(made, ngram=_whole("ngram", given.pop("ngram")))
    if drafter == "auto" and "model" in given:
        made = replace(made, model=given.pop("model"))
    if made.model and "weights" in given:
        weights = given.pop("weights")
        if weights not in _WEIGHTS:
            raise UsageError(f"speculate, weights={weights}: choose from {', '.join(_WEIGHTS)}")
        made = replace(made, weights=weights)
    name = subject if drafter == "self" else given.pop("attention", None) if drafter == "model" else None
    known = parameter_types(METHODS[name]) if name in METHODS else {}
    if unknown := [key for key in given if key not in known]:
        raise UsageError(f"speculate '{text}': setting '{unknown[0]}' is not known here")
    method = parse_method(f"{name}:{','.join(f'{k}={v}' for k, v in given.items())}") if name else None
    if drafter == "self":
        return replace(made, drafter="self", method=method)
    return replace(made, method=method) if method else made


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"speculate, {name}={text}: give a whole number") from None
