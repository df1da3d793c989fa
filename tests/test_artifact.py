"""The quantiser and the file: bounds, round trips, and every kind of damage."""

import hashlib
import json
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from family import load_script
from hypothesis import given, settings
from hypothesis import strategies as st


def dequantise(q: np.ndarray, step: np.ndarray) -> np.ndarray:
    return q.astype(np.float32) * step.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(2, 8),
    st.floats(0.5, 30),
    st.sampled_from([1e-7, 1e-3, 1.0, 30.0]),
    st.integers(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_quantiser_error_is_half_a_step_inside_its_range(
    trunk, rows, columns, bits, k, scale, axis, seed
):
    weight = (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)
    q, step = trunk.quantise(weight, bits, k, axis)
    top = 2 ** (bits - 1) - 1
    assert q.dtype == np.int8 and np.abs(q).max(initial=0) <= top and step.dtype == np.float16
    assert step.shape == tuple(1 if i == axis else n for i, n in enumerate(weight.shape)) and (step > 0).all()
    error = np.abs(dequantise(q, step) - weight)
    inside = np.abs(weight) <= step.astype(np.float32) * top
    assert (error[inside] <= np.broadcast_to(step.astype(np.float32), weight.shape)[inside] * 0.5001).all()
    again, _ = trunk.quantise(weight, bits, k, axis)
    assert (q == again).all()


def test_quantiser_on_rows_that_break_naive_ones(trunk):
    zero = np.zeros((2, 8), np.float32)
    q, step = trunk.quantise(zero, 6, 12, 1)
    assert (q == 0).all() and np.isfinite(dequantise(q, step)).all()
    # G2: no floor at 1/31
    small = np.random.default_rng(0).standard_normal((4, 4096)).astype(np.float32) * 0.01
    error = dequantise(*trunk.quantise(small, 6, 6, 1)) - small
    assert np.sqrt((error**2).mean()) < 0.06 * 0.01


@pytest.fixture(scope="module")
def packed(trunk):
    """(artifact bytes, model, args) of a random tiny model."""
    from conftest import TINY

    args = trunk.Hyperparameters(TINY)
    model = trunk.GPT(args)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    tensors = {name: p.detach().numpy() for name, p in model.exported().items()}
    return trunk.pack(tensors, args), tensors, args


@pytest.mark.parametrize("compressor", ["rans", "lzma", "auto"])
def test_unpack_gives_what_the_quantiser_gives(trunk, packed, tiny, compressor):
    _, tensors, _ = packed
    args = tiny(COMPRESSOR=compressor)
    blob = trunk.pack(tensors, args)
    assert blob == trunk.pack(tensors, args)
    header, found = trunk.unpack(blob, "test")
    assert compressor in ("auto", header["compressor"]) and list(found) == list(tensors)
    bits = {name: width for name, _, width, _ in header["tensors"]}
    for name, weight in tensors.items():
        large = weight.ndim >= 2 and (weight.size >= 4096 or min(weight.shape) >= 16)
        kind = trunk.tensor_class(name)
        assert bits[name] == (args.bits_by_class[kind] if large else 0)
        if large:
            axis = weight.ndim - (2 if kind == "ngram" else 1)
            k, rate = args.k_by_class[kind], args.rate_by_class[kind]
            weight = dequantise(*trunk.quantise(weight, bits[name], k, axis, rate))
        else:
            weight = weight.astype(np.float16).astype(np.float32)
        assert np.array_equal(found[name], weight)


@pytest.mark.parametrize("folder", [
    ".",
    *sorted(
        path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("records/*/train_gpt.py")
    ),
])
def test_an_artifact_asks_nothing_of_the_training_batch(folder):
    """Rows of 56 ids fill no default batch: of no interest to a script that scores."""
    about, script = ROOT / folder / "submission.json", load_script(ROOT / folder)
    if about.exists() and json.loads(about.read_text()).get("frozen"):
        pytest.skip("a frozen record keeps the defect")
    rows = {"TRAIN_SEQ_LEN": "56", "EVAL_STRIDE": "8"}
    if hasattr(script.Hyperparameters, "ttt_chunk_tokens"):  # a multiple of the stride
        rows["TTT_CHUNK_TOKENS"] = "64"
    if hasattr(script.Hyperparameters, "ttt_doc_chunk"):  # within the window
        rows["TTT_DOC_CHUNK"] = "8"
    shipped = script.Hyperparameters({**rows, "TRAIN_BATCH_TOKENS": "448"}).shipped()
    assert script.Hyperparameters().train_batch_tokens % 56
    assert script.Hyperparameters({}, shipped).train_seq_len == 56
    with pytest.raises(script.UserError, match="TRAIN_BATCH_TOKENS"):
        script.Hyperparameters({**rows, "TRAIN_BATCH_TOKENS": "450"})


def test_default_configuration_fits_its_budget(trunk):
    """Entropy of normally distributed weights at the configured
    steps, 2 % for the coder, steps, header and code."""
    args = trunk.Hyperparameters()
    with torch.device("meta"):
        model = trunk.GPT(args)
    total = (ROOT / "train_gpt.py").stat().st_size + 20_000
    for name, p in model.exported().items():
        if not trunk.quant_plan(name, p.shape, args)[0]:
            total += 2 * p.numel()
            continue
        kind = trunk.tensor_class(name)
        sample = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
        q, _ = trunk.quantise(sample, args.bits_by_class[kind], args.k_by_class[kind], 1)
        share = np.unique(q, return_counts=True)[1] / q.size
        entropy = -(share * np.log2(share)).sum()
        total += 1.02 * entropy / 8 * p.numel() + 2 * p.numel() / p.shape[-1] * (kind != "ngram")
    assert 0.9 * args.artifact_budget_bytes < total < args.artifact_budget_bytes, total


def test_gains_stay_fp16_at_any_size(trunk):
    """Numbers near 1: an integer grid around 0 that ends at some standard deviations would cut them off."""
    args = trunk.Hyperparameters({})
    for shape in ((6, 512), (8, 1024), (2, 4096)):
        for name in ("skip_weights", "blocks.0.resid_mix"):
            assert trunk.quant_plan(name, shape, args) == (0, 0), (name, shape)
    assert trunk.quant_plan("blocks.0.mlp.fc.weight", (64, 64), args) == (6, 1)
    assert trunk.quant_plan("ngram.table", (14, 4096, 16), args) == (6, 1)


def test_no_pickle_and_a_readable_header(trunk, packed, tmp_path, monkeypatch):
    """An artifact is loaded without a pickle being read."""
    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    blob, *_ = packed
    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, refuse)
        patch.setattr(torch, "load", refuse)
        (tmp_path / "a.bin").write_bytes(blob)
        trunk.load(tmp_path / "a.bin")
    length = int.from_bytes(blob[42:46], "little")
    header = json.loads(zlib.decompress(blob[46 : 46 + length]))
    assert header["config"]["NUM_LAYERS"] == 3 and header["tensors"][0][0] == "skip_weights"


