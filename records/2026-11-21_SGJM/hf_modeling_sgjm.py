"""The backbone of an SGJM checkpoint for `transformers`: a causal byte model, transformer or Mamba-2 hybrid.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
    print(model.decode(model.generate(model.encode("def main("), max_new_tokens=64)[0]))

SGJM's export_hf.py writes this file into the folder; it needs only torch and transformers (tried: 4.57.6,
5.22.2, 5.23.0 and 5.24.0, which hands the cache on under another name than those before). Ids are bytes + 4,
after PAD 0, BOS 1, EOS 2, UNK 3 (only bytes with a vocabulary of 256). Every text begins with BOS.

A batch of prompts of different lengths is padded on the left and comes with its attention_mask: a padded row
gives the same as the row without padding. Padding on the right is accepted where nothing is kept for later
(use_cache=False), and refused otherwise. More positions than max_position_embeddings are refused: none beyond
was trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

SPECIAL_IDS = 4  # PAD, BOS, EOS, UNK

# What a forward hands on was called `past_key_values` up to transformers 5.23, and is `cache` from 5.24 on.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Arguments that `forward` may get beside its own: places that the cache knows anyway, and what must be off.
UNREAD, MUST_BE_OFF = {"cache_position"}, {"output_attentions", "output_hidden_states"}


class SGJMConfig(PretrainedConfig):
    """Sizes of the backbone.

    positions: learned or rope; rope turns `rotary_dims` of a head, with base `rotary_base` for the whole
    window. attn_every_n: every n-th block attends, the others are Mamba-2.
    """

    model_type = "sgjm"

    def __init__(
        self,
        vocab_size=260,
        hidden_size=384,
        num_hidden_layers=10,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=256,
        positions="learned",
        rotary_base=10000.0,
        rotary_dims=64,
        attn_every_n=1,
        mamba_state=64,
        mamba_expand=2,
        mamba_d_conv=4,
        mamba_head_dim=64,
        mamba_chunk_size=64,
        initializer_range=0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings

        self.positions = positions
        self.rotary_base = rotary_base
        self.rotary_dims = rotary_dims

        self.attn_every_n = attn_every_n
        self.mamba_state = mamba_state
        self.mamba_expand = mamba_expand
        self.mamba_d_conv = mamba_d_conv
        self.mamba_head_dim = mamba_head_dim
        self.mamba_chunk_size = mamba_chunk_size
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class SGJMCache:
    """What a later forward continues from.

    Of each attention the keys and values (B, H, T, d); of each Mamba block the last inputs of its convolution
    (B, C, taps - 1) and its state (B, H, P, N); and a mask (B, T), True where a position is not padding.
    """

    is_compileable = is_sliding = False
    is_linear = (False,)  # generation cuts off what `get_seq_length` says is known

    def __init__(self, layers: int):
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.real: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.real is None else self.real.size(1)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # it grows

    get_max_length = get_max_cache_shape

    def _each(self, change) -> None:
        self.layers = [pair if pair is None else tuple(map(change, pair)) for pair in self.layers]
        self.real = None if self.real is None else change(self.real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda part: part[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda part: part.repeat_interleave(repeats, 0))

    @property
    def is_croppable(self) -> bool:
        """A Mamba block keeps only its last state."""
        return all(pair is None or pair[0].ndim == 4 for pair in self.layers)

    def crop(self, max_length: int) -> None:
        """Forgets all but the first `max_length` positions, or the last -max_length ones."""
        if not self.is_croppable:
            raise ValueError(f"crop({max_length}): the states of Mamba blocks cannot be taken back")
        length = max_length if max_length >= 0 else self.get_seq_length() + max_length
        self.layers = [
            pair if pair is None else tuple(part[:, :, :length] for part in pair) for pair in self.layers
        ]
        self.real = None if self.real is None else self.real[:, :length]


class SGJMRMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    return nn.Linear(dim_in, dim_out, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary on the first dimensions of x (B, T, H, d); cos and sin (B, T, 1, r / 2) in fp32."""
    half = cos.size(-1)
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((a * cos + b * sin).to(x.dtype), (b * cos - a * sin).to(x.dtype), rest), -1)


