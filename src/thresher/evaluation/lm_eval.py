"""Thresher as a model of EleutherAI's lm-evaluation-harness (lm_eval).

    python -m thresher.evaluation.lm_eval --tasks TASK \
        --model_args 'model=smollm2-135m-instruct,attention="streaming:sinks=4,window=1024"'

The harness finds models by a table of its own and has no entry points for others, so this module registers one and
then calls the harness' command line, whose options are all there. Quotes protect the commas of a method.

Methods apply to decoded tokens: contexts are prefilled densely, but for their last token, and a continuation is decoded
token by token under the method. A rolling log-likelihood has no context, so it decodes whole texts: slow, and right.
"""

import logging
import sys
from dataclasses import replace
from typing import Any

from thresher.attention import DEFAULT_ATTENTION
from thresher.cache.sequence import KVSequence
from thresher.decoding.sampling import SamplingParams
from thresher.engine.llm import LLM
from thresher.errors import ThresherError, UsageError
from thresher.evaluation.teacher import prefill, score_tokens
from thresher.models.resolve import DEFAULT_MODEL

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    message = f"lm_eval is not installed ({error}); pip install 'thresher[lm-eval]'"
    if __name__ == "__main__":
        raise SystemExit(f"error: {message}") from None
    raise UsageError(message) from error

_log = logging.getLogger(__name__)
_MAX_NEW_TOKENS = 256  # the harness' own default


@register_model("thresher")
class ThresherLM(TemplateLM):  # type: ignore[misc]
    """model, attention, weights, kv_budget (MiB), allow_extrapolation: as of LLM and the command line."""

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        attention: str = DEFAULT_ATTENTION,
        weights: str = "bf16",
        kv_budget: int | None = None,
        allow_extrapolation: bool = False,
        batch_size: Any = None,  # the harness passes these three; the scheduler batches by the KV budget
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(
                f"model_args {', '.join(unknown)}: not known; quote a method with commas, "
                'e.g. attention="streaming:sinks=4,window=1024"'
            )
        self.llm = LLM(
            model,
            attention=attention,
            weights=weights,
            kv_budget=kv_budget * 2**20 if kv_budget else None,
            allow_extrapolation=allow_extrapolation,
        )
        self.tokenizer = self.llm.model.tokenizer
        self.max_length = min(self.llm.positions, self.llm.kv_budget // self.llm.runner.layout.bytes_per_token)

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return int(eos if eos is not None else min(self.llm.model.eos_token_ids))

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.llm.model.tokenizer_fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Without a word on special tokens, those the tokenizer puts before a text, unless the text has them."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities (nats) of each continuation, and whether it is the greedy one."""
        results = []
        read: list[int] = []
        sequence: KVSequence | None = None
        for texts, context, continuation in tqdm(requests, desc="thresher", disable=disable_tqdm):
            kept = context[-max(1, self.max_length + 1 - len(continuation)) :]  # as the harness: cut from the left
            if sequence is None or kept[:-1] != read:  # the choices of one question come in a row
                read = kept[:-1]
                sequence = prefill(self.llm, read)
            logprobs, greedy = score_tokens(
                self.llm.runner, sequence, kept[-1], continuation[-self.max_length :], self.llm.attention
            )
            result = (sum(logprobs), greedy)
            results.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows of the longest length, each token scored once."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            total = sum(logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to all requests, batched by the scheduler. Where prompt and answer do not both fit, the answer may
        become shorter, down to a quarter of the longest length; only then is the prompt cut, from the left."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            chosen = _sampling(options)
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            room = max(1, self.max_length - len(prompt), self.max_length // 4)
            if chosen.max_new_tokens > room:
                chosen = replace(chosen, max_new_tokens=room)
            kept = prompt[-max(1, self.max_length - chosen.max_new_tokens) :]
            if len(kept) < len(prompt):
                _log.warning("a prompt of %d tokens is cut to its last %d", len(prompt), len(kept))
            prompts.append(kept)
            params.append(chosen)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="thresher", disable=disable_tqdm) as bar:
            for event in self.llm.stream(prompts, params):
                texts[event.request] += event.text
                if event.finish_reason:
                    self.cache_hook.add_partial("generate_until", requests[event.request].args, texts[event.request])
                    bar.update()
        return texts


def _sampling(options: dict[str, Any]) -> SamplingParams:
    """The harness' generation arguments. Raises UsageError for one that Thresher does not have."""
    given = dict(options)
    until = given.pop("until", None) or []
    tokens = _MAX_NEW_TOKENS
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        tokens = int(given.pop(name, tokens))
    sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sample else 0.0) or 0.0)
    known = {
        name: given.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed") if name in given
    }
    if given:
        raise UsageError(f"generation arguments {', '.join(given)}: not known to Thresher; leave them out")
    return SamplingParams(
        max_new_tokens=tokens,
        temperature=0.0 if sample is False else temperature,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        **known,
    )


def main() -> None:
    """The harness' command line with `--model thresher` as its default."""
    from lm_eval.__main__ import cli_evaluate

    if len(sys.argv) > 1 and sys.argv[1] not in ("ls", "validate") and "--model" not in sys.argv:
        sys.argv += ["--model", "thresher"]
    try:
        cli_evaluate()
    except ThresherError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
