from typing import Annotated

import typer

from thresher.cli import options as o
from thresher.cli.terminal import say, write_json


def methods(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache to give the cost for.")] = "2048,8192,32768",
    heads: Annotated[
        str, typer.Option(help="Query heads x KV heads x head_dim x layers. Default: those of the embedded model.")
    ] = "9x3x64x30",
    json: o.Json = None,
) -> None:
    """List the attention methods: parameters with defaults, paper, exactness, and the cost of a token.

    Choose one with --attention NAME:parameter=value,...   e.g. --attention lsh:K=10,L=150,window=128
    """
    import inspect
    from dataclasses import fields

    from rich.console import Console

    from thresher.attention.registry import METHODS
    from thresher.attention.sparse import BudgetMethod, SparseMethod
    from thresher.errors import UsageError
    from thresher.machine.cost import ModelShape, attention_cost

    lengths = o.numbers("contexts", contexts)
    numbers = o.numbers("heads", heads.replace("x", ","))
    if len(numbers) != 4 or numbers[0] % numbers[1]:
        raise UsageError(f"--heads {heads}: give query heads x KV heads x head_dim x layers, e.g. 32x8x128x32")
    q_heads, kv_heads, head_dim, layers = numbers
    shape = ModelShape(layers, q_heads, kv_heads, head_dim, 0, 0, 2)
    console = Console(highlight=False)
    listed = []
    for name, kind in METHODS.items():
        method = kind()
        cost = {n: method.cost(shape, n) for n in lengths}
        about, _, details = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
        about, details = " ".join(about.split()), " ".join(details.split())
        parameters = {f.name: f.default for f in fields(kind)}
        listed.append(
            {
                "name": name,
                "about": about,
                "details": details,
                "parameters": parameters,
                "paper": kind.paper,
                "exact": kind.exact,
                "cost": {n: {"bytes": c.bytes, "flops": c.flops} for n, c in cost.items()},
                "dense_up_to": method.least_context(shape) if isinstance(method, SparseMethod) else None,
            }
        )
        if str(json) == "-":
            continue
        console.print(f"[bold]{name}[/]{'  (exact)' if kind.exact else ''}  {kind.paper}", soft_wrap=True)
        console.print(f"  {about}", soft_wrap=True)
        if details:
            console.print(f"  [dim]{details}[/]", soft_wrap=True)
        if parameters:
            text = ",".join(f"{k}={v}" for k, v in parameters.items())
            console.print(f"  {name}:{text}", soft_wrap=True)
        dense = {n: attention_cost(shape, n).bytes for n in lengths}
        shares = ", ".join(f"{100 * c.bytes / dense[n]:.1f} % at {n}" for n, c in cost.items())
        console.print(f"  reads {shares}\n", soft_wrap=True)
    if str(json) != "-":
        for kind in (SparseMethod, BudgetMethod):
            shared = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[2]
            console.print(f"[bold]Shared[/]  [dim]{' '.join(shared.split())}[/]", soft_wrap=True)
        say("reads: expected bytes of attention a token, of dense. A method stays dense where it would not win.")
    write_json(json, listed)
