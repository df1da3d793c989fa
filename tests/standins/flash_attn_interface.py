"""Stands in for FlashAttention 3: the signatures of its Hopper build, which returns the sums of exp too."""

import flash_attn
import torch


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                    pack_gqa=None, deterministic=False, sm_margin=0):
    out = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    return out, torch.zeros(q.shape[:3])


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=False, window_size=(-1, -1)):
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                            causal=causal, window_size=window_size)
    return out, torch.zeros(q.shape[:2])
