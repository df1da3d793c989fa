"""Writes the backbone of a checkpoint or artifact as a folder that `transformers` loads.

    python records/2026-11-21_SGJM/export_hf.py runs/NAME/final.safetensors exported
    python records/2026-11-21_SGJM/export_hf.py runs/NAME/artifact.bin exported --force

The folder: config.json, generation_config.json, model.safetensors (fp32, no pickle), modeling_sgjm.py (a copy
of hf_modeling_sgjm.py, which needs only torch and transformers) and a README.md. It is read by
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. From a checkpoint the averaged weights
are written, as an artifact holds them. Drafter, judge and verifier are left out: plain generation does not
use them. Where transformers is installed, the folder is loaded again and its logits are compared with the
script's (1e-4 at most).

The folder appears whole or not at all. Exit code 0; 1 if the logits differ; 2 misuse.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from family import FINDINGS, FINE, Misuse, command, load_script

SCRIPT = Path(__file__).with_name("train_gpt.py")
TEMPLATE, CODE = SCRIPT.with_name("hf_modeling_sgjm.py"), "modeling_sgjm"
AGREE = 1e-4


def config_of(model) -> dict:
    """config.json of a model of the script."""
    args = model.args
    dims = args.rope_dims or args.model_dim // args.num_heads
    base = args.rope_base
    if args.eval_seq_len > args.train_seq_len and dims > 2:  # as the script's own tables for scoring
        base *= (args.eval_seq_len / args.train_seq_len) ** (dims / (dims - 2))
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0} if args.vocab_size > 256 else {}

    same_names = (
        "vocab_size", "positions", "attn_every_n",
        "mamba_state", "mamba_expand", "mamba_d_conv", "mamba_head_dim", "mamba_chunk_size",
    )
    return {
        "architectures": ["SGJMForCausalLM"],
        "model_type": "sgjm",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "auto_map": {
            "AutoConfig": f"{CODE}.SGJMConfig",
            "AutoModelForCausalLM": f"{CODE}.SGJMForCausalLM",
        },
        "hidden_size": args.model_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": args.num_heads,
        "intermediate_size": args.ff_dim,
        "max_position_embeddings": args.eval_seq_len,
        "rotary_base": base,
        "rotary_dims": dims,
        **{name: getattr(args, name) for name in same_names},
        "use_cache": True,
        **special,
    }


def weights_of(model) -> dict:
    """Tensors under the names of the template, which are the script's; of learned positions those that were
    trained.
    """
    found = {
        name: p.detach().float().contiguous()
        for name, p in model.named_parameters() if not name.startswith("aux.")
    }
    if "pos_emb.weight" in found:
        found["pos_emb.weight"] = found["pos_emb.weight"][: model.args.eval_seq_len].contiguous()
    return found


def write(model, source: Path, folder: Path) -> None:
    """The folder's files."""
    from safetensors.torch import save_file

    config, weights = config_of(model), weights_of(model)
    generation = {key: value for key, value in config.items() if key.endswith("_token_id")}
    for name, content in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(TEMPLATE, folder / f"{CODE}.py")
    count = sum(p.numel() for p in weights.values())
    usage = "\n".join(
        line.removeprefix("    ") for line in TEMPLATE.read_text().split("\n\n")[1].splitlines()
    )
    text = (
        f"# {folder.name}\n\n"
        f"A causal model of bytes, {count:,} parameters: the backbone of an SGJM model, from "
        f"`{source.name}`.\n\n"
        f"```python\n{usage}\n```\n\n"
        f"`{CODE}.py` says how texts become ids, and which padding is accepted.\n"
    )
    (folder / "README.md").write_text(text)


def largest_difference(model, folder: Path) -> float:
    """Between the logits of the script's model and of the folder, read afresh, on two rows of a window each.
    """
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    generator = torch.Generator().manual_seed(0)
    vocab_size, shape = model.args.vocab_size, (2, model.args.eval_seq_len)
    ids = torch.randint(vocab_size - 256, vocab_size, shape, generator=generator)
    with torch.no_grad():
        return float((model.head(model.hidden(ids, model.rotary_eval)) - other(ids).logits).abs().max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="best|last|final.safetensors, or an artifact")
    parser.add_argument("folder", type=Path, help="what to write")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")
    options = parser.parse_args(argv)
    script = load_script(SCRIPT)

    if options.folder.exists() and not options.force:
        raise Misuse(f"{options.folder}: exists; --force replaces it")
    if options.force and options.folder.exists() and not (options.folder / f"{CODE}.py").exists():
        raise Misuse(
            f"{options.folder}: holds no {CODE}.py, so it was not written by this tool; --force does not "
            "replace it"
        )
    try:
        model = script.open_model(str(options.model))
    except script.UserError as error:
        raise Misuse(str(error)) from None

    # Under another name until it is whole.
    working = options.folder.parent / f".{options.folder.name}.{os.getpid()}.partial"
    working.mkdir(parents=True)
    try:
        write(model, options.model, working)
        if options.folder.exists():
            shutil.rmtree(options.folder)
        working.rename(options.folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)

    difference, told = None, "not checked, transformers is not installed"
    if importlib.util.find_spec("transformers"):
        difference = largest_difference(model, options.folder)
        told = f"logits differ by {difference:.1e} at most"
    count = sum(p.numel() for p in weights_of(model).values())
    if options.json:
        print(json.dumps({"folder": str(options.folder), "parameters": count, "difference": difference}))
    else:
        print(f"{options.folder}: {count:,} parameters, {told}")
    return FINE if difference is None or difference < AGREE else FINDINGS


if __name__ == "__main__":
    command(main)
