"""Stands in for FlashAttention 2 where there is no card: its signatures, torch's kernels inside."""

import torch
import torch.nn.functional as F


def near(mask, window_size):
    """A mask (T, T) with `causal` and window_size (keys before, keys after a query; -1 is no limit)."""
    before, after = window_size
    assert after in ((0,) if before >= 0 else (-1, 0))
    mask = mask.tril()
    return mask.triu(-before) if before >= 0 else mask


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    assert causal and not dropout_p
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = near(torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device), window_size)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):
    """q (N, H, d), k and v (N, K, d), rows that begin at cu_seqlens -> (N, H, d)."""
    assert causal and not dropout_p
    positions = torch.arange(len(q), device=q.device)
    row = torch.bucketize(positions, cu_seqlens_q.long(), right=True)
    mask = near(row[:, None] == row, window_size)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
