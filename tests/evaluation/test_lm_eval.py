"""The adapter under the harness' own command line, on a task of its own, offline."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from thresher.errors import UsageError
from thresher.evaluation.teacher import prefill, score_tokens

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm_eval is absent; pip install -c constraints.txt lm_eval"
)

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "yes"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def adapter(tiny_folder):
    from thresher.evaluation.lm_eval import ThresherLM

    return ThresherLM(model=str(tiny_folder), weights="float32", attention="streaming:sinks=1,window=8")


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def test_command_line(tiny_folder, tmp_path):
    (tmp_path / "data.json").write_text(
        "".join(json.dumps({"question": f"Is {i} even?", "answer": i % 2}) + "\n" for i in range(3))
    )
    for name, task in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=tmp_path / "data.json"))
    command = [sys.executable, "-m", "thresher.evaluation.lm_eval", "--include_path", str(tmp_path)]
    command += ["--tasks", "tiny_choice,tiny_generate,tiny_rolling", "--output_path", str(tmp_path / "out.json")]
    command += ["--model_args", f'model={tiny_folder},weights=float32,attention="streaming:sinks=2,window=16"']
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("out*.json")
    scores = json.loads(result.read_text())["results"]
    assert 0 <= scores["tiny_choice"]["acc,none"] <= 1
    assert math.isfinite(scores["tiny_rolling"]["word_perplexity,none"])
    assert "tiny_generate" in scores


def test_unknown_arguments_are_refused():
    from thresher.evaluation.lm_eval import ThresherLM

    with pytest.raises(UsageError, match="window: not known; quote"):
        ThresherLM(attention="streaming:sinks=2", window=16)


def test_loglikelihood_is_that_of_the_method(adapter):
    llm = adapter.llm
    context, continuation = adapter._encode_pair("The quick brown fox jumps", " over the dog")
    got = adapter.loglikelihood(
        requests(("The quick brown fox jumps", " over the dog"), ("The quick brown fox jumps", " x"), ("", "abc")),
        disable_tqdm=True,
    )
    expected, _ = score_tokens(llm.runner, prefill(llm, context[:-1]), context[-1], continuation, llm.attention)
    assert got[0][0] == pytest.approx(sum(expected), abs=1e-9)
    assert len(got) == 3
    assert all(logprob < 0 for logprob, _ in got)


def test_rolling_scores_every_token_once(adapter):
    text = "abcdefgh" * 100  # longer than the 512 positions of the model
    (total,) = adapter.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert math.isfinite(total)
    (start,) = adapter.loglikelihood_rolling(requests(("abcdefgh",)), disable_tqdm=True)
    assert total < start < 0


def test_generation(adapter):
    prompts = [("hello", {"until": [], "max_gen_toks": 5}), ("x" * 900, {"until": ["\n"], "max_gen_toks": 3})]
    texts = adapter.generate_until(requests(*prompts), disable_tqdm=True)
    expected = adapter.llm.generate([adapter.tok_encode("hello")])[0][0].text
    assert expected.startswith(texts[0])
    with pytest.raises(UsageError, match="num_beams"):
        adapter.generate_until(requests(("hello", {"num_beams": 4})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("length", "new", "kept", "written"),
    [(100, 500, 100, 412), (100, 5000, 100, 412), (500, 100, 412, 100), (600, 5000, 384, 128)],
)
def test_a_long_answer_does_not_push_the_prompt_out(adapter, monkeypatch, length, new, kept, written):
    """Of 512 positions."""
    seen = {}
    monkeypatch.setattr(
        adapter.llm, "stream", lambda prompts, params: seen.update(zip("pq", (prompts, params), strict=True)) or []
    )
    prompt = adapter.tok_encode("x" * length)[:length]
    monkeypatch.setattr(adapter, "tok_encode", lambda text: prompt)
    adapter.generate_until(requests(("", {"max_gen_toks": new})), disable_tqdm=True)
    assert seen["p"] == [prompt[-kept:]]
    assert seen["q"][0].max_new_tokens == written
