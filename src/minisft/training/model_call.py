"""How the model is called on a row: which arguments its forward gets, decided once before the first step."""

from dataclasses import dataclass
from typing import Any

import torch

from minisft.models import forward_arguments
from minisft.training.attention import PADDING_FREE
from minisft.training.batching import PackedRow
from minisft.training.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class ModelCall:
    """The arguments of a model's forward on a row.

    With MiniSFT's attention a row holds several conversations, and the forward passes their lengths on to it. With
    transformers' own attention a row holds one conversation, and the call is that of transformers: ids and their mask.

    Attributes:
        packed: Whether the model has MiniSFT's attention.
        boundaries: Whether recurrent layers and convolutions get the boundaries of the conversations too, under
            transformers' names. Their kernels keep conversations apart with them; without kernels they raise an error.
        position_ids: Whether the forward takes positions.
        selects_logits: Whether the forward computes only the logits of given positions (`logits_to_keep`).
        attention_mask: Whether the forward takes a mask.
        use_cache: Whether the forward takes the switch of its cache.
        sequence_group: The processes that share the tokens of a row, for rows that are shared.
    """

    packed: bool = True
    boundaries: bool = False
    position_ids: bool = True
    selects_logits: bool = True
    attention_mask: bool = True
    use_cache: bool = True
    sequence_group: SequenceGroup | None = None

    @classmethod
    def of(cls, model: Any) -> "ModelCall":
        """Return the call for the model as it was loaded, with what its forward takes."""
        taken = forward_arguments(model)
        return cls(
            packed=model.config._attn_implementation == PADDING_FREE,
            position_ids="position_ids" in taken,
            selects_logits="logits_to_keep" in taken,
            attention_mask="attention_mask" in taken,
            use_cache="use_cache" in taken,
        )

    def arguments(self, row: PackedRow) -> dict[str, Any]:
        """Return the keyword arguments of the forward for a row."""
        found: dict[str, Any] = {"input_ids": row.input_ids}
        if self.use_cache:
            found["use_cache"] = False
        if self.selects_logits:
            found["logits_to_keep"] = row.predict_at
        if not self.packed:
            assert len(row.lengths) == 1
            return found | ({"attention_mask": torch.ones_like(row.input_ids)} if self.attention_mask else {})
        found["conversation_lengths"] = row.lengths
        if row.shards > 1:
            found["sequence_group"] = self.sequence_group
        if self.position_ids:
            found["position_ids"] = row.position_ids
        return found | (_boundaries(row) if self.boundaries else {})


PADDING_FREE_CALL = ModelCall()  # of a model with MiniSFT's attention whose forward takes everything


def _boundaries(row: PackedRow) -> dict[str, Any]:
    """Return the boundaries of the conversations, as transformers' collator of padding-free rows names them."""
    device = row.input_ids.device
    lengths = torch.tensor(row.lengths, device=device)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    numbers = torch.arange(len(row.lengths), device=device, dtype=torch.int32).repeat_interleave(lengths)
    longest = max(row.lengths)
    return {
        "seq_idx": numbers[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
