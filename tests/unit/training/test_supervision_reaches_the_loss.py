"""The mask, looked at where it matters: in the batch that reaches the model's forward, and in the loss."""

import numpy as np
import pytest
import torch

from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.models import load_model, load_tokenizer
from minisft.training import attention
from minisft.training.batching import IGNORED, pack_sequences
from minisft.training.loss import row_loss

TALKS = [
    [("user", "a cup of tea"), ("assistant", "with milk?"), ("user", "no"), ("assistant", "here you are")],
    [("system", "be short"), ("user", "coffee"), ("assistant", "only tea")],
]


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return Encoder(load_tokenizer(tiny_model), "mistral")


@pytest.fixture(scope="module")
def encoded(encoder):
    conversations = [
        Conversation(tuple(Message(role, text) for role, text in talk), id=str(number), location=f"test:{number}")
        for number, talk in enumerate(TALKS)
    ]
    rows = [encoder.encode(conversation) for conversation in conversations]
    return [(np.array(row.input_ids), np.array(row.labels)) for row in rows]


@pytest.fixture(scope="module")
def model(tiny_model):
    attention.register()
    return load_model(tiny_model, dtype=torch.float32, attention=attention.PADDING_FREE)


def test_the_forward_predicts_answers_and_terminators_alone(encoder, encoded, model):
    seen = {}

    def watch(module, args, kwargs):
        seen.update(kwargs)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    row = pack_sequences(encoded)
    row_loss(model, row)
    handle.remove()
    following = seen["input_ids"][0, seen["logits_to_keep"] + 1].tolist()
    assert following == row.targets.tolist()
    answers = [text for talk in TALKS for role, text in talk if role == "assistant"]
    assert encoder.tokenizer.decode(following) == "".join(f"{text}</s>" for text in answers)
    assert seen["input_ids"].shape == (1, sum(len(ids) for ids, _ in encoded)), "no padding"


def test_a_masked_label_changes_nothing_and_a_supervised_one_does(encoder, model):
    def loss_of(learned, masked):
        """The loss of a talk whose first answer is learned and whose last is masked."""
        messages = (
            Message("user", "a cup of tea"),
            Message("assistant", learned),
            Message("user", "no"),
            Message("assistant", masked, supervised=False),
        )
        row = encoder.encode(Conversation(messages, id="0", location="test:0"))
        return row_loss(model, pack_sequences([(np.array(row.input_ids), np.array(row.labels))]))

    loss = loss_of("with milk?", "here you are")
    torch.testing.assert_close(loss_of("with milk?", "something else, and longer"), loss)
    assert not torch.isclose(loss_of("with salt?", "here you are"), loss)


def test_the_loss_is_that_of_plain_transformers(encoded, model, tiny_model):
    """One conversation at a time, through the model's own labels: the same sum over supervised tokens."""
    plain = load_model(tiny_model, dtype=torch.float32)
    expected = 0.0
    for ids, labels in encoded:
        count = int((labels[1:] != IGNORED).sum())
        loss = plain(torch.from_numpy(ids)[None].long(), labels=torch.from_numpy(labels)[None].long()).loss
        expected += loss.item() * count
    assert row_loss(model, pack_sequences(encoded)).item() == pytest.approx(expected, rel=1e-5)
