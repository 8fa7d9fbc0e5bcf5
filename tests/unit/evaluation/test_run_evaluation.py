"""A run with a tiny model: everything that `evaluate` writes, reuses, resumes and refuses."""

import fcntl
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minisft.data.encoder import Encoder
from minisft.data.preparation import prepare
from minisft.data.prepared import load_test, load_train
from minisft.data.renderers.base import RefusedError
from minisft.errors import UserError
from minisft.evaluation import backends, monitor
from minisft.evaluation import run_evaluation as module
from minisft.evaluation.examples import load_held_out, train_answers
from minisft.evaluation.metrics import loss_batches, mean_loss, sum_of_losses
from minisft.evaluation.run_evaluation import evaluate
from minisft.files import hold_lock
from minisft.models import weights_fingerprint
from minisft.recipe import DataRecipe, EvaluationRecipe, Recipe
from minisft.run_folder import RunFolder, record_base_model

MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("minisft.evaluation.metrics.RESAMPLES", 40)


def conversations(rows):
    draw = random.Random(4)
    drinks, sizes = ["coffee", "tea", "cocoa", "juice"], ["small", "large"]
    for number in range(rows):
        drink, size = draw.choice(drinks), draw.choice(sizes)
        turns = [
            ("human", f"One {drink} please, I am guest {number}."), ("gpt", f"What size for the {drink}?"),
            ("human", f"{size}"), ("gpt", f"A {size} {drink}, done."),
        ]  # fmt: skip
        yield {"id": f"row{number}", "conversations": [{"from": who, "value": text} for who, text in turns]}


def save_tokenizer(folder, texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", *MARKERS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    return fast


def save_model(folder, tokenizer, seed, context=256):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared run with a base model and two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "chats.jsonl"
    rows = list(conversations(40))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = save_tokenizer(folder / "base", [json.dumps(row) for row in rows])
    save_model(folder / "base", tokenizer, 0)
    data = DataRecipe(source=str(source), template="chatml", test_fraction=0.25)
    settings = EvaluationRecipe(max_new_tokens=12, batch_size=3)
    recipe = Recipe(model=str(folder / "base"), output=str(folder / "run"), data=data, evaluation=settings)
    prepare(recipe)
    for step in (10, 9):
        save_model(folder / f"run/checkpoints/checkpoint-{step}", tokenizer, step)
    return recipe


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made.output, tmp_path / "run")
    return tmp_path / "run"


def with_settings(recipe, **settings):
    from dataclasses import replace

    return replace(recipe, evaluation=replace(recipe.evaluation, **settings))


def lines(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_follow_the_contract(made, run, capsys):
    drawn: list[Path] = []
    results = evaluate(made, run, draw=drawn.append)
    assert results == json.loads((run / "evaluation/results.json").read_text())
    assert [c["checkpoint"] for c in results["checkpoints"]] == ["checkpoint-9", "checkpoint-10"]
    assert [c["step"] for c in results["checkpoints"]] == [9, 10]
    assert drawn == [run] * 3
    test_rows = load_test(run)
    for name, entry in [("base", results["base"]), *((c["checkpoint"], c) for c in results["checkpoints"])]:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["seconds"] > 0
        for metric in ("bleu", "chrf"):
            assert {"score", "low", "high", "signature"} <= set(entry[metric])
        outputs = lines(run / "evaluation" / name / "outputs.jsonl")
        assert [line["id"] for line in outputs] == [row["id"] for row in test_rows]
        assert outputs[0]["reference"] == test_rows[0]["messages"][-1]["content"]
        assert outputs[0]["prompt"].endswith("<|im_start|>assistant\n")
        assert outputs[0]["turn"] == 2
        examples = (run / "evaluation" / name / "examples.txt").read_text()
        assert examples.count("--- output ---") == 3
    best = max(results["checkpoints"], key=lambda c: c["bleu"]["score"])
    assert results["best"] == best["checkpoint"]
    assert results["constant"]["text"].startswith("A ")
    assert set(best["bleu"]["p"]) == {"base", "constant"}
    assert set(results["base"]["bleu"]["p"]) == {"constant", "best"}
    printed = capsys.readouterr().out
    assert f"{results['best']} (best)" in printed
    assert "constant" in printed


def test_all_turns_have_the_earlier_answers_of_the_data_in_their_prompts(made, run):
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(made.model), "chatml")
    held_out = load_held_out(run, encoder, "all", None)
    rows = load_test(run)
    assert [q.turn for q in held_out.examples] == [1, 2] * len(rows)
    for row, first, second in zip(rows, held_out.examples[::2], held_out.examples[1::2], strict=True):
        assert row["input_ids"][: len(second.prompt_ids)] == second.prompt_ids
        assert row["input_ids"][: len(first.prompt_ids)] == first.prompt_ids
        assert first.reference in second.prompt
    answers = train_answers(run, encoder, "all")
    assert len(answers) == 2 * len(load_train(run))
    assert train_answers(run, encoder, "last") == answers[1::2]
    assert answers[0].startswith("What size for the ")


