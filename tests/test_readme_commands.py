"""The commands of every record's README, as they are written: a shell reads them, and what they would start
is looked at. Settings have to be the script's, options the tools'. SGJM's are carried out, at a smoke size.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import generate
import pytest
import run_seeds
import sweep
from conftest import ROOT, slow
from family import Misuse, load_script, records
from test_sgjm import RECORD, section

# In place of python, first on PATH.
RECORDER = """#!/bin/sh
exec "{python}" -I -S -c 'import json, os, sys
with open(os.environ["RECORDED"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")' "$@"
"""
SHELLS = {"PATH", "HOME", "PWD", "OLDPWD", "SHLVL", "RECORDED", "LC_CTYPE", "_"}


def blocks(page: Path) -> list[str]:
    """The fenced blocks of a page that start something."""
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    return [block for block in found if re.search(r"\bpython ", block)]


def recorded(block: str, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """(arguments of python, variables) of all that a shell would start, in order; nothing is started."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/python").write_text(RECORDER.format(python=sys.executable))
    (folder / "bin/python").chmod(0o755)
    told = folder / "recorded.jsonl"
    told.unlink(missing_ok=True)
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "RECORDED": str(told)}
    # what a block writes to, as in `> measured/audit.json`, stays out of the repository
    (folder / "cwd").mkdir(exist_ok=True)
    for place in re.findall(r"> (\S+)/[^/\s]+$", block, re.M):
        (folder / "cwd" / place).mkdir(parents=True, exist_ok=True)
    call = ["bash", "-euc", block]
    done = subprocess.run(call, env=env, cwd=folder / "cwd", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in told.read_text().splitlines()]
    return [(call, {key: text for key, text in env.items() if key not in SHELLS}) for call, env in calls]


class Parsed(Exception):
    pass


@pytest.fixture
def arms(monkeypatch):
    """arms(tool, argv) -> {arm: settings} that sweep.py or run_seeds.py would run."""
    def arms(tool, argv):
        taken = {}

        def carry_out(options, script, known, found, *_):
            taken.update(found)
            return 0
        monkeypatch.setattr(tool, "carry_out", carry_out)
        assert tool.main(argv) == 0
        return taken
    return arms


@pytest.mark.parametrize("record", records(), ids=lambda record: record.name)
def test_commands_are_understood(record, tmp_path, monkeypatch, arms):
    """`train_gpt.py` is the record's, in a page of the record."""
    ways = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}

    def only_parse(parse):
        def parsed(self, *given):
            parse(self, *given)
            raise Parsed
        return parsed
    monkeypatch.setattr(run_seeds, "say", lambda text: None)
    calls = [call for block in blocks(record / "README.md") for call in recorded(block, tmp_path)]
    assert calls
    for (name, *argv), variables in calls:
        monkeypatch.setattr(os, "environ", variables)
        path = record / name if name.startswith("train_gpt") else ROOT / name
        assert path.is_file(), name
        if path.name in ("train_gpt.py", "train_gpt_mlx.py"):
            assert argv == []
            load_script(path).Hyperparameters(variables)
            continue
        tool = {"sweep": sweep, "run_seeds": run_seeds}.get(path.stem) or load_script(path)
        if tool in (sweep, run_seeds):
            script = load_script(sweep.find_script(argv[0]))
            for settings in arms(tool, argv).values():
                script.Hyperparameters(settings)
            continue
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            for way, parse in ways.items():
                patch.setattr(argparse.ArgumentParser, way, only_parse(parse))
            patch.setattr(sys, "argv", [name, *argv])
            tool.main(argv)


def test_a_command_that_is_not_understood_is_found(tmp_path, arms):
    """The tests above would see it."""
    block = """export LR=1
    A="X=1 Y=2"
    for n in 1 2; do env $A N=$n python a.py $(printf -- "--set %s " $A) # why
    done"""
    first, second = recorded(block, tmp_path)
    assert first == (["a.py", "--set", "X=1", "--set", "Y=2"], {"LR": "1", "X": "1", "Y": "2", "N": "1"})
    assert second[1]["N"] == "2"
    with pytest.raises(Misuse, match="the script has no variable SIZES"):
        arms(sweep, ["SGJM", "--named", "ablation", "--set", "SIZES=smoke"])
    with pytest.raises(AssertionError, match="No such file"):
        recorded("python a.py < nowhere", tmp_path)


