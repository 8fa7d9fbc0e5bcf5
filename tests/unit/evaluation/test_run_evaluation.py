"""A run with a tiny model: everything that `evaluate` writes, reuses, resumes and refuses."""

import contextlib
import fcntl
import json
import math
import random
import shutil
from dataclasses import replace
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
from minisft.evaluation.backends import AnswerTask, LossTask, Workers
from minisft.evaluation.evaluator import ScoredModel
from minisft.evaluation.examples import load_held_out, train_answers
from minisft.evaluation.metrics import CorpusScore, loss_batches, mean_loss, sum_of_losses
from minisft.evaluation.monitor import is_training_running, models_to_score, wait_for_data
from minisft.evaluation.run_evaluation import evaluate, summarise_scores
from minisft.files import hold_lock
from minisft.models import weights_fingerprint
from minisft.recipe import DataRecipe, EvaluationRecipe, Recipe
from minisft.run_folder import RunFolder, record_base_model

MARKERS = ["<|im_start|>", "<|im_end|>"]


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


def test_the_loss_is_the_mean_over_all_supervised_tokens(made, run):
    model = LlamaForCausalLM.from_pretrained(made.model).eval()
    total, count = 0.0, 0
    rows = [(row["input_ids"], row["labels"]) for row in load_test(run)]
    rows[0] = (rows[0][0][:-9], rows[0][1][:-9])
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    loss, tokens = mean_loss(sum_of_losses(model, batch) for batch in loss_batches(rows, batch_tokens=150))
    assert tokens == count
    assert loss == pytest.approx(total / count, rel=1e-5)


class WatchedWorkers(Workers):
    """One process that records what it does, and is interrupted before a batch of answers.

    Args:
        interrupt_at: Number of the batch of answers that never begins, from 1.
    """

    def __init__(self, interrupt_at=None):
        super().__init__(1)
        self.interrupt_at = interrupt_at
        self.loaded = []  # names of the models that were needed
        self.answered = []  # prompts
        self.batches = 0

    def perform(self, spec, tasks):
        for number, task in enumerate(tasks):
            if isinstance(task, AnswerTask):
                self.batches += 1
                if self.batches == self.interrupt_at:
                    raise KeyboardInterrupt
            if spec.weights.name not in self.loaded:
                self.loaded.append(spec.weights.name)
            [outcome] = super().perform(spec, [task])
            if isinstance(task, AnswerTask):
                self.answered.extend(map(tuple, task.prompts))
            yield type(outcome)(number, outcome.value, outcome.seconds)


def test_unchanged_checkpoints_are_not_computed_again(made, run):
    first = evaluate(made, run)
    workers = WatchedWorkers()
    assert evaluate(made, run, workers=workers) == first
    assert evaluate(with_settings(made, metrics=["chrf"]), run, workers=workers)["best"] is not None
    assert workers.loaded == []
    save_model(run / "checkpoints/checkpoint-10", PreTrainedTokenizerFast.from_pretrained(made.model), 77)
    evaluate(made, run, workers=workers)
    assert workers.loaded == ["checkpoint-10"]


def test_an_interrupted_evaluation_resumes_where_it_stopped(made, run):
    undisturbed = evaluate(made, run)
    shutil.rmtree(run / "evaluation")
    interrupted, resumed = WatchedWorkers(interrupt_at=3), WatchedWorkers()
    with pytest.raises(KeyboardInterrupt):
        evaluate(made, run, workers=interrupted)
    assert interrupted.answered
    journal = run / "evaluation/base/journal.jsonl"
    with journal.open("a") as file:
        file.write('{"answers": [["abc", {"ids": [1')  # incomplete, as when the process is killed
    again = evaluate(made, run, workers=resumed)
    examples = len(load_test(run))
    assert len(interrupted.answered + resumed.answered) == 3 * examples, "each answer of each model once"
    assert without_seconds(again) == without_seconds(undisturbed)


def without_seconds(results):
    entries = [results["base"], *results["checkpoints"]]
    return [*({**entry, "seconds": None} for entry in entries), results["constant"], results["best"]]


