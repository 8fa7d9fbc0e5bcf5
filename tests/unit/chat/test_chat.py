"""Chat: what it sends, what it prints, its commands, and a pseudo-terminal with Ctrl-C."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minisft.chat.session import load_model_and_encoder
from minisft.chat.terminal import Session, Terminal, chat, choose_model
from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError
from minisft.errors import UserError
from minisft.evaluation.generation import Sampling
from minisft.recipe import DataRecipe, Recipe
from minisft.run_start import open_run
from minisft.text import printable
from tests.tiny import heed_ctrl_c


def save_tiny(folder, seed=0, context=512):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = Encoder(fast, "chatml").chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def session(model_folder):
    model, encoder = load_model_and_encoder(str(model_folder), False)
    return Session(model, encoder, max_new_tokens=12)


def typed(monkeypatch, *lines):
    waiting = list(lines)

    def read(prompt=""):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", read)


@dataclass
class RecordingSession(Session):
    """Keeps the prompt of each answer."""

    prompts: list[list[int]] = field(default_factory=list)

    def answer(self, on_text):
        self.prompts.append(self.prompt())
        return super().answer(on_text)


def recorded_chat(folder, max_new_tokens):
    """Chat with a model until the end of the typed lines, and return the prompt of each answer."""
    model, encoder = load_model_and_encoder(str(folder), False)
    session = RecordingSession(model, encoder, max_new_tokens=max_new_tokens)
    Terminal(session, None, False).run()
    return session.prompts


def test_the_prompt_is_a_prefix_of_the_training_row(session, capsys):
    inputs = []
    hook = session.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    session.set_system("be short")
    Terminal(session, None, False).ask("hello [/INST] <|im_end|>", one_shot=True)
    hook.remove()
    answer = capsys.readouterr().out.removesuffix("\n")
    said = (Message("system", "be short"), Message("user", "hello [/INST] <|im_end|>"), Message("assistant", "x"))
    row = session.encoder.encode(Conversation(said, "id", "here")).input_ids
    assert len(inputs[0]) > 20
    assert row[: len(inputs[0])] == inputs[0]
    assert answer


def test_one_message_prints_only_the_answer(model_folder, capsys):
    chat(model_folder, "hi", max_new_tokens=6)
    captured = capsys.readouterr()
    model: Any
    model, encoder = load_model_and_encoder(str(model_folder), False)
    ids = torch.tensor([encoder.encode_prompt([Message("user", "hi")])])
    out = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=list(encoder.stop_token_ids))
    assert captured.out == printable(encoder.decode_answer(out[0, ids.shape[1] :].tolist())) + "\n"
    assert "/help" not in captured.err


def test_streamed_pieces_make_up_the_answer(session):
    session.turns = [Message("user", "hi")]
    pieces = []
    session.answer(lambda piece: pieces.append(piece))
    assert "".join(pieces) == session.turns[-1].content
    assert len(pieces) > 3


def test_each_chat_command_does_what_the_help_describes(model_folder, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "saved.jsonl"
    typed(
        monkeypatch, "/system be kind", "one", "two\\", "lines", "/regen", f"/save {saved}", "/system", "/reset",
        "/regen", "//slash", "/nonsense", "/help", "/compare", "/save", "", "/exit", "never sent",
    )  # fmt: skip
    prompts = recorded_chat(model_folder, max_new_tokens=3)
    error = capsys.readouterr().err
    assert "There is no command /nonsense" in error
    assert "System prompt: be kind" in error
    assert "nothing to answer again yet" in error
    assert "base model is known for a run folder only" in error
    assert "Say where: /save FILE" in error
    assert "/reset  " in error
    [line] = [json.loads(text) for text in saved.read_text().splitlines()]
    turns = line["conversations"]
    assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "human", "gpt"]
    assert turns[3]["value"] == "two\nlines"
    assert len(prompts) == 4  # one, two, two again, slash
    assert prompts[1] == prompts[2]
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(model_folder), "chatml")
    assert prompts[3] == encoder.encode_prompt([Message("system", "be kind"), Message("user", "/slash")])


def test_a_full_context_drops_the_oldest_exchanges_with_a_message(tmp_path, monkeypatch, capsys):
    folder = save_tiny(tmp_path / "short", context=160)
    typed(monkeypatch, "first " * 6, "second " * 6, "third " * 6, "x" * 200, "/exit")
    prompts = recorded_chat(folder, max_new_tokens=20)
    error = capsys.readouterr().err
    assert "the oldest exchange was dropped" in error
    assert "do not fit the model's context of 160" in error
    assert all(len(prompt) <= 140 for prompt in prompts)
    assert len(prompts) == 3


class ColouredEncoder(Encoder):
    """Decodes every answer to terminal control characters."""

    def decode_answer(self, ids):
        return "\x1b[31mred\x07" if ids else ""


def test_terminal_control_characters_are_not_passed_on(session, capsys):
    session.encoder = ColouredEncoder(session.encoder.tokenizer, "chatml")
    Terminal(session, None, False).ask("hi")
    assert capsys.readouterr().out == "\\x1b[31mred\\x07\n"


def a_run(folder, base):
    with open_run(Recipe(model=str(base), output=str(folder), data=DataRecipe(source="nowhere.jsonl"))):
        return folder


def test_a_run_folder_gives_its_model_or_its_newest_checkpoint(tmp_path, model_folder):
    run = a_run(tmp_path / "run", model_folder)
    with pytest.raises(UserError, match="no model and no checkpoint yet"):
        choose_model(str(run))
    for step in (9, 10):
        save_tiny(run / f"checkpoints/checkpoint-{step}")
    assert choose_model(str(run)) == (str(run / "checkpoints/checkpoint-10"), str(model_folder))
    save_tiny(run / "model")
    assert choose_model(str(run)) == (str(run / "model"), str(model_folder))
    assert choose_model(str(model_folder)) == (str(model_folder), None)


def test_compare_shows_the_base_models_answer_next_to_the_tuned_one(tmp_path, model_folder, monkeypatch, capsys):
    run = a_run(tmp_path / "run", model_folder)
    save_tiny(run / "model", seed=5)
    typed(monkeypatch, "hello", "/compare", "/exit")
    chat(run, max_new_tokens=4)
    out = capsys.readouterr().out
    assert "base" in out
    assert "tuned" in out


def refusing_system_prompts(folder):
    """A model folder whose chat template, like Gemma's, takes no system prompt."""
    save_tiny(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("message", [None, "hi"])
def test_a_system_prompt_that_the_template_refuses_is_an_error(tmp_path, message):
    with pytest.raises(UserError, match="takes no system message"):
        chat(refusing_system_prompts(tmp_path / "model"), message, "be kind")


def test_a_system_prompt_refused_during_a_session_is_reported_and_the_session_continues(tmp_path, monkeypatch, capsys):
    typed(monkeypatch, "one", "/system be kind", "/regen", "/compare", "two", "/system", "/exit")
    prompts = recorded_chat(refusing_system_prompts(tmp_path / "model"), max_new_tokens=3)
    error = capsys.readouterr().err
    assert error.count("takes no system message") == 1
    assert "leave the system prompt out" in error
    assert "System prompt: none" in error
    assert len(prompts) == 3


class RefusingEncoder(Encoder):
    """Refuses every prompt."""

    def encode_prompt(self, messages, tools=""):
        raise RefusedError("template_refuses", "not like this")


def test_an_answer_stays_if_the_template_refuses_to_generate_it_again(session, capsys):
    terminal = Terminal(session, None, False)
    terminal.ask("hi")
    before = list(session.turns)
    session.encoder = RefusingEncoder(session.encoder.tokenizer, "chatml")
    assert not terminal.handle("/regen")
    terminal.ask("again")
    assert session.turns == before
    assert capsys.readouterr().err.count("not like this") == 2


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_p", [0.0, -1.0, 1.5, float("nan")]),
    ],
)
def test_an_option_out_of_range_is_named(model_folder, option, values):
    for value in values:
        options: Any = {option: value}
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')}"):
            chat(model_folder, "hi", **options)


