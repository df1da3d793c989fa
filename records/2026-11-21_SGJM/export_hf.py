"""Writes the backbone of a checkpoint or artifact as a folder that `transformers` loads.

    python records/2026-11-21_SGJM/export_hf.py runs/NAME/final.safetensors exported
    python records/2026-11-21_SGJM/export_hf.py runs/NAME/artifact.bin exported --force

The folder: config.json, generation_config.json, model.safetensors (fp32, no pickle), modeling_sgjm.py (a copy
of hf_modeling_sgjm.py, which needs only torch and transformers) and a README.md. It is read by
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. From a checkpoint the averaged weights
are written, as an artifact holds them. Drafter, judge and verifier are left out: plain generation does not
use them. Where transformers is installed, the folder is loaded again and asked to do what its users will: its
logits are compared with the script's (1e-4 at most), and 64 ids are generated with a cache and without one:
both have to be what the script's own decoder writes. Tried with transformers 4.57.6, 5.22.2, 5.23.0 and
5.24.0; the last line names the version at hand.

The folder appears whole or not at all. Exit code 0; 1 if logits or texts differ; 2 misuse.
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
AGREE = 1e-4  # logits: between those of the folder and the script's
WRITTEN, PROMPT = 64, "the "  # ids that the check generates, and after what


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


def write(model, source: Path, folder: Path, title: str) -> None:
    """The folder's files; `title` is the name that it will have."""
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
        f"# {title}\n\n"
        f"A causal model of bytes, {count:,} parameters: the backbone of an SGJM model, from "
        f"`{source.name}`.\n\n"
        f"```python\n{usage}\n```\n\n"
        f"`{CODE}.py` says how texts become ids, and which padding is accepted.\n"
    )
    (folder / "README.md").write_text(text)


def largest_difference(model, other) -> float:
    """Between the logits of the script's model and of the folder's, on two rows of a window each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocab_size, shape = model.args.vocab_size, (2, model.args.eval_seq_len)
    ids = torch.randint(vocab_size - 256, vocab_size, shape, generator=generator)
    with torch.no_grad():
        return float((model.head(model.hidden(ids, model.rotary_eval)) - other(ids).logits).abs().max())


def wrong_texts(script, model, other) -> dict[str, int]:
    """{how the folder's model generated: the first id that is not the script's}, nothing where all are.

    Greedily, so that an id says what all before it have left behind; ids nearer to each other than rounding
    may fall either way, and end the comparison.
    """
    prompt = other.encode(PROMPT)
    writer = script.Generator(model, prompt[0].tolist(), 0, False, 0.0)
    room = model.args.eval_seq_len - prompt.size(1)
    wanted = list(map(ord, writer.write(min(WRITTEN, room))))

    sure = [writer.gaps[prompt.size(1) + i] > AGREE for i in range(len(wanted))]
    sure = sure.index(False) if False in sure else len(wanted)
    options = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = {}
    for name, cached in (("with a cache", True), ("without a cache", False)):
        made = other.generate(prompt, use_cache=cached, **options)[0, prompt.size(1) :].tolist()
        apart = [i for i in range(sure) if made[i] != wanted[i]]
        found |= {name: apart[0]} if apart else {}
    return found


def checked(script, model, folder: Path) -> dict:
    """What the folder's model does, read afresh: `difference` of logits, `wrong_texts`, the `transformers`
    that ran it.
    """
    import transformers

    other = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return {"difference": largest_difference(model, other), "wrong_texts": wrong_texts(script, model, other),
            "transformers": transformers.__version__}


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
        model = script.load(str(options.model))
    except script.UserError as error:
        raise Misuse(str(error)) from None
    except KeyError:
        raise Misuse(f"{options.model}: a checkpoint of another script") from None

    # Under another name until it is whole.
    working = options.folder.parent / f".{options.folder.name}.{os.getpid()}.partial"
    working.mkdir(parents=True)
    try:
        write(model, options.model, working, options.folder.resolve().name)
        if options.folder.exists():
            shutil.rmtree(options.folder)
        working.rename(options.folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)

    found = {"difference": None, "wrong_texts": {}, "transformers": None}
    told = "not checked, transformers is not installed"
    if importlib.util.find_spec("transformers"):
        found = checked(script, model, options.folder)
        texts = ", ".join(f"{how} id {i + 1} is wrong" for how, i in found["wrong_texts"].items())
        told = (f"with transformers {found['transformers']} logits differ by {found['difference']:.1e} at "
                f"most, texts: {texts or 'the same with a cache and without'}")
    count = sum(p.numel() for p in weights_of(model).values())
    if options.json:
        print(json.dumps({"folder": str(options.folder), "parameters": count, **found}))
    else:
        print(f"{options.folder}: {count:,} parameters, {told}")
    fine = not found["wrong_texts"] and (found["difference"] or 0.0) < AGREE
    return FINE if fine else FINDINGS


if __name__ == "__main__":
    command(main)
