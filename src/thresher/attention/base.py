"""What an attention method is: a frozen dataclass that says which cached rows a query reads."""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, get_type_hints

from thresher.errors import UsageError
from thresher.kernels.attention import Visibility
from thresher.machine.cost import Cost, ModelShape, attention_cost

LARGEST = 2**53  # of a parameter: a float holds every whole number up to here, and sums of a few stay within 64 bits


@dataclass(frozen=True)
class AttentionMethod:
    """Base of all methods. Parameters are the dataclass's fields; the docstring's first line describes it.

    Methods apply to generated tokens. Prompts and questions are always read densely: sparse prefill costs quality that
    no later step gets back.
    """

    name: ClassVar[str]
    paper: ClassVar[str]  # a link
    exact: ClassVar[bool]  # gives the dense result

    def __post_init__(self) -> None:
        """Raises UsageError if a parameter is not of its type, not finite, or too large for the kernels."""
        for name, kind in parameter_types(type(self)).items():
            value = getattr(self, name)
            if kind is int and not isinstance(value, Integral):
                raise UsageError(f"{self.name}, {name}={value}: give a whole number")
            if kind is float and not isinstance(value, Real):
                raise UsageError(f"{self.name}, {name}={value}: give a number")
            if kind is not str and not abs(value) <= LARGEST:
                raise UsageError(f"{self.name}, {name}={value}: give a number up to 2^53")

    def visibility(self) -> Visibility | None:
        """The rows a query sees by their position alone, None for all."""
        return None

    def cost(self, shape: ModelShape, context: int) -> Cost:
        """All layers' attention of one token to `context` cached ones."""
        return attention_cost(shape, context)

    def __str__(self) -> str:
        """What chooses this method in `parse_method`: the name and the parameters that are not as by default."""
        chosen = [(f.name, getattr(self, f.name)) for f in fields(self)]
        default = {f.name: f.default for f in fields(self)}
        text = ",".join(f"{name}={value}" for name, value in chosen if value != default[name])
        return f"{self.name}:{text}" if text else self.name


def parameter_types(method: type[AttentionMethod]) -> dict[str, type]:
    """The type of each parameter: int, float (a whole number is one, too) or str."""
    hints = get_type_hints(method)
    return {f.name: hints[f.name] for f in fields(method)}
