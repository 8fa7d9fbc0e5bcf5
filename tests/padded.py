"""The independent reference of training: a plain padded loop, without the Trainer; and what a run did."""

import json

import torch

from minisft.training.batching import measure_lengths, steps_of_epoch


def padded_loop(model, dataset, steps, learning_rates, dtype=torch.float32, skipped=()):
    """A plain loop: padded batches, every logit, torch's AdamW; returns losses and gradient norms.

    The weights stay as they are in the `skipped` steps, numbered from 0.
    """
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    came_out = []
    for number, (step, learning_rate) in enumerate(zip(steps, learning_rates, strict=True)):
        rows = [dataset[index] for index in step]
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        came_out.append((loss.item(), norm.item()))
        optimizer.param_groups[0]["lr"] = learning_rate
        if number not in skipped:
            optimizer.step()
        optimizer.zero_grad()
    return came_out


def logged_steps(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def train_rows(run):
    from datasets import load_from_disk

    return load_from_disk(str(run.dataset / "train"))


def conversations_of_steps(run, *, global_batch, pack_tokens=None):
    """The rows that make each step that the run took."""
    lengths = measure_lengths(train_rows(run)).tokens
    count, steps = len(logged_steps(run)), []
    for epoch in range(count):
        how = {"global_batch": global_batch, "pack_tokens": pack_tokens, "seed": 0, "epoch": epoch}
        steps += [step.tolist() for step in steps_of_epoch(lengths, **how)]
    return steps[:count]
