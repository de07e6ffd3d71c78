"""Every causal class of transformers, made tiny, against transformers' own forward: right, refused, or cannot be made.

Run as a script, it prints a line for each, and writes docs/models.md: `python tests/models/sweep.py --write FILE`.
"""

import argparse
import copy
import itertools
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import byte_tokenizer
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.errors import UnsupportedModelError
from thresher.models.load import checked

LARGEST = 30_000_000  # parameters of a model that counts as tiny
TOKENS = 64

# What an attribute of a configuration becomes, by its name: the first pattern that matches all of it.
SHRUNK = [
    (r"(decoder_|encoder_|unpadded_)?vocab_size(_per_layer_input)?|context_vocab_size", 320),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_target_positions",
        512,
    ),
    (r"hidden_size|d_model|n_embd|dim_model|attention_hidden_size|word_embed_proj_dim|embedding_size|emb_dim", 80),
    (r"input_embedding_size|output_embedding_size|embedding_dim|lru_width|num_hidden|state_hidden_size", 80),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_(en|de)coder_layers|num_blocks", 4),
    (
        r"(moe_|shared_|shared_expert_|shared_experts_|moe_shared_expert_|dense_|expert_ffn_)?intermediate_size(_mlp)?",
        96,
    ),
    (
        r"n_inner|(encoder_|decoder_)?ffn_dim|dim_ff|dff|ffn_hidden_size|d_inner|expert_ffn_hidden_size|feed_forward_size",
        96,
    ),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", 2),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|attention_heads|(en|de)coder_attention_heads", 4),
    (r"num_(en|de)coder_attention_heads", 4),
    (r"(swa_)?(v_)?head_dim|attention_head_dim|dim_head|kv_channels|attention_head_size|d_head|global_head_dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim|index_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|hidden_size_per_layer_input|ple_embed_dim|laurel_rank|adapter_rank", 16),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_selected_experts", 2),
    (r"n_group|topk_group", 1),
    (r"sliding_window|sliding_window_size|window_size|attention_window_size|local_attention", 12),
    (r"attention_chunk_size", 16),
    (r"query_pre_attn_scalar", 16),
    (r"(first_k_dense_replace|num_dense_layers)", 1),
    (r"linear_num_(key|value)_heads|linear_num_heads|mamba_n(um)?_heads|index_n_heads", 4),
    (
        r"linear_(key_|value_)?head_dim|mamba_d_head|mamba_headdim|mamba_head_dim|mamba_d_state|ssm_state_size|state_size",
        16,
    ),
    (r"mamba_chunk_size|chunk_size|index_topk", 16),
    (r"num_kv_shared_layers", 0),
    (r"image_size", 32),
    (r"patch_size", 16),
]
# Values that are 1 or 0 by default and would hide that a factor is forgotten.
TELLING = {
    "residual_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
    "use_sliding_window": True,
    "max_window_layers": 2,
}
# What some classes want beside that.
FIXES: dict[str, dict[str, object]] = {
    "axk1": {"head_dim": 8},
    "axk2": {"head_dim": 8, "index_head_dim": 16},
    "bamba": {"mamba_n_heads": 10},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "deepseek_v3": {"head_dim": 8},
    "deepseek_v32": {"head_dim": 8, "index_head_dim": 16},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 10},
    "glm_moe_dsa": {"head_dim": 8, "index_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 10},
    "helium": {"head_dim": 20},
    "kimi_linear": {"num_experts_per_token": 2},
    "mamba2": {"num_heads": 10},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 20},
    "reformer": {"is_decoder": True},
    "roc_bert": {"shape_vocab_size": 100, "pronunciation_vocab_size": 100, "is_decoder": True},
    "stablelm": {"num_attention_heads": 5, "num_key_value_heads": 5},
    "xlnet": {"d_head": 20},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "youtu": {"head_dim": 8},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Row:
    """What came of one class: a verdict, the reason, and mean KL to transformers float32 for each format."""

    model_type: str
    verdict: str  # "right", "refused", "cannot be made" or "wrong"
    reason: str = ""
    kl: tuple[float, ...] = ()


def shrink(config, fixes):
    """The arguments that make a configuration of this kind tiny, its nested ones too."""
    arguments = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            arguments[name] = shrink(value, {}) | fixes.get(name, {})
            continue
        if name in TELLING:
            arguments[name] = TELLING[name]
        elif (isinstance(value, int) and not isinstance(value, bool)) or value is None:
            sizes = (size for pattern, size in SHRUNK if re.fullmatch(pattern, name))
            if (size := next(sizes, None)) is not None and (value is not None or name == "head_dim"):
                arguments[name] = size
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    arguments |= {k: v for k, v in tokens.items() if hasattr(config, k)}
    return arguments | {k: v for k, v in fixes.items() if not isinstance(v, dict) or k not in arguments}


def make(model_type):
    """A tiny model in float32 whose weights have the spread of trained ones."""
    kind = CONFIG_MAPPING[model_type]
    fixes = FIXES.get(model_type, {})
    try:
        default = kind()
    except Exception:
        default = kind(**fixes)
    config = kind(**shrink(default, fixes))
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    if sum(sizes.values()) > LARGEST:
        largest = max(sizes, key=sizes.get)
        raise ValueError(f"{sum(sizes.values()):.0e} parameters, the largest {largest}")
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread(module)
    return module