class SGJMAttention(nn.Module):
    def __init__(self, config: SGJMConfig):
        super().__init__()
        dim = config.hidden_size
        self.head_dim = dim // config.num_attention_heads
        self.c_q, self.c_k, self.c_v, self.proj = (linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, sees: Tensor, rotary, past: tuple | None) -> tuple[Tensor, tuple]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.c_q, self.c_k, self.c_v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, d)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return self.proj(y.transpose(1, 2).flatten(2)), (k, v)


class SGJMMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.proj = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.up(x))


class SGJMBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: SGJMConfig):
        super().__init__()
        self.attn_norm, self.attn = SGJMRMSNorm(config.hidden_size), SGJMAttention(config)
        self.mlp_norm = SGJMRMSNorm(config.hidden_size)
        self.mlp = SGJMMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, real: Tensor, sees: Tensor, rotary, past: tuple | None
    ) -> tuple[Tensor, tuple]:
        y, kept = self.attn(self.attn_norm(x), sees, rotary, past)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kept


def ssd(
    x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t in chunks of `size` positions.

    x (B, T, H, P), dt (B, T, H), A = rate (H,) < 0, B and C = write and read (B, T, N), state (B, H, P, N),
    all fp32 -> y (B, T, H, P), the last state. Dao & Gu 2024, section 6.
    """
    length = x.size(1)

    def chunks(part: Tensor) -> Tensor:
        """(B, T, ...) -> (B, C, L, ...), the last chunk filled with zeros."""
        return F.pad(part, (0, 0) * (part.ndim - 2) + (0, -length % size)).unflatten(1, (-1, size))

    x, dt, write, read = map(chunks, (dt[..., None] * x, dt, write, read))
    x, log = x.transpose(2, 3), (dt * rate).transpose(2, 3).cumsum(-1)  # (B, C, H, L, P) and (B, C, H, L)
    ends = F.pad(log[..., -1].cumsum(1), (0, 0, 1, 0)).mT  # (B, H, C + 1)

    def decay(sums: Tensor) -> Tensor:
        """(..., n) -> (..., n, n): exp(sums_t - sums_s) for s <= t, else 0."""
        past = torch.ones(2 * sums.shape[-1:], dtype=torch.bool, device=sums.device).tril()
        return (sums[..., None] - sums[..., None, :]).masked_fill(~past, -torch.inf).exp()

    left = (log[..., -1:] - log).exp()[..., None] * x
    sums = torch.cat((state[:, None], torch.einsum("bchlp,bcln->bchpn", left, write)), 1)
    states = torch.einsum("bhzc,bchpn->bzhpn", decay(ends), sums)
    y = ((read @ write.mT)[:, :, None] * decay(log)) @ x
    y = y + log.exp()[..., None] * torch.einsum("bcln,bchpn->bchlp", read, states[:, :-1])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[:, -1]


class SGJMMambaBlock(nn.Module):
    """A whole block of Mamba-2.

    Padding enters as nothing: zeros for the convolution, no step for the state.
    """

    def __init__(self, config: SGJMConfig):
        super().__init__()
        dim, state = config.hidden_size, config.mamba_state
        inner = config.mamba_expand * dim
        self.taps, self.chunk = config.mamba_d_conv, config.mamba_chunk_size
        self.heads, self.widths = inner // config.mamba_head_dim, [inner, inner + 2 * state]
        self.state_shape = self.heads, config.mamba_head_dim, state
        self.norm, self.in_proj = SGJMRMSNorm(dim), linear(dim, sum(self.widths) + self.heads)
        self.conv_weight = nn.Parameter(torch.empty(self.widths[1], self.taps))
        self.conv_bias = nn.Parameter(torch.zeros(self.widths[1]))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(self.heads)) for _ in range(3))
        self.out_norm, self.out_proj = SGJMRMSNorm(inner), linear(inner, dim)

    def forward(
        self, x: Tensor, real: Tensor, sees: Tensor, rotary, past: tuple | None
    ) -> tuple[Tensor, tuple]:
        z, mixed, dt = self.in_proj(self.norm(x)).split([*self.widths, self.heads], -1)
        if past is None:
            past = (
                mixed.new_zeros(len(x), self.widths[1], self.taps - 1),
                x.new_zeros(len(x), *self.state_shape, dtype=torch.float32),
            )
        tail, state = past
        mixed = torch.cat((tail, (mixed * real[..., None]).mT), 2)  # (B, C, taps - 1 + T)
        seen = F.conv1d(mixed, self.conv_weight[:, None], self.conv_bias, groups=len(self.conv_weight))
        seen = F.silu(seen).mT.float()
        inner, *sides = seen.split([self.widths[0], *[self.state_shape[2]] * 2], -1)
        inner = inner.unflatten(-1, self.state_shape[:2])  # (B, T, H, P)
        dt = F.softplus(dt.float() + self.dt_bias.float()) * real[..., None]
        y, state = ssd(inner, dt, -self.A_log.float().exp(), *sides, state, min(self.chunk, x.size(1)))
        y = (y + self.D.float()[:, None] * inner).flatten(2).to(x.dtype)
        return x + self.out_proj(self.out_norm(y * F.silu(z))), (mixed[..., 1 - self.taps :], state)


class SGJMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SGJMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False  # a loss is the mean of its own batch; a Trainer that accumulates scales it
    _no_split_modules = ["SGJMBlock", "SGJMMambaBlock"]
    _supports_sdpa = True

    def __init__(self, config: SGJMConfig):
        super().__init__(config)
        attends = [(i + 1) % config.attn_every_n == 0 for i in range(config.num_hidden_layers)]
        learned = config.positions == "learned"
        self.tok_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_emb = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(SGJMBlock(config) if here else SGJMMambaBlock(config) for here in attends)
        self.norm = SGJMRMSNorm(config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SGJMMambaBlock):
            nn.init.uniform_(module.conv_weight, -(module.taps**-0.5), module.taps**-0.5)
            nn.init.uniform_(module.A_log, 0.0, 2.77)  # A from -1 to -16
            nn.init.uniform_(module.dt_bias, -6.9, -2.25)  # steps from 0.001 to 0.1

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_emb = value

    def encode(self, text: str | bytes) -> Tensor:
        """A text as ids (1, n) that begin a document."""
        raw = list(text.encode() if isinstance(text, str) else text)
        special = self.config.vocab_size > 256
        ids = [1] + [byte + SPECIAL_IDS for byte in raw] if special else raw
        return torch.tensor([ids], dtype=torch.long, device=self.device)

    def decode(self, ids: Tensor) -> str:
        """The text of ids (n,); special ids have none, and bytes that are not UTF-8 are replaced."""
        first = SPECIAL_IDS if self.config.vocab_size > 256 else 0
        return bytes(i - first for i in ids.tolist() if i >= first).decode(errors="replace")

    def _real(
        self, attention_mask: Tensor | None, rows: int, length: int, past: SGJMCache | None, keeps: bool
    ) -> Tensor:
        """(B, past + T): True where there is text.

        Raises:
            ValueError: a mask of another shape, or padding that cannot be handled.
        """
        before = past.real if past is not None and past.real is not None else None
        known = 0 if before is None else before.size(1)
        if attention_mask is None:
            fresh = torch.ones(rows, length, dtype=torch.bool, device=self.device)
            return fresh if before is None else torch.cat((before, fresh), 1)

        if tuple(attention_mask.shape) != (rows, known + length):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: {(rows, known + length)} is "
                "needed, for "
                f"{known} positions of the cache and {length} new ones"
            )
        real = attention_mask.to(self.device) != 0
        begins = real & ~F.pad(real, (1, 0))[:, :-1]
        if bool((begins.sum(1) > 1).any()):
            raise ValueError(
                f"attention_mask: row {int((begins.sum(1) > 1).nonzero()[0])} has padding within its text"
            )
        if keeps and bool((real.any(1) & ~real[:, -1]).any()):
            raise ValueError(
                "attention_mask: padding after the text; pad on the left, or pass use_cache=False"
            )
        return real

    def _rotary(self, at: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (B, T, 1, r / 2) at positions (B, T), from fp64 tables."""
        if self.pos_emb is not None:
            return None
        dims = self.config.rotary_dims
        frequency = self.config.rotary_base ** (
            -torch.arange(0, dims, 2, dtype=torch.float64, device="cpu") / dims
        )
        angles = at.cpu().double()[..., None, None] * frequency
        return angles.cos().float().to(at.device), angles.sin().float().to(at.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SGJMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: SGJMCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids (B, T) -> logits (B, T, V), or of the last `logits_to_keep` positions.

        With labels (B, T) also the mean cross-entropy of each id after its prefix, in nats (-100 is left
        out). `cache` and `past_key_values` are two names of one thing.

        Raises:
            TypeError: an argument that this model does not know; left unread it could change the text.
            ValueError: more positions than were trained, a mask that does not fit, padding that cannot be
            handled, one cache under each name.
        """
        harmless = UNREAD | {name for name in MUST_BE_OFF if not kwargs.get(name)}
        if unknown := sorted(kwargs.keys() - harmless):
            raise TypeError(f"forward() does not know {', '.join(unknown)}")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values differ: they are one thing under two names")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds, one of them, is needed")
        x = self.tok_emb(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = x.shape[:2]
        keeps = use_cache if use_cache is not None else not self.training
        past = past_key_values if cache is None else cache
        if past is not None and not isinstance(past, SGJMCache):
            raise ValueError(f"the cache is a {type(past).__name__}: this model makes its own, a SGJMCache")
        if past is None and keeps:
            past = SGJMCache(len(self.blocks))

        # Where there is text, and at which position of its row.
        real = self._real(attention_mask, rows, length, past, keeps)
        if position_ids is None:
            at = (real.cumsum(1) - 1).clamp(min=0)[:, -length:]
        else:
            at = position_ids.to(x.device).expand(rows, -1)
        if int(at.max()) >= (most := self.config.max_position_embeddings):
            raise ValueError(
                f"{int(at.max()) + 1} positions: this model was trained on {most}; "
                "shorten the prompt or max_new_tokens"
            )
        if self.pos_emb is not None:
            x = x + self.pos_emb(at)

        total = real.size(1)
        everywhere = torch.arange(total, device=x.device)
        # padding sees itself, so that no row of weights is empty
        own = everywhere == everywhere[-length:, None]
        # (B, 1, T, past + T)
        sees = (real[:, None] & (everywhere <= everywhere[-length:, None]) | own)[:, None]

        rotary, fresh = self._rotary(at), real[:, -length:]
        for i, block in enumerate(self.blocks):
            x, kept = block(x, fresh, sees, rotary, past.layers[i] if past is not None else None)
            if keeps:
                past.layers[i] = kept
        if keeps:
            past.real = real
        x = self.norm(x)

        wanted = logits_to_keep
        if isinstance(logits_to_keep, int):
            wanted = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = F.linear(x[:, wanted], self.tok_emb.weight).float()
        loss = None
        if labels is not None:
            full = logits if logits.size(1) == length else F.linear(x, self.tok_emb.weight).float()
            targets = labels[:, 1:].flatten().to(full.device)
            loss = F.cross_entropy(full[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past if keeps else None})
        return found if return_dict is None or return_dict else found.to_tuple()
