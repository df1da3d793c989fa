"""Bad days of the training scripts: wrong shards, other text on resuming, full disks, kills, unlike ranks.

Each fault is one line that names the file or the variable, exit code 2 and nothing half-written. What every
script of the family must refuse is tried in every one of them. tests/test_bad_days.py has data/prepare.py.
"""

import errno
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, ROOT, environment, shard, slow
from family import TRUNK, load_script
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st
from test_bijepax import HERE as LOOPED
from test_sgjm import RUN, SCRIPT
from test_tokenbest import HERE as PLAIN

FAMILY = [TRUNK, *sorted(ROOT.glob("records/*_[A-Z]*/train_gpt.py"))]
FAMILY = [path for path in FAMILY if "Baseline" not in path.parent.name and "_Trunk" not in path.parent.name]
BIJEPAX, *CHILDREN = (path for path in FAMILY if path.parent.name.endswith(("BiJEPAX", "TokenBest")))
# The trunk, and the record that is least like it, each with its small model beside the trunk's.
PAIR = (TRUNK, {}), (SCRIPT, RUN)
UNLIKE = pytest.mark.parametrize("script, small", PAIR, ids=["trunk", "SGJM"])
# Beside them the token models, whose symbols for this are the trunk's.
TOKENS = [pytest.param(path, small, marks=slow, id=path.parent.name.partition("_")[2])
          for path, small in [(BIJEPAX, LOOPED), *((child, PLAIN) for child in CHILDREN)]]
MORE = pytest.mark.parametrize("script, small", [*(pytest.param(*each) for each in PAIR), *TOKENS])


@pytest.fixture
def folder(tmp_path):
    """A folder with two shards of training text and one of validation."""
    path = tmp_path / "data" / "shards"
    path.mkdir(parents=True)
    for name in ("x_train_000000", "x_train_000001", "x_val_000000"):
        (path / f"{name}.bin").write_bytes(shard(1, *range(10, 60)))
    return path


def open_data(script: Path, folder: Path):
    """(the script, the data that it finds in a folder, its settings)."""
    module = load_script(script)
    args = module.Hyperparameters({"DATA_PATH": str(folder), "VOCAB_SIZE": "260", "TOKENIZER_PATH": ""})
    return module, module.Dataset(args, False), args


@pytest.mark.parametrize("name, words", [
    ("x_val_000000 (1).bin", "x_val_000000 (1).bin: a copy"),
    ("y_val_000000.bin", "y_val_000000.bin: a copy, a sidecar, or another source's"),
    ("x_val_bytes_000000.bin", "x_val_bytes_000000.bin: a copy, a sidecar"),
    ("x_train_bytes_000000.bin", "x_train_bytes_000000.bin: a copy, a sidecar"),
    ("x_train_000000 copy.bin", "x_train_000000 copy.bin: a copy"),
])
@pytest.mark.parametrize("script", FAMILY, ids=lambda path: path.parent.name)
def test_shards_that_would_be_read_twice_or_as_text_are_refused(folder, script, name, words):
    (folder / name).write_bytes(shard(1, 5, 6))
    if script in (BIJEPAX, *CHILDREN) and "_bytes_" in name:
        pytest.skip("it reads the published sidecars")
    module = load_script(script)
    args = module.Hyperparameters({"DATA_PATH": str(folder), "VOCAB_SIZE": "260", "TOKENIZER_PATH": ""})
    with pytest.raises(module.UserError) as refused:
        module.Dataset(args, False)
    assert words in str(refused.value)


@pytest.mark.parametrize("script", FAMILY, ids=lambda path: path.parent.name)
def test_a_gap_is_warned_of_and_a_wrong_folder_names_the_right_one(folder, script):
    _, data, args = open_data(script, folder)
    assert len(data.train_files) == 2 and not args.warnings
    (folder / "x_train_000001.bin").rename(folder / "x_train_000002.bin")
    module, _, args = open_data(script, folder)
    assert len(args.warnings) == 1 and args.warnings[0].endswith("x_train_000002.bin: a number is missing")
    args.data_path = str(folder.parent)
    with pytest.raises(module.UserError, match=f"did you mean {folder}"):
        module.Dataset(args, False)


@pytest.mark.parametrize("script", [BIJEPAX, *CHILDREN], ids=lambda path: path.parent.name)
def test_published_sidecars_are_read_under_their_own_names(folder, script):
    """Two numbers an id, as CaseOps text is published: ids, and the bytes that each stands for."""
    for split in ("train", "val"):
        (folder / f"x_{split}_bytes_000000.bin").write_bytes(shard(0, *([3] * 50)))
    (folder / "x_train_bytes_000001.bin").write_bytes(shard(0, *([3] * 50)))
    _, data, _ = open_data(script, folder)
    assert len(data.val) == 51 and data.val_sizes.tolist() == [0] + [3] * 50


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["shards", "file", "sha256", "vocab_size", "val_bytes", "caseops", "x"]), inner),
    max_leaves=12,
)