def spread(module):
    """Weights as trained models have them: norms up to 300 where they are centred at zero, biases and scales not 0."""
    draw = torch.Generator().manual_seed(1)
    modules = dict(module.named_modules())
    with torch.no_grad():
        for name, p in module.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            noise = torch.randn(p.shape, generator=draw)
            if isinstance(owner, torch.nn.Embedding):
                p.copy_(noise)
            elif p.dim() >= 2:
                p.copy_(noise * p.shape[-1] ** -0.5)
            elif "norm" in name.lower() and not p.any():  # gain 1 + w, or a bias
                p.copy_(0.3 * noise)
                if name.endswith("weight"):
                    p[: max(1, len(p) // 32)] = torch.linspace(15, 300, max(1, len(p) // 32))
            elif "norm" in name.lower():
                p.copy_(p * (0.4 * noise).exp())
                p[: max(1, len(p) // 32)] *= 8
            else:
                p.add_(0.1 * noise)
        tokens = sample(module)
        for _ in range(2):  # twice, as an output that is tied changes the input as well
            logits = module(input_ids=tokens[None], use_cache=False).logits
            head = module.get_output_embeddings()
            if head is not None and isinstance(getattr(head, "weight", None), torch.Tensor):
                head.weight.mul_(2.5 / logits.std().clamp_min(1e-6))


def sample(module):
    return torch.randint(3, 300, (TOKENS,), generator=torch.Generator().manual_seed(2))


def own(module, tokens):
    with torch.inference_mode():
        return module(input_ids=tokens[None], use_cache=False).logits[0].float()


def ours(model, tokens):
    """In pieces, each beside a piece of another sequence."""
    runner = Runner(model)
    first, second = KVSequence(runner.layout), KVSequence(runner.layout)
    cuts = [0, 1, 2, 9, 24, 25, len(tokens)]
    rows = []
    for begin, end in itertools.pairwise(cuts):
        piece = tokens[begin:end].tolist()
        logits = runner.run([Work(second, piece[::-1], True), Work(first, piece, True)])
        rows.append(logits[1])
    return torch.stack(rows), torch.tensor(cuts[1:]) - 1


def divergence(reference, logits):
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def judge(model_type, formats=("float32", "bf16", "int8")):
    try:
        module = make(model_type)
        tokens = sample(module)
        reference = own(module, tokens)
    except Exception as error:
        return Row(model_type, "cannot be made", line(error))
    if not reference.isfinite().all():
        return Row(model_type, "cannot be made", "its logits are not numbers")
    found, notes = [], []
    for weights in formats:
        stock = copy.deepcopy(module)
        if weights != "float32":
            stock = stock.to(torch.bfloat16)
        try:
            model = checked(lambda: copy.deepcopy(stock), byte_tokenizer(), model_type, weights, notes.append)  # noqa: B023
            logits, at = ours(model, tokens)
        except UnsupportedModelError as error:
            if found:  # a class that is right in float32 must not be refused in bf16
                return Row(model_type, "wrong", f"{weights}: refused: {line(error)}", tuple(found))
            return Row(model_type, "refused", line(error))
        except Exception as error:
            return Row(model_type, "wrong", f"{weights}: {type(error).__name__}: {line(error)}", tuple(found))
        kl = divergence(reference[at], logits)
        found.append(kl)
        rounding = 0.0 if weights == "float32" else divergence(reference[at], own(stock, tokens)[at])
        if not kl <= limit(weights, rounding):
            return Row(model_type, "wrong", f"{weights}: KL {kl:.2g}, transformers {rounding:.2g}", tuple(found))
    undone = [note for note in notes if "native layers" in note]
    return Row(model_type, "right", undone[0] if undone else "", tuple(found))


def limit(weights, rounding):
    """The largest KL that counts as right: a few times what rounding does to transformers' own forward."""
    return {"float32": 1e-5, "bf16": 4 * rounding + 0.03, "int8": 4 * rounding + 0.15}[weights]


def line(error):
    text = (str(error).strip().splitlines() or [""])[-1].strip()
    return (text or type(error).__name__)[:110].replace("|", "/")


def table(rows):
    """docs/models.md."""
    import transformers

    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    lines = [
        HEAD.format(
            version=transformers.__version__, total=len(rows), **{k.replace(" ", "_"): v for k, v in counts.items()}
        )
    ]
    for row in rows:
        kl = [f"{max(0.0, k):.1g}" for k in row.kl] + [""] * (3 - len(row.kl))
        lines.append(f"| {row.model_type} | {row.verdict} | {' | '.join(kl)} | {row.reason} |")
    return "\n".join(lines) + "\n"


def read_table(text):
    """Model type -> verdict, of what `table` wrote."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[1:]}


VERDICTS = ("right", "refused", "cannot be made", "wrong")
HEAD = """# Which models give right numbers

Every causal class of transformers {version} ({total}), made tiny with weights that have the spread of trained
ones (norm gains up to 300, biases, factors that are not 1), 64 tokens in pieces beside another sequence,
against transformers' own forward in float32: {right} are right, {refused} refused by name when they are
loaded, {cannot_be_made} cannot be made (their own code fails at this size, or they want something that is not
installed), {wrong} wrong. `make sweep` makes this page; a test holds a part of it on every run.

The numbers are the mean KL, nats a token, of transformers float32 over Thresher in float32, bf16 and int8.
Right is 1e-5 in float32; in bf16 and int8 0.03 and 0.15 more than four times what rounding to bf16 does to
transformers' own forward. Tiny random models amplify rounding, above all where they choose experts by it;
[results.md](results.md) has real ones. Nothing is said here about speed: layers that are not of the Llama
family run as transformers has them.

| model type | verdict | float32 | bf16 | int8 | why |
|---|---|--:|--:|--:|---|"""


def main():
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="only these; all if none is given")
    parser.add_argument("--write", type=Path, help="write the table of all to this file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["THRESHER_CACHE"] = cache
        for name in arguments.model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            rows.append(judge(name))
            print(name, rows[-1].verdict, rows[-1].reason, *(f"{k:.2g}" for k in rows[-1].kl), flush=True)
    if arguments.write:
        arguments.write.write_text(table(rows))
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