@pytest.mark.parametrize("overrides", [{}, {"JEPA_CHUNK_SIZE": 0}], ids=str)
def test_every_shipped_tensor_moves_a_score(trunk, tiny, alive, overrides):
    """Nothing that only training uses is in an artifact."""
    model, ids = alive(tiny(**overrides)).eval(), np.random.default_rng(0).integers(4, 260, 80)
    base, dead = trunk.score(model, ids)[0], []
    for name, p in model.exported().items():
        kept = p.detach().clone()
        with torch.no_grad():
            p.add_(0.3)
        dead += [name] * np.array_equal(trunk.score(model, ids)[0], base)
        with torch.no_grad():
            p.copy_(kept)
    assert not dead


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_artifacts_are_refused_by_name(trunk, packed, data):
    """Cut anywhere, or change any byte: one line that names the file."""
    blob = bytearray(packed[0])
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    else:
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(trunk.UserError, match="^some/file.bin: ") as caught:
        trunk.unpack(bytes(blob), "some/file.bin")
    assert "\n" not in str(caught.value)


def test_well_formed_lies_are_refused(trunk, packed, tmp_path):
    """A file with a right checksum and a wrong story: other
    version, unknown compressor, tensors of another model."""
    blob, tensors, args = packed

    def forge(change) -> bytes:
        body = bytearray(blob[40:])
        length = int.from_bytes(body[2:6], "little")
        header = json.loads(zlib.decompress(body[6 : 6 + length]))
        body[:2] = change(header).to_bytes(2, "little")
        text = zlib.compress(json.dumps(header).encode())
        body = body[:2] + len(text).to_bytes(4, "little") + text + body[6 + length :]
        return blob[:8] + hashlib.sha256(body).digest() + body

    lies = {
        "version": lambda header: 9,
        "compressor": lambda header: header.update(compressor="rar") or 2,
        "decoder": lambda header: (
            header.update(compressor={"rans": "lzma"}.get(header["compressor"], "rans")) or 2
        ),
        "config": lambda header: header["config"].update(MODEL_DIM=64) or 2,
        "names": lambda header: header["tensors"][0].__setitem__(0, "other") or 2,
        "shape": lambda header: header["tensors"][0].__setitem__(1, [7, 7]) or 2,
        "empty": lambda header: header["tensors"][0].__setitem__(slice(1, 4), [[0, 7], 6, 0]) or 2,
        "missing": lambda header: header.pop("config") and 2,
    }
    for name, lie in lies.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(forge(lie))
        with pytest.raises(trunk.UserError, match=f"{name}.bin"):
            trunk.load(path)


def test_a_fresh_process_gives_the_same_score(trunk, packed, tmp_path):
    blob, *_ = packed
    path = tmp_path / "a.bin"
    path.write_bytes(blob)
    ids = np.random.default_rng(0).integers(4, 260, 150)
    np.save(tmp_path / "ids.npy", ids)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy as np, train_gpt as t\n"
        f"nats, _ = t.score(t.load({str(path)!r}), np.load({str(tmp_path / 'ids.npy')!r}))\n"
        "print(repr(float(nats.sum())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    nats, _ = trunk.score(trunk.load(path), ids)
    assert float(done.stdout) == pytest.approx(float(nats.sum()), abs=1e-6)


def test_importing_has_no_side_effect(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, train_gpt\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment())
    assert not list(tmp_path.iterdir())