def test_other_examples_compute_only_what_is_new(made, run):
    evaluate(with_settings(made, turns="last"), run)
    workers = WatchedWorkers()
    every = evaluate(with_settings(made, turns="all"), run, workers=workers)
    rows = len(load_test(run))
    assert len(workers.answered) == len(set(workers.answered)) * 3 == 3 * rows, "the first answers of three models"
    workers.answered.clear()
    evaluate(with_settings(made, turns="last", prompts=["One tea please."]), run, workers=workers)
    assert len(workers.answered) == 3
    again = evaluate(with_settings(made, turns="all"), run, workers=workers)
    assert without_seconds(again) == without_seconds(every)
    assert len(workers.answered) == 3


def test_equal_prompts_are_answered_once(made, run):
    workers = WatchedWorkers()
    settings = with_settings(made, turns="last", prompts=["Tea?", "Tea?"])
    evaluate(settings, run, workers=workers)
    assert len(workers.answered) == len(set(workers.answered)) * 3
    given = lines(run / "evaluation/base/prompts.jsonl")
    assert [line["id"] for line in given] == ["prompt-1", "prompt-2"]
    assert given[0]["output"] == given[1]["output"]


def test_the_users_own_prompts_are_answered_by_every_model(made, run, tmp_path):
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
        ("asked.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "hi"}\n', r"asked.jsonl:2: this line is not a prompt"),
        ("asked.jsonl", "nothing\n", "asked.jsonl:1: this line is not a prompt"),
        ("asked.jsonl", '{"messages": [{"role": "robot", "content": "hi"}]}', "asked.jsonl:1: this line is not a prompt .*robot"),
        ("asked.jsonl", '{"messages": [{"role": "assistant", "content": "hi"}]}', "the last message is an assistant's, there is no message"),
        ("asked.jsonl", '{"messages": []}', "the last message is an assistant's, there is no message"),
        ("asked.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "a content is not text"),
        ("asked.jsonl", "7\n", "asked.jsonl:1: this line is not a prompt"),
        ("asked.txt", " \n\n", "no prompt in this file"),
        ("asked.txt", None, "evaluation.prompts: .*asked.txt cannot be read"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_a_prompt_is_named(made, run, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate(with_settings(made, prompts=str(tmp_path / name)), run)


def test_sampled_answers_are_the_same_again_and_differ_by_seed(made, run, tmp_path):
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
    with hold_lock(run / "evaluation/.lock"), pytest.raises(UserError, match="another evaluation is running here"):
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


class FailingWorkers(Workers):
    """One process in which a kind of task fails."""

    def __init__(self, kind, error):
        super().__init__(1)
        self.kind, self.error = kind, error

    def perform(self, spec, tasks):
        if any(isinstance(task, self.kind) for task in tasks):
            raise self.error
        yield from super().perform(spec, tasks)


def test_lack_of_memory_or_a_bug_is_not_reported_as_a_damaged_checkpoint(made, run):
    evaluate(made, run)
    save_model(run / "checkpoints/checkpoint-10", PreTrainedTokenizerFast.from_pretrained(made.model), 77)
    for kind in (LossTask, AnswerTask):  # in this order: the loss that the second one computes is cached
        for error in (torch.OutOfMemoryError("out of memory"), ZeroDivisionError("a bug")):
            with pytest.raises(type(error), match=str(error)):
                evaluate(made, run, workers=FailingWorkers(kind, error))


def test_weights_that_do_not_fit_their_config_are_reported_as_a_damaged_checkpoint(made, run):
    config = run / "checkpoints/checkpoint-10/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 40}))
    [failed] = evaluate(made, run)["failed"]
    assert failed["checkpoint"] == "checkpoint-10"
    assert "mismatch" in failed["error"]
    assert "\n" not in failed["error"]


class RefusingEncoder(Encoder):
    """Refuses every prompt, as a template without a system role does."""

    def encode_prompt(self, messages, tools=""):
        raise RefusedError("system_unsupported", "the template takes no system message")


def test_a_held_out_row_that_the_template_refuses_is_named(made, run):
    encoder = RefusingEncoder(PreTrainedTokenizerFast.from_pretrained(made.model), "chatml")
    with pytest.raises(UserError, match=r"held-out row row\d+: the template takes no system message"):
        load_held_out(run, encoder, "last", None)


def test_data_that_is_not_prepared_is_named(made, run):
    shutil.rmtree(run / "dataset")
    with pytest.raises(UserError, match="no prepared data"):
        evaluate(made, run)


def test_systems_that_never_differ_have_a_p_of_one():
    references = ["a large tea done", "a small juice done"]
    same, other = ["a large tea here", "a small tea done"], ["a small cocoa done"] * 2
    scored = {}
    for name, outputs in (("base", same), ("checkpoint-10", same), ("checkpoint-9", same), ("constant", other)):
        scores = {metric: CorpusScore(metric, outputs, references) for metric in ("bleu", "chrf")}
        scored[name] = ScoredModel({}, outputs, scores)
    results = summarise_scores(scored, scored.pop("constant"), EvaluationRecipe())
    assert results["best"] == "checkpoint-9"
    assert results["checkpoints"][0]["bleu"]["p"]["base"] == 1.0
    assert results["checkpoints"][1]["chrf"]["p"]["best"] == 1.0


def replace_answers(run, ids):
    """Give every cached answer of a run's models these ids."""
    for journal in run.glob("evaluation/*/journal.jsonl"):
        cached = lines(journal)
        for line in cached:
            for answer in line.get("answers", []):
                answer[1]["ids"] = ids
        journal.write_text("".join(json.dumps(line) + "\n" for line in cached))


def test_markup_and_unusual_line_ends_in_answers_are_shown_as_text(made, tmp_path, capsys):
    odd = "[/INST] [bold] <script> \x85\u2028\u2029 \n\r end"
    source, run = tmp_path / "odd.jsonl", tmp_path / "run"
    rows = [[{"from": "human", "value": f"guest {n}"}, {"from": "gpt", "value": odd}] for n in range(12)]
    source.write_text("".join(json.dumps({"id": str(n), "conversations": row}) + "\n" for n, row in enumerate(rows)))
    recipe = replace(made, output=str(run), data=replace(made.data, source=str(source)))
    prepare(recipe)
    shutil.copytree(Path(made.output) / "checkpoints/checkpoint-9", run / "checkpoints/checkpoint-9")
    evaluate(recipe, run)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.model)
    replace_answers(run, tokenizer(odd, add_special_tokens=False)["input_ids"])
    capsys.readouterr()
    assert evaluate(recipe, run)["constant"]["text"] == odd
    assert repr(odd)[:20] in capsys.readouterr().out
    assert "[/INST] [bold] <script>" in (run / "evaluation/base/examples.txt").read_text()
    outputs = lines(run / "evaluation/base/outputs.jsonl")  # splits at every line end that Python knows
    assert [line["output"] for line in outputs] == [odd] * len(load_test(run))


def test_empty_answers_cause_a_warning_and_score_zero(made, run, capsys):
    evaluate(made, run)
    replace_answers(run, [])
    results = evaluate(made, run)
    assert results["base"]["bleu"]["score"] == 0
    assert "every answer is empty, so BLEU is 0" in capsys.readouterr().err


def test_with_as_json_stdout_holds_only_the_results(made, run, capsys):
    results = evaluate(made, run, as_json=True)
    assert json.loads(capsys.readouterr().out) == results


def test_too_many_new_tokens_no_metrics_and_no_checkpoints_are_refused(made, run):
    with pytest.raises(UserError, match="no room for a prompt in the model's context of 256"):
        evaluate(with_settings(made, max_new_tokens=256), run)
    with pytest.raises(UserError, match="evaluation.metrics"):
        EvaluationRecipe(metrics=[])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints"):
        evaluate(made, run)


def test_no_held_out_rows_is_named(made, tmp_path):
    recipe = replace(made, output=str(tmp_path), data=replace(made.data, test_fraction=0.0))
    prepare(recipe)
    (tmp_path / "checkpoints/checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no held-out conversations"):
        evaluate(recipe, tmp_path)


def test_answers_cut_by_a_full_context_are_marked(made, run, capsys):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.model)
    longest = max(len(row["input_ids"]) for row in load_test(run))
    save_model(run / "checkpoints/checkpoint-10", tokenizer, 10, context=longest)
    shutil.rmtree(run / "checkpoints/checkpoint-9")
    results = evaluate(with_settings(made, max_new_tokens=24), run)
    assert results["checkpoints"][0]["finish"]["context"] > 0
    assert "context is full" in capsys.readouterr().err
    assert {"context"} <= {line["finish"] for line in lines(run / "evaluation/checkpoint-10/outputs.jsonl")}


def test_following_scores_checkpoints_as_they_appear(made, run):
    late = run / "checkpoints/checkpoint-10"
    hidden = late.rename(run / "hidden")

    def finish_training(seconds):
        hidden.rename(late)
        shutil.copytree(late, run / "model")

    results = evaluate(made, run, follow=True, sleep=finish_training)
    assert [c["step"] for c in results["checkpoints"]] == [9, 10]


class Training:
    """A training that holds the lock of its run folder while the evaluation waits.

    Args:
        run: The run folder.
        starts: Number of the wait during which it starts; 0: it is running already.
        ends: Number of the wait during which it ends.
        during: Called with the number of each wait.
    """

    def __init__(self, run, starts, ends, during=lambda number: None):
        self.run, self.starts, self.ends, self.during = run, starts, ends, during
        self.waits, self.lock = 0, contextlib.ExitStack()
        if starts == 0:
            self.lock.enter_context(hold_lock(run / ".lock"))

    def sleep(self, seconds):
        self.waits += 1
        self.during(self.waits)
        if self.waits == self.starts:
            self.lock.enter_context(hold_lock(self.run / ".lock"))
        if self.waits == self.ends:
            self.lock.close()


def test_following_ends_when_training_died(made, run):
    training = Training(run, starts=0, ends=3)
    assert len(evaluate(made, run, follow=True, sleep=training.sleep)["checkpoints"]) == 2
    assert training.waits == 3


def test_following_waits_for_the_data_of_a_training_that_is_about_to_start(made, run, capsys):
    hidden = (run / "dataset").rename(run / "hidden")
    training = Training(run, starts=1, ends=4, during=lambda number: number == 2 and hidden.rename(run / "dataset"))
    assert len(evaluate(made, run, follow=True, sleep=training.sleep)["checkpoints"]) == 2
    assert training.waits == 4
    assert capsys.readouterr().err.count("waiting for the data") == 1


def test_following_does_not_wait_for_data_without_a_training(tmp_path):
    slept: list[float] = []
    with pytest.raises(UserError, match="no training is running here"):
        wait_for_data(RunFolder(tmp_path), slept.append)
    assert sum(slept) == 60
    with pytest.raises(UserError, match="ended before it prepared the data"):
        wait_for_data(RunFolder(tmp_path), Training(tmp_path, starts=0, ends=1).sleep)


def test_following_ends_if_no_training_starts(made, run):
    slept: list[float] = []
    models = models_to_score(RunFolder(run), Path(made.model), follow=True, sleep=slept.append)
    assert [name for name, _ in models] == ["base", "checkpoint-9", "checkpoint-10"]
    assert sum(slept) == 60


def test_a_training_that_holds_the_lock_counts_as_running(tmp_path):
    run = RunFolder(tmp_path)
    assert not is_training_running(run)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_training_running(run)
    assert not is_training_running(run)


def test_the_scores_of_a_removed_checkpoint_are_kept(made, run):
    before = evaluate(made, run)
    shutil.rmtree(run / "checkpoints/checkpoint-9")
    assert evaluate(made, run) == before
    other = evaluate(with_settings(made, max_new_tokens=5), run)
    assert [entry["checkpoint"] for entry in other["checkpoints"]] == ["checkpoint-10"]
    problem = "it was removed before all of it was scored"
    assert other["failed"] == [{"checkpoint": "checkpoint-9", "error": problem, "removed": True}]
    again = evaluate(made, run)
    assert again["checkpoints"][0] == before["checkpoints"][0], "other settings did not delete the cached results"


def test_a_checkpoint_removed_while_it_is_scored_is_left_out(made, run, monkeypatch):
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
