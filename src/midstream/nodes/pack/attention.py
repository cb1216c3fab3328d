"""Attention masks for packed rows: no token attends to another document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from midstream.common.validation import require_int

__all__ = ["DocumentMask", "document_mask"]


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """Causal attention masks for packed rows: a token attends to earlier tokens of its document.

    Padding at the end of a row is a document of its own, so that every token attends to at least
    one.

    Attributes:
        cu_seqlens: int32, shape [documents + 1]: where each document starts when the rows are laid
            end to end (``[batch * seq_len]``), then ``batch * seq_len``. For variable-length
            attention kernels such as flash attention.
        max_seqlen: Tokens of the longest document.
        document_ids: int32, shape [batch, seq_len]: index of the document within its row, -1 on
            padding.
        mask_mod: ``(batch, head, q_idx, kv_idx) -> bool`` for
            ``torch.nn.attention.flex_attention.create_block_mask``.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    document_ids: torch.Tensor
    mask_mod: Callable[[Any, Any, Any, Any], torch.Tensor]

    def dense(self) -> torch.Tensor:
        """The mask as a tensor for ``torch.nn.functional.scaled_dot_product_attention``.

        Returns:
            bool, shape [batch, 1, seq_len, seq_len]: True where query i may attend to key j.
        """
        rows, size = self.document_ids.shape
        positions = torch.arange(size, device=self.document_ids.device)
        batch = torch.arange(rows, device=self.document_ids.device)[:, None, None, None]
        return self.mask_mod(batch, 0, positions[:, None], positions)


def document_mask(
    seq_lens: Any, seq_len: int | None = None, *, device: torch.device | str | None = None
) -> DocumentMask:
    """Makes attention masks from the ``seq_lens`` of packed rows.

    Args:
        seq_lens: Lengths of the documents in one row, shape [documents]; or of a batch, shape
            [batch, documents], padded with zeros at the end as `collate` does; or a list of rows.
        seq_len: Tokens per row including padding, ``batch["input_ids"].shape[-1]``. May be omitted
            when all rows are full.
        device: Device of the tensors in the result; by default that of ``seq_lens``.

    Raises:
        ValueError: If a row has more tokens than ``seq_len``, or if ``seq_len`` is omitted and rows
            differ in length.

    >>> import midstream as ms
    >>> mask = ms.document_mask([[3, 1], [2, 0]], seq_len=4)
    >>> mask.document_ids.tolist(), mask.cu_seqlens.tolist(), mask.max_seqlen
    ([[0, 0, 0, 1], [0, 0, -1, -1]], [0, 3, 4, 6, 8], 3)
    >>> mask.dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    """
    lengths = _lengths(seq_lens)
    tokens = lengths.sum(dim=1)
    if seq_len is None:
        seq_len = int(tokens.max())
        if int(tokens.min()) < seq_len:
            raise ValueError(
                f"document_mask: rows have {int(tokens.min())} to {seq_len} tokens, so some are"
                " padded; give seq_len=batch['input_ids'].shape[-1]"
            )
    require_int(seq_len, "seq_len", 1, "document_mask")
    if int(tokens.max()) > seq_len:
        raise ValueError(
            f"document_mask: a row holds {int(tokens.max())} tokens, more than seq_len={seq_len};"
            " seq_lens are the lengths of the documents of one row, not where they start"
        )
    rows = torch.cat([lengths, (seq_len - tokens)[:, None]], dim=1)
    ids = torch.arange(rows.shape[1], dtype=torch.int32)
    ids[-1] = -1
    document_ids = (
        ids.repeat(len(rows)).repeat_interleave(rows.reshape(-1)).reshape(len(rows), seq_len)
    )
    flat = rows.reshape(-1)
    flat = flat[flat > 0]
    cu_seqlens = torch.nn.functional.pad(flat.cumsum(0), (1, 0)).to(torch.int32)
    device = device if device is not None else getattr(seq_lens, "device", None)
    document_ids, cu_seqlens = document_ids.to(device), cu_seqlens.to(device)

    def mask_mod(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        same = document_ids[batch, q_idx] == document_ids[batch, kv_idx]
        causal: torch.Tensor = same & (q_idx >= kv_idx)
        return causal

    return DocumentMask(cu_seqlens, int(flat.max()), document_ids, mask_mod)


def _lengths(seq_lens: Any) -> torch.Tensor:
    """The lengths as int64, shape [batch, documents], padded with zeros at the end."""
    if isinstance(seq_lens, Sequence) and len(seq_lens) and hasattr(seq_lens[0], "__len__"):
        rows = [torch.as_tensor(row) for row in seq_lens]
        lengths = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    else:
        lengths = torch.as_tensor(seq_lens)
    lengths = lengths.to(device="cpu", dtype=torch.int64)
    lengths = lengths[None] if lengths.ndim == 1 else lengths
    if lengths.ndim != 2 or not lengths.numel() or int(lengths.min()) < 0 or not int(lengths.sum()):
        raise ValueError(
            "document_mask: seq_lens are lengths of documents, shape [documents] or"
            f" [batch, documents]; found shape {tuple(lengths.shape)}"
        )
    return lengths
