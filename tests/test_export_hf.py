"""SGJM's export_hf.py: the folder loads with transformers, its logits are the script's, caches and padding
change nothing.

With another version of transformers than the one that requirements-dev.txt pins:

    pip install --target /tmp/other transformers==5.24.0
    PYTHONPATH=/tmp/other python -m pytest tests/test_export_hf.py
"""

import ast
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from family import Misuse, load_script

RECORD, = (ROOT / "records").glob("*_SGJM")
section = load_script(RECORD)
export_hf = load_script(RECORD / "export_hf.py")
needed = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("transformers") is None,
    reason="transformers is not installed",
)

SMALL = {
    "SIZE": "smoke",
    "MODEL_DIM": 32,
    "NUM_LAYERS": 2,
    "NUM_HEADS": 2,
    "FF_DIM": 48,
    "DRAFTER_DIM": 16,
    "DRAFTER_FF_DIM": 24,
    "JUDGE_HIDDEN": 24,
    "VERIFIER_HIDDEN": 24,
    "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 128,
    "EVAL_STRIDE": 8,
    "MAMBA_HEAD_DIM": 16,
    "MAMBA_STATE": 8,
    "MAMBA_CHUNK_SIZE": 8,
    "INIT_STD": 0.15,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
    "COMPILE": 0,
}
HYBRID = {"ATTN_EVERY_N": 2, "NUM_LAYERS": 3}
KINDS = {
    "transformer": {},
    "rope": {"POSITIONS": "rope", "EVAL_SEQ_LEN": 48},
    "some rope": {"POSITIONS": "rope", "ROPE_DIMS": 4},
    "hybrid": HYBRID,
    "hybrid rope": {**HYBRID, "POSITIONS": "rope"},
    "baseline": {"ARCH": "baseline", "BASELINE_LAYERS": 3},
    "bytes": {"VOCAB_SIZE": 256},
}


def checkpoint(folder, **overrides) -> str:
    """The path of a checkpoint of a model whose every path carries a signal."""
    args = section.Hyperparameters(
        {key: str(value) for key, value in {**SMALL, "RUNS_PATH": folder, "RUN_ID": "a", **overrides}.items()}
    )
    trainer = section.Trainer(args, None, section.Runtime(args), section.Log(None))
    trainer.save("final")
    return str(folder / "a" / "final.safetensors")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """export(kind) -> (the script's model, that of the folder, the folder); each once."""
    transformers = pytest.importorskip("transformers")
    patch, done = pytest.MonkeyPatch(), {}
    patch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
    )

    @torch.enable_grad()
    def export(kind: str):
        if kind not in done:
            place = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            path = checkpoint(place, **KINDS[kind])
            assert export_hf.main([path, str(place / "out")]) == 0
            other = transformers.AutoModelForCausalLM.from_pretrained(
                place / "out", trust_remote_code=True
            ).eval()
            done[kind] = section.load(path), other, place / "out"
        return done[kind]

    yield export
    patch.undo()


def text(count: int, model, rows: int = 1, seed: int = 0) -> torch.Tensor:
    first = model.args.vocab_size - 256
    return torch.randint(first, first + 256, (rows, count), generator=torch.Generator().manual_seed(seed))


@needed
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_scripts_with_and_without_cache(export, kind):
    model, other, folder = export(kind)
    length = model.args.eval_seq_len
    ids = text(length, model, 2)
    wanted = model.head(model.hidden(ids, model.rotary_eval))
    found = other(ids, labels=ids)
    torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-5)
    nats = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(nats.item(), abs=1e-5)
    assert (
        other(ids, use_cache=False).past_key_values is None
        and other(ids, return_dict=False, use_cache=False)[0].shape == wanted.shape
    )
    torch.testing.assert_close(other(ids, logits_to_keep=3).logits, wanted[:, -3:], atol=1e-5, rtol=1e-5)
    past = other(ids[:, :11], use_cache=True).past_key_values  # a prompt, single ids, several at once
    for i, (start, stop) in enumerate(((11, 12), (12, 13), (13, 20), (20, 21), (21, length))):
        name = ("past_key_values", "cache")[i % 2]  # up to transformers 5.23, and from 5.24 on
        part = other(ids[:, start:stop], **{name: past})
        torch.testing.assert_close(part.logits, wanted[:, start:stop], atol=1e-5, rtol=1e-5)
        past = part.past_key_values
        assert past.get_seq_length() == stop
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == length and config["num_hidden_layers"] == len(model.blocks)
    assert config.get("eos_token_id") == (None if kind == "bytes" else 1)


