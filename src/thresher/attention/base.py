"""What an attention method is: a frozen dataclass that says which cached rows a query reads."""

from dataclasses import dataclass, fields
from typing import ClassVar

from thresher.kernels.attention import Visibility
from thresher.machine.cost import Cost, ModelShape, attention_cost


@dataclass(frozen=True)
class AttentionMethod:
    """Base of all methods. Parameters are the dataclass's fields; the docstring's first line describes it.

    Methods apply to generated tokens. Prompts and questions are always read densely: sparse prefill costs quality that
    no later step gets back.
    """

    name: ClassVar[str]
    paper: ClassVar[str]  # a link
    exact: ClassVar[bool]  # gives the dense result

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
