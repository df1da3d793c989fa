"""What scripts/audit.py reads without running anything: static
hints in a script, forensics on a record's files.

A hint says where to look. It is never a verdict: names lie, and honest code trips over some of the patterns.
Rules: `static/N` are items of section 7 of the checker's blueprint, B, D, M and S those of the competition.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import lzma
import math
import re
import zlib
from pathlib import Path

import stats
from family import OF_THE_RUN, Finding, carried, read_json

CAP = 16_000_000  # decimal bytes, code and model
FIELD_BYTES = (
    151_080_891,
    151_078_222,
    151_074_499,
)  # of the full validation split: all SP8192 targets, cut, CaseOps
NETWORK = {
    "socket",
    "urllib",
    "http",
    "requests",
    "httpx",
    "ftplib",
    "huggingface_hub",
    "aiohttp",
    "gdown",
    "wandb",
}
LINE = re.compile(r"^(final_\w+?)(_exact)? val_loss:([\d.]+) val_bpb:([\d.]+)", re.M)


# -----------------------------------------------------------------------------
# STATIC HINTS
# -----------------------------------------------------------------------------


def unpacked(source: str) -> tuple[str, bool]:
    """The code behind an exec(decompress(decode("..."))) wrapper, and whether there was one.

    Nothing is executed.
    """
    tree, best = ast.parse(source), ""
    if not any(
        isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("exec", "eval")
        for node in ast.walk(tree)
    ):
        return source, False
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, (str, bytes)) or len(value) < 64:
            continue
        raw = value.encode("latin-1", "ignore") if isinstance(value, str) else value
        for decode in (base64.b85decode, base64.a85decode, base64.b64decode, bytes):
            for unpack in (lzma.decompress, zlib.decompress, _brotli, bytes):
                try:
                    text = unpack(decode(raw)).decode("utf-8")
                    ast.parse(text)
                except Exception:  # wrong guess
                    continue
                if "\n" in text and len(text) > len(best):
                    best = text
    return (unpacked(best)[0], True) if best and best != source else (source, True)


def _brotli(raw: bytes) -> bytes:
    import brotli

    return brotli.decompress(raw)


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute below a node."""
    return {
        found.id if isinstance(found, ast.Name) else found.attr
        for found in ast.walk(node)
        if isinstance(found, (ast.Name, ast.Attribute))
    }


def looks_like(names: set[str], pattern: str) -> bool:
    return any(re.search(pattern, name, re.I) for name in names)


def calls_in(node: ast.AST) -> set[str]:
    return {
        name
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        for name in [getattr(call.func, "attr", getattr(call.func, "id", ""))]
    }