# In place of what SGJM's page sets: every step of it in seconds.
SMOKE = {
    "SIZE": "smoke", "MODEL_DIM": 32, "NUM_LAYERS": 2, "BASELINE_LAYERS": 2, "NUM_HEADS": 2, "FF_DIM": 48,
    "DRAFTER_DIM": 16, "DRAFTER_LAYERS": 1, "DRAFTER_HEADS": 2, "DRAFTER_FF_DIM": 24, "JUDGE_HIDDEN": 16,
    "VERIFIER_HIDDEN": 16, "HEAD_POSITIONS": 8, "TRAIN_SEQ_LEN": 32, "MAX_SEQ_LEN": 32, "EVAL_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 128, "ITERATIONS": 3, "WARMDOWN_ITERS": 1, "WARMUP_STEPS": 0, "VAL_BYTES": 600,
    "EVAL_STRIDE": 16, "EVAL_BATCH_TOKENS": 1024, "GATE_BATCHES": 1, "GPTQ_BATCHES": 1,
    "COMPILE": 0, "DEVICE": "cpu", "DTYPE": "fp32", "OMP_NUM_THREADS": 1,
}
SMOKE = {key: str(value) for key, value in SMOKE.items()}


@pytest.fixture
def carried_out(corpus, tmp_path, monkeypatch, capfd):
    """carried_out(arguments, variables) -> (exit code, output): a command of the page in this process, in a
    folder that has nothing but what earlier commands have left.
    """
    tools = {name: load_script(RECORD / f"{name}.py") for name in ("gate", "bench", "export_hf", "rows")}
    tools["generate"] = generate
    place = tmp_path / "cwd"
    (place / RECORD.relative_to(ROOT) / "measured").mkdir(parents=True)
    (place / RECORD.relative_to(ROOT) / "train_gpt.py").write_bytes((RECORD / "train_gpt.py").read_bytes())
    (place / RECORD.relative_to(ROOT) / "measured/prompts").symlink_to(RECORD / "measured/prompts")
    monkeypatch.chdir(place)
    monkeypatch.setattr(tools["bench"], "beside", lambda name: section)

    monkeypatch.setattr(section, "run_beside", lambda name: tools["gate"].main())

    class Inside:
        """A run of the script as run_seeds.py starts it, finished when it has started."""

        def __init__(self, call, env, **_):
            self.pid, self.returncode = id(self), script(env)

        def poll(self):
            return self.returncode

    def script(variables) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", variables)
            patch.setattr(sys, "argv", ["train_gpt.py"])
            return section.main()

    def carried_out(call, variables):
        name, *argv = call
        if name == "data/prepare.py":
            folder = Path(argv[argv.index("--out") + 1])
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(corpus)
            return 0, ""
        variables = variables | SMOKE
        monkeypatch.setattr(os, "environ", variables)
        inside = SimpleNamespace(Popen=Inside, DEVNULL=subprocess.DEVNULL)
        monkeypatch.setattr(run_seeds, "subprocess", inside)
        if Path(name).name == "train_gpt.py":
            code = script(variables)
        elif Path(name).stem == "sweep":
            pairs = list(zip(argv, [*argv[1:], ""]))
            kept = [i for i, (a, b) in enumerate(pairs) if not (a == "--set" and b.split("=")[0] in SMOKE)]
            kept = [i for i in kept if i == 0 or i - 1 in kept or argv[i - 1] != "--set"]
            code = sweep.main([*(argv[i] for i in kept), "--seeds", "42"])
        else:
            tool, few = Path(name).stem, ["--max-new-tokens", "4"]
            short = {"generate": few, "bench": [*few, "--repeats", "1"]}.get(tool, [])
            code = tools[tool].main([*argv, *short])
        shown = capfd.readouterr()
        return code, shown.out + shown.err

    return carried_out


@slow
def test_the_commands_of_sgjm_are_carried_out(tmp_path, carried_out):
    """All of its page, one after the other. A gate says no (exit code 1) of models as young as these."""
    done = []
    for block in blocks(RECORD / "README.md"):
        for call, variables in recorded(block, tmp_path):
            if call[:2] == ["scripts/sweep.py", "."]:  # of the trunk, by its own settings
                continue
            if call[0] == "train_gpt.py":
                call[0] = str(RECORD.relative_to(ROOT) / "train_gpt.py")
            code, output = carried_out(call, variables)
            assert code == 0 or code == 1 and variables.get("EVAL_GATE") == "1", (call, variables, output)
            assert not re.search("^failed |Traceback", output, re.M), output
            done.append(Path(call[0]).stem)
    assert {"prepare", "train_gpt", "generate", "bench", "export_hf", "sweep", "rows"} == {*done}
    place = tmp_path / "cwd"
    assert json.loads((place / "exported/config.json").read_text())["hidden_size"] == 32
    for name in ("bench/bench.json", "gate/gate.json", "small_gate/gate.json"):
        assert json.loads((place / "runs" / name).read_text())["settings"]["MODEL_DIM"] == 32
    summaries = {path.name.split(".")[0] for path in place.glob("records/*/sweeps/*.summary.json")}
    assert summaries == {"ablation", "loss_weight", "block_size", "merge_radius"}
