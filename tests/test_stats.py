"""scripts/stats.py: the t distribution against SciPy, tests, verdicts, and where runs come from."""

import json
import math
import subprocess
import sys

import pytest
import stats
from conftest import ROOT
from family import Misuse
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from scipy import stats as scipy_stats

DF = [0.5, 1, 1.7, 2, 3, 4.4, 9, 30.3, 200, 1e4, 1e6]
freedom = st.floats(0.1, 1e5)
tees = st.floats(-1e6, 1e6)


# --- Distribution ---


@pytest.mark.parametrize("a, b", [(0.5, 0.5), (1, 0.5), (0.5, 15), (3, 7), (200, 0.5), (0.05, 40)])
def test_the_incomplete_beta_function_is_scipys(a, b):
    for x in (0.0, 1e-12, 1e-3, 0.2, 0.5, 0.77, 0.999, 1.0):
        assert stats.betainc(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("df", DF)
def test_the_t_distribution_is_scipys(df):
    rel = 1e-8 if df > 1e3 else 1e-11  # lgamma of large numbers loses digits
    for t in (0.0, 1e-9, 0.01, 0.5, 1.0, 1.7, 3.2, 12.0, 25.0, 1e4):
        for signed in (t, -t):
            assert stats.t_sf(signed, df) == pytest.approx(scipy_stats.t.sf(signed, df), rel=rel, abs=1e-290)
            assert stats.t_cdf(signed, df) == pytest.approx(
                scipy_stats.t.cdf(signed, df), rel=rel, abs=1e-290
            )
    for p in (1e-6, 0.005, 0.025, 0.3, 0.5, 0.6, 0.975, 0.995, 0.9999):
        assert stats.t_quantile(p, df) == pytest.approx(scipy_stats.t.ppf(p, df), rel=max(rel, 1e-9))


def test_the_ends_of_the_distribution():
    assert stats.t_sf(math.inf, 3) == 0 and stats.t_sf(-math.inf, 3) == 1
    assert stats.t_sf(1.96, math.inf) == pytest.approx(scipy_stats.norm.sf(1.96), rel=1e-12)
    assert stats.t_sf(1e200, 1) == pytest.approx(1e-200 / math.pi, rel=1e-9)  # no overflow of its square
    for call, arguments in (
        (stats.t_sf, (math.nan, 3)),
        (stats.t_sf, (1.0, 0)),
        (stats.t_quantile, (1.0, 3)),
    ):
        with pytest.raises(ValueError):
            call(*arguments)


@given(tees, freedom)
def test_the_distribution_is_symmetric(t, df):
    assert stats.t_cdf(t, df) + stats.t_sf(t, df) == pytest.approx(1, abs=1e-12)
    assert stats.t_cdf(-t, df) == stats.t_sf(t, df)


@given(tees, tees, freedom)
def test_the_distribution_rises(a, b, df):
    low, high = sorted((a, b))
    assert 0 <= stats.t_cdf(low, df) <= stats.t_cdf(high, df) + 1e-13 <= 1 + 1e-12


@given(st.floats(1e-4, 1 - 1e-4), st.floats(0.5, 1e4))
def test_the_quantile_inverts_the_distribution(p, df):
    assert stats.t_cdf(stats.t_quantile(p, df), df) == pytest.approx(p, abs=1e-10)
    assert stats.t_quantile(1 - p, df) == pytest.approx(-stats.t_quantile(p, df), rel=1e-7, abs=1e-9)


# --- Tests ---

A, B = [1.9221, 1.9233, 1.9224, 1.9218], [1.9188, 1.9205, 1.9190, 1.9199]


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize("a, b", [(A, B), (B, A), (A, B[:2]), ([1.0, 1.5, 9.0], [1.2, 1.1])])
def test_welch_is_scipys(a, b):
    ours, theirs = stats.welch(a, b), scipy_stats.ttest_ind(b, a, equal_var=False, alternative="greater")
    found = ours.t(), ours.df, ours.p()
    assert found == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9)
    low, high = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert ours.interval == pytest.approx((low, high), rel=1e-9)