def hints(script: Path) -> list[Finding]:
    """Static hints in a script, each with file and line; one PASS where there is none."""
    try:
        source, wrapped = unpacked(script.read_text(encoding="utf-8"))
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return [Finding("static", "FAIL", f"cannot be read as Python: {error}", script.name)]
    out: dict[tuple[str, int], Finding] = {}

    def hint(rule: str, node: ast.AST, text: str) -> None:
        out.setdefault(
            (rule, node.lineno), Finding(f"static/{rule}", "WARN", text, f"{script.name}:{node.lineno}")
        )

    if wrapped:
        hint(
            "0",
            tree.body[0],
            "the code is wrapped in exec: judged as unpacked, lines are those of the unpacked text"
            if source != script.read_text()
            else "the code is wrapped in exec and could not be unpacked: it cannot be judged by reading",
        )
    declared = next(
        (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters"),
        None,
    )
    inside = range(declared.lineno, declared.end_lineno + 1) if declared else range(0)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            for module in modules:
                if module.split(".")[0] in NETWORK:
                    hint("1", node, f"imports {module}: nothing may be downloaded while scoring")
        elif isinstance(node, ast.Call):
            _call(node, inside, hint)
        elif isinstance(node, ast.FunctionDef):
            _function(node, hint)
        elif isinstance(node, ast.BinOp):
            _arithmetic(node, hint)
        elif isinstance(node, ast.Subscript) and _is_environ(node.value) and node.lineno not in inside:
            hint("7", node, f"reads the environment outside the hyper-parameters: {ast.unparse(node)[:60]}")
    if not re.search(r"16[_]?000[_]?000|16e6|1\.6e7", source):
        out[("9", 0)] = Finding(
            "static/9", "WARN", "16,000,000 bytes are named nowhere: is the size checked?", script.name
        )
    return sorted(
        out.values(), key=lambda found: (int(found.rule[7:]), int((found.where + ":0").split(":")[1]))
    ) or [Finding("static", "PASS", "no pattern of a known fault in its source", script.name)]


def _is_environ(node: ast.AST) -> bool:
    return getattr(node, "attr", getattr(node, "id", "")) in ("environ", "environb")


def _call(node: ast.Call, inside: range, hint) -> None:
    name, text = getattr(node.func, "attr", getattr(node.func, "id", "")), ast.unparse(node)
    if name in (
        "urlopen",
        "urlretrieve",
        "snapshot_download",
        "hf_hub_download",
        "load_state_dict_from_url",
    ) or re.search(r"\b(curl|wget)\b", text):
        hint("1", node, f"network: {text[:60]}")
    if name == "getenv" or (
        isinstance(node.func, ast.Attribute) and _is_environ(node.func.value) and name == "get"
    ):
        if node.lineno not in inside:
            hint("7", node, f"reads the environment outside the hyper-parameters: {text[:60]}")
        if re.search(r"FORCE_STOP|OUTSIDE|SKIP_(SIZE|TIME)|NO_LIMIT|IGNORE_(CAP|BUDGET)", text):
            hint("7", node, f"a switch that moves a budget: {text[:60]}")
    if name in ("repeat", "repeat_interleave") and looks_like(names_in(node), r"^(log_?p|nll|logprob|nats)"):
        hint("6", node, f"a loss spread over the bytes of its token: {text[:60]}")
    if name == "exp" and any(
        isinstance(part, ast.BinOp)
        and isinstance(part.op, ast.Div)
        and looks_like(names_in(part.right), r"len|bytes")
        for part in ast.walk(node)
    ):
        hint("6", node, f"a probability spread evenly over the bytes of its token: {text[:60]}")


def _arithmetic(node: ast.BinOp, hint) -> None:
    text = ast.unparse(node)
    if isinstance(node.op, ast.BitXor) and looks_like(
        names_in(node), r"^(tgt|target|targets|next_(id|tok\w*)|y)$"
    ):
        hint("4", node, f"the target in a hash key: {text[:60]}")
    if (
        isinstance(node.op, ast.Add)
        and isinstance(node.right, ast.BinOp)
        and "has_leading_space" in names_in(node)
    ):
        hint("5", node, f"the leading space is added here; is it in the table too? {text[:60]}")
    if isinstance(node.op, (ast.Div, ast.Mult)) and any(
        isinstance(call, ast.Call) and ast.unparse(call) in ("math.log(2)", "math.log(2.0)", "np.log(2)")
        for call in (node.left, node.right)
    ):
        other = node.left if isinstance(node.right, ast.Call) else node.right
        numbers = [
            c.value
            for c in ast.walk(other)
            if isinstance(c, ast.Constant)
            and isinstance(c.value, float)
            and c.value not in (0.5, 1.0, 2.0, 8.0)
        ]
        if numbers:
            hint("10", node, f"a constant beside log(2): {text[:60]}")


def _function(node: ast.FunctionDef, hint) -> None:
    arguments = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
    calls = calls_in(node)
    takes_val = looks_like(arguments, r"^val_|^val$|valid")
    if takes_val and {"backward", "step"} <= calls and not {"no_grad", "inference_mode"} & names_in(node):
        hint(
            "3", node, f"{node.name} takes validation tokens and trains, with no scoring under no_grad before"
        )
    if re.search(r"^train|fit|calib|hessian", node.name) and not re.search("eval|valid|ttt", node.name):
        for call in ast.walk(node):
            text = ast.unparse(call) if isinstance(call, ast.Call) else ""
            if re.match(
                r"(open|np\.(memmap|fromfile)|load_data_shard|load_validation_tokens|glob\.glob)\(", text
            ) and re.search(r"(?<![a-z])val(?![a-z]*ue)|valid", text):
                hint("2", call, f"{node.name} opens validation files: {text[:60]}")
    if re.search("eval|score", node.name):
        for loop in ast.walk(node):
            if (
                isinstance(loop, ast.Return)
                and loop.value is not None
                and re.search(r"\bmin\((\w*(loss|bpb|score)\w*)", ast.unparse(loop.value))
            ):
                hint("8", loop, f"{node.name} returns the best of several scores: {ast.unparse(loop)[:60]}")
    flags = re.findall("rescore|two_pass|second_pass|recal", node.name)
    if flags:
        hint("8", node, f"{node.name}: scores again after having seen?")


# -----------------------------------------------------------------------------
# FORENSICS
# -----------------------------------------------------------------------------


def forensics(folder: Path) -> list[Finding]:
    """Bytes, budgets, seeds, hashes and the implied denominator, from a record's own files.

    Reads submission.json, seed*/metrics.json with seed*/log.txt, or
    the field's *.log and *.txt logs beside them.
    """
    found: list[Finding] = []
    submission = read_json(folder / "submission.json")
    script = (folder / "train_gpt.py").read_bytes()
    sha, runs = hashlib.sha256(script).hexdigest(), {}
    for path in sorted(folder.glob("seed*/metrics.json")):
        runs[path.parent.name] = stats.as_carried(folder, read_json(path))
    logs = {
        path.parent.name if path.parent != folder else path.name: path.read_text("utf-8", "replace")
        for path in [
            *sorted(folder.glob("seed*/log.txt")),
            *sorted(folder.glob("*.log")),
            *sorted(folder.glob("*log*.txt")),
        ]
    }
    frozen = " (frozen)" if submission.get("frozen") else ""

    def say(rule: str, bad: list[str], good: str, level: str = "FAIL") -> None:
        found.extend(Finding(rule, level, text, folder.name) for text in bad)
        if not (runs or bad):
            found.append(Finding(rule, "WARN", "not judged: no seed*/metrics.json", folder.name))
        elif not bad:
            found.append(Finding(rule, "PASS", good, folder.name))

    say(
        "B1",
        _bytes(submission, runs, [text for name, text in logs.items() if name not in runs], len(script)),
        f"code {len(script):,} bytes and the largest model within {CAP:,}",
    )
    say(
        "B2",
        [
            f"{name} counts {run['bytes_code']:,} bytes of code, the script has {len(script):,}"
            for name, run in runs.items()
            if run.get("bytes_code") != len(script)
        ],
        "the code bytes claimed are those of the script",
    )
    _budgets(submission, runs, logs, say)
    _seeds(submission, runs, logs, sha, frozen, say)
    _numbers(submission, runs, logs, say)
    return found


def _bytes(submission: dict, runs: dict, logs: list[str], code: int) -> list[str]:
    out = []
    for name, run in runs.items():
        if run["bytes_total"] != run["bytes_code"] + run["bytes_model"]:
            out.append(
                f"{name}: {run['bytes_code']:,} + {run['bytes_model']:,} bytes are not the "
                f"{run['bytes_total']:,} claimed"
            )
    sizes = [
        int(m)
        for text in logs
        for m in re.findall(r"^(?:Total submission size|bytes_total)\D*?[^\n]*?(\d{6,})", text, re.M)
    ]
    total = max(
        [submission.get("bytes_total", 0), *sizes, *(run["bytes_model"] + code for run in runs.values())]
    )
    return out + [f"{total:,} bytes, {CAP:,} are allowed"] * (total > CAP)


def _budgets(submission: dict, runs: dict, logs: dict, say) -> None:
    hardware = str(submission.get("hardware", "unnamed hardware"))
    contest = re.search(r"\b8\s*x\s*(NVIDIA\s+)?H100", hardware, re.I)
    level, why = ("FAIL", "") if contest else ("WARN", f"; measured on {hardware}, not the contest's")

    def within(rule: str, what: str, seconds: dict[str, float]) -> None:
        bad = [
            f"{name}: {value:.1f} s of {what}, 600 are allowed{why}"
            for name, value in seconds.items()
            if value >= 600
        ]
        most = f" at most, {max(seconds.values()):.0f}" if seconds else ", no time recorded"
        say(rule, bad, f"{what} within 600 s{most}", level)

    trained = {name: run["train_seconds"] for name, run in runs.items()}
    scored = {
        name: max(run["eval_seconds"], run.get("clocks", {}).get("evaluation", 0))
        for name, run in runs.items()
    }
    for name, text in logs.items():
        if times := re.findall(r"train_time:(\d+)ms", text):
            trained[name] = max(trained.get(name, 0), int(times[-1]) / 1000)
        if name not in runs and (times := re.findall(r"eval_time:(\d+)ms", text)):
            scored[name] = max(map(int, times)) / 1000
    within("B3", "training", trained)
    late = [
        f"{name}: calibration of {run['clocks']['calibration']:.1f} s is not within the training clock"
        for name, run in runs.items()
        if run.get("clocks", {}).get("calibration", 0) > 0
        and run["train_seconds"] + 0.01 < run["clocks"].get("training", 0) + run["clocks"]["calibration"]
    ]
    say("B4", late, "calibration is on the training clock, or there is none")
    within("B6", "evaluation", scored)
    broken = [
        f"{name}: its log ends in a traceback"
        for name, text in logs.items()
        if name not in runs and "Traceback (most recent call last)" in text
    ]
    broken += [f"{name}: {line}" for name, run in runs.items() for line in run.get("broken_budgets", [])]
    say("B3/own", broken, "no run says that it broke a budget")


def _seeds(submission: dict, runs: dict, logs: dict, sha: str, frozen: str, say) -> None:
    kept = {
        name: {k: v for k, v in run.get("settings", {}).items() if k not in OF_THE_RUN}
        for name, run in runs.items()
    }
    first = next(iter(kept.values()), {})
    mixed = [
        f"{name} has {key}={settings.get(key)!r}, {next(iter(kept))} {first.get(key)!r}"
        for name, settings in kept.items()
        for key in sorted({*settings, *first})
        if settings.get(key) != first.get(key)
    ]
    say("S2", mixed, "one configuration for all seeds")
    stale = [
        f"{name}: measured with script {run['script_sha256'][:8]}, this one is {sha[:8]}: run it again"
        for name, run in runs.items()
        if not carried(submission, run.get("script_sha256", ""), sha, name)
    ]
    for name, text in logs.items():
        if "=" * 100 in text:
            head = hashlib.sha256(text.split("=" * 100)[0].encode()).hexdigest()
            if head != runs.get(name, {}).get("script_sha256", sha):
                stale.append(
                    f"{name}: the source at the head of its log is not the script that its metrics name"
                )
    moved = any(run.get("script_sha256") != sha for run in runs.values())
    good = "the numbers of every run are those of this script" if moved else "every run is of this script"
    say("S3", stale, f"{good}, {sha[:8]}{frozen}")
    seeds = sorted({run["seed"] for run in runs.values()}) or sorted(set(submission.get("seeds", [])))
    say(
        "S5",
        [f"{len(seeds)} distinct seeds: {seeds}, at least 3 are asked for"] * (len(seeds) < 3)
        + [f"{len(logs)} logs for {len(seeds)} seeds"] * (not runs and len(logs) < len(seeds)),
        f"seeds {seeds}",
    )
    say(
        "D4",
        [
            f"{name}: {run['dataset'].get('train_shards')} training shards: the fingerprint of a split with "
            "validation documents in it"
            for name, run in runs.items()
            if run.get("dataset", {}).get("train_shards") == 1499
        ],
        "no fingerprint of an overlapping split",
        "WARN",
    )


def _numbers(submission: dict, runs: dict, logs: dict, say) -> None:
    wrong, denominator, split = [], [], []
    for name, run in runs.items():
        entry = run["evals"][run["headline"]]
        nats = entry["val_loss"] / math.log(2)
        for key, value in (("val_bpb", run["val_bpb"]), ("val_loss", entry["val_loss"]),
                           ("bytes_total", run["bytes_total"])):
            said = submission.get("seed_results", {}).get(str(run["seed"]), {}).get(key)
            if said is not None and said != value:
                wrong.append(f"{name}: submission.json says {key} {said}, its metrics {value}")
        lines = {m[1]: (float(m[3]), float(m[4])) for m in LINE.finditer(logs.get(name, "")) if m[2]}
        if name in logs and lines.get(run["headline"]) != (
            round(entry["val_loss"], 8),
            round(entry["val_bpb"], 8),
        ):
            wrong.append(
                f"{name}: its log says {lines.get(run['headline'])} for {run['headline']}, its metrics "
                f"{entry['val_loss']:.8f} and {entry['val_bpb']:.8f}"
            )
        implied, data = nats * entry["targets"] / entry["val_bpb"], run.get("dataset", {})
        if not abs(implied / entry["bytes"] - 1) <= 2e-4:
            denominator.append(
                f"{name}: loss and BPB imply {implied:,.0f} bytes, {entry['bytes']:,} are claimed"
            )
        size = data.get("bytes", {}).get("val")  # of the original text; a tokenizer may normalise
        if size and entry["bytes"] > size * (1 + 2e-4):
            denominator.append(f"{name}: {entry['bytes']:,} bytes divide, the validation text has {size:,}")
        if (tokens := data.get("val_tokens")) and entry["targets"] != tokens - 1:
            split.append(f"{name}: {entry['targets']:,} targets of a validation stream of {tokens:,} ids")
    for name, text in logs.items():
        if name in runs:
            continue
        lines = {m[1]: (float(m[3]), float(m[4])) for m in LINE.finditer(text) if m[2]}
        targets = re.findall(
            r"\b(?:targets|val_tokens):\s*(\d+)|^val_loader:.*?\btokens:\s*(\d+)", text, re.M
        )
        for label, (loss, bpb) in lines.items():
            if targets:
                implied = loss / math.log(2) * int(targets[-1][0] or targets[-1][1]) / bpb
                if min(abs(implied / known - 1) for known in FIELD_BYTES) > 2e-4:
                    denominator.append(
                        f"{name}: {label} implies {implied:,.0f} bytes; the full split has {FIELD_BYTES[0]:,}"
                    )
    theirs = [
        list(LINE.finditer(text))[-1] for name, text in logs.items() if name not in runs and LINE.search(text)
    ]
    if theirs and not runs:
        mean, said = sum(float(m[4]) for m in theirs) / len(theirs), submission.get("val_bpb", math.nan)
        if not abs(mean - said) <= 2e-4:
            wrong.append(
                f"submission.json says val_bpb {said}, the last lines of its logs have the mean {mean:.6f}"
            )
    means = {
        key: [
            run["val_bpb"] if key == "val_bpb" else run["evals"][run["headline"]]["val_loss"]
            for run in runs.values()
        ]
        for key in ("val_bpb", "val_loss")
    }
    for key, values in means.items():
        if (
            values
            and abs(submission.get(key, math.nan) - sum(values) / len(values)) > 1e-9
            or (values and key not in submission)
        ):
            wrong.append(
                f"submission.json says {key} {submission.get(key)}, the mean of its seeds is "
                f"{sum(values) / len(values)}"
            )
    say("S4", wrong, "submission.json, metrics and logs agree to all digits")
    say("M1", denominator, "loss and BPB imply the bytes that are claimed")
    say("D3", split, "the whole validation stream is scored", "FAIL")
