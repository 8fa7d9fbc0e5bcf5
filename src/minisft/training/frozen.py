"""Parameters that no loss can reach, found before the first step.

A checkpoint may hold parameters that a causal language model never uses: the vision tower of a multimodal model that
trains on text, or a layer that only another class calls. With several processes, DDP waits for their gradients and
fails at the second step ("Expected to have finished reduction"), and ZeRO applies weight decay to them. So they are
frozen.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minisft.models import transformers_attention

_TOKENS = 4


def unreached_parameters(model: Any) -> list[str]:
    """Return the names of the trainable parameters that the autograd graph of a forward does not contain.

    This says nothing of the size of a gradient: adapters whose other factor is zero are in the graph. An element of a
    `ModuleList` or `ModuleDict` that did not run at all, while another one of the same class did, is left out of the
    result, and so are experts that are stacked in one tensor: no token of this forward may have been routed to them.
    No gradient is computed, no random number is drawn (the model is in evaluation mode), and weights and mode are left
    unchanged.

    Args:
        model: The model, before DDP or DeepSpeed wraps it, with complete weights (not sharded by ZeRO-3).

    Returns:
        Names as `named_parameters` gives them; none if the model fails, which the probe of the call reports.
    """
    # 1. A forward of a few tokens.
    ids = torch.arange(1, 1 + _TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()  # without gradient checkpointing, whose reentrant form hides parameters from the graph
    try:
        with torch.enable_grad(), transformers_attention(model):
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception:  # a model may fail in any way
        return []
    finally:
        model.train(training)
    # 2. The parameters of its graph.
    reached = {id(leaf) for leaf in _leaves(logits)}
    names = {name for name, one in model.named_parameters() if id(one) in reached}
    if not names:
        return []  # the graph does not lead to any parameter, so it proves nothing
    # 3. The others, except for those of elements that may run in another forward.
    spared = tuple(f"{element}." for element in _elements_not_run(model, names))
    return [
        name
        for name, one in model.named_parameters()
        if one.requires_grad
        and name not in names
        and not name.startswith(spared)
        and not ("expert" in name and one.ndim == 3)
    ]


def _leaves(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the leaf tensors of the autograd graph of a tensor."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _elements_not_run(model: nn.Module, reached: set[str]) -> Iterator[str]:
    """Yield the names of elements of lists without a reached parameter, if one of their class in the list has some."""
    ran = {name[:end] for name in reached for end, letter in enumerate(name) if letter == "."}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            elements = {f"{name}.{key}" if name else key: element for key, element in module.named_children()}
            classes = {type(element) for path, element in elements.items() if path in ran}
            yield from (path for path, element in elements.items() if path not in ran and type(element) in classes)
