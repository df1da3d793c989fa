"""The gate: are SGJM's heads worth having? The published conditions as they were computed, and honest
ones beside them.

    EVAL_GATE=1 SGJM=FILE BASELINE=FILE python train_gpt.py                  starts this file
    EVAL_GATE=1 SGJM=FILE BASELINE=FILE GATE_BENCH=bench.json python gate.py

SGJM is a checkpoint, or an artifact with heads, BASELINE the same of ARCH=baseline; all settings are
variables of train_gpt.py beside this file (`--help` lists them). The run's folder gets a log and
gate.json. Exit code 0 if every honest condition holds, else 1; 2 misuse; 130 stopped.

An honest figure has a 95 % interval, and the interval's worse end decides: over stretches of the text
(val_bpb_delta), windows of it (bytes_per_pass, jepa_top1_hard, merge_advantage) or prompts of GATE_BENCH
(speed_up_greedy, speed_up_sampled: both have to hold). The intervals are about the text: how two models
differ that are trained with other seeds is not in them. Speed-ups count on prompts whose texts do not
loop, since a loop is drafted by anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def beside(name: str):
    """The script of this name in this folder, as a module."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"gated_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = beside("train_gpt.py")

DISTRACTORS, PAIRS, BRANCHES, GATE_SEED = 8, 4096, 4, 1234  # published
MATCHED = 0.02  # share by which parameters and steps may differ
ENOUGH = 30  # merged pairs that say something
POOL, DRAWS = 2048, 1000  # places to merge, bootstrap samples
STRETCHES = 32  # of the validation text, equally long
LOOPING, PROMPTS = 0.25, 4  # share of a text that may repeat itself, and how many such texts are needed
# 97.5 % quantiles of Student's t by degrees of freedom, from 1 on; beyond them that of 10 is wide enough
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def drawn_anew(count: int) -> np.ndarray:
    """(DRAWS, count): how often a bootstrap sample has each of `count` parts."""
    return np.random.default_rng(GATE_SEED).multinomial(count, np.full(count, 1 / count), DRAWS)


def middle_95(samples) -> list[float]:
    """The ends between which 95 % of the samples lie; NaN where none is a number."""
    samples = np.asarray(samples, np.float64)
    if np.isnan(samples).all():
        return [math.nan, math.nan]
    return np.nanquantile(samples, [0.025, 0.975]).tolist()


def unsound(honest: dict, ours: dict, theirs: dict) -> dict[str, str]:
    """{figure: why it says nothing}: bits of models with other numbers of parameters or steps, or of
    which one is the best of many; too few merged pairs; speed that was not measured, or on texts that
    loop."""
    why = {}
    for key, share in (("params", MATCHED), ("steps", MATCHED), ("best", 0)):
        a, b = ours[key], theirs[key]
        if None in (a, b) or abs(a - b) > share * b:
            why["val_bpb_delta"] = f"not matched: {key} {a} against {b}"
    merged = honest["merge"]["merged_pairs"]
    if merged < ENOUGH:
        why["merge_advantage"] = f"{merged} merged pairs, {ENOUGH} needed"
    for kind, found in honest["speed_up"].items():
        if found is None:
            why[f"speed_up_{kind}"] = "not measured"
        elif found["used"] < PROMPTS:
            why[f"speed_up_{kind}"] = (f"texts of {found['used']} of {found['prompts']} prompts do not loop, "
                                       f"{PROMPTS} needed")
    return why


