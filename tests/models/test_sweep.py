"""docs/models.md says what is right and what is refused; a part of it is tried here (`make sweep` tries all)."""

from pathlib import Path

import pytest
import sweep
import transformers

TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
VERDICTS = sweep.read_table(TABLE)
# One of each kind that was wrong once, or that is near to it.
PART = {
    "llama": "right",
    "olmo": "right",  # rotary tables in float32 beside bf16 rows
    "olmo2": "right",
    "cohere2": "right",
    "gemma3_text": "right",
    "granitemoe": "right",  # factors on embedding, residual, attention and logits
    "gpt2": "right",
    "gpt_neox": "right",
    "qwen3_moe": "right",  # rounding flips experts
    "phi3": "right",
    "deepseek_v3": "right",
    "doge": "refused",
    "diffllama": "refused",
    "qwen2_moe": "refused",
    "gpt_oss": "refused",
    "bert": "refused",
}


@pytest.mark.parametrize("model_type", PART)
def test_part_of_the_table(model_type, tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    row = sweep.judge(model_type)
    assert row.verdict == PART[model_type] == VERDICTS[model_type], row


def test_the_table_holds_every_class_and_nothing_wrong():
    if f"transformers {transformers.__version__} " not in TABLE:
        pytest.skip("docs/models.md was made with another version of transformers")
    assert set(VERDICTS) == set(sweep.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(VERDICTS.values()) <= {"right", "refused", "cannot be made"}


def test_a_class_that_is_a_little_off_is_called_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    stock = sweep.ours

    def off(model, tokens):
        logits, at = stock(model, tokens)
        return 1.02 * logits, at

    monkeypatch.setattr(sweep, "ours", off)
    assert sweep.judge("llama", ("float32",)).verdict == "wrong"