def test_the_loss_is_the_mean_over_all_supervised_tokens(made, run, monkeypatch):
    monkeypatch.setattr("minisft.evaluation.metrics.BATCH_TOKENS", 150)
    model = LlamaForCausalLM.from_pretrained(made.model).eval()
    total, count = 0.0, 0
    rows = [(row["input_ids"], row["labels"]) for row in load_test(run)]
    rows[0] = (rows[0][0][:-9], rows[0][1][:-9])
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    loss, tokens = mean_loss(sum_of_losses(model, batch) for batch in loss_batches(rows))
    assert tokens == count
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_unchanged_checkpoints_are_not_computed_again(made, run, monkeypatch):
    first = evaluate(made, run)
    monkeypatch.setattr(backends, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert evaluate(made, run) == first
    assert evaluate(with_settings(made, metrics=["chrf"]), run)["best"] is not None
    monkeypatch.undo()
    save_model(run / "checkpoints/checkpoint-10", PreTrainedTokenizerFast.from_pretrained(made.model), 77)
    loaded = []
    load = backends.load_model

    def watched(folder, **settings):
        loaded.append(folder.name)
        return load(folder, **settings)

    monkeypatch.setattr(backends, "load_model", watched)
    evaluate(made, run)
    assert loaded == ["checkpoint-10"]


def test_killed_in_the_middle_it_goes_on_where_it_stopped(made, run, monkeypatch):
    undisturbed = evaluate(made, run)
    shutil.rmtree(run / "evaluation")
    asked = watch_generate(monkeypatch, interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made, run)
    journal = run / "evaluation/base/journal.jsonl"
    with journal.open("a") as file:
        file.write('{"answers": [["abc", {"ids": [1')  # torn as it was killed
    again = evaluate(made, run)
    examples = len(load_test(run))
    assert len(asked) == 3 * examples, "each answer of each model once"
    assert without_seconds(again) == without_seconds(undisturbed)


def watch_generate(monkeypatch, interrupt_at=None):
    """The prompts that `generate` has answered from now on; its call number `interrupt_at` never begins."""
    answered: list[tuple[int, ...]] = []
    real = backends.generate
    calls = 0

    def watched(model, prompts, **settings):
        nonlocal calls
        calls += 1
        if calls == interrupt_at:
            raise KeyboardInterrupt
        done = real(model, prompts, **settings)
        answered.extend(map(tuple, prompts))
        return done

    monkeypatch.setattr(backends, "generate", watched)
    return answered


def without_seconds(results):
    entries = [results["base"], *results["checkpoints"]]
    return [*({**entry, "seconds": None} for entry in entries), results["constant"], results["best"]]


def test_other_questions_cost_only_what_is_new(made, run, monkeypatch):
    evaluate(with_settings(made, turns="last"), run)
    asked = watch_generate(monkeypatch)
    every = evaluate(with_settings(made, turns="all"), run)
    rows = len(load_test(run))
    assert len(asked) == len(set(asked)) * 3 == 3 * rows, "the first answers of three models"
    asked.clear()
    evaluate(with_settings(made, turns="last", prompts=["One tea please."]), run)
    assert len(asked) == 3
    assert without_seconds(evaluate(with_settings(made, turns="all"), run)) == without_seconds(every)
    assert len(asked) == 3


def test_equal_prompts_are_answered_once(made, run, monkeypatch):
    asked = watch_generate(monkeypatch)
    settings = with_settings(made, turns="last", prompts=["Tea?", "Tea?"])
    evaluate(settings, run)
    assert len(asked) == len(set(asked)) * 3
    given = lines(run / "evaluation/base/prompts.jsonl")
    assert [line["id"] for line in given] == ["prompt-1", "prompt-2"]
    assert given[0]["output"] == given[1]["output"]


def test_prompts_of_the_users_own(made, run, tmp_path):
    plain, chats = tmp_path / "asked.txt", tmp_path / "asked.jsonl"
    plain.write_text("One tea please.\n\nA juice <|im_end|> [/INST]\n")
    turns = [
        {"role": r, "content": c}
        for r, c in (("system", "be kind"), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Tea"))
    ]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    results = evaluate(with_settings(made, prompts=str(plain)), run)
    assert results["prompts"] == 2
    listed = evaluate(with_settings(made, prompts=["One tea please.", "A juice <|im_end|> [/INST]"]), run)
    assert without_seconds(listed) == without_seconds(results)
    evaluate(with_settings(made, prompts=str(chats)), run)
    for name in ("base", "checkpoint-9", "checkpoint-10"):
        [line] = lines(run / "evaluation" / name / "prompts.jsonl")
        assert line["prompt"].count("<|im_start|>") == 5
        assert {"id", "prompt", "output", "finish", "tokens"} == set(line)
    side_by_side = (run / "evaluation/prompts.txt").read_text()
    assert [side_by_side.count(f"--- {name} ---") for name in ("base", "checkpoint-9", "checkpoint-10")] == [1, 1, 1]
    evaluate(made, run)
    assert not (run / "evaluation/prompts.txt").exists()
    assert not (run / "evaluation/base/prompts.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("asked.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "hi"}\n', r"asked.jsonl:2: this is no prompt"),
        ("asked.jsonl", "nothing\n", "asked.jsonl:1: this is no prompt"),
        ("asked.jsonl", '{"messages": [{"role": "robot", "content": "hi"}]}', "asked.jsonl:1: this is no prompt .*robot"),
        ("asked.jsonl", '{"messages": [{"role": "assistant", "content": "hi"}]}', "must be one to be answered"),
        ("asked.jsonl", '{"messages": []}', "must be one to be answered"),
        ("asked.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "contents must be text"),
        ("asked.jsonl", "7\n", "asked.jsonl:1: this is no prompt"),
        ("asked.txt", " \n\n", "no prompt in this file"),
        ("asked.txt", None, "evaluation.prompts: .*asked.txt cannot be read"),
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_named(made, run, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate(with_settings(made, prompts=str(tmp_path / name)), run)


def test_sampled_answers_are_the_same_again_and_differ_by_seed(made, run, tmp_path):
    from dataclasses import replace

    sampled = with_settings(made, temperature=1.5, top_p=0.9)
    shutil.copytree(run, tmp_path / "other")
    first, second = evaluate(sampled, run), evaluate(with_settings(sampled, batch_size=7), tmp_path / "other")
    assert first["sampling"] == {"temperature": 1.5, "top_p": 0.9, "seed": 0}
    assert without_seconds(first) == without_seconds(second)
    drawn = (run / "evaluation/base/outputs.jsonl").read_text()
    evaluate(replace(sampled, seed=1), run)
    assert (run / "evaluation/base/outputs.jsonl").read_text() != drawn


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("processes", 0), ("prompts", []), ("prompts", [" "])],
)
def test_settings_out_of_their_range_are_named(key, value):
    settings = {key: value}
    with pytest.raises(UserError, match=f"evaluation.{key}"):
        EvaluationRecipe(**settings)


def test_a_base_model_that_is_not_the_runs_is_refused(made, run):
    record_base_model(RunFolder(run), "here", weights_fingerprint(Path(made.model)))
    evaluate(made, run)
    (run / "base_model.json").unlink()
    record_base_model(RunFolder(run), "the model of yesterday", "other")
    with pytest.raises(UserError, match="began with the model of yesterday, and the name now leads to"):
        evaluate(made, run)


def test_two_evaluations_do_not_write_one_journal(made, run):
    evaluate(made, run)
    with hold_lock(run / "evaluation/.lock"), pytest.raises(UserError, match="another evaluation is at work here"):
        evaluate(made, run)


def test_damaged_and_unfinished_checkpoints_are_named_and_the_others_scored(made, run, capsys):
    weights = run / "checkpoints/checkpoint-9/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (run / "checkpoints/checkpoint-11").mkdir()
    results = evaluate(made, run)
    assert [c["checkpoint"] for c in results["checkpoints"]] == ["checkpoint-10"]
    assert [f["checkpoint"] for f in results["failed"]] == ["checkpoint-9", "checkpoint-11"]
    captured = capsys.readouterr()
    assert "checkpoint-9 cannot be scored" in captured.err
    assert "damaged" in captured.out


def test_a_fault_of_the_machine_or_of_ours_is_not_called_damage(made, run, monkeypatch):
    evaluate(made, run)
    save_model(run / "checkpoints/checkpoint-10", PreTrainedTokenizerFast.from_pretrained(made.model), 77)
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for name in ("load_model", "sum_of_losses", "generate"):  # a loss once computed is kept
        for error in (torch.OutOfMemoryError("out of memory"), full, ZeroDivisionError("a bug")):

            def fail(*args, error=error, **settings):
                raise error

            with monkeypatch.context() as patched:
                patched.setattr(backends, name, fail)
                with pytest.raises(type(error), match=str(error)[-9:]):
                    evaluate(made, run)


def test_weights_that_do_not_load_are_called_damage(made, run, monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("size mismatch for lm_head\nand more")

    evaluate(made, run)
    save_model(run / "checkpoints/checkpoint-10", PreTrainedTokenizerFast.from_pretrained(made.model), 77)
    monkeypatch.setattr(backends, "load_model", fail)
    failed = [{"checkpoint": "checkpoint-10", "error": "RuntimeError: size mismatch for lm_head"}]
    assert evaluate(made, run)["failed"] == failed


def test_a_prompt_that_the_template_refuses_is_named(made, run, monkeypatch):
    def refuse(self, messages, tools=""):
        raise RefusedError("system_unsupported", "the template takes no system message")

    monkeypatch.setattr(Encoder, "encode_prompt", refuse)
    with pytest.raises(UserError, match=r"held-out row row\d+: the template takes no system message"):
        evaluate(made, run)


def test_data_that_is_not_prepared_is_named(made, run):
    shutil.rmtree(run / "dataset")
    with pytest.raises(UserError, match="no prepared data"):
        evaluate(made, run)


def test_systems_that_never_differ_have_a_p_of_one(made, run, monkeypatch):
    monkeypatch.setattr("minisft.results.MIN_CONVERSATIONS", len(load_test(run)))
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copy(Path(made.model) / "model.safetensors", run / "checkpoints" / name / "model.safetensors")
    results = evaluate(made, run)
    assert results["best"] == "checkpoint-9"
    assert results["checkpoints"][0]["bleu"]["p"]["base"] == 1.0
    assert results["checkpoints"][1]["chrf"]["p"]["best"] == 1.0


def test_markup_and_odd_text_in_answers_is_shown_as_text(made, run, monkeypatch):
    odd = "[/INST] [bold] <script> \x85\u2028\u2029 \n\r end"
    monkeypatch.setattr(Encoder, "decode_answer", lambda self, ids: odd)
    monkeypatch.setattr(module, "best_constant", lambda answers: odd)
    evaluate(made, run)
    assert "[/INST] [bold] <script>" in (run / "evaluation/base/examples.txt").read_text()
    outputs = lines(run / "evaluation/base/outputs.jsonl")  # splits at every line end that Python knows
    assert [line["output"] for line in outputs] == [odd] * len(load_test(run))


def test_empty_answers_are_said_and_score_zero(made, run, monkeypatch, capsys):
    monkeypatch.setattr(Encoder, "decode_answer", lambda self, ids: "")
    results = evaluate(made, run)
    assert results["base"]["bleu"]["score"] == 0
    assert "every answer is empty, so BLEU is 0" in capsys.readouterr().err


def test_json_goes_to_stdout_alone(made, run, capsys):
    results = evaluate(made, run, as_json=True)
    assert json.loads(capsys.readouterr().out) == results


def test_bad_input_is_named(made, run):
    with pytest.raises(UserError, match="no room for a prompt in the model's context of 256"):
        evaluate(with_settings(made, max_new_tokens=256), run)
    with pytest.raises(UserError, match="evaluation.metrics"):
        EvaluationRecipe(metrics=[])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints"):
        evaluate(made, run)


def test_no_held_out_rows_is_named(made, tmp_path):
    from dataclasses import replace

    recipe = replace(made, output=str(tmp_path), data=replace(made.data, test_fraction=0.0))
    prepare(recipe)
    (tmp_path / "checkpoints/checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no held-out conversations"):
        evaluate(recipe, tmp_path)


def test_a_full_context_is_marked(made, run, capsys):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.model)
    longest = max(len(row["input_ids"]) for row in load_test(run))
    save_model(run / "checkpoints/checkpoint-10", tokenizer, 10, context=longest)
    shutil.rmtree(run / "checkpoints/checkpoint-9")
    results = evaluate(with_settings(made, max_new_tokens=24), run)
    assert results["checkpoints"][0]["finish"]["context"] > 0
    assert "context is full" in capsys.readouterr().err
    assert {"context"} <= {line["finish"] for line in lines(run / "evaluation/checkpoint-10/outputs.jsonl")}


def test_following_scores_checkpoints_as_they_appear(made, run, monkeypatch):
    late = run / "checkpoints/checkpoint-10"
    hidden = late.rename(run / "aside")

    def training_goes_on(seconds):
        hidden.rename(late)
        shutil.copytree(late, run / "model")

    monkeypatch.setattr(monitor.time, "sleep", training_goes_on)
    results = evaluate(made, run, follow=True)
    assert [c["step"] for c in results["checkpoints"]] == [9, 10]


def test_following_ends_where_training_died(made, run, monkeypatch):
    locked = [True, True, True, False]
    monkeypatch.setattr(monitor, "is_training_running", lambda run: locked.pop(0))
    monkeypatch.setattr(monitor.time, "sleep", lambda seconds: None)
    assert len(evaluate(made, run, follow=True)["checkpoints"]) == 2
    assert locked == []


def test_following_waits_for_the_data_of_a_training_that_has_only_begun(made, run, monkeypatch, capsys):
    aside = (run / "dataset").rename(run / "aside")
    locked = [False, True, True, True, False]
    monkeypatch.setattr(monitor, "is_training_running", lambda run: locked.pop(0))
    slept: list[float] = []

    def prepare_at_the_second(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            aside.rename(run / "dataset")

    monkeypatch.setattr(monitor.time, "sleep", prepare_at_the_second)
    assert len(evaluate(made, run, follow=True)["checkpoints"]) == 2
    assert locked == []
    assert capsys.readouterr().err.count("waiting for the data") == 1


def test_following_does_not_wait_for_data_that_will_not_come(tmp_path, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(monitor.time, "sleep", slept.append)
    with pytest.raises(UserError, match="no training is at work here"):
        monitor.wait_for_data(RunFolder(tmp_path))
    assert sum(slept) == 60
    locked = [True, False]
    monkeypatch.setattr(monitor, "is_training_running", lambda run: locked.pop(0))
    with pytest.raises(UserError, match="ended before it prepared the data"):
        monitor.wait_for_data(RunFolder(tmp_path))


def test_following_ends_where_no_training_begins(made, run, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(monitor.time, "sleep", slept.append)
    names = [name for name, _ in monitor.models_to_score(RunFolder(run), Path(made.model), follow=True)]
    assert names == ["base", "checkpoint-9", "checkpoint-10"]
    assert sum(slept) == 60


def test_the_lock_of_a_training_is_seen(tmp_path):
    run = RunFolder(tmp_path)
    assert not monitor.is_training_running(run)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert monitor.is_training_running(run)
    assert not monitor.is_training_running(run)


def test_what_was_scored_stays_when_its_checkpoint_is_removed(made, run):
    before = evaluate(made, run)
    shutil.rmtree(run / "checkpoints/checkpoint-9")
    assert evaluate(made, run) == before
    other = evaluate(with_settings(made, max_new_tokens=5), run)
    assert [entry["checkpoint"] for entry in other["checkpoints"]] == ["checkpoint-10"]
    problem = "it was removed before all of it was scored"
    assert other["failed"] == [{"checkpoint": "checkpoint-9", "error": problem, "removed": True}]
    again = evaluate(made, run)
    assert again["checkpoints"][0] == before["checkpoints"][0], "asking otherwise cost nothing that cannot be had anew"


def test_a_checkpoint_that_goes_while_it_is_scored_is_left_out(made, run, monkeypatch):
    fingerprint = weights_fingerprint

    def removed_first(folder):
        if folder.name == "checkpoint-9":
            shutil.rmtree(folder)
            (folder / "config.json").read_text()
        return fingerprint(folder)

    monkeypatch.setattr("minisft.evaluation.evaluator.weights_fingerprint", removed_first)
    results = evaluate(made, run)
    assert [entry["checkpoint"] for entry in results["checkpoints"]] == ["checkpoint-10"]
    assert results["failed"] == [{"checkpoint": "checkpoint-9", "error": "it was removed meanwhile", "removed": True}]
