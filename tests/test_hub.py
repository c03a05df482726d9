"""Exported models: equal to what was trained, decoding, and as other programs load them."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers")

from recallzoo.errors import UserError  # noqa: E402
from recallzoo.hub import RecallzooForCausalLM, export  # noqa: E402
from recallzoo.mixers import mixer, use_mixer  # noqa: E402
from recallzoo.model import LanguageModel, ModelConfig  # noqa: E402
from recallzoo.presets import preset  # noqa: E402

VOCAB_SIZE, CONTEXT = 19, 24
MODELS = {
    name: preset(f"{name}-70m").resized(128 if name == "attention" else 16, 2).model
    for name in ("attention", "long_conv", "h3", "hyena", "rwkv", "base_conv")
} | {
    "hybrid_untied": ModelConfig(
        mixers=(mixer("attention", num_heads=2), mixer("sliding_window", window=3)),
        d_model=16,
        state_mixer="mlp",
        position="learned",
        tie_embeddings=False,
    )
}


def trained(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def exported(folder: Path, name: str) -> tuple[LanguageModel, Any]:
    model = trained(MODELS[name])
    weights = {n: p.detach() for n, p in model.named_parameters()}
    export(folder, MODELS[name], weights, vocab_size=VOCAB_SIZE, context=CONTEXT)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, RecallzooForCausalLM)
    return model, loaded.eval()


def prompts() -> torch.Tensor:
    # Without token 0, which stands for padding here: generate() would mask it in a prompt.
    return torch.randint(1, VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.unchecked  # transformers builds models on the meta device
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_has_the_logits_of_the_trained_one(name, tmp_path):
    model, loaded = exported(tmp_path / "model", name)
    with torch.no_grad():
        # The weights are the same bits; a Fourier transform rounds by where its input lies.
        torch.testing.assert_close(loaded(prompts()).logits, model(prompts()))


@pytest.mark.unchecked  # transformers builds models on the meta device
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_with_the_cache_is_that_of_full_forward_passes(name, tmp_path):
    model, loaded = exported(tmp_path / "model", name)
    tokens = prompts()
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        got = loaded.generate(
            prompts(), max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        assert got.tolist() == tokens.tolist()


@pytest.mark.parametrize("name", ["attention", "rwkv", "hybrid_untied"])
def test_padding_on_the_left_changes_nothing(name, tmp_path):
    _, loaded = exported(tmp_path / "model", name)
    tokens, padding = prompts(), [0, 3, 1]
    mask = torch.ones_like(tokens)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    together = loaded.generate(
        tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    logits = loaded(tokens, attention_mask=mask).logits
    for row, count in enumerate(padding):
        alone = tokens[row : row + 1, count:]
        got = loaded.generate(alone, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert together[row, count:].tolist() == got[0].tolist()
        torch.testing.assert_close(logits[row, count:], loaded(alone).logits[0])


@pytest.mark.parametrize("name", ["attention", "base_conv", "h3", "hyena", "rwkv"])
def test_a_row_of_padding_alone_has_zeros_and_changes_no_other(name, tmp_path):
    _, loaded = exported(tmp_path / "model", name)
    mask = torch.ones_like(prompts())
    mask[0, :2] = mask[1] = 0
    logits = loaded(prompts(), attention_mask=mask).logits
    others = loaded(prompts()[[0, 2]], attention_mask=mask[[0, 2]]).logits
    assert torch.equal(logits[1], torch.zeros_like(logits[1]))
    torch.testing.assert_close(logits[[0, 2]], others)
    none = loaded(prompts(), attention_mask=torch.zeros_like(mask)).logits
    assert torch.equal(none, torch.zeros_like(logits))


def test_beam_search_reorders_the_cache(tmp_path):
    _, loaded = exported(tmp_path / "model", "rwkv")
    found = [
        loaded.generate(
            prompts(), max_new_tokens=6, num_beams=3, do_sample=False, use_cache=c, pad_token_id=0
        ).tolist()
        for c in (True, False)
    ]
    assert found[0] == found[1]


def test_a_mask_with_holes_is_refused(tmp_path):
    _, loaded = exported(tmp_path / "model", "rwkv")
    mask = torch.ones_like(prompts())
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="holes"):
        loaded(prompts(), attention_mask=mask)


def test_a_row_that_ends_in_padding_is_not_decoded(tmp_path):
    _, loaded = exported(tmp_path / "model", "rwkv")
    mask = torch.ones_like(prompts())
    mask[1, -3:] = 0
    logits = loaded(prompts(), attention_mask=mask).logits
    torch.testing.assert_close(logits[1, :-3], loaded(prompts()[1:2, :-3]).logits[0])
    for padded in (mask[1:], torch.zeros_like(mask)):  # on the right; throughout
        prompt = prompts()[: len(padded)]
        with pytest.raises(ValueError, match="Pad on the left"):
            loaded(prompt, attention_mask=padded, use_cache=True)
        with pytest.raises(ValueError, match="Pad on the left"):
            loaded.generate(prompt, attention_mask=padded, max_new_tokens=2, pad_token_id=0)


def test_a_model_without_steps_says_how_it_can_generate(tmp_path):
    config = use_mixer(f"{Path(__file__).parent / 'train' / 'own_mixers.py'}:PreviousToken")
    model = trained(ModelConfig(mixers=(config,), d_model=16))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    described = ModelConfig(mixers=(config,), d_model=16)
    export(tmp_path / "m", described, weights, vocab_size=VOCAB_SIZE, context=CONTEXT)
    loaded = RecallzooForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"PreviousToken has no step.* Give use_cache=False"):
        loaded.generate(prompts(), max_new_tokens=2)
    found = loaded.generate(prompts(), max_new_tokens=2, do_sample=False, use_cache=False)
    assert torch.equal(found[:, 7], model(prompts())[:, -1].argmax(-1))


def test_labels_give_the_mean_loss_of_next_tokens(tmp_path):
    model, loaded = exported(tmp_path / "model", "attention")
    tokens = prompts()
    positions = torch.arange(6).expand(3, 6)
    wanted = model.loss(tokens, positions, tokens[:, 1:])
    torch.testing.assert_close(loaded(tokens, labels=tokens).loss, wanted)


@pytest.mark.slow
def test_an_exported_folder_loads_where_recallzoo_is_not_imported(tmp_path):
    exported(tmp_path / "model", "attention")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, "
        "trust_remote_code=True)\n"
        "print(type(m).__name__)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split()[-1:] == ["RecallzooForCausalLM"], done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("format_version", 99, "newer recallzoo"), ("model", None, "damaged")],
)
def test_a_config_that_cannot_be_built_is_explained(name, value, words, tmp_path):
    exported(tmp_path / "model", "attention")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


TASK = """\
task: continue_the_pattern
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="lm-evaluation-harness is not installed: pip install 'recallzoo[eval]'",
)
def test_the_evaluation_harness_runs_on_an_exported_model(tmp_path, monkeypatch):
    """A task made here: log-likelihoods of answers, and texts generated from padded prompts."""
    from tests.train.pretraining import small_data

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval: Any = importlib.import_module("lm_eval")
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    managing: Any = importlib.import_module("lm_eval.tasks")

    from recallzoo.text import open_data

    data = open_data(small_data(tmp_path / "data"))
    config = preset("rwkv-70m").resized(16, 2).model
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size=data.vocab_size, max_seq_len=256)
    export(
        tmp_path / "model",
        config,
        {n: p.detach() for n, p in model.named_parameters()},
        vocab_size=data.vocab_size,
        context=256,
        tokenizer_folder=data.tokenizer_folder,
    )
    rows = [{"prompt": "bada " * n, "answer": "bada"} for n in (1, 4, 9)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for kind, metric, more in (
        ("loglikelihood", "acc", ""),
        ("generate_until", "exact_match", "generation_kwargs: {until: [' '], max_gen_toks: 4}"),
    ):
        text = TASK.format(file=source, kind=kind, metric=metric, more=more)
        text = text.replace("continue_the_pattern", kind)
        (tasks / f"{kind}.yaml").write_text(text)
    lm = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", batch_size=3)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=["loglikelihood", "generate_until"],
        task_manager=managing.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = found["samples"]["loglikelihood"]
    tokenizer = data.tokenizer()
    for sample in samples:
        row = sample["doc"]
        prompt = tokenizer.encode(row["prompt"].rstrip()).ids
        both = tokenizer.encode(row["prompt"].rstrip() + " " + row["answer"]).ids
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([both]))[0], -1)
        wanted = sum(float(log_p[t - 1, both[t]]) for t in range(len(prompt), len(both)))
        assert sample["filtered_resps"][0][0] == pytest.approx(wanted, abs=1e-3)
    assert len(found["samples"]["generate_until"]) == len(rows)