def conditions(published: dict, honest: dict, ours: dict, theirs: dict) -> dict[str, list[dict]]:
    """The published gate with its thresholds, and the same questions asked of what they are about, of
    the worse end of an interval. What is no number (NaN) or `unsound` does not hold."""
    asked = {
        "published": {
            "nll_delta": ("<=", 0.05), "branch_acceptance_rate": (">=", 0.5),
            "jepa_top1_acc": (">", published["sgjm"]["jepa_chance_top1"] + 0.05),
            "merge_precision_advantage": (">=", 1.5), "compute_advantage": (">=", 1.0),
        },
        "honest": {
            "val_bpb_delta": ("<=", 0.01), "bytes_per_pass": (">=", 1.5),
            "jepa_top1_hard": (">", honest["jepa_chance_hard"] + 0.05),
            "merge_advantage": (">=", max(1.5, honest["control"]["interval"][1])),
            "speed_up_greedy": (">", 1.0), "speed_up_sampled": (">", 1.0),
        },
    }
    found = published | published["sgjm"] | honest
    ends = dict(honest["intervals"])
    nothing = {"ratio": None, "interval": None}
    spread = {"merge_advantage": honest["merge"] | {"ratio": honest["merge"]["advantage"]}}
    spread |= {f"speed_up_{kind}": each or nothing for kind, each in honest["speed_up"].items()}
    for name, each in spread.items():
        found[name], ends[name] = each["ratio"], each["interval"]
    why = unsound(honest, ours, theirs)

    def answer(name: str, sign: str, limit: float) -> dict:
        value, reason = found[name], why.get(name, "")
        worse = value
        if ends.get(name):
            worse = ends[name][sign == "<="]
        holds = not reason and {"<=": worse <= limit, ">=": worse >= limit, ">": worse > limit}[sign]
        return {"name": name, "value": value, "interval": ends.get(name),
                "wanted": f"{sign} {limit:.4f}", "why": reason, "passed": bool(holds)}

    return {kind: [answer(name, *limit) for name, limit in limits.items()]
            for kind, limits in asked.items()}


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of distributions (..., V), in nats, ln 2 at most."""
    middle = ((p + q) / 2 + 1e-12).log()
    return sum((x * ((x + 1e-12).log() - middle)).sum(-1) for x in (p, q)) / 2


def closest(guess: torch.Tensor, right: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Is a guess (..., D) nearer to the right state (..., D) than to any other (..., n, D)?"""
    wrong = (guess[..., None, :] - others).square().mean(-1)
    return (guess - right).square().mean(-1) < wrong.amin(-1)


def merge_figures(signs: torch.Tensor, told: torch.Tensor, window: torch.Tensor, radius: int) -> dict:
    """Do places with near signatures predict alike? All pairs of N places are held against each
    other: signs (N, 64) of 1 and -1, told (N, V) the backbone's predictions there, window (N,) where
    a place is from.

    advantage: mean divergence of other pairs / of merged pairs, with a 95 % interval over windows
    drawn anew (places of a window are alike); same_choice: share of merged, of other pairs with one
    most likely id."""
    generator = torch.Generator().manual_seed(GATE_SEED)
    near = (64 - signs @ signs.mT) / 2 <= radius
    merged = near.triu(1).nonzero()
    places, windows = len(signs), int(window.max()) + 1
    apart = torch.randint(places, (PAIRS, 2), generator=generator)
    some = torch.randperm(len(merged), generator=generator)[:PAIRS]
    groups = merged[some], apart[~near[tuple(apart.T)]]
    draws = torch.from_numpy(drawn_anew(windows)).double()  # (DRAWS, windows)

    means, sampled, same = [], [], []
    for i, j in (group.T for group in groups):
        js = divergence(told[i], told[j]).double()
        weight = draws[:, window[i]] * draws[:, window[j]]
        means.append(js.mean().item())
        sampled.append(weight @ js / weight.sum(1))
        same.append((told[i].argmax(-1) == told[j].argmax(-1)).double().mean().item())
    ratio = sampled[1] / sampled[0].clamp(min=1e-9)
    return {"radius": radius, "places": places, "pairs": places * (places - 1) // 2,
            "same_choice": same, "merged_pairs": len(merged), "js": means,
            "advantage": means[1] / max(means[0], 1e-9), "interval": middle_95(ratio)}


