"""What the keys of a GGUF file mean for a transformers config: each is translated, changes nothing, or is refused."""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from thresher.errors import ModelError, UnsupportedModelError
from thresher.models.gguf_header import Header, TensorInfo


@dataclass(frozen=True)
class Architecture:
    """What transformers calls it, what only its files have to say, and what they never say."""

    model_type: str
    window: bool = False  # reads attention.sliding_window
    partial_rotation: bool = False  # may rotate the first dimensions of a head only
    required: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of the config


ARCHITECTURES = {
    "llama": Architecture("llama"),  # of Mistral's models too
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture("qwen2_moe", fixed={"norm_topk_prob": False}),
    "qwen3moe": Architecture("qwen3_moe", fixed={"norm_topk_prob": True}),
    "phi3": Architecture("phi3", window=True, partial_rotation=True),
    "gemma2": Architecture("gemma2", window=True, required=("attention.sliding_window",)),
    "gemma3": Architecture("gemma3_text", window=True, required=("attention.sliding_window",)),
    "starcoder2": Architecture("starcoder2", window=True),
    "stablelm": Architecture("stablelm", partial_rotation=True),
    "nemotron": Architecture("nemotron", partial_rotation=True),
    "gpt2": Architecture("gpt2"),
}
REQUIRED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")

# The field of the config that a key sets: the first of these names that the architecture has.
COUNTS = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
NORMS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
}
SOFT_CAPS = {  # 0: none
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}

# The values with which a key that was not translated changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # not given, softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
# Keys that change no number of a language model, whatever they say.
HARMLESS = {"decoder_start_token_id", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout"}
# Groups of keys without numbers of the model: how the file was made. The tokenizer's are checked with it.
GROUPS = ("general", "quantize", "split", "tokenizer")

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def architecture_of(header: Header) -> Architecture:
    """Raises ModelError if the file holds no language model, UnsupportedModelError if it is of an unknown kind."""
    name = header.values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"a GGUF file of architecture {name!r:.40} is not converted ({', '.join(ARCHITECTURES)} are); "
            "give the model's Hugging Face folder"
        )
    if header.values.get("general.type", "model") != "model":
        raise ModelError(f"it holds no whole model, but {header.values['general.type']!r:.40} (general.type)")
    return ARCHITECTURES[name]


