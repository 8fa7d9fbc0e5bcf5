"""A model that says what a test wants, and the parts of a server around it."""

import queue
import time
from collections import OrderedDict

import torch
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from minisft.data.encoder import Encoder
from minisft.evaluation.generation import DecodingRequest
from minisft.serving.answer_text import AnswerText, Piece
from minisft.serving.model_pool import LoadedModel, ModelPool, ServedModel
from minisft.serving.protocol import ApiError
from minisft.serving.scheduler import Job, Scheduler
from tests.tiny import byte_tokenizer


class ScriptedModel(torch.nn.Module):
    """Continues a prompt of `prompt` tokens with the ids of `script`, whatever the prompt is; then with id 1."""

    def __init__(self, script, prompt, vocabulary=300, seconds=0.0, failing_at=None):
        super().__init__()
        self.script, self.prompt, self.vocabulary = script, prompt, vocabulary
        self.seconds, self.failing_at, self.calls = seconds, failing_at, 0
        self.rows = []
        self.config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=4096)
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        self.calls += 1
        self.rows.append(len(input_ids))
        time.sleep(self.seconds)
        if self.calls == self.failing_at:
            raise RuntimeError("planted")
        logits = torch.zeros(len(input_ids), 1, self.vocabulary)
        for row, length in enumerate(attention_mask.sum(dim=1).tolist()):
            place = length - self.prompt
            logits[row, 0, self.script[place] if place < len(self.script) else 1] = 9.0
        return CausalLMOutput(logits=logits)


class ScriptedPool(ModelPool):
    """Models by name, without files; the size of each is one byte."""

    def __init__(self, models, limit=100, seconds=0.0):
        self.found, self.limit, self.seconds = models, limit, seconds
        self.loaded, self.run, self.recipe = OrderedDict(), None, None
        self.evicted = []
        self.encoder = byte_encoder()

    def models(self):
        return {name: ServedModel(name, None, 0) for name in self.found}

    def context(self, model):
        return 4096

    def size(self, model):
        return 1

    def load(self, model):
        time.sleep(self.seconds)
        if isinstance(self.found[model.name], Exception):
            raise self.found[model.name]
        return LoadedModel(model.name, self.found[model.name], 1)

    def evict(self, name):
        self.evicted.append(name)
        del self.loaded[name]


def byte_encoder(template=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or (
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    return Encoder(tokenizer)


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


class Asked:
    """A job and what was delivered of it."""

    def __init__(self, scheduler, name, rows=1, prompt=3, most=50, **options):
        self.events: queue.Queue[tuple[int, Piece | ApiError]] = queue.Queue()
        encoder = scheduler.pool.encoder
        request = DecodingRequest([5] * prompt, frozenset([1]), most)
        texts = tuple(AnswerText(encoder, **options) for _ in range(rows))
        self.job = Job(
            ServedModel(name, None, 0), (request,) * rows, texts, lambda row, piece: self.events.put((row, piece))
        )
        scheduler.submit(self.job)

    def answers(self, timeout=10):
        """Return the text of every row, or the error."""
        texts: dict[int, str] = {}
        ended = 0
        while ended < len(self.job.rows):
            row, piece = self.events.get(timeout=timeout)
            if isinstance(piece, ApiError):
                return piece
            texts[row] = texts.get(row, "") + piece.content
            ended += piece.finish is not None
        return [texts[row] for row in range(len(texts))]


def started(models, **settings):
    return Scheduler(ScriptedPool(models, **settings))
