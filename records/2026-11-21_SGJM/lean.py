"""How far plain decoding is from a lean loop: the same network with nothing around it, byte by byte in turn.

    python records/2026-11-21_SGJM/lean.py --out records/2026-11-21_SGJM/measured/lean.json

The loop has its weights joined and cast before it begins, its caches are arrays that it writes into, and it
can do nothing but take the likeliest byte after the last one. Weights are random; both must write the same
text, but for ties in bf16. Times are processor time of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import Misuse, command, load_script, markdown_table

SCRIPT = Path(__file__).with_name("train_gpt.py")
HEADER = ["size", "dtype", "the loop, ms a byte", "the script", "ratio"]
PROMPT, WINDOW = 200, 512


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


class Attention:
    """A transformer block for one position after another."""

    def __init__(self, block, args, cast):
        attn, mlp = block.attn, block.mlp
        self.norms = cast(block.attn_norm.weight), cast(block.mlp_norm.weight)
        self.qkv = cast(torch.cat([attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]))
        self.wide = cast(torch.cat([mlp.gate.weight, mlp.up.weight]))
        self.out, self.down = cast(attn.proj.weight), cast(mlp.proj.weight)
        self.shape = 3, args.num_heads, attn.head_dim
        self.past = cast(torch.zeros(2, args.num_heads, args.eval_seq_len, attn.head_dim))

    def __call__(self, x: torch.Tensor, place: int, rotate) -> torch.Tensor:
        q, k, v = F.linear(norm(x, self.norms[0]), self.qkv).view(self.shape)
        if rotate:
            q, k = rotate(q, place), rotate(k, place)
        self.past[0, :, place], self.past[1, :, place] = k, v
        keys, values = self.past[:, None, :, : place + 1]
        y = F.scaled_dot_product_attention(q[None, :, None], keys, values)
        x = x + F.linear(y.view(1, -1), self.out)
        gate, up = F.linear(norm(x, self.norms[1]), self.wide).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Mamba:
    """A Mamba-2 block for one position after another."""

    def __init__(self, block, args, cast):
        self.norms = cast(block.norm.weight), cast(block.out_norm.weight)
        self.enter, self.leave = cast(block.in_proj.weight), cast(block.out_proj.weight)
        self.taps, self.bias = cast(block.conv_weight), cast(block.conv_bias)
        self.rate, self.dt_bias, self.skip = -block.A_log.exp(), block.dt_bias, block.D
        self.widths, self.shape = [*block.widths, block.heads], block.state_shape
        self.seen = cast(torch.zeros(block.widths[1], block.taps))
        self.state = torch.zeros(block.state_shape)

    def __call__(self, x: torch.Tensor, place: int, rotate) -> torch.Tensor:
        z, mixed, dt = F.linear(norm(x, self.norms[0]), self.enter).split(self.widths, -1)
        self.seen[:, :-1] = self.seen[:, 1:].clone()
        self.seen[:, -1] = mixed[0]
        seen = F.silu((self.seen * self.taps).sum(1) + self.bias).float()
        inner, write, read = seen.split([self.widths[0], self.shape[2], self.shape[2]])
        inner, dt = inner.view(self.shape[:2]), F.softplus(dt[0].float() + self.dt_bias)
        self.state.mul_((dt * self.rate).exp()[:, None, None])
        self.state.add_((dt[:, None] * inner)[..., None] * write)
        y = (self.state @ read + self.skip[:, None] * inner).flatten()[None].to(x.dtype)
        return x + F.linear(norm(y * F.silu(z), self.norms[1]), self.leave)


class Loop:
    """The likeliest byte after the last one: `loop(id) -> id`."""

    def __init__(self, script, model):
        def cast(weight: torch.Tensor) -> torch.Tensor:
            return weight.detach().to(model.dtype)

        kinds = {script.Block: Attention, script.MambaBlock: Mamba}
        self.layers = [kinds[type(block)](block, model.args, cast) for block in model.blocks]
        self.embedding, self.norm, self.place = cast(model.tok_emb.weight), cast(model.norm.weight), 0
        self.positions = None if model.pos_emb is None else cast(model.pos_emb.weight)

        def rotate(x: torch.Tensor, place: int) -> torch.Tensor:
            return script.rotate(x[None, None], model.rotary_eval[:, place : place + 1])[0, 0]

        self.rotate = rotate if model.pos_emb is None else None

    @torch.no_grad()
    def __call__(self, token: int) -> int:
        x = self.embedding[token : token + 1]
        if self.positions is not None:
            x = x + self.positions[self.place : self.place + 1]
        for layer in self.layers:
            x = layer(x, self.place, self.rotate)
        self.place += 1
        return int(F.linear(norm(x, self.norm), self.embedding).argmax())


def timed(function, *values) -> tuple:
    began = time.process_time()
    return function(*values), time.process_time() - began


def by_loop(script, model, prompt: list[int], count: int) -> tuple[list[int], float]:
    """(`count` ids after a prompt, seconds an id)."""
    loop, ids, spent = Loop(script, model), [], 0.0
    for token in prompt:
        following = loop(token)
    for _ in range(count):
        ids.append(following)
        following, seconds = timed(loop, following)
        spent += seconds
    return ids, spent / count


def by_script(script, model, prompt: list[int], count: int) -> tuple[list[int], float]:
    writer = script.Generator(model, prompt, 0, False, 0.0)
    writer.catch_up()
    text, seconds = timed(writer.write, count)
    return list(map(ord, text)), seconds / count


def measured(script, size: str, dtype: torch.dtype, count: int, repeats: int) -> dict:
    args = script.Hyperparameters({"SIZE": size, "TRAIN_SEQ_LEN": str(WINDOW), "MAX_SEQ_LEN": str(WINDOW)})
    model = script.GPT(args, dtype=dtype)
    model.init_weights(0)
    model.eval()
    prompt = [script.BOS_ID, *(40 + i % 50 for i in range(PROMPT))]
    ways, seconds, texts = {"loop": by_loop, "script": by_script}, {"loop": [], "script": []}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            texts[name], spent = way(script, model, prompt, count)
            seconds[name].append(spent)
    ms = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), **ms,
            "ratio": ms["script"] / ms["loop"], "same_text": texts["loop"] == texts["script"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, default=SCRIPT, help="another train_gpt.py of this record")
    parser.add_argument("--sizes", nargs="+", default=["25m", "25m-hybrid"], metavar="SIZE")
    parser.add_argument("--count", type=int, default=60, help="bytes a text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as JSON")
    options = parser.parse_args(argv)

    if min(options.count, options.repeats) < 1:
        raise Misuse("--count and --repeats: at least 1")
    if options.count > WINDOW - 1 - PROMPT:
        raise Misuse(f"--count {options.count}: at most {WINDOW - 1 - PROMPT}, for a window of {WINDOW}")
    torch.set_num_threads(1)
    script = load_script(options.script)
    script.tune_allocator()
    try:
        runs = [measured(script, size, dtype, options.count, options.repeats)
                for size in options.sizes for dtype in (torch.float32, torch.bfloat16)]
    except script.UserError as error:
        raise Misuse(str(error)) from None
    rows = [[run["size"], run["dtype"], f"{run['loop']:.2f}", f"{run['script']:.2f}", f"{run['ratio']:.2f}"]
            for run in runs]
    note = (f"Medians of {options.repeats} texts of {options.count} bytes after {PROMPT}, in turn, "
            f"one thread, random weights, torch {torch.__version__}.")
    told = {"header": HEADER, "rows": rows, "runs": runs, "note": note,
            "script_sha256": hashlib.sha256(options.script.read_bytes()).hexdigest()}
    print(markdown_table(HEADER, rows) + "\n\n" + note)
    if options.out:
        script.write_atomic(options.out, json.dumps(told, indent=1).encode())
    wrong = [run for run in runs if run["dtype"] == "float32" and not run["same_text"]]
    for run in wrong:
        print(f"{run['size']}: the loop and the script write different texts in fp32", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    command(main)