def test_paired_is_scipys():
    ours, theirs = stats.paired(by_seed(B), by_seed(A)), scipy_stats.ttest_rel(A, B, alternative="greater")
    found = ours.t(), ours.df, ours.p()
    assert found == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9)
    low, high = scipy_stats.ttest_rel(B, A).confidence_interval(0.95)
    assert ours.interval == pytest.approx((low, high), rel=1e-9)
    margin = 0.001  # of a gain of more than that: the test of differences moved by it
    moved = scipy_stats.ttest_1samp([a - b for a, b in zip(A, B)], margin, alternative="greater")
    assert ours.p(margin) == pytest.approx(moved.pvalue, rel=1e-9)


def test_only_shared_seeds_are_paired():
    arm, base = {1: 1.0, 2: 1.1, 7: 5.0}, {1: 1.2, 2: 1.2, 9: 0.1}
    assert stats.paired(arm, base) == stats.paired({1: 1.0, 2: 1.1}, {1: 1.2, 2: 1.2})
    assert stats.compare(arm, base).test == "paired" and stats.compare({1: 1.0, 7: 1.1}, base).test == "Welch"
    with pytest.raises(Misuse, match="no seed in common: 1 against 2"):
        stats.paired({1: 1.0}, {2: 1.0})
    with pytest.raises(Misuse, match="a value in each group"):
        stats.welch([], [1.0])


@pytest.mark.parametrize("found", [stats.paired({1: 0.5}, {1: 1.0}), stats.welch([0.5], [1.0, 1.1, 1.2])])
def test_one_value_shows_nothing(found):
    assert found.t() == 0
    assert found.p() == 0.5
    assert found.p(0.1) == 0.5
    assert found.interval == (-math.inf, math.inf)
    assert found.difference < -0.49 and found.word == "undecided"


@pytest.mark.parametrize("gain, p, word", [
    (0.25, 0.0, "better"), (-0.25, 1.0, "worse"), (0.0, 0.5, "no effect"),
])
def test_without_variance_the_sign_decides(gain, p, word):
    arm, base = [1.0 - gain] * 3, [1.0] * 3
    for found in (stats.paired(by_seed(arm), by_seed(base)), stats.welch(arm, base[:2])):
        assert found.error == 0 and found.half == 0 and found.p() == p and found.word == word
    tiny = stats.welch([1e-100, 3e-100], [2e-100, 4e-100])  # squares of variances would underflow
    assert tiny.df == pytest.approx(2) and tiny.t() == pytest.approx(0.5**0.5)


arms = st.lists(st.floats(0.5, 3.0), min_size=2, max_size=6)


@given(arms, arms, st.floats(-0.5, 0.5))
def test_swapping_arms_mirrors_and_shifting_both_changes_nothing(a, b, shift):
    found, mirrored = stats.welch(a, b), stats.welch(b, a)
    assert found.difference == pytest.approx(-mirrored.difference, abs=1e-12)
    assert found.p() == pytest.approx(1 - mirrored.p(), abs=1e-9)
    if found.error > 1e-6:
        moved = stats.welch([x + shift for x in a], [x + shift for x in b])
        assert moved.p() == pytest.approx(found.p(), abs=1e-6)