@rules(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(0, 99))
def test_any_manifest_is_read_or_refused(trunk, folder, content, cut):
    """Whatever stands in manifest.json, and cut off anywhere."""
    (folder / "manifest.json").write_bytes(content[: len(content) * (cut + 1) // 100])
    args = trunk.Hyperparameters({"DATA_PATH": str(folder)})
    try:
        trunk.Dataset(args, True)
    except trunk.UserError as refused:
        assert str(folder) in str(refused)


# --- resuming ---


@pytest.fixture
def other_text(corpus, tmp_path):
    """The corpus with one id of the validation text changed."""
    path = tmp_path / "other"
    shutil.copytree(corpus, path)
    (path / "manifest.json").unlink()
    file = next(path.glob("*_val_*.bin"))
    data = bytearray(file.read_bytes())
    data[1024 + 2 * 100] ^= 1
    file.write_bytes(data)
    return path


@MORE
def test_resuming_on_other_text_is_refused_and_other_settings_are_told(run, other_text, script, small):
    small = {"script": script, **small, "MODEL_DIM": 32}
    code, output, _ = run(**small | {"ITERATIONS": 4, "CHECKPOINT_EVERY": 2})
    assert code == 0, output
    again = small | {"ITERATIONS": 8, "CHECKPOINT_EVERY": 2, "RESUME": "auto"}
    code, output, _ = run(DATA_PATH=other_text, **again)
    assert code == 2 and f"made with other text than {other_text}; RESUME_DATA=changed" in output
    changed = {"RESUME_DATA": "changed", "SEED": 7, "MATRIX_LR": 0.01}
    code, output, metrics = run(DATA_PATH=other_text, **again | changed)
    assert code == 0 and metrics["steps"] == 8, output
    told = [line for line in output.splitlines() if line.startswith("warning: resumed with ")]
    before = load_script(script).Hyperparameters.matrix_lr.default
    assert told == [f"warning: resumed with MATRIX_LR=0.01, it was {before}",
                    "warning: resumed with SEED=7, it was 1337"]
    code, output, _ = run(**again | {"MODEL_DIM": 64})
    assert code == 2 and "made with MODEL_DIM=32, not 64" in output


def test_a_run_that_was_stopped_while_it_packed_does_not_train_again(run, tmp_path):
    code, output, first = run(CHECKPOINT_EVERY=2)
    assert code == 0, output
    folder = tmp_path / "runs" / "test"
    artifact = (folder / "artifact.bin").read_bytes()
    for name in ("artifact.bin", "metrics.json"):
        (folder / name).unlink()
    code, output, second = run(CHECKPOINT_EVERY=2, RESUME="auto")
    assert code == 0, output
    assert f"resume:{folder / 'final.safetensors'} step:6" in output and "step:6/6 train_loss" not in output
    assert (folder / "artifact.bin").read_bytes() == artifact and second["val_bpb"] == first["val_bpb"]


def test_resume_auto_takes_the_newest_checkpoint(run, tmp_path):
    """A run that ended goes on with more steps and is stopped: then `last` is newer than `final`."""
    code, output, _ = run(ITERATIONS=4)
    assert code == 0, output
    folder = tmp_path / "runs" / "test"
    code, output, _ = run(ITERATIONS=10, CHECKPOINT_EVERY=3, RESUME="auto", MATRIX_LR=0.02)
    assert code == 0 and f"resume:{folder / 'final.safetensors'} step:4" in output, output
    (folder / "last.safetensors").touch()  # as if it had been stopped after step 9
    code, output, _ = run(ITERATIONS=12, RESUME="auto")
    assert code == 0 and f"resume:{folder / 'last.safetensors'} step:9" in output, output


def test_ranks_with_other_weights_are_refused(run, tmp_path):
    """As processors of two kinds may make them from one seed."""
    text = (ROOT / "train_gpt.py").read_text()
    assert text.count("self.model.init_weights(args.seed)") == 1
    script = tmp_path / "train_gpt.py"
    script.write_text(text.replace("init_weights(args.seed)", "init_weights(args.seed + args.rank)"))
    code, output, metrics = run(ranks=2, script=script)
    assert code and metrics is None and "rank 1 has other weights or another step than rank 0" in output


def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(run, corpus, tmp_path):
    """SIGKILL at random moments: in training, while a checkpoint is written, in packing and scoring."""
    settings = {"ITERATIONS": 30, "CHECKPOINT_EVERY": 1, "WARMDOWN_ITERS": 10}
    start = time.monotonic()
    code, output, whole = run(RUN_ID="whole", **settings)
    seconds = time.monotonic() - start  # within which a kill meets something
    assert code == 0, output
    chance, kills, wanted = random.Random(0), 0, 20 if EXAMPLES > 100 else 3
    for number in range(100):
        folder = tmp_path / "runs" / f"killed{number}"
        places = {"DATA_PATH": corpus, "RUNS_PATH": folder.parent, "RUN_ID": folder.name, "RESUME": "auto"}
        finished = False
        while not finished:
            started = subprocess.Popen([sys.executable, str(TRUNK)], env=environment(**settings, **places),
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                started.wait(timeout=chance.uniform(0.4, 1) * seconds if kills < wanted else 120)
                assert started.returncode == 0, started.stdout.read().decode()
                finished = True
            except subprocess.TimeoutExpired:
                started.send_signal(signal.SIGKILL)
                started.wait()
                kills += 1
            finally:
                started.stdout.close()
        artifact = folder / "artifact.bin"
        assert artifact.read_bytes() == (folder.parent / "whole" / "artifact.bin").read_bytes()
        killed = json.loads((folder / "metrics.json").read_text())
        assert whole["val_bpb"] == killed["val_bpb"] and not list(folder.glob("*.tmp"))
        if kills >= wanted:
            return
    pytest.fail(f"a hundred runs ended before {wanted} kills")


def test_two_processes_may_not_share_a_run(run, corpus, tmp_path):
    places = {"DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "test"}
    first = subprocess.Popen([sys.executable, str(TRUNK)], env=environment(ITERATIONS=100_000, **places),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        log = tmp_path / "runs" / "test" / "log.txt"
        end = time.monotonic() + 60
        while not (log.exists() and "step:1/" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        code, output, _ = run()
        assert code == 2 and "error: RUN_ID=test: another process runs it" in output
    finally:
        first.kill()
        first.communicate()
    code, output, _ = run()
    assert code == 0, output  # nothing of the lock is left


@pytest.mark.parametrize("script", FAMILY, ids=lambda path: path.parent.name)
def test_a_file_system_without_locks_is_no_reason_to_stop(script, tmp_path, monkeypatch):
    module = load_script(script)

    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    module.Log(tmp_path / "run")("a line", console=False)
    assert (tmp_path / "run" / "log.txt").read_text() == "a line\n"


# --- disks, memory, ranks, artifacts ---


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(run, corpus, tmp_path):
    """No file may grow beyond a limit, as on a full disk: the log is one of them, and training goes on."""
    assert run(CHECKPOINT_EVERY=6)[0] == 0
    folder = tmp_path / "runs" / "test"
    kept = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    log = folder / "log.txt"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as a disk gives one
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 2000,) * 2)

    places = {"DATA_PATH": corpus, "RUNS_PATH": tmp_path / "runs", "RUN_ID": "test", "RESUME": "auto"}
    settings = {"ITERATIONS": 12, "CHECKPOINT_EVERY": 12, "MODEL_DIM": 32}
    done = subprocess.run([sys.executable, str(TRUNK)], env=environment(**settings, **places),
                          capture_output=True, text=True, preexec_fn=limited)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: {folder}/") and errors[0].endswith(
        ".safetensors: File too large; the old file is whole")
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert warned == [f"warning: {log}: File too large"]
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == kept
    assert not list(folder.glob(".*")), "a temporary file is left"


@pytest.mark.parametrize("script", FAMILY, ids=lambda path: path.parent.name)
def test_a_folder_of_runs_that_is_a_file(script, tmp_path):
    module = load_script(script)
    (tmp_path / "runs").write_text("I am a file")
    with pytest.raises(module.UserError, match="Not a directory|File exists"):
        module.Log(tmp_path / "runs" / "test")
    with pytest.raises(module.UserError, match="artifact.bin: (Not a directory|File exists)"):
        module.write_atomic(tmp_path / "runs" / "artifact.bin", b"x")


@UNLIKE
def test_memory_of_a_gpu_that_runs_out_says_what_to_try(inside, monkeypatch, script, small):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = load_script(script)
    monkeypatch.setattr(module, "train", full)
    code, output, *_ = inside(module, **small | {"DEVICE_BATCH_TOKENS": 4096})
    assert code == 2 and "error: out of GPU memory, try DEVICE_BATCH_TOKENS=2048" in output


@MORE
def test_ranks_that_see_other_text_or_settings_stop(run, other_text, corpus, tmp_path, script, small):
    """Two ranks whose folders differ: both end, and one line says which."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, runpy\n"
        f"if os.environ['RANK'] == '1': os.environ['DATA_PATH'] = {str(other_text)!r}\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    code, output, _ = run(ranks=2, script=driver, **small)
    assert code != 0 and "error: rank 1 has other settings or text than rank 0" in output


def test_an_artifact_of_another_script_says_who_made_it(run, tmp_path):
    assert run()[0] == 0
    path = tmp_path / "runs" / "test" / "artifact.bin"
    digest = load_script(TRUNK).sha256_file(TRUNK)[:8]
    # the classes of its tensors mean something else to a script with other classes
    for name, reason in (("ByteJEPA", "its config lacks "), ("PatchJEPA", "header and payload differ ")):
        other = load_script(next(path for path in FAMILY if name in str(path)))
        with pytest.raises(other.UserError, match=f"made by The trunk, script {digest}: {reason}"):
            other.load(path)
    code, output, _ = run(ARTIFACT=path)
    assert code == 2 and f"ARTIFACT={path}: set EVAL_ONLY=1 to score it" in output