def model_config(header: Header) -> Any:
    """The transformers config of the model in the file.

    Raises ModelError if a key is missing or contradicts the tensors, UnsupportedModelError naming every key that is
    not translated.
    """
    from transformers import AutoConfig

    architecture = architecture_of(header)
    name = header.values["general.architecture"]
    tensors = {tensor.name: tensor for tensor in header.tensors}
    defaults = AutoConfig.for_model(architecture.model_type)
    keys = {k.removeprefix(f"{name}."): v for k, v in header.values.items() if k.startswith(f"{name}.")}
    missing = [key for key in (*REQUIRED, *architecture.required) if not keys.get(key)]
    if not any(key in keys and _place(defaults, names) for key, names in NORMS.items()):
        missing.append(next(key for key, names in NORMS.items() if _place(defaults, names)))
    if missing:
        raise ModelError(f"{name}.{missing[0]} is missing")

    # Each key is taken out of `keys` when it is read; what is left at the end was not.
    fields: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in tensors} | architecture.fixed
    for name_here, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{name_here}_token_id"] = header.values.get(f"tokenizer.ggml.{key}_token_id")
    for table, read in ((COUNTS, _count), (NORMS, _positive), (SOFT_CAPS, _cap)):
        for key, names in table.items():
            place = _place(defaults, names)
            if key in keys and place:
                fields[place] = read(key, keys.pop(key))
    layers, width, heads = (fields[n] for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    fields["vocab_size"] = _check_shapes(tensors, layers, width)
    head_dim = _count("attention.key_length", keys.pop("attention.key_length", max(1, width // heads)))
    if hasattr(defaults, "head_dim") or head_dim * heads != width:
        fields["head_dim"] = head_dim
    if hasattr(defaults, "num_key_value_heads"):
        fields.setdefault("num_key_value_heads", heads)
    if architecture.window and "attention.sliding_window" in keys:
        window = keys.pop("attention.sliding_window")
        fields["sliding_window"] = _count("attention.sliding_window", window) if window else None
    if "norm_topk_prob" in architecture.fixed and "expert_weights_norm" in keys:
        fields["norm_topk_prob"] = bool(keys.pop("expert_weights_norm"))
    if architecture.model_type in ("gemma2", "gemma3_text"):
        _set_gemma(keys, fields, head_dim, architecture.model_type)
    fields |= _flags(tensors, defaults)
    if hasattr(defaults, "rope_parameters"):
        fields["rope_parameters"] = _rope(tensors, keys, fields, head_dim, architecture)
        if architecture.model_type == "phi3" and "original_max_position_embeddings" in fields["rope_parameters"]:
            fields["original_max_position_embeddings"] = fields["rope_parameters"]["original_max_position_embeddings"]

    same = {  # said twice
        "vocab_size": fields["vocab_size"],
        "attention.value_length": head_dim,
        "attention.head_count_kv": heads,
        "use_parallel_residual": fields.get("use_parallel_residual"),
    }
    unread = [k for k, v in keys.items() if k not in HARMLESS and v not in NEUTRAL.get(k, ()) and same.get(k) != v]
    refuse([f"{name}.{key}" for key in unread])
    refuse(set(ROPE_TENSORS) & tensors.keys() - _used_rope_tensors(fields.get("rope_parameters", {})))
    config = AutoConfig.for_model(architecture.model_type, **fields)
    for place, value in fields.items():
        if place != "rope_parameters" and getattr(config, place, None) != value:
            raise ModelError(f"{type(config).__name__} does not take {place} = {value!r:.40}")
    return config


def unknown_groups(header: Header) -> list[str]:
    """Keys that belong neither to the file's architecture nor to a group that is known: no reader asks for them."""
    known = (*GROUPS, str(header.values.get("general.architecture")))
    return [key for key in header.values if key.partition(".")[0] not in known]


def refuse(names: Iterable[str]) -> None:
    """Raise UnsupportedModelError naming what of the file was not used, if there is any."""
    names = sorted(names)
    if names:
        raise UnsupportedModelError(f"{some(names)} would be lost; give the model's Hugging Face folder")


def some(names: list[str]) -> str:
    """The first of many names."""
    shown = ", ".join(f"{name:.80}" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _place(defaults: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(defaults, name)), None)


def _count(key: str, value: Any) -> int:
    if isinstance(value, tuple) and len(set(value)) == 1:  # one for each layer
        value = value[0]
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ModelError(f"{key} is {value!r:.40}, not a positive whole number")
    return value


def _positive(key: str, value: Any) -> float:
    if type(value) not in (float, int) or not 0 < value < 1e30:
        raise ModelError(f"{key} is {value!r:.40}, not a positive number")
    return float(value)


def _cap(key: str, value: Any) -> float | None:
    return _positive(key, value) if value else None


def _check_shapes(tensors: dict[str, TensorInfo], layers: int, width: int) -> int:
    """The number of tokens; before a model is made, the counts that could make it huge agree with the tensors."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2 or embedding.dims[0] != width:
        raise ModelError(f"there is no token_embd.weight with rows of {width} (embedding_length)")
    blocks = {
        int(found) for name in tensors if (found := name.split(".")[1] if name.startswith("blk.") else "").isdecimal()
    }
    absent = [layer for layer in range(min(layers, len(blocks) + 1)) if layer not in blocks]
    if absent:
        raise ModelError(f"weights are missing: all of layer {absent[0]} of {layers} (block_count)")
    return embedding.dims[1]


def _set_gemma(keys: dict[str, Any], fields: dict[str, Any], head_dim: int, model_type: str) -> None:
    layers, width, heads = (fields[n] for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    pattern = keys.get("attention.sliding_window_pattern", 6 if model_type == "gemma3_text" else 2)
    if isinstance(pattern, tuple) and len(pattern) >= layers:
        slides = [bool(flag) for flag in pattern[:layers]]
    else:
        every = _count("attention.sliding_window_pattern", pattern)
        slides = [bool((layer + 1) % every) for layer in range(layers)]
    keys.pop("attention.sliding_window_pattern", None)
    fields["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    # The two models of 27 billion scale by the width that a head would have if heads filled the hidden state.
    wide = layers == (62 if model_type == "gemma3_text" else 46)
    fields["query_pre_attn_scalar"] = width // heads if wide else head_dim


def _flags(tensors: dict[str, TensorInfo], defaults: Any) -> dict[str, bool]:
    """Fields that say which tensors there are."""
    attention = any(f"blk.0.attn_{part}.bias" in tensors for part in "qkv") or "blk.0.attn_output.bias" in tensors
    found = {
        "attention_bias": attention,
        "use_qkv_bias": attention,
        "mlp_bias": any(f"blk.0.ffn_{part}.bias" in tensors for part in ("gate", "up", "down")),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
    }
    return {name: value for name, value in found.items() if hasattr(defaults, name)}


def _rope(
    tensors: dict[str, TensorInfo],
    keys: dict[str, Any],
    fields: dict[str, Any],
    head_dim: int,
    architecture: Architecture,
) -> dict[str, Any]:
    theta = _positive("rope.freq_base", keys.pop("rope.freq_base", 10000.0))
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = _count("rope.dimension_count", keys.get("rope.dimension_count", head_dim))
    if rotated == head_dim or (architecture.partial_rotation and rotated < head_dim and rotated % 2 == 0):
        keys.pop("rope.dimension_count", None)
    if architecture.partial_rotation:
        parameters["partial_rotary_factor"] = rotated / head_dim
    parameters |= _rope_scaling(tensors, keys, fields, rotated, theta)
    if architecture.model_type != "gemma3_text":
        return parameters
    # Layers with a window keep their own base, unscaled.
    local = _positive("rope.freq_base_swa", keys.pop("rope.freq_base_swa", 10000.0))
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _rope_scaling(
    tensors: dict[str, TensorInfo], keys: dict[str, Any], fields: dict[str, Any], rotated: int, theta: float
) -> dict[str, Any]:
    """Takes the keys of rope.scaling that it translates, or that change nothing beside those, out of `keys`."""
    prefix = "rope.scaling."
    kind = keys.pop(prefix + "type", "linear")  # of files that only give a factor
    factor = keys.pop(prefix + "factor", None) or keys.pop("rope.scale_linear", None) or 1.0
    factor = _positive(prefix + "factor", factor)
    original = keys.pop(prefix + "original_context_length", fields["max_position_embeddings"])
    original = _count(prefix + "original_context_length", original)
    betas = {name: keys.pop(f"{prefix}yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    factors = _factors(tensors, "rope_freqs.weight", rotated)
    if all(math.isclose(f, 1, rel_tol=1e-6) for f in factors):
        factors = ()
    if "rope_factors_long.weight" in tensors and kind in ("linear", "none", "longrope") and not factors:
        scaling = {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "long_factor": list(_factors(tensors, "rope_factors_long.weight", rotated)),
            "short_factor": list(_factors(tensors, "rope_factors_short.weight", rotated)),
        }
        if attention := keys.pop(prefix + "attn_factor", None):
            scaling["attention_factor"] = _positive(prefix + "attn_factor", attention)
        return scaling
    if kind == "none" or (kind == "linear" and factor == 1):
        return _llama3(factors, theta) if factors else {}
    if factors:
        raise UnsupportedModelError("rope_freqs.weight together with other RoPE scaling is not known")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        given = {name: _positive(prefix + "yarn_" + name, value) for name, value in betas.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | given
    raise UnsupportedModelError(f"rope.scaling.type {kind!r:.40} with factor {factor:g} is not known")


def _used_rope_tensors(parameters: dict[str, Any]) -> set[str]:
    if "rope_type" not in parameters:  # no rotation, or different ones by layer
        return set()
    return set(ROPE_TENSORS) if parameters["rope_type"] == "longrope" else {"rope_freqs.weight"}


def _factors(tensors: dict[str, TensorInfo], name: str, rotated: int) -> tuple[float, ...]:
    """Divisors of the frequencies of RoPE, `rotated / 2` of them; none if there is no such tensor."""
    tensor = tensors.get(name)
    if tensor is None:
        return ()
    if tensor.type != 0 or tensor.dims != (rotated // 2,):
        raise ModelError(f"{name} is not a float32 tensor of {rotated // 2} numbers")
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        found = struct.unpack(f"<{rotated // 2}f", file.read(tensor.bytes))
    return tuple(_positive(name, value) for value in found)


def _llama3(factors: tuple[float, ...], theta: float) -> dict[str, Any]:
    """The llama3 parameters that give exactly these divisors of the frequencies; refused if there are none."""
    factor, low, high, original = max(factors), 1.0, 4.0, 8192  # all but the factor are the same in every Llama 3
    for i, found in enumerate(factors):
        waves = original * theta ** (-i / len(factors)) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            raise UnsupportedModelError(
                "rope_freqs.weight is not what Llama 3's formula gives; RoPE scaling would be wrong"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
