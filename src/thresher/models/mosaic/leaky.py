"""Leaky averages y_t = x_t + lam_t y_{t-1} of many channels: as a parallel scan to train with, and carried on."""

import torch

CHUNK = 32  # steps that one triangular matrix covers


def leaky_scan(x: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """y_t = x_t + exp(log_decay_t) y_{t-1} from y_0 = x_0, without a loop over time; differentiable.

    x `[batch, steps, heads, dim]`; log_decay `[batch or 1, steps, heads]`, at most 0, -inf included (nothing is kept).
    By chunks: inside of one a lower-triangular matrix of decays, whose exponents are sums over the steps between and so
    exact for decays near 1; between chunks the same recurrence again, over chunks for steps. O(steps * chunk) memory.
    """
    batch, steps, heads, dim = x.shape
    if steps == 1:
        return x
    size = min(CHUNK, steps)
    count = -(-steps // size)
    if fill := count * size - steps:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, fill))
        log_decay = torch.nn.functional.pad(log_decay, (0, 0, 0, fill))
    x = x.view(batch, count, size, heads, dim)
    log_decay = log_decay.view(-1, count, size, heads)
    y = torch.einsum("bnhij,bnjhd->bnihd", _decays(log_decay).to(x.dtype).expand(batch, -1, -1, -1, -1), x)
    if count > 1:
        # What each chunk hands to the next: its last value, which fades over the whole of the next chunk.
        carried = leaky_scan(y[:, :-1, -1], log_decay[:, :-1].sum(2))
        carried = torch.nn.functional.pad(carried, (0, 0, 0, 0, 1, 0))
        y = y + log_decay.cumsum(2).exp().to(x.dtype)[..., None] * carried[:, :, None]
    return y.reshape(batch, count * size, heads, dim)[:, :steps]


def _decays(log_decay: torch.Tensor) -> torch.Tensor:
    """`[batch, chunks, size, heads]` -> `[batch, chunks, heads, size, size]`: how much of step j is left at step i."""
    size = log_decay.shape[2]
    steps = torch.arange(size, device=log_decay.device)
    between = steps[:, None] > steps[None, :]  # of j < i: decays of j+1 .. i
    by_head = log_decay.transpose(2, 3)
    exponents = by_head[..., None].expand(*by_head.shape, size).masked_fill(~between, 0).cumsum(-2)
    return exponents.exp() * (steps[:, None] >= steps[None, :])


def leaky_loop(x: torch.Tensor, log_decay: torch.Tensor, carried: torch.Tensor | None = None) -> torch.Tensor:
    """What `leaky_scan` computes, step by step; carried `[batch, heads, dim]`: the average of what came before."""
    decay = log_decay.exp().expand(x.shape[0], -1, -1)[..., None]
    steps = []
    for t in range(x.shape[1]):
        y = x[:, t] if carried is None else x[:, t] + decay[:, t] * carried
        steps.append(y)
        carried = y
    return torch.stack(steps, dim=1)
