"""Losses and models that are broken in one way each: the check for it is the first to fail."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from minisft.checking.context import CheckContext
from minisft.training import batching
from minisft.training.loss import row_loss
from tests.tiny import byte_tokenizer
from tests.unit.checking.examined import (
    StepsInThisProcess,
    TrainerWithFault,
    assert_first_to_fail,
    context_with_trainer,
    examined,
)


class ForgetfulConfig(GPT2Config):
    model_type = "forgetful_gpt2"


class ForgetfulModel(GPT2LMHeadModel):
    """Learned positions, counted from the beginning of the row whatever the caller says."""

    config_class = ForgetfulConfig

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class LeakyConfig(LlamaConfig):
    model_type = "leaky_llama"


class LeakyModel(LlamaForCausalLM):
    """Mixes every token with the one before it, as a convolution does, over the borders of conversations too."""

    config_class = LeakyConfig

    def forward(self, input_ids=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, -1))
        return super().forward(inputs_embeds=embedded + before, **kwargs)


class HalfWrongConfig(LlamaConfig):
    model_type = "half_wrong_llama"


class HalfWrongModel(LlamaForCausalLM):
    """In half precision its output layer has other logits, under every attention; in fp32 it is right."""

    config_class = HalfWrongConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.lm_head.weight.dtype == torch.bfloat16:
            output.logits = output.logits * 1.5
        return output


OWN = ((ForgetfulConfig, ForgetfulModel), (LeakyConfig, LeakyModel), (HalfWrongConfig, HalfWrongModel))
for config, model in OWN:
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)


@pytest.fixture
def with_model(recipe_file, tmp_path):
    """Return a function that examines the recipe with a model of a class of its own."""

    def run_checks(model_class, config, *overrides, only="loss.rows"):
        torch.manual_seed(0)
        model_class(config).save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        words = (f"model={tmp_path / 'model'}", *overrides)
        return examined(recipe_file, *words, only=only, context=StepsInThisProcess)

    return run_checks


def assert_one_conversation_in_a_row(results, words):
    """Training copes with such a model, so nothing failed: the checks of rows of several were not run."""
    failed = [result.name for result in results.values() if result.status == "FAILED"]
    assert not [name for name in failed if name != "spend.memory"]  # that of this process counts earlier tests too
    for name in ("loss.rows", "loss.split"):
        assert results[name].status == "not run"
        assert f"{words}, so training gives each conversation its own row" in results[name].detail


def test_a_model_that_ignores_position_ids(with_model):
    config = ForgetfulConfig(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5,
    )  # fmt: skip
    words = "ForgetfulModel ignores position_ids, so a conversation does not begin at position 0"
    assert_one_conversation_in_a_row(with_model(ForgetfulModel, config), words)


def test_a_model_that_lets_conversations_see_each_other(with_model):
    config = LeakyConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    words = "LeakyModel lets tokens of one conversation see those of another"
    assert_one_conversation_in_a_row(with_model(LeakyModel, config), words)


def test_a_fault_that_only_half_precision_has(with_model):
    config = HalfWrongConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    results = with_model(HalfWrongModel, config, "training.precision=bf16", only="loss.padding")
    assert "in bf16, padded loss" in assert_first_to_fail(results, "loss.padding")
    right = with_model(HalfWrongModel, config, "training.precision=fp32", only="loss.padding")
    assert right["loss.padding"].status == "ok"


@pytest.mark.parametrize("more", [[], ["training.lora={rank: 2}"], ["training.gradient_checkpointing=true"]])
def test_the_checks_of_the_loss_run_in_the_precision_of_the_recipe(recipe_file, more):
    """With LoRA the frozen weights are in half precision, so fp32 is not compared."""
    results = examined(recipe_file, "training.precision=bf16", *more, only="loss.split", context=StepsInThisProcess)
    for name in ("loss.padding", "loss.rows", "loss.split"):
        assert results[name].status == "ok", results[name].detail
        assert "in bf16" in results[name].detail
        assert ("in fp32" in results[name].detail) == ("lora" not in str(more))


def test_the_loss_scale_of_fp16_is_not_in_the_gradient_norm_that_is_compared(recipe_file):
    """On a CPU accelerate has no fp16; the trainer gets torch's scaler, with a scale that would overflow fp32."""

    class WithScaler(CheckContext):
        def train_in_scratch(self, recipe):
            trainer = super().train_in_scratch(recipe)
            trainer.args.fp16 = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
            return trainer

    expected, found = (
        examined(recipe_file, only="loss.split", context=context)["loss.split"]
        for context in (CheckContext, WithScaler)
    )
    assert (found.status, found.detail) == ("ok", expected.detail)


def test_labels_that_are_overwritten_on_the_way_to_the_loss(recipe_file):
    class AllLearned(TrainerWithFault):
        def get_train_dataloader(self):
            for batch in self._trainer.get_train_dataloader():
                rows = (
                    batching.pack_sequences([(one, one) for one in conversations(row)], row.indexes)
                    for row in batch.rows
                )
                yield replace(batch, rows=tuple(rows))

    def conversations(row):
        return [part.numpy() for part in row.input_ids[0].split(list(row.lengths))]

    results = examined(recipe_file, only="loss.mask", context=context_with_trainer(AllLearned))
    assert "the mask is lost" in assert_first_to_fail(results, "loss.mask")


def test_a_loss_that_does_not_look_at_the_mask(recipe_file):
    class LossOfAllTokens(CheckContext):
        def loss_of(self, row):
            everywhere = torch.arange(row.input_ids.shape[1] - 1)
            return super().loss_of(replace(row, predict_at=everywhere, targets=row.input_ids[0, 1:]))

    results = examined(recipe_file, only="loss.mask", context=LossOfAllTokens)
    assert "two halves of a mask" in assert_first_to_fail(results, "loss.mask")


def test_targets_that_are_off_by_one(recipe_file):
    """The padded reference shifts by itself, so a second shift shows."""

    class Shifted(CheckContext):
        def loss_of(self, row):
            return super().loss_of(replace(row, predict_at=(row.predict_at - 1).clamp(min=0)))

    assert_first_to_fail(examined(recipe_file, only="loss.padding", context=Shifted), "loss.padding")


def test_a_loss_that_averages_means(recipe_file):
    class MeanOfMeans(TrainerWithFault):
        def training_step(self, model, inputs):
            total = torch.zeros(())
            for row in inputs.rows:
                loss = row_loss(model, row) / len(row.targets) / len(inputs.rows)
                loss.backward()
                total += loss.detach()
            return total

    results = examined(recipe_file, only="loss.split", context=context_with_trainer(MeanOfMeans))
    assert "how the batch is split" in assert_first_to_fail(results, "loss.split")


def test_gradients_that_are_not_summed_over_the_rows(recipe_file):
    """The loss that is shown is right; only the gradient is that of the last row alone."""

    class OfTheLastRow(TrainerWithFault):
        def training_step(self, model, inputs):
            total = torch.zeros(())
            for row in inputs.rows:
                model.zero_grad()
                loss = row_loss(model, row) / inputs.step_supervised
                loss.backward()
                total += loss.detach()
            return total

    results = examined(recipe_file, only="loss.split", context=context_with_trainer(OfTheLastRow))
    assert "gradient norm" in assert_first_to_fail(results, "loss.split")
