"""docs/launch.md: two agents on the loopback address, processes that are killed, and the page's commands.

LAUNCH_KILLS=10 tries ten runs that lose a process at a random step instead of one, 20 to 30 seconds each."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, environment, slow
from torch.distributed.run import get_args_parser

STEPS, CHECKPOINT_EVERY, SECONDS = 20, 5, 180
SETTINGS = {
    "ITERATIONS": STEPS, "WARMDOWN_ITERS": 10, "TRAIN_LOG_EVERY": 1, "JEPA_PHASE1_FRAC": 0, "RUN_ID": "run",
    "NUM_LAYERS": 2, "VAL_BYTES": 1000, "EVAL_STRIDE": 32, "GPTQ_BATCHES": 1,
    # Else processes that torchrun starts again look for the dead ones: the page says more.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
    # How long torchrun waits for a process that does not end at SIGTERM.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 3,
}
# Writes the process's number down and becomes the script.
START = 'echo $$ > "$1/$RANK"\nexec "$2" "$3"\n'

PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
# Names in the page that the script does not read: torch's and those that platforms set.
FOREIGN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
PLATFORMS = ("SLURM_", "SKYPILOT_", "SBATCH")


class Agent:
    """torchrun with processes that it may start again; `ranks` has a file for each with its number."""

    def __init__(self, folder: Path, name: str, processes: int, options: list[str], seconds: int = SECONDS,
                 **settings):
        self.ranks = folder / f"{name}-ranks"
        self.ranks.mkdir(parents=True)
        start = self.ranks.with_suffix(".sh")
        start.write_text(START)
        command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}",
                   "--no-python", "sh", start, self.ranks, sys.executable, ROOT / "train_gpt.py"]
        env = environment(**{**SETTINGS, **settings}, RUNS_PATH=folder / "runs")
        self.process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)
        # What hangs ends as a failure.
        self.limit = threading.Timer(seconds, self.process.terminate)
        self.limit.start()

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(int((self.ranks / str(rank)).read_text()), number)

    def close(self) -> None:
        """Leaves no process: torchrun ends its own at SIGTERM, and each of them leads a group."""
        self.limit.cancel()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                for path in self.ranks.iterdir():
                    with contextlib.suppress(OSError, ValueError):
                        os.killpg(int(path.read_text()), signal.SIGKILL)
                self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def agent(corpus):
    """agent(folder, name, processes, options, VAR=value, ...) -> Agent, which does not outlive the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **settings: stack.enter_context(
            contextlib.closing(Agent(*arguments, **{"DATA_PATH": corpus, **settings}))
        )


def result(folder: Path, count: int = STEPS) -> dict:
    """What may not depend on the launch: the last line of each step, scores, weights and the artifact."""
    (run,) = (folder / "runs").iterdir()
    assert run.name == "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train_loss" in line}
    assert sorted(steps) == list(range(1, count + 1))
    evals = json.loads((run / "metrics.json").read_text())["evals"]
    for entry in (*steps.values(), *evals.values()):
        entry.pop("train_seconds", None)
        entry.pop("seconds", None)
    files = {name: (run / name).read_bytes() for name in ("artifact.bin", "final.safetensors")}
    return {"steps": steps, "evals": evals, **files}


def tensors(blob: bytes) -> bytes:
    """A checkpoint without its header, which has the clock in it."""
    return blob[8 + int.from_bytes(blob[:8], "little"):]


