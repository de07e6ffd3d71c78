"""What an attention method is: a frozen dataclass that says which cached rows a query reads."""

from dataclasses import dataclass, fields
from typing import ClassVar

from thresher.kernels.attention import Visibility


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
        """The rows a query sees, None for all."""
        return None

    def rows_read(self, context: int) -> int:
        """Rows of K (and as many of V) that one query reads in each layer and KV head, of `context` there are."""
        return context

    def __str__(self) -> str:
        chosen = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}:{chosen}" if chosen else self.name
