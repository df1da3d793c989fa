"""What the tools and the tests share: scripts as modules, records
and their files, findings, exit codes, tables.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUNK = ROOT / "train_gpt.py"

# Exit codes of every tool.
FINE, FINDINGS, MISUSE = 0, 1, 2


class Misuse(Exception):
    """What the caller got wrong: one line that names the file or option, the value and what is accepted."""


def command(main: Callable[[], int]) -> None:
    """Ends the process with the exit code of `main`; what the
    caller can mend is one line on stderr, exit code 2.
    """
    try:
        sys.exit(main())
    except Misuse as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISUSE)
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FINE)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install -r requirements-dev.txt", file=sys.stderr)
        sys.exit(MISUSE)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(MISUSE)
    except Exception as error:
        if type(error).__name__ != "UserError":  # a script's own class for what its caller can mend
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISUSE)


@dataclass(frozen=True)
class Finding:
    """One rule and how it went. `where` is `file:line`, a counter-example's place, or empty."""

    rule: str
    level: str  # PASS, WARN or FAIL
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.level} {self.rule}: {f'{self.where}: ' if self.where else ''}{self.text}"


def report(findings: Iterable[Finding], as_json: bool) -> int:
    """Prints findings, a line each or as one JSON list -> exit code: FINDINGS where one is a FAIL."""
    findings = list(findings)
    print(json.dumps([asdict(finding) for finding in findings], indent=1) if as_json
          else "\n".join(map(str, findings)))
    return FINDINGS if any(finding.level == "FAIL" for finding in findings) else FINE


def find_script(name: Path | str) -> Path:
    """A script by its path, by its folder, or by a record's name; `.` is the trunk.

    Raises:
        Misuse: nothing of that name.
    """
    if str(name) in (".", "trunk"):
        return TRUNK
    title = Path(name).name
    titled = [path for path in sorted((ROOT / "records").glob("*_*")) if path.name.partition("_")[2] == title]
    for path in (Path(name), ROOT / "records" / name, *titled):
        path = path / "train_gpt.py" if path.is_dir() else path
        if path.is_file():
            if len(titled) > 1 and path.parent in titled:
                raise Misuse(f"{name}: which of {', '.join(each.name for each in titled)}?")
            return path.resolve()
    raise Misuse(f"{name}: no script, no folder with a train_gpt.py and no record of this name")


def records(root: Path = ROOT) -> list[Path]:
    """Folders of all records below `root`, by date and name."""
    return sorted(path.parent for path in (root / "records").glob("*/train_gpt.py"))


def read_json(path: Path | str) -> dict:
    """A JSON file.

    Raises:
        Misuse: it is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise Misuse(f"{path}: {reason}") from None


def write_atomic(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def texts_to_mix(script, folder: Path, targets: int, vocab_size: int) -> tuple:
    """(Ids of the first training shard, ids of the first validation shard up to `targets`, 0 = all) for a
    tool that times a mixture.

    Raises:
        Misuse: there are none, they are of another vocabulary, or the script cannot mix.
    """
    if targets < 0:
        raise Misuse("--targets: 0, for all, or more")
    if not script.njit:
        raise Misuse("the mixture needs numba, see the record's requirements.txt")
    found = []
    for part in ("train", "val"):
        paths = sorted(Path(folder).glob(f"*_{part}_*.bin"))
        if not paths:
            raise Misuse(f"{folder}: has no *_{part}_*.bin")
        try:
            found.append(script.open_shard(paths[0], vocab_size))
        except script.UserError as error:
            raise Misuse(str(error)) from None
    train, ids = found
    ids = ids[: targets + 1] if targets else ids
    if len(ids) < 2:
        raise Misuse(f"{folder}: no target to score")
    return train, ids


def tell(told: dict, out: Path | None) -> None:
    """Prints a report as JSON, and writes it where `out` says."""
    text = json.dumps(told, indent=1)
    print(text)
    if out:
        write_atomic(out, text.encode())


def load_script(path: Path | str = TRUNK):
    """A script as a module, named as in `find_script`: importing one starts no work."""
    path = find_script(path)
    name = f"script_{path.resolve().parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


LOG_RULER = b"=" * 100 + b"\n"  # after the script's own source at the head of a log


def source_in_log(path: Path, sha256: str) -> bytes:
    """The script that a run has written at the head of its log.

    Raises:
        Misuse: there is no log, or its source is not the one of this sha256.
    """
    if not path.is_file():
        raise Misuse(f"{path}: missing, so the script that made these numbers is not known")
    source, found, _ = path.read_bytes().partition(LOG_RULER)
    if not found or hashlib.sha256(source).hexdigest() != sha256:
        raise Misuse(f"{path}: does not begin with the script {sha256[:8]}, which its metrics.json names")
    return source


def carried(submission: dict, measured: str, present: str, result: str) -> bool:
    """Whether a number holds for the present script: it was measured with it, or proved to be the same.

    measured, present: sha256 of the two scripts. result: "seed42", or a path below the record's folder. The
    proofs are the entries of `carried` in submission.json, which scripts/lineage.py carry writes; one for a
    folder is for all that is in it, and several may follow each other.
    """
    steps: dict[str, set[str]] = {}
    for entry in submission.get("carried", []):
        if any(result == name or result.startswith(f"{name}/") for name in entry["for"]):
            steps.setdefault(entry["from"], set()).add(entry["to"])
    reached, waiting = {measured}, [measured]
    while waiting:
        new = steps.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return present in reached


# What a run's settings say only about its process.
OF_THE_PROCESS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ARTIFACT",
    "EVAL_ONLY",
    "RESUME",
)
# And what may differ between the seeds of one configuration.
OF_THE_RUN = {"SEED", "RUN_ID", "RUNS_PATH", "DATA_PATH", "TOKENIZER_PATH", *OF_THE_PROCESS}


def idle(settings: dict) -> set[str]:
    """Names of settings that a run never read: how it would have learned at test time, where that is off."""
    return {name for name in settings if name.startswith("TTT_")} if settings.get("TTT") == "0" else set()


def run_settings(folder: Path | str) -> dict[str, str]:
    """The settings of a run, as its script reads them from the
    environment, from the metrics.json in its folder.
    """
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise Misuse(f"{path}: needed for the settings of this run")
    return {key: str(int(value) if isinstance(value, bool) else value)
            for key, value in json.loads(path.read_text())["settings"].items() if key not in OF_THE_PROCESS}


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
