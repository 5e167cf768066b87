"""The model of the lm-evaluation-harness: full attention is `hf`, a large K is full attention; costs are counted."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from refreshkv import cli
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.launch.command import FILES
from refreshkv.settings import SettingsError
from tests.helpers.models import decode_logits, random_ids, tiny_model
from tests.helpers.presses import kvpress_or_like
from tests.helpers.ranks import run_ranks

TASKS = {
    "continue_words": {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["ab"], "do_sample": False, "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}],
    },
    "choose_words": {
        "output_type": "multiple_choice",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "read_words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
NAMES = ["continue_words", "choose_words"]


@pytest.fixture(scope="module", autouse=True)
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and the texts of the tasks."""
    folder, generator = tmp_path_factory.mktemp("harness"), random.Random(0)
    texts = [" ".join(coined_words(generator, 60)) for _ in range(8)]
    tokenizer = train_tokenizer(texts, 300)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "max_position_embeddings": 256}
    tiny_model(dtype=torch.float32, **settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = []
    for number, text in enumerate(texts[:5]):
        words = text.split()
        choices = [f" {words[i]} {words[i + 1]} {words[i + 2]}" for i in (1, 9, 20)]
        values = {"text": " ".join(words[: 20 + 3 * number]), "choices": choices, "label": number % 3}
        lines.append(json.dumps({**values, "target": " ".join(words[-8:])}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}}
    for name, task in TASKS.items():
        text = "" if name == "read_words" else "{{text}}"
        settings = {"task": name, **data, "test_split": "test", "doc_to_text": text, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def evaluated(folder, model="refreshkv", tasks=NAMES, limit=None, batch_size=2, **arguments):
    """The results of the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import refreshkv.evaluation.harness.model  # noqa: F401  # registers the model

    return simple_evaluate(
        model,
        {"pretrained": str(folder / "model"), **arguments},
        tasks=list(tasks),
        device="cpu",
        batch_size=batch_size,
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )


def answers(results):
    """What the model answered: texts and log-likelihoods, by task."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def scores(results):
    return {task: {k: v for k, v in own.items() if "," in k} for task, own in results["results"].items()}


@pytest.fixture(scope="module")
def hf(folder):
    return evaluated(folder, "hf")


def test_full_attention_is_the_model_of_the_harness(folder, hf):
    full = evaluated(folder, strategy="full")
    assert answers(full) == answers(hf) and scores(full) == scores(hf)
    assert any(text for ((text,),) in answers(hf)["continue_words"])
    metadata = full["config"]["refreshkv"]
    assert metadata["strategy"] == "full" and metadata["seconds"] > 0 and metadata["cache_bytes"] > 0
    assert metadata["effective_strides"] == {}


@pytest.mark.parametrize("strategy", ["refresh:5", pytest.param("select:2:4bit", marks=pytest.mark.slow)])
def test_a_small_cache_of_everything_is_full_attention(folder, hf, strategy):
    large = evaluated(folder, strategy=strategy, budget=1000)
    assert answers(large)["continue_words"] == answers(hf)["continue_words"]
    for mine, theirs in zip(answers(large)["choose_words"], answers(hf)["choose_words"], strict=True):
        assert [value for ((value, _),) in mine] == pytest.approx([value for ((value, _),) in theirs], abs=1e-4)
    assert scores(large) == scores(hf)


def test_continuations_are_scored_as_they_would_be_decoded(folder, hf):
    """The context is the prompt, the continuation's tokens are decoding steps; and the metadata counts these."""
    small = evaluated(folder, tasks=["choose_words"], limit=2, strategy="refresh:2", budget=0.25)
    assert answers(small)["choose_words"] != answers(hf)["choose_words"][:2]
    lm, steps, full = model_of(folder, strategy="refresh:2", budget=0.25), 0, 0
    for sample in small["samples"]["choose_words"]:
        for (context, end), ((value, is_greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            prompt, tokens = lm._encode_pair(context, end)
            ids = torch.tensor([prompt + tokens])
            logits, cache = decode_logits(lm.model, ids, len(prompt), lm.strategy.config)
            own = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert value == pytest.approx(float(own.gather(1, ids[0, len(prompt) :, None]).sum()), abs=1e-4)
            assert is_greedy == (own.argmax(-1).tolist() == tokens)
            steps += len(tokens) - 1
            full += int(cache.full_steps[0, 0, len(prompt) : -1].sum())
    metadata = small["config"]["refreshkv"]
    assert metadata["decoding_steps"] == steps and metadata["effective_strides"]["0"] == pytest.approx(steps / full)
    assert metadata["cache_bytes"] is None and metadata["settings"]["budget"] == 0.25


def model_of(folder, **arguments):
    from refreshkv.evaluation.harness.model import RefreshLM

    return RefreshLM(pretrained=str(folder / "model"), device="cpu", **{"batch_size": 2, **arguments})


def test_answers_come_from_the_small_cache(folder, hf):
    own = {"strategy": "select:2:4bit", "budget": 6, "refresh.pool_kernel": 1}
    small = evaluated(folder, tasks=["continue_words"], limit=2, **own)
    assert answers(small)["continue_words"] != answers(hf)["continue_words"][:2]
    metadata = small["config"]["refreshkv"]
    assert metadata["effective_strides"] == {"0": None, "1": None} and metadata["cache_bytes"] > 0
    assert metadata["effective_select_strides"]["0"] == pytest.approx(2, rel=0.1)
    assert metadata["settings"]["pool_kernel"] == 1 and metadata["strategy"] == "select S=2 4 bits"


@pytest.mark.slow
def test_caches_that_evict_score_token_by_token(folder):
    """SnapKV is RefreshKV that never refreshes."""
    snapkv, never = (evaluated(folder, strategy=name, budget=8) for name in ("snapkv", "never"))
    assert answers(snapkv)["continue_words"] == answers(never)["continue_words"]
    for mine, theirs in zip(answers(snapkv)["choose_words"], answers(never)["choose_words"], strict=True):
        assert [value for ((value, _),) in mine] == pytest.approx([value for ((value, _),) in theirs], abs=1e-4)
    assert snapkv["config"]["refreshkv"]["effective_strides"] == {}


def test_rolling_perplexity(folder):
    """With a K of everything it is full attention's; the prompt may be longer than the one token of the windows."""
    full, large, small, prompted = (
        evaluated(folder, tasks=["read_words"], limit=1, **own)
        for own in (
            {"strategy": "full"},
            {"strategy": "refresh:5", "budget": 1000},
            {"strategy": "refresh:5", "budget": 4},
            {"strategy": "refresh:5", "budget": 0.1, "rolling_prompt": 10_000},
        )
    )
    losses = [[value for ((value,),) in answers(own)["read_words"]] for own in (full, large, small, prompted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    assert math.isfinite(sum(losses[2])) and prompted["config"]["refreshkv"]["decoding_steps"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "refreshed:5"}, "strategy: there is no 'refreshed'"),
        ({"strategy": "refresh:5", "budget": 0}, "budget"),
        ({"strategy": "refresh:5", "refresh.strides": 2}, "strides"),
        ({"strategy": "refresh:5", "rolling_prompt": 0.5}, "rolling_prompt must be a whole number"),
        ({"strategy": "refresh:5", "batch_size": "auto"}, "--batch_size auto"),
        ({"strategy": "refresh:5", "nonesuch": 3}, "--model_args: .*nonesuch.*: leave it out"),
        ({"strategy": "refresh:5", "revision": "main"}, "^revision=main: .* has no revisions: leave it out"),
    ],
)
def test_refusals(folder, arguments, words):
    from refreshkv.evaluation.harness.model import RefreshLM

    with pytest.raises(SettingsError, match=words):
        RefreshLM(pretrained=str(folder / "model"), device="cpu", **{"batch_size": 1, **arguments})


def test_what_cannot_be_scored_is_refused(folder):
    with pytest.raises(SettingsError, match="budget=0.125 is a share of the prompt"):
        evaluated(folder, tasks=["read_words"], limit=1, strategy="refresh:5")
    with pytest.raises(SettingsError, match="strategy=SnapKV: a rolling perplexity"):
        evaluated(folder, tasks=["read_words"], limit=1, strategy="snapkv", budget=8)


def logits_without(model, ids, prompt, dropped):
    """The naive form of a press that drops these positions of the prompt: nothing behind the prompt attends to them."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[:, :, prompt:, dropped] = False
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[0]


def test_a_press_is_full_attention_without_what_it_drops(folder, hf, monkeypatch):
    """StreamingLLMPress drops the same positions in all layers and heads: all but the first four and the last."""
    kvpress_or_like(monkeypatch)
    own = {"strategy": "kvpress:StreamingLLMPress", "budget": 0.5, "batch_size": 1}
    found, lm = evaluated(folder, limit=2, **own), model_of(folder, **own)
    assert answers(found)["choose_words"] != answers(hf)["choose_words"][:2]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")

    def dropped(prompt):
        return slice(4, prompt - (int(prompt * 0.5) - 4))

    for sample in found["samples"]["choose_words"]:
        for (context, end), ((value, is_greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            prompt, tokens = lm._encode_pair(context, end)
            logits = logits_without(model, torch.tensor([prompt + tokens]), len(prompt), dropped(len(prompt)))
            logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
            assert value == pytest.approx(float(logits.gather(1, torch.tensor(tokens)[:, None]).sum()), abs=1e-4)
            assert is_greedy == (logits.argmax(-1).tolist() == tokens)
    for sample in found["samples"]["continue_words"]:
        context = lm.tok_encode(sample["arguments"][0][0])
        ids = torch.tensor([context])
        for _ in range(24):
            logits = logits_without(model, ids, len(context), dropped(len(context)))
            ids = torch.cat([ids, logits[-1].argmax().reshape(1, 1)], dim=1)
        text = lm.tok_decode(ids[0, len(context) :].tolist())
        assert sample["resps"][0][0] == text.split("ab")[0]
    metadata = found["config"]["refreshkv"]
    assert metadata["settings"] == {"press": "StreamingLLMPress", "budget": 0.5, "n_sink": "4"}
    assert metadata["cache_bytes"] > 0 and metadata["decoding_steps"] > 0
    assert metadata["strategy"] == "kvpress StreamingLLMPress"


@pytest.mark.parametrize(
    ("length", "budget"), [(40, 0.1), (50, 0.1), (100, 0.29), (40, 0.5), (41, 0.125), (41, 1.0)], ids=str
)
def test_a_press_keeps_the_budget_to_the_token(monkeypatch, length, budget):
    """1 - (1 - budget) is not the budget: of 40 tokens 0.1 would leave 3, of 100 tokens 0.29 would leave 29."""
    from refreshkv.evaluation.harness.presses import PressedSteps, PressStrategy

    kvpress_or_like(monkeypatch)
    strategy = PressStrategy("kvpress", {"press": "StreamingLLMPress", "budget": budget}, lambda *_: None)
    steps = PressedSteps(tiny_model(dtype=torch.float32), strategy)
    with torch.no_grad():
        steps.prompt(random_ids(1, length))
    assert [layer.keys.shape[2] for layer in steps.cache.layers] == [int(length * budget)] * len(steps.cache.layers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "kvpress:SnapKV"}, "only presses of kvpress that score tokens and prune"),
        ({"strategy": "kvpress:AnswerPress"}, "only presses of kvpress that score tokens and prune"),
        ({"strategy": "kvpress:StreamingLLMPress", "batch_size": 2}, "scores padding as tokens: write 1"),
        ({"strategy": "kvpress:StreamingLLMPress", "budget": 30}, "a press leaves a share of the prompt"),
    ],
)
def test_presses_that_would_be_wrong_are_refused(folder, monkeypatch, arguments, words):
    kvpress_or_like(monkeypatch)
    with pytest.raises(SettingsError, match=words):
        model_of(folder, **{"batch_size": 1, **arguments})


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_presses_need_layers_of_full_attention(family):
    from refreshkv.evaluation.harness.presses import PressStrategy, validate_press

    strategy = PressStrategy("kvpress X", {"press": "X"}, lambda *_: None)
    if family == "llama":
        return validate_press(strategy, tiny_model(), 1)
    with pytest.raises(SettingsError, match="layers without full attention"):
        validate_press(strategy, tiny_model(family=family, sliding_window=12), 1)


def test_a_prompt_that_a_press_does_not_take_is_refused(folder, monkeypatch):
    kvpress_or_like(monkeypatch)
    lm = model_of(folder, strategy="kvpress:StreamingLLMPress", batch_size=1)
    with pytest.raises(SettingsError, match="strategy=kvpress:StreamingLLMPress: Input should contain more tokens"):
        lm._loglikelihood_tokens([(None, [5, 6, 7], [8, 9])])


def test_presses_need_kvpress(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(SettingsError, match="kvpress cannot be imported .*pip install --no-deps kvpress"):
        model_of(folder, strategy="kvpress:SnapKVPress", batch_size=1)


def as_rank(folder, output):
    results = evaluated(Path(folder), strategy="refresh:3", budget=8)
    if results is not None:
        values = {"answers": answers(results), "scores": scores(results), **results["config"]["refreshkv"]}
        Path(output).write_text(json.dumps(values))


@pytest.mark.slow
def test_two_processes_answer_as_one(folder, tmp_path):
    run_ranks(2, tmp_path / "log", as_rank, str(folder), str(tmp_path / "two.json"))
    as_rank(folder, tmp_path / "one.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0
    for task in NAMES:
        assert sorted(map(str, one["answers"][task])) == sorted(map(str, two["answers"][task]))
        del one["answers"][task], two["answers"][task]
    assert one == two


@pytest.mark.slow
def test_the_command_is_that_of_the_harness(folder, tmp_path, monkeypatch, capsys):
    from refreshkv.launch import lm_harness

    arguments = f"--model refreshkv --model_args pretrained={folder}/model,strategy=refresh:5,budget=8 --device cpu "
    arguments += f"--tasks choose_words --include_path {folder} --output_path {tmp_path}/out --limit 2"
    monkeypatch.setattr(sys, "argv", ["refreshkv lm-eval"])
    lm_harness.main(arguments.split())
    assert "choose_words" in capsys.readouterr().out
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["config"]["refreshkv"]["strategy"] == "refresh S=5"
    assert FILES["lm-eval"] == "lm_harness" and "lm_eval" in cli.EXTRAS["lm-eval"]
