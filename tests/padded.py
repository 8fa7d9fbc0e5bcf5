"""The independent reference of training: a plain padded loop, without the Trainer."""

import torch


def padded_loop(model, dataset, steps, learning_rates, dtype=torch.float32):
    """A plain loop: padded batches, every logit, torch's AdamW; returns losses and gradient norms."""
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    came_out = []
    for step, learning_rate in zip(steps, learning_rates, strict=True):
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
        optimizer.step()
        optimizer.zero_grad()
    return came_out