class Figures:
    """What windows of a text say of SGJM and baseline: published figures and honest ones.

    The published are computed as they were, faults and all: acceptance is the verifier's opinion of
    latents, no byte is looked at; the judge chooses among states of any place; pairs to merge are
    any two places; computation per byte takes all siblings as accepted and none as verified. Ours
    are the latent, after a greedy draft, and the state to foresee, h[t + b] (published
    h[t + b - 1]), for which heads were trained.

    bytes_per_pass   how far a pass of the backbone gets when the text is the one to be written, with
                     one greedy draft by the heads in each (`passes`): BLOCK_SIZE at most
    jepa_top1_hard   the judge's choice among the state to come and the 8 next to it in time,
                     without the parent
    merge, control   latents after the true bytes, held against the predictions there, or others
                     dealt out"""

    def __init__(self, model: script.GPT, plain: script.GPT, args: script.Hyperparameters):
        self.model, self.plain, self.args = model, plain, args
        self.aux = model.aux
        length, size = args.train_seq_len, args.block_size
        self.places = torch.arange(length - size)
        self.ahead = self.places[:, None] + torch.arange(size)  # (K, b)

        # the states next in time to the one that a place foresees
        gaps = (torch.arange(length) - self.places[:, None] - size).abs().double()
        gaps[self.places, self.places] = gaps[self.places, self.places + size] = math.inf
        self.hard = gaps.topk(min(DISTRACTORS, length - 2), largest=False).indices
        self.generator = torch.Generator()
        self.planes = torch.randn(args.model_dim, 64, generator=self.generator.manual_seed(42))
        self.means = torch.zeros(4)
        self.walked, self.hits = [], []  # by window: passes, share of hard choices that are right
        self.merged, self.apart = [], []  # divergences of pairs
        self.signs, self.told = [], []

    @torch.no_grad()
    def add(self, text: torch.Tensor, share: float, count: int) -> None:
        """Takes in windows text (B, T + 1), a share of all; `count` places each are to merge."""
        model, aux, size = self.model, self.aux, self.args.block_size
        states = model.hidden(text[:, :-1], model.rotary_train)
        theirs = self.plain.hidden(text[:, :-1], self.plain.rotary_train)
        logits, theirs = model.head(states), self.plain.head(theirs)
        parent, future = states[:, :-size], states[:, size:]  # (B, K, D)
        true = text[:, self.ahead + 1]  # (B, K, b)
        every, laws = future.flatten(0, 1), logits[:, size:].softmax(-1).flatten(0, 1)
        guess = aux.judge(parent)
        ends = aux.drafter.draft(parent.flatten(0, 1), 1)[2][:, 0]

        shape = *parent.shape[:2], DISTRACTORS
        others = torch.randint(len(every), shape, generator=self.generator)
        targets = text[:, 1:].flatten()
        nats = [F.cross_entropy(each.flatten(0, 1), targets) for each in (logits, theirs)]
        shares = (aux.verdict(parent.flatten(0, 1), ends) > 0,
                  closest(guess, future, every[others]))
        means = torch.stack([*nats, *(part.float().mean() for part in shares)])
        self.means += share * means.cpu()
        self.pair(ends, laws)
        self.walked += self.passes(states, text)
        self.hits += closest(guess, future, states[:, self.hard]).double().mean(1).tolist()

        order = torch.randperm(len(self.places), generator=self.generator)
        some = order[:count]
        slots = aux.drafter.slots(*(part[:, some].flatten(0, 1) for part in (parent, true)))
        above = aux.drafter.latent(slots[:, -1]).cpu() @ self.planes >= 0
        self.signs.append(above.float() * 2 - 1)
        laws = laws.unflatten(0, true.shape[:2])
        self.told.append(laws[:, some].flatten(0, 1).cpu())

    def passes(self, states: torch.Tensor, text: torch.Tensor) -> list[int]:
        """Of each window how many passes write its text after the first two bytes, as the decoder
        would (DRAFTER=heads DRAFT_BRANCHES=1, no draft too dear).

        A pass reads the newest byte and what the heads draft after it, from the state before it: the
        first byte of a block is the newest one itself, which the pass before has settled. Drafted bytes
        join the text while they are the text's own, and then the byte that the pass predicts."""
        given = text[:, 1:-1]  # (B, T - 1), each the newest byte of a pass
        blocks = self.aux.drafter.draft(
            states[:, :-1].flatten(0, 1), 1, given=given.reshape(-1, 1))[0]
        drafted = blocks[:, 0, 1:].unflatten(0, given.shape)  # (B, T - 1, b - 1)
        rest = torch.nn.functional.pad(text[:, 2:], (0, drafted.size(2)), value=-1)
        true = rest.unfold(1, max(drafted.size(2), 1), 1)[:, : given.size(1), : drafted.size(2)]
        taken = (drafted == true).long().cumprod(-1).sum(-1)

        found = []
        for row in taken.tolist():
            place = count = 0
            while place < len(row):
                place, count = place + row[place] + 1, count + 1
            found.append(count)
        return found

    def pair(self, ends: torch.Tensor, laws: torch.Tensor) -> None:
        """Published: any two places, merged where their latents `ends` (N, D) look alike."""
        i, j = torch.randint(len(laws), (2, PAIRS), generator=self.generator)
        i, j = i[i != j], j[i != j]
        bits = ends @ self.planes.to(ends) >= 0
        js = divergence(laws[i], laws[j])
        same = (bits[i] != bits[j]).sum(-1) <= self.args.gate_radius
        self.merged += js[same].tolist()
        self.apart += js[~same].tolist()

    def result(self, windows: int) -> tuple[dict, dict]:
        """(published figures, honest ones) of all that was added."""
        nll, plain_nll, acceptance, right = self.means.tolist()
        counts = {"n_tokens": windows * self.args.train_seq_len,
                  "n_positions": windows * len(self.places)}
        cost, plain_cost = self.costs(acceptance)
        js = [sum(part) / len(part) if part else math.nan for part in (self.merged, self.apart)]
        both = self.merged and self.apart
        sgjm = counts | {
            "token_nll": nll, "branch_acceptance_rate": acceptance, "jepa_top1_acc": right,
            "jepa_chance_top1": 1 / (DISTRACTORS + 1),
            "merge_precision_js": js[0], "random_pair_js": js[1],
            "merge_precision_advantage": js[1] / max(js[0], 1e-9) if both else 1.0,
            "merged_pairs": len(self.merged), "compute_per_accepted_token": cost,
        }
        published = {
            "sgjm": sgjm,
            "baseline": {"token_nll": plain_nll, "compute_per_token": plain_cost},
            "nll_delta": nll - plain_nll, "compute_advantage": plain_cost / cost,
        }

        signs, told = torch.cat(self.signs), torch.cat(self.told)
        window = torch.arange(windows).repeat_interleave(len(told) // windows)
        mixed = told[torch.randperm(len(told), generator=self.generator)]
        radius = self.args.gate_radius
        passes, hits, draws = np.array(self.walked), np.array(self.hits), drawn_anew(windows)
        written = self.args.train_seq_len - 1
        return published, counts | {
            "bytes_per_pass": windows * written / int(passes.sum()), "passes": int(passes.sum()),
            "jepa_top1_hard": hits.mean(), "jepa_chance_hard": 1 / (self.hard.size(1) + 1),
            "intervals": {
                "bytes_per_pass": middle_95(windows * written / (draws @ passes)),
                "jepa_top1_hard": middle_95(draws @ hits / windows),
            },
            "merge": merge_figures(signs, told, window, radius),
            "control": merge_figures(signs, mixed, window, radius),
        }

    def costs(self, acceptance: float) -> tuple[float, float]:
        """Published: parameters that a byte takes, of SGJM and of the baseline."""
        aux = self.aux
        parts = self.model, aux, aux.drafter, aux.verifier, self.plain
        whole, heads, drafter, verifier, plain = (
            sum(p.numel() for p in part.parameters()) for part in parts)
        cost = whole - heads + BRANCHES * (drafter + verifier)
        return cost / (max(acceptance, 1e-6) * BRANCHES * self.args.block_size), plain


def figures(model: script.GPT, plain: script.GPT, ids: np.ndarray, starts: np.ndarray,
            args: script.Hyperparameters) -> tuple[dict, dict]:
    """(published `Figures`, honest ones) of the windows that begin at `starts`."""
    found = Figures(model, plain, args)
    device, length = model.tok_emb.weight.device, args.train_seq_len
    rows = args.train_batch_tokens // length
    for first in range(0, len(starts), rows):
        text = ids[starts[first : first + rows, None] + np.arange(length + 1)].astype(np.int64)
        text = torch.from_numpy(text).to(device)
        found.add(text, len(text) / len(starts), -(-POOL // len(starts)))
    return found.result(len(starts))


def compared(path: str, model: script.GPT) -> dict:
    """Who is compared; `steps` None: neither in the file nor in a metrics.json beside it."""
    file, steps = Path(path), None
    with contextlib.suppress(OSError, ValueError, KeyError):
        if file.suffix == ".safetensors":
            steps = script.read_checkpoint(path, "checkpoint", ())[0]["step"]
        else:
            steps = json.loads(file.with_name("metrics.json").read_text())["steps"]
    return {"file": str(path), "sha256": script.sha256_file(file), "steps": steps,
            "params": sum(p.numel() for p in model.parameters()), "best": file.stem == "best"}


def own_settings(path: str, environ, variable: str) -> script.Hyperparameters:
    """`settings_of` a file, which must be of this script."""
    try:
        return script.settings_of(path, environ, variable)
    except KeyError:
        raise script.UserError(f"{variable}={path}: a checkpoint of another script") from None


def gate_models(args: script.Hyperparameters, device: torch.device) -> tuple[script.GPT, script.GPT]:
    """(SGJM, baseline), which fit each other."""
    theirs = own_settings(args.baseline, None, "BASELINE")
    wanted = {"arch": "baseline", "vocab_size": args.vocab_size,
              "train_seq_len": args.train_seq_len}
    for name, value in wanted.items():
        if (found := getattr(theirs, name)) != value:
            raise script.UserError(f"BASELINE={args.baseline}: {name.upper()}={found}, "
                            f"where {value} is needed")
    for name in ("eval_seq_len", "eval_stride", "eval_batch_tokens"):
        setattr(theirs, name, getattr(args, name))
    model = script.load(args.sgjm, device, args)
    plain = script.load(args.baseline, device, theirs)
    if model.aux is None:
        raise script.UserError(f"SGJM={args.sgjm}: no heads in it; a checkpoint has them, or EXPORT_HEADS=1")
    return model, plain


def speed_up(results: dict[str, dict]) -> dict:
    """Of a bench's prompts: the geometric mean of the ratios on those whose texts, plain and with drafts,
    do not loop, its 95 % interval over these prompts (by t, of the logarithms), how many there are."""
    logs = np.array([math.log(result["ratio"]) for result in results.values()
                     if max(result[way]["looping"] for way in ("ar", "speculation")) <= LOOPING])
    found = {"ratio": math.nan, "interval": [math.nan, math.nan], "used": len(logs), "prompts": len(results)}
    if len(logs) > 1:
        half = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1] * logs.std(ddof=1) / math.sqrt(len(logs))
        ends = (logs.mean() + half * side for side in (-1, 1))
        found |= {"ratio": math.exp(logs.mean()), "interval": [math.exp(end) for end in ends]}
    return found


def speed_ups(args: script.Hyperparameters, sha256: str) -> dict[str, dict | None]:
    """{greedy, sampled: `speed_up`} of GATE_BENCH, which must be of the file with this sha256; None
    without."""
    kinds = ("greedy", "sampled")
    if not args.gate_bench:
        return dict.fromkeys(kinds)
    try:
        bench = json.loads(script.read_file(args.gate_bench, "GATE_BENCH"))
        found = {kind: speed_up(bench[kind]) for kind in kinds}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise script.UserError(f"GATE_BENCH={args.gate_bench}: no ratios by prompt, greedy and sampled, "
                               f"as in bench.json ({error!r})") from None
    if bench.get("artifact_sha256", sha256) != sha256:
        raise script.UserError(f"GATE_BENCH={args.gate_bench}: measured with another file than {args.sgjm}")
    settings, greedy = bench.get("settings", {}), bench.get("summary", {}).get("greedy", {})
    if settings.get("TEMPERATURE", 1.0) != 1.0:
        raise script.UserError(f"GATE_BENCH={args.gate_bench}: measured at temperature "
                               f"{settings['TEMPERATURE']:g}; the gate asks for 1")
    if greedy.get("mismatches"):
        raise script.UserError(f"GATE_BENCH={args.gate_bench}: drafts changed greedy texts")
    return found


def bits_of(name: str, model: script.GPT, evaluator: script.Evaluator, log: script.Log) -> np.ndarray:
    """Bits of every target (N,), by the routine that scores records; a line of the log."""
    began = time.perf_counter()
    nats = script.score(model, evaluator.ids)[0]
    bpb = nats.sum() / math.log(2) / evaluator.bytes
    evaluator.results[f"gate_{name}"] = {
        "val_loss": nats.mean(), "val_bpb": bpb, "targets": len(nats), "bytes": evaluator.bytes,
        "stride": model.args.eval_stride, "seconds": time.perf_counter() - began,
    }
    log(f"gate_{name} val_loss:{nats.mean():.4f} val_bpb:{bpb:.4f} stride:{model.args.eval_stride} "
        f"targets:{len(nats)} bytes:{evaluator.bytes}")
    return nats / math.log(2)


def delta(ours: np.ndarray, theirs: np.ndarray, sizes: np.ndarray) -> tuple[float, list[float]]:
    """(bits a byte of ours - of theirs, its 95 % interval over STRETCHES of the text drawn anew), of the
    bits and bytes of each target (N,)."""
    parts = [part for part in np.array_split(np.arange(len(sizes)), STRETCHES) if sizes[part].sum()]
    bits, size = (np.array([each[part].sum() for part in parts]) for each in (ours - theirs, sizes))
    draws = drawn_anew(len(parts))
    return bits.sum() / size.sum(), middle_95(draws @ bits / (draws @ size))


def gate(args: script.Hyperparameters, log: script.Log, evaluator: script.Evaluator,
         fingerprint: dict) -> int:
    """Judges SGJM against BASELINE: a table, gate.json; 0 if every honest condition holds, else 1.
    """
    model, plain = gate_models(args, evaluator.runtime.device)
    ids, length = evaluator.ids, args.train_seq_len
    if len(ids) < length + 2:
        raise script.UserError(f"TRAIN_SEQ_LEN={length}: no such window in {len(ids)} validation ids")
    report = {"sgjm": compared(args.sgjm, model), "baseline": compared(args.baseline, plain)}
    speed = speed_ups(args, report["sgjm"]["sha256"])
    bits = [bits_of(name, part, evaluator, log) for name, part in (("sgjm", model), ("baseline", plain))]
    sizes = script.target_bytes(ids, script.byte_tables(args))
    gap, ends = delta(*bits, sizes)

    # published: windows at random; ours: spread over the text, none twice
    last = len(ids) - length
    count = args.gate_batches * args.train_batch_tokens // length
    starts = np.random.default_rng(GATE_SEED).integers(last, size=count)
    published, _ = figures(model, plain, ids, starts, args)
    starts = np.arange(0, last, length)
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, count).astype(int))]
    _, honest = figures(model, plain, ids, starts, args)
    bpb = [evaluator.results[f"gate_{name}"]["val_bpb"] for name in ("sgjm", "baseline")]
    honest = {"val_bpb_delta": gap, "val_bpb": bpb, "speed_up": speed, **honest}
    honest["intervals"] = {"val_bpb_delta": ends, **honest["intervals"]}

    told = conditions(published, honest, report["sgjm"], report["baseline"])
    report |= {"published": published, "honest": honest, "dataset": fingerprint,
               "evals": evaluator.results, "settings": args.settings(),
               "script_sha256": script.sha256_file(Path(script.__file__)),
               "gate_sha256": script.sha256_file(Path(__file__))}
    for kind, answers in told.items():
        failed = [each["name"] for each in answers if not each["passed"]]
        report[kind] |= {"conditions": answers, "gate_passed": not failed, "gate_reasons": failed}
        for each in answers:
            value = "-" if each["value"] is None else f"{each['value']:.4f}"
            ends = "{:.4f} to {:.4f}".format(*each["interval"]) if each["interval"] else ""
            verdict = "pass" if each["passed"] else "FAIL"
            reason = f" ({each['why']})" if each["why"] else ""
            log(f"gate {kind:<9} {each['name']:<25} {value:>11} {ends:<20} {each['wanted']:<9} "
                f"{verdict}{reason}")
        log(f"gate {kind:<9} {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN
    script.write_atomic(log.folder / "gate.json", json.dumps(report, indent=2, allow_nan=False).encode())
    return int(not honest["gate_passed"])


def main() -> int:
    try:
        args = own_settings(os.environ.get("SGJM", ""), os.environ, "SGJM")
        runtime = script.Runtime(args)
        runtime.attention = script.pick_attention(args, runtime)
        args.run_id = args.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-seed{args.seed}"
        data = script.Dataset(args, verify=True)
        log = script.Log(script.run_folder(args))
        fingerprint = data.fingerprint()
        script.log_header(log, args, runtime, fingerprint)
        evaluator = script.Evaluator(args, data, runtime, log)
        log(evaluator.describe(data.manifest))
        return gate(args, log, evaluator, fingerprint)
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