@needed
@pytest.mark.parametrize("kind", ["transformer", "rope", "hybrid", "bytes"])
@torch.no_grad()
def test_generate_writes_what_the_scripts_stream_writes(export, kind):
    model, other, _ = export(kind)
    prompt = other.encode("the")
    assert prompt.tolist()[0] == ([1] if kind != "bytes" else []) + [
        byte + (0 if kind == "bytes" else 4) for byte in b"the"
    ]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = other.generate(prompt, **options)
    stream, wanted = section.stream(model), prompt[0].tolist()
    for token in wanted:
        stream.push(token)
    model.args.eval_stride, kept = model.args.eval_seq_len, model.args.eval_stride  # one window
    for _ in range(24):
        wanted.append(int(np.argmax(stream.logprobs())))
        stream.push(wanted[-1])
    model.args.eval_stride = kept
    assert found[0].tolist() == wanted
    assert torch.equal(other.generate(prompt, use_cache=False, **options), found)
    assert other.decode(found[0]).startswith("the")
    torch.manual_seed(0)
    assert other.generate(
        prompt, max_new_tokens=5, do_sample=True, top_k=20, eos_token_id=None, pad_token_id=0
    ).shape == (1, prompt.size(1) + 5)
    options["max_new_tokens"] = 6
    beams = [other.generate(prompt, num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)


@needed
@pytest.mark.parametrize("kind", ["transformer", "rope", "hybrid", "hybrid rope"])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(export, kind):
    model, other, _ = export(kind)
    ids, lengths = text(14, model, 3), (14, 9, 1)
    mask = torch.tensor([[0] * (14 - n) + [1] * n for n in lengths])
    padded = torch.where(mask.bool(), ids, 0)
    found = other(padded, attention_mask=mask).logits
    for row, n in enumerate(lengths):
        alone = other(ids[row : row + 1, 14 - n :]).logits
        torch.testing.assert_close(found[row, 14 - n :], alone[0], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = other.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together, other.generate(padded, attention_mask=mask, use_cache=False, **options))
    for row, n in enumerate(lengths):
        assert (
            together[row, 14:].tolist()
            == other.generate(ids[row : row + 1, 14 - n :], **options)[0, n:].tolist()
        )
    # a later call without a mask goes on from the one before
    past = other(padded, attention_mask=mask).past_key_values
    more = text(3, model, 3, seed=1)
    with_mask = other(
        more, attention_mask=torch.cat((mask, torch.ones(3, 3)), 1), past_key_values=past
    ).logits
    past = other(padded, attention_mask=mask).past_key_values
    torch.testing.assert_close(other(more, past_key_values=past).logits, with_mask)


@needed
@pytest.mark.parametrize("kind", ["transformer", "hybrid"])
@torch.no_grad()
def test_padding_on_the_right_is_right_or_refused(export, kind):
    model, other, _ = export(kind)
    ids = text(14, model, 2)
    mask = torch.tensor([[1] * 14, [1] * 9 + [0] * 5])
    found = other(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[1, :9], other(ids[1:, :9]).logits[0], atol=1e-5, rtol=1e-5)
    for odd, changes, words in (
        (mask, {}, "padding after the text; pad on the left, or pass use_cache=False"),
        (
            torch.tensor([[1] * 14, [1, 1, 0, 0] + [1] * 10]),
            {"use_cache": False},
            "row 1 has padding within its text",
        ),
        (mask[:, :5], {}, r"attention_mask of shape \(2, 5\): \(2, 14\) is needed"),
        (None, {"past_key_values": object()}, "the cache is a object"),
        (None, {"cache": object()}, "the cache is a object"),
        (None, {"cache": object(), "past_key_values": object()}, "two names"),
        (None, {"inputs_embeds": torch.zeros(2, 14, 32)}, "one of them, is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            other(ids, attention_mask=odd, **changes)
    with pytest.raises(ValueError, match="padding after the text"):
        other.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


@needed
@pytest.mark.parametrize("kind,most", [("transformer", 32), ("rope", 48), ("hybrid", 32)])
@torch.no_grad()
def test_no_position_beyond_the_trained_ones(export, kind, most):
    model, other, _ = export(kind)
    assert other(text(most, model)).logits.shape[1] == most
    with pytest.raises(ValueError, match=f"{most + 1} positions: this model was trained on {most}"):
        other(text(most + 1, model))
    with pytest.raises(ValueError, match="shorten the prompt or max_new_tokens"):
        other.generate(
            text(most - 2, model), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )


@needed
@torch.no_grad()
def test_a_cache_goes_back_where_it_can(export):
    for kind in ("transformer", "hybrid"):
        model, other, _ = export(kind)
        ids = text(20, model)
        past = other(ids).past_key_values
        assert past.is_croppable == (kind == "transformer")
        if kind == "hybrid":
            with pytest.raises(ValueError, match="cannot be taken back"):
                past.crop(4)
            continue
        past.crop(12)
        past.crop(-2)
        assert past.get_seq_length() == 10
        torch.testing.assert_close(
            other(ids[:, 10:], past_key_values=past).logits, other(ids).logits[:, 10:], atol=1e-5, rtol=1e-5
        )


@needed
def test_it_trains_and_is_saved_again_and_made_anew(export, tmp_path):
    import transformers
    model, other, folder = export("hybrid")
    ids = text(16, model, 2)
    loss = other.train()(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in other.parameters())
    other.zero_grad()
    other.eval().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, other(ids).logits)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
        assert fresh(ids).logits.isfinite().all() and not torch.equal(fresh(ids).logits, other(ids).logits)


@needed
def test_an_artifact_is_exported_as_it_is_scored(export, tmp_path, capsys):
    import transformers
    model = section.load(checkpoint(tmp_path, **HYBRID))
    args = section.Hyperparameters(None, {**model.args.shipped(), "EXPORT_HEADS": True})
    (tmp_path / "artifact.bin").write_bytes(
        section.pack({name: p.detach().numpy() for name, p in model.named_parameters()}, args)
    )
    assert export_hf.main([str(tmp_path / "artifact.bin"), str(tmp_path / "out")]) == 0
    assert "logits differ by" in capsys.readouterr().out
    model, ids = section.load(tmp_path / "artifact.bin"), text(33, model)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        nats = -other(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    model.args.eval_stride = 32
    np.testing.assert_allclose(section.score(model, ids[0].numpy())[0], nats.numpy(), atol=1e-5)


@needed
def test_the_folder_stands_alone(export):
    _, other, folder = export("hybrid")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_sgjm.py",
        "README.md",
    }
    tree = ast.parse((folder / "modeling_sgjm.py").read_text())
    modules = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
               for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert modules == {"__future__", "torch", "transformers"}
    assert not any(name.startswith("aux") for name, _ in other.named_parameters())
    readme = (folder / "README.md").read_text()
    assert "from_pretrained(FOLDER, trust_remote_code=True)" in readme
    assert readme.splitlines()[0] == f"# {folder.name}"


@needed
@torch.no_grad()
def test_an_argument_that_forward_does_not_know_is_refused(export):
    """Swallowed, the cache under a new name gave wrong texts."""
    _, other, _ = export("hybrid")
    ids = other.encode("the")
    for name in ("past", "kv_cache", "token_type_ids"):
        with pytest.raises(TypeError, match=f"does not know {name}$"):
            other(ids, **{name: ids})
    with pytest.raises(TypeError, match="does not know output_attentions$"):
        other(ids, output_attentions=True, output_hidden_states=False)
    assert other(ids, output_attentions=False, output_hidden_states=None).logits.shape == (1, 4, 260)


@needed
@pytest.mark.parametrize("kind", ["transformer", "hybrid"])
def test_the_check_generates_what_users_will(tmp_path, monkeypatch, capsys, kind):
    """A template that forgets what it kept, as an older one did with transformers 5.24: right logits."""
    import transformers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    rows = {"TRAIN_SEQ_LEN": 80, "MAX_SEQ_LEN": 80, "TRAIN_BATCH_TOKENS": 80}
    path = checkpoint(tmp_path, **KINDS[kind], **rows, INIT_STD=0.3)
    assert export_hf.main([path, str(tmp_path / "good"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["wrong_texts"] == {} and found["difference"] < 1e-4
    assert found["transformers"] == transformers.__version__

    template, kept = tmp_path / "template.py", "for pair in zip(past, (k, v))"
    text = export_hf.TEMPLATE.read_text()
    assert text.count(kept) == 1
    template.write_text(text.replace(kept, "for pair in zip((part * 0 for part in past), (k, v))"))
    monkeypatch.setattr(export_hf, "TEMPLATE", template)
    assert export_hf.main([path, str(tmp_path / "bad")]) == 1
    told = capsys.readouterr().out.splitlines()[-1]
    assert "logits differ by 0.0" in told and "with a cache id 2 is wrong" in told
    assert "without a cache" not in told


def test_misuse_writes_nothing(tmp_path):
    path = checkpoint(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "torn.bin").write_bytes(b"no")
    for call, words in (([str(tmp_path / "torn.bin"), str(tmp_path / "out")], "torn.bin: not an artifact"),
                        ([str(tmp_path / "none.safetensors"), str(tmp_path / "out")], "not a checkpoint"),
                        ([path, str(tmp_path / "there")], "there: exists; --force"),
                        ([path, str(tmp_path / "there"), "--force"], "was not written by this tool")):
        with pytest.raises(Misuse, match=words):
            export_hf.main(call)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "there", "torn.bin"] and not [
        *(tmp_path / "there").iterdir()
    ]


def test_without_transformers_the_folder_is_written_and_said_to_be_unchecked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_hf.importlib.util, "find_spec", lambda name: None)
    path = checkpoint(tmp_path)
    assert export_hf.main([path, str(tmp_path / "out")]) == 0
    assert "not checked, transformers is not installed" in capsys.readouterr().out
    assert export_hf.main([path, str(tmp_path / "out"), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] is None
    assert (tmp_path / "out" / "model.safetensors").exists() and len([*tmp_path.iterdir()]) == 2