def assert_same(found: dict, wanted: dict) -> None:
    assert found["steps"] == wanted["steps"]
    assert found["evals"] == wanted["evals"]
    assert found["artifact.bin"] == wanted["artifact.bin"]
    assert tensors(found["final.safetensors"]) == tensors(wanted["final.safetensors"])


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """`result` of four processes under one agent."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.closing(Agent(folder, "one", 4, ["--standalone"], DATA_PATH=corpus)) as one:
        output = one.process.communicate()[0]
        assert one.process.returncode == 0, output
    return result(folder)


@slow
def test_two_agents_with_two_processes_each_train_as_four_under_one(agent, run, undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--rdzv-id=pair", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
               "--local-addr=127.0.0.1"]
    pair = [agent(tmp_path / "pair", name, 2, options) for name in "ab"]
    # Each output is far smaller than a pipe, so that the second agent does not wait for the first's reader.
    outputs = [each.process.communicate()[0] for each in pair]
    assert [each.process.returncode for each in pair] == [0, 0], "\n".join(outputs)
    assert sorted("world_size:4" in output for output in outputs) == [False, True]  # rank 0 alone prints
    found = result(tmp_path / "pair")
    assert_same(found, undisturbed)

    settings = {**SETTINGS, "RUNS_PATH": tmp_path / "single" / "runs"}
    code, output, _ = run(**settings)
    assert code == 0, output
    single = result(tmp_path / "single")
    for step, line in single["steps"].items():
        assert line["train_loss"] == pytest.approx(found["steps"][step]["train_loss"], abs=1e-4), step
    for name, entry in single["evals"].items():
        assert entry["val_bpb"] == pytest.approx(found["evals"][name]["val_bpb"], abs=3e-4), name


@slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("LAUNCH_KILLS", "1"))))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_run_that_loses_a_process_ends_like_one_that_does_not(agent, undisturbed, tmp_path, seed, number):
    """A process that is stopped is told of by those that wait for it, a minute later."""
    rng = random.Random(seed)
    step, rank = rng.randint(1, STEPS - 4), rng.randrange(4)
    options = ["--standalone", "--max-restarts=1"]
    one = agent(tmp_path, "one", 4, options, RESUME="auto", CHECKPOINT_EVERY=CHECKPOINT_EVERY)
    lines = []
    for line in one.process.stdout:
        lines.append(line)
        if line.startswith(f"step:{step}/") and not (tmp_path / "killed").exists():
            one.send(rank, number)
            (tmp_path / "killed").touch()
    output = "".join(lines)
    assert one.process.wait() == 0, output
    assert (f"stopped, rank {rank} is silent" in output) == (number == signal.SIGSTOP), output

    # It went on from the newest checkpoint that was whole: a step's line is shown before its checkpoint.
    starts = output.split("model_params:")[1:]
    assert len(starts) == 2, output
    lost = max(int(x) for x in re.findall(r"^step:(\d+)/\d+ train_loss", starts[0], re.M))
    found = re.search(r"^resume:\S+last\.safetensors step:(\d+)", starts[1], re.M)
    begun = int(found[1]) if found else 0
    whole = {count // CHECKPOINT_EVERY * CHECKPOINT_EVERY for count in (lost - 1, lost)}
    assert step <= lost < STEPS and begun in whole, (step, lost, begun)
    assert_same(result(tmp_path), undisturbed)


@slow
def test_a_run_that_loses_ten_processes_ends_like_one_that_loses_none(agent, tmp_path):
    """Some steps after each of its starts, one of the four is killed; the eleventh start comes to the end."""
    rng, kills, longer = random.Random(7), 10, {"ITERATIONS": 90, "WARMDOWN_ITERS": 30}
    whole = agent(tmp_path / "whole", "one", 4, ["--standalone"], **longer)
    output = whole.process.communicate()[0]
    assert whole.process.returncode == 0, output

    options = ["--standalone", f"--max-restarts={kills}"]
    torn = agent(tmp_path / "torn", "one", 4, options, RESUME="auto", CHECKPOINT_EVERY=CHECKPOINT_EVERY,
                 seconds=4 * SECONDS, **longer)
    lines, starts, wait = [], 0, 0
    for line in torn.process.stdout:
        lines.append(line)
        if line.startswith("model_params:"):
            starts, wait = starts + 1, rng.randint(1, CHECKPOINT_EVERY + 2)
        elif re.match(r"step:\d+/\d+ train_loss", line) and starts <= kills:
            wait -= 1
            if wait == 0:
                torn.send(rng.randrange(4), signal.SIGKILL)
    output = "".join(lines)
    assert torn.process.wait() == 0 and starts == kills + 1, output
    assert_same(result(tmp_path / "torn", 90), result(tmp_path / "whole", 90))


# --- The page ---


def test_settings_of_the_page_are_taken(trunk):
    settings = {}
    for _, text in BLOCKS:
        found = re.findall(r"""\b([A-Z][A-Z_0-9]+)"?(?:=|: )["']?([\w./$:{}-]*)""", text)
        settings |= {name: value for name, value in found if not name.startswith(PLATFORMS)}
    own = {name: value for name, value in settings.items() if name not in FOREIGN}
    assert {"DATA_PATH", "RUNS_PATH", "RUN_ID", "RESUME", "CHECKPOINT_EVERY", "DEVICE"} <= set(own)
    assert set(own) <= {var.name for var in trunk.Hyperparameters.vars().values()}

    platforms = dict.fromkeys(re.findall(r"\$\{?((?:SLURM|SKYPILOT)_\w+)", PAGE), "1")
    assert len(platforms) > 5
    # Nor does it take a platform's variables for misspelt ones of its own.
    modal = dict.fromkeys(("MODAL_IMAGE_ID", "MODAL_TASK_ID", "MODAL_REGION", "MODAL_ENVIRONMENT"), "1")
    args = trunk.Hyperparameters({**settings, **platforms, **modal})
    assert not args.warnings and args.resume == "auto" and args.checkpoint_every == 200


def test_torchrun_has_the_options_of_the_page():
    text = re.sub(r"\\\n\s*", "", "\n".join(text for _, text in BLOCKS))
    commands = re.findall(r"torchrun (.*?/?train_gpt\.py)", text)
    assert len(commands) == 7
    for command in commands:
        options = get_args_parser().parse_args(shlex.split(command))
        assert Path(options.training_script).name == "train_gpt.py" and not options.training_script_args
        assert options.standalone or (options.rdzv_backend, bool(options.rdzv_endpoint)) == ("c10d", True)


@pytest.mark.parametrize("kind, text", BLOCKS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(BLOCKS)])
def test_the_blocks_of_the_page_are_of_their_language(kind, text):
    if kind == "python":
        compile(text, "launch_modal.py", "exec")
    elif kind == "yaml":
        task = pytest.importorskip("yaml").safe_load(text)
        text = task["setup"] + task["run"]
    if kind != "python":
        shell = shutil.which("bash") or "sh"
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