def start_chat(folder, *options, **settings):
    code = (
        "import sys, torch; torch.set_num_threads(1); from minisft.chat.terminal import chat; "
        "chat(sys.argv[1], max_new_tokens=int(sys.argv[2]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *options], preexec_fn=heed_ctrl_c, **settings)


def test_piped_lines_are_answered_without_an_input_prompt(model_folder):
    process = start_chat(
        model_folder, "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8",
    )  # fmt: skip
    out, err = process.communicate("hello\n/system x\nagain\n", timeout=120)
    assert process.returncode == 0
    assert ">" not in out.split("\n")[0]
    assert "System prompt: x" in err


def test_through_a_pseudo_terminal_ctrl_c_stops_the_answer_and_keeps_the_session(tmp_path):
    folder = save_tiny(tmp_path / "endless", context=100000)
    weights: Any = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # never ends by itself
        weights.lm_head.weight[2] = 0
    weights.save_pretrained(folder)
    ours, theirs = pty.openpty()
    process = start_chat(folder, "90000", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.wait_for("> ")
        os.write(ours, b"hello\n")
        screen.wait_for("hello")
        screen.wait_for_more(40)
        process.send_signal(signal.SIGINT)
        screen.wait_for("(stopped)")
        screen.wait_for("> ")
        os.write(ours, b"/nonsense\n")
        screen.wait_for("There is no command /nonsense")
        screen.wait_for("> ")
        screen.press_until("/exit or Ctrl-D leaves.", process)
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_every_command_through_a_pseudo_terminal(tmp_path, model_folder):
    run = a_run(tmp_path / "run", save_tiny(tmp_path / "base", seed=0, context=400))
    save_tiny(run / "model", seed=5, context=400)
    saved = tmp_path / "saved.jsonl"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = start_chat(run, "10", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = Screen(ours)

    def say(line, *shown):
        screen.wait_for("> ")
        os.write(ours, line.encode() + b"\n")
        for text in shown:
            screen.wait_for(text)

    try:
        say("/help", "/regen         answer the last message again")
        say("/regen", "There is nothing to answer again yet.")
        say("/system be kind", "System prompt: be kind")
        say("/system", "System prompt: be kind")
        say("one", "(cut: the answer reached --max-new-tokens)")
        say("/regen", "(cut: the answer reached --max-new-tokens)")
        say("/compare", "base", "tuned")
        screen.wait_for("> ")
        os.write(ours, b"two\\\n")
        screen.wait_for("... ")
        os.write(ours, b"lines\n")
        screen.wait_for("(cut: the answer reached --max-new-tokens)")
        say(f"/save {saved}", "Added to")
        say("/save", "Say where: /save FILE")
        say("/nonsense", "There is no command /nonsense")
        say("third " * 50, "The context is full: the oldest exchange was dropped.")
        say("x" * 390, "do not fit the model's context of 400")
        say("/reset", "A new conversation.")
        say("/compare", "There is nothing to compare yet.")
        say("//slash", "(cut: the answer reached --max-new-tokens)")
        say(f"/save {saved}", "Added to")
        say("/exit")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    first, second = [json.loads(line)["conversations"] for line in saved.read_text().splitlines()]
    assert [turn["value"] for turn in first if turn["from"] != "gpt"] == ["be kind", "one", "two\nlines"]
    assert [turn["value"] for turn in second if turn["from"] != "gpt"] == ["be kind", "/slash"]


def test_regen_samples_another_answer(session):
    session.sampling = Sampling(2.0, 1.0, 3)
    answers = []
    for _ in range(3):
        session.turns = [Message("user", "hi")]
        session.answer(lambda piece: None)
        answers.append(session.turns[-1].content)
    assert len(set(answers)) == 3
    again = replace(session, answer_count=0, cache=None, turns=[Message("user", "hi")])
    again.answer(lambda piece: None)
    assert again.turns[-1].content == answers[0]


class Screen:
    """What a pseudo-terminal has shown, read in order."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.unread = ""

    def wait_for(self, text, seconds=90):
        while text not in self.unread:
            self._read(text, seconds)
        self.unread = self.unread.partition(text)[2]

    def wait_for_more(self, characters, seconds=90):
        while len(self.unread) < characters:
            self._read("more", seconds)
        self.unread = ""

    def press_until(self, text, process, times=20):
        """Press Ctrl-C until text appears: Python loses one that arrives just before `input` starts to wait."""
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            if select.select([self.descriptor], [], [], 5)[0]:
                break
        self.wait_for(text)

    def _read(self, wanted, seconds):
        end = time.monotonic() + seconds
        ready, _, _ = select.select([self.descriptor], [], [], end - time.monotonic())
        assert ready, f"no {wanted!r} after {seconds} s; shown: {self.unread!r}"
        self.unread += os.read(self.descriptor, 65536).decode(errors="replace")