def test_verdicts():
    assert stats.verdict([-0.02, -0.021, -0.019])[2] == "better"
    assert stats.verdict([0.02, 0.021, 0.019])[2] == "worse"
    assert stats.verdict([0.0002, -0.0003, 0.0001])[2] == "no effect"
    assert stats.verdict([0.002, -0.003, 0.001])[2] == "undecided"
    mean, half, _ = stats.verdict([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-6)
    # The border of "no effect": symmetric differences whose interval ends at 0.003 from either side.
    edge = stats.NO_EFFECT * 3**0.5 / scipy_stats.t.ppf(0.975, 2)
    words = [stats.verdict([-edge * factor, 0.0, edge * factor])[2] for factor in (0.999, 1.001)]
    assert words == ["no effect", "undecided"]


def test_spread_pools_by_degrees_of_freedom():
    assert stats.spread([[1.0, 2.0], [5.0, 5.0, 8.0], [7.0]]) == pytest.approx(((0.5 + 6.0) / 3) ** 0.5)
    assert stats.spread([[1.0], [2.0]]) == 0.0


def test_the_competition_reads_nats_per_byte_and_per_token():
    caseops = 0.3167  # tokens a byte: 0.005 nats a token are 0.00228 BPB, a byte 0.00721
    base = [1.0601, 1.0599, 1.0600]
    found = stats.welch([x - 0.004 for x in base], base)
    token, byte = stats.reading(found, caseops), stats.reading(found)
    assert token.word == "yes" and byte.word == "no"
    nats = 0.004 * math.log(2)
    assert (byte.gain, token.gain) == pytest.approx((nats, nats / caseops))
    for gain, word in ((0.00229, "mean only"), (0.00227, "no")):
        assert stats.reading(stats.welch([x - gain for x in base], base), caseops).word == word
    for gain, words in ((0.00722, "mean only"), (0.0072, "no"), (0.0079, "yes")):
        assert stats.reading(stats.welch([x - gain for x in base], base)).word == words
    noisy = stats.welch([1.04, 1.06, 1.02], base)
    assert stats.reading(noisy).word == "no" and noisy.p() < stats.FRONTIER_P  # a gain of .02, p .07


# --- Sources and groups ---

SETTINGS = {"SEED": 0, "RUN_ID": "", "DATA_PATH": "d", "MATRIX_LR": 0.02, "WORLD_SIZE": 1}


def metrics(seed: int, bpb: float, /, **changes) -> dict:
    entry = {"val_loss": bpb * math.log(2), "val_bpb": bpb, "targets": 1000, "bytes": 1000}
    evals = {"final_raw": {**entry, "val_bpb": bpb + 0.1}, "final_int6_sliding": entry}
    return {"val_bpb": bpb, "headline": "final_int6_sliding", "evals": evals, "seed": seed,
            "script_sha256": "ab" * 32, "dataset": {"sha256": "cd" * 32}, **changes,
            "settings": {**SETTINGS, "SEED": seed, "RUN_ID": f"r{seed}", **changes.get("settings", {})}}


@pytest.fixture
def arm(tmp_path):
    """arm(name, {seed: BPB}, **changes of metrics.json) -> its folder, runs in seed*/."""

    def arm(name: str, scores: dict[int, float], **changes):
        for seed, bpb in scores.items():
            folder = tmp_path / name / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text(json.dumps(metrics(seed, bpb, **changes)))
        return tmp_path / name

    return arm


def tool(capsys, *arguments) -> tuple[int, dict]:
    code = stats.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_folders_files_and_numbers_are_the_same_group(arm, capsys):
    base = arm("base", {42: 1.92, 314: 1.93, 9: 1.925})
    other = arm("other", {42: 1.9, 314: 1.91, 9: 1.906})
    files = ",".join(str(path) for path in sorted(other.glob("seed*/metrics.json")))
    code, found = tool(capsys, "--base", base, other, f"files={files}", "numbers=9:1.906,42:1.9,314:1.91")
    assert code == 0 and [row["name"] for row in found["groups"]] == ["other", "files", "numbers"]
    assert found["base"]["seeds"] == [9, 42, 314] and found["base"]["mean"] == pytest.approx(1.925)
    assert all(row["house"] == found["groups"][0]["house"] for row in found["groups"])
    first = found["groups"][0]
    expected = scipy_stats.ttest_rel([1.92, 1.93, 1.925], [1.9, 1.91, 1.906], alternative="greater")
    assert first["house"]["verdict"] == "better"
    assert first["house"]["p_better"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert first["competition"]["nats per token"] == first["competition"]["nats per byte"]  # a byte model
    assert first["settings"] == {} and "nats per token" not in found["groups"][2]["competition"]
    code, found = tool(capsys, "--base", base, other, "--eval", "final_raw")
    assert found["base"]["mean"] == pytest.approx(2.025) and found["groups"][0]["evaluation"] == "final_raw"


def test_ablation_arms_and_the_base_among_them(tmp_path, capsys):
    for name, shift in (("base", 0.0), ("wide", -0.02)):
        (tmp_path / name).mkdir()
        for seed in (1, 2, 3):
            text = json.dumps(metrics(seed, 1.9 + seed / 1000 + shift, settings={"MATRIX_LR": 0.02 - shift}))
            (tmp_path / name / f"seed{seed}.json").write_text(text)
    code, found = tool(capsys, "--base", tmp_path / "base", *sorted(tmp_path.iterdir()))
    row, = found["groups"]
    assert code == 0 and row["name"] == "wide" and row["settings"] == {"MATRIX_LR": [0.02, 0.04]}
    assert row["house"]["verdict"] == "better" and row["house"]["difference"] == pytest.approx(-0.02)


def test_a_plot_of_the_differences(tmp_path, capsys):
    path = tmp_path / "arms.png"
    numbers = ["a=42:1.90,314:1.91,999:1.92", "one=42:1.95"]
    assert stats.main(["--base", "base=42:2.0,314:2.011,999:2.02", *numbers, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and "better" in capsys.readouterr().out
    with pytest.raises(Misuse, match="no group to draw"):
        stats.main(["--base", "base=42:2.0,314:2.011,999:2.02", "--plot", str(tmp_path / "none.png")])


def test_seeds_without_a_pair_fall_back_to_welch(capsys):
    base, arm = (",".join(map(str, values)) for values in (A, B))
    code, found = tool(capsys, "--base", base, f"b={arm}", "--tokens-per-byte", "0.5")
    row, = found["groups"]
    assert code == 0 and row["house"] == row["welch"] and row["house"]["test"] == "Welch"
    token, byte = (row["competition"][unit]["gain"] for unit in ("nats per token", "nats per byte"))
    assert token == pytest.approx(2 * byte)


LOG = """import os
final_int6_sliding_exact val_loss:9.00000000 val_bpb:9.00000000
{ruler}
{settings}
step:600/600 val_loss:1.3000 val_bpb:1.9000 train_time:568000ms
final_int6_roundtrip_exact val_loss:1.35000000 val_bpb:1.95000000
final_int6_sliding val_loss:1.3000 val_bpb:1.9000 stride:64 targets:1000 bytes:3157 eval_time:1ms
final_int6_sliding_exact val_loss:1.30000000 val_bpb:{bpb}
"""


def test_logs_of_the_field(tmp_path, capsys):
    ruler = "=" * 100
    for seed in (1, 2, 3):
        listed = f"Hyperparameters:\n  matrix_lr: 0.02\n  run_id: r{seed}\nseed:{seed}"
        named = LOG.format(ruler=ruler, settings=listed, bpb=f"1.90{seed}00000")
        (tmp_path / f"train_seed{seed}.log").write_text(named)
    code, found = tool(capsys, "--base", tmp_path)
    assert code == 0 and found["base"]["seeds"] == [1, 2, 3]
    assert found["base"]["values"] == [1.901, 1.902, 1.903]  # neither the source's line nor an earlier pass
    assert found["base"]["tokens_per_byte"] == pytest.approx(1000 / 3157)
    code, found = tool(capsys, "--base", tmp_path, "--eval", "final_int6_roundtrip")
    assert found["base"]["values"] == [1.95] * 3
    changed = tmp_path / "train_seed3.log"
    text = changed.read_text()
    changed.write_text(text.replace("matrix_lr: 0.02", "matrix_lr: 0.03"))
    code, found = tool(capsys, "--base", tmp_path)
    assert code == 1 and "matrix_lr 0.02 against 0.03" in found["findings"][0]["text"]
    changed.write_text(text.replace("import os", "import sys"))
    code, found = tool(capsys, "--base", tmp_path)
    assert code == 1 and found["findings"][0]["rule"] == "script"


def test_a_log_of_this_family_says_what_its_metrics_say():
    folder = sorted((ROOT / "records").glob("*_Baseline"))[0] / "seed42"
    log, run = stats.read_run(folder / "log.txt"), stats.read_run(folder / "metrics.json")
    assert (log.seed, log.evaluation) == (run.seed, run.evaluation)
    assert log.bpb == pytest.approx(run.bpb, abs=1e-8)
    assert log.identity() == run.identity()


@pytest.mark.parametrize("changes, rule, words", [
    ({"script_sha256": "ef" * 32}, "script", "abababab against efefefef"),
    ({"settings": {"MATRIX_LR": 0.03}}, "settings", "MATRIX_LR 0.02 against 0.03"),
    ({"settings": {"EXTRA": 1}}, "settings", "EXTRA unset against 1"),
    ({"headline": "final_raw"}, "evaluation", "final_int6_sliding against final_raw"),
    ({"dataset": {"sha256": "01" * 32}}, "data", "cdcdcdcd against 01010101"),
    ({"seed": 7}, "seeds", "ran seed 7"),
])
def test_mixed_groups_are_not_compared(arm, capsys, changes, rule, words):
    base = arm("base", {1: 1.9, 2: 1.91, 3: 1.92})
    mixed = arm("mixed", {1: 1.8, 2: 1.81})
    arm("mixed", {3: 1.82}, **changes)
    code, found = tool(capsys, "--base", base, mixed)
    failed = [finding for finding in found["findings"] if finding["level"] == "FAIL"]
    assert code == 1 and [finding["rule"] for finding in failed] == [rule] and words in failed[0]["text"]
    assert "house" not in found["groups"][0] and found["groups"][0]["mean"] == pytest.approx(1.81, abs=0.1)
    code, found = tool(capsys, "--base", mixed, base)  # nothing is compared with a mixed base
    assert code == 1 and "house" not in found["groups"][0]
    assert stats.main(["--base", str(base), str(mixed)]) == 1
    assert "not compared" in capsys.readouterr().out


def test_names_paths_and_processes_may_differ(arm, capsys):
    base = arm("base", {1: 1.9, 2: 1.91})
    arm("base", {3: 1.92}, settings={"RUN_ID": "x", "DATA_PATH": "elsewhere", "WORLD_SIZE": 8})
    code, found = tool(capsys, "--base", base)
    assert code == 0 and found["findings"] == [] and found["groups"] == []


def test_what_may_not_be_compared_between_groups(arm, capsys):
    base = arm("base", {1: 1.9, 2: 1.91, 3: 1.92})
    entry = {"val_loss": 1.3, "val_bpb": 1.9, "targets": 500, "bytes": 500}
    short = arm("short", {1: 1.9, 2: 1.9, 3: 1.9}, evals={"final_int6_sliding": entry})
    code, found = tool(capsys, "--base", base, short)
    assert code == 1 and "scored on 500 bytes, the base on 1000" in found["findings"][0]["text"]
    other = {"sha256": "cd" * 32, "bytes": {"val": 900}, "val_documents": 7}
    cut = [arm(f"cut{i}", {1: 1.9, 2: 1.91, 3: 1.92}, dataset={**other, "val_documents": i}) for i in (7, 8)]
    code, found = tool(capsys, "--base", *cut)  # VAL_BYTES made the counts of bytes equal
    assert code == 1 and "has 8 documents, the base's 7: not the same text" in found["findings"][0]["text"]
    tokens = {**entry, "targets": 300, "bytes": 1000}
    pieces = arm("sp", {1: 1.9, 2: 1.9, 3: 1.9}, evals={"final_int6_sliding": tokens})
    code, found = tool(capsys, "--base", base, pieces)
    assert code == 0 and "nats per token are not comparable" in found["findings"][0]["text"]
    assert set(found["groups"][0]["competition"]) == {"nats per byte", "frontier"}
    whole = {**entry, "targets": 1000, "bytes": 1000}
    mixed = {name: arm(name, {1: 1.9, 2: 1.9, 3: 1.9}, evals={name: whole}, headline=name)
             for name in ("final_int5_sliding", "final_int6_ttt_mix")}
    for name, told in ("final_int5_sliding", 0), ("final_int6_ttt_mix", 1):
        code, found = tool(capsys, "--base", base, mixed[name])
        warned = [each["text"] for each in found["findings"] if each["rule"] == "scoring"]
        assert code == 0 and len(warned) == told and (not told or "other ways of scoring" in warned[0])


def test_few_seeds_doubled_seeds_and_stale_records_are_said(arm, capsys):
    base = arm("base", {1: 1.9, 2: 1.91, 3: 1.92})
    code, found = tool(capsys, "--base", base, "few=1:1.9,2:1.8", "one=1:1.8")
    assert code == 0 and [finding["where"] for finding in found["findings"]] == ["few", "one"]
    assert found["groups"][1]["house"]["low"] is None
    assert found["groups"][1]["house"]["verdict"] == "undecided"
    code, found = tool(capsys, "--base", base, f"twice={base},{base / 'seed1'}")
    assert code == 1 and "seed 1 is there 2 times" in str(found["findings"])
    (base / "train_gpt.py").write_text("print()\n")
    code, found = tool(capsys, "--base", base)
    assert code == 0
    assert found["findings"][0]["text"].startswith("stale: measured with script `abababab`, this one is")


@pytest.mark.parametrize("arguments, words", [
    (["--base", "no/such"], "no/such: no file, folder or record"),
    (["--base", "1.9,oops"], "oops: no file"),
    (["--base", "x=1.9,,1.8"], "an empty source"),
    (["--base", "1.9,nan"], "nan: val_bpb is nan"),
    (["--base", "1.9,-1"], "-1: val_bpb is -1.0"),
    (["--base", "{tmp}"], "none of metrics.json"),
    (["--base", "{tmp}/a.json"], "a.json: not JSON"),
    (["--base", "{tmp}/b.json"], "b.json: no `headline`"),
    (["--base", "{tmp}/d.json"], "d.json: evals: an object"),
    (["--base", "{tmp}/e.json"], "e.json: evals: an object"),
    (["--base", "{tmp}/f.json"], "f.json: seed is '1': a whole number"),
    (["--base", "{tmp}/g.log"], "g.log: seed is 'abc': a whole number"),
    (["--base", "{tmp}/c.log"], "c.log: no line `final_"),
    (["--base", "Baseline", "--eval", "final_x"], "no evaluation final_x: there are final_raw"),
    (["--base", "1.9", "--tokens-per-byte", "0"], "--tokens-per-byte 0.0"),
    (["--base", "1.9", "a=1.8", "a=1.7"], "a: the name of 2 groups"),
])
def test_misuse_is_one_line(tmp_path, arguments, words):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"val_bpb": 1.9}')
    (tmp_path / "c.log").write_text("Traceback (most recent call last):\n")
    for name, change in (("d", {"evals": []}), ("e", {"evals": None}), ("f", {"seed": "1"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**metrics(1, 1.9), **change}))
    (tmp_path / "g.log").write_text('settings {"SEED": "abc"}\nfinal_x_exact val_loss:1.3 val_bpb:1.9\n')
    call = [text.replace("{tmp}", str(tmp_path)) for text in arguments]
    if words.startswith("none of"):
        (tmp_path / "empty").mkdir()
        call[1] += "/empty"
    with pytest.raises(Misuse) as refused:
        stats.main(call)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_line_and_its_exit_codes(arm):
    base, other = arm("base", {1: 1.9, 2: 1.91, 3: 1.92}), arm("new", {1: 1.8, 2: 1.82, 3: 1.815})

    def run(*arguments):
        call = [sys.executable, ROOT / "scripts" / "stats.py", *map(str, arguments)]
        return subprocess.run(call, capture_output=True, text=True, timeout=60)

    done = run("--base", base, other)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "| new |" in done.stdout
    assert "| better |" in done.stdout
    done = run("--base", "no/such")
    assert done.returncode == 2 and done.stderr.startswith("error: no/such") and done.stderr.count("\n") == 1
    assert "--tokens-per-byte" in run("--help").stdout
    probe = "import stats, sys; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT / "scripts", capture_output=True, text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "set()"
