"""scripts/ladder.py: the contest's proportions, lines and verdicts, and a tiny real ladder."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import ladder
import ladder_report
import numpy as np
import pytest
import run_seeds
import rungs
import stats
import trends
from conftest import ROOT, slow
from family import TRUNK, Misuse
from hypothesis import given, settings
from hypothesis import strategies as st

TOOL = [sys.executable, str(ROOT / "scripts" / "ladder.py")]
NAMES = ["0.03", "0.1", "0.3", "0.9"]
X = [ladder_report.compute(name) for name in NAMES]
CONTEST = ladder_report.contest()
LADDERS = sorted(path.parent.name for path in (ROOT / "records" / "ladder").glob("*/ladder.json"))


# --- Proportions ---


def test_a_rung_of_the_contests_size_is_the_trunk(trunk):
    asked = trunk.Hyperparameters(rungs.proportions(rungs.WEIGHTS / 1e6)).settings()
    default = trunk.Hyperparameters({}).settings()
    assert {name for name in default if asked[name] != default[name]} == set()
    assert rungs.weights(rungs.WEIGHTS / 1e6) == rungs.WEIGHTS


@given(st.floats(0.001, 200))
@settings(deadline=None, max_examples=60)
def test_every_rung_has_the_proportions_and_is_accepted(trunk, millions):
    found = rungs.arm_settings(millions, {}, {}, "test")
    number = {name: float(value) for name, value in found.items()
              if re.fullmatch(r"[\d.]+", value)}
    weights, read = rungs.weights(millions), number["ITERATIONS"] * number["TRAIN_BATCH_TOKENS"]
    # whole layers and widths of 16: a rung is near its name, and all else is by what it really has
    assert 0.5 < weights / 1e6 / millions < 2 or millions < 0.005
    assert read == pytest.approx(rungs.TEXT * weights, rel=0.02)
    tables = rungs.CONTEXTS * number["NGRAM_DIM"] * number["NGRAM_BUCKETS"]
    assert tables == pytest.approx(rungs.TABLES * weights, rel=0.1)
    assert number["WARMDOWN_ITERS"] == pytest.approx(number["ITERATIONS"] / 3, abs=0.51)
    assert number["TRAIN_BATCH_TOKENS"] % number["DEVICE_BATCH_TOKENS"] == 0
    assert 0 <= number["MUON_MOMENTUM_WARMUP_START"] <= number["MUON_MOMENTUM"] < 1
    trunk.Hyperparameters(found)


@given(st.floats(0.01, 30), st.floats(1, 4))
@settings(deadline=None, max_examples=40)
def test_a_rung_in_ids_reads_the_text_of_one_in_bytes(millions, per_id):
    """Rows are whole ids, so the smallest rungs are some percent off."""
    bytes_, ids = rungs.proportions(millions), rungs.proportions(millions, per_id)
    for name in ("TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS"):
        assert int(ids[name]) * per_id == pytest.approx(int(bytes_[name]), rel=0.5), name
    assert int(ids["TRAIN_SEQ_LEN"]) * per_id == pytest.approx(int(bytes_["TRAIN_SEQ_LEN"]), abs=4 * per_id)
    read = int(ids["ITERATIONS"]) * int(ids["TRAIN_BATCH_TOKENS"]) * per_id
    assert read == pytest.approx(rungs.TEXT * rungs.weights(millions), rel=0.02)
    same = {"NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NGRAM_BUCKETS"}
    assert {name: ids[name] for name in same} == {name: bytes_[name] for name in same}


def test_the_law_of_the_batch_goes_through_both_points():
    assert rungs.batch_law(rungs.SMALL_TEXT) == pytest.approx(8192)
    assert rungs.batch_law(rungs.TEXT * rungs.WEIGHTS) == pytest.approx(393_216)


def test_an_arm_changes_what_follows_from_it():
    base = rungs.arm_settings(0.1, {}, {}, "arm")
    half = rungs.arm_settings(0.1, {"TRAIN_BATCH_TOKENS": "*0.5"}, {}, "arm")
    assert int(half["TRAIN_BATCH_TOKENS"]) * 2 == int(base["TRAIN_BATCH_TOKENS"])
    assert int(half["ITERATIONS"]) == pytest.approx(2 * int(base["ITERATIONS"]), abs=1)
    assert float(half["MUON_MOMENTUM"]) > float(base["MUON_MOMENTUM"])
    deep = rungs.arm_settings(0.1, {"NUM_LAYERS": "+1", "MATRIX_LR": "*2"}, {"MATRIX_LR": "0.025"}, "arm")
    assert (deep["NUM_LAYERS"], deep["MATRIX_LR"]) == ("5", "0.05")
    shared = rungs.arm_settings(0.1, {"ITERATIONS": "*2"}, {}, "arm", {"ITERATIONS": "7"})
    assert (shared["ITERATIONS"], shared["WARMDOWN_ITERS"]) == ("14", "5")
    with pytest.raises(Misuse, match="DEVICE=\\*2"):
        rungs.arm_settings(0.1, {"DEVICE": "*2"}, {"DEVICE": "'auto'"}, "arm")


def test_what_a_run_never_reads_does_not_tell_it_apart(trunk):
    """How test-time training would go is no matter where it is off."""
    for ttt, apart in ("0", []), ("sgd", ["TTT_BATCH_ROWS"]):
        found = trunk.Hyperparameters({"TTT": ttt, "TTT_BATCH_ROWS": "3"}).settings()
        assert ladder.differing({"settings": found}, {"TTT": ttt, "TTT_BATCH_ROWS": "4"}, trunk) == apart


def test_a_run_of_a_script_without_a_setting_did_not_have_it(trunk):
    found = trunk.Hyperparameters({}).settings()
    del found["XSA_LAST_N"]
    usual = trunk.Hyperparameters({}).settings()["XSA_LAST_N"]
    for asked, apart in (usual, []), (usual + 1, ["XSA_LAST_N"]):
        assert ladder.differing({"settings": found}, {"XSA_LAST_N": str(asked)}, trunk) == apart


def test_matching_passes_the_size_at_which_tensors_are_rounded(monkeypatch):
    """Below 512 rows a table is kept in fp16: 112 rows make as many bytes as 869 that are rounded."""
    def planned(script, settings: dict) -> int:
        rows = int(settings["NGRAM_BUCKETS"])
        return 15_000 + (13 * rows if rows < 512 else 600 + int(0.97 * rows))
    monkeypatch.setattr(rungs, "planned_bytes", planned)
    found = rungs.matched(None, {}, ["NGRAM_BUCKETS"], 16_446, {}, {"NGRAM_BUCKETS": "1"})
    assert int(found["NGRAM_BUCKETS"]) > 512 and planned(None, found) == pytest.approx(16_446, abs=1)
    with pytest.raises(Misuse, match="no value makes"):
        rungs.matched(None, {}, ["NGRAM_BUCKETS"], 10**9, {}, {"NGRAM_BUCKETS": "1"})


@pytest.mark.parametrize("rung", ["0.03", "0.9"])
@pytest.mark.parametrize("names", [["MLP_MULT"], ["MODEL_DIM", "MLP_MULT"]])
def test_matched_bytes_are_the_bases(trunk, rung, names):
    defaults = run_seeds.variables(TRUNK)
    base = rungs.arm_settings(float(rung), {}, defaults, "base")
    size = rungs.planned_bytes(trunk, base)
    arm = rungs.matched(trunk, base | {"NGRAM_ORDERS": "0"}, names, size, {}, defaults)
    assert rungs.planned_bytes(trunk, arm) == pytest.approx(size, rel=0.01)
    assert {name for name in arm if arm[name] != base.get(name)} <= {*names, "NGRAM_ORDERS", "ROPE_DIMS"}
    with pytest.raises(Misuse, match="the least is"):
        rungs.matched(trunk, base, ["NGRAM_BUCKETS"], size // 3, {}, defaults)


@pytest.mark.parametrize("name", LADDERS)
def test_a_committed_ladder_is_sound(name, tmp_path, capsys):
    """Every arm can be planned at the lowest rung, and what is matched has the base's bytes."""
    found = ladder.read_ladder(name)
    before = sorted(found.folder.rglob("*"))
    assert ladder.main([name, "--plan", "--runs", str(tmp_path), "--rungs", found.rungs[0]]) == 0
    assert sorted(found.folder.rglob("*")) == before  # a plan leaves no file
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    assert len(lines) == len(found.arms)
    for line in lines:
        arm = found.arms[line[2].strip()]
        assert not arm.match or 0.98 < float(line[6]) < 1.02


@pytest.mark.parametrize("name", [name for name in LADDERS if (ladder.LADDERS / name / "README.md").exists()])
def test_committed_tables_are_those_of_the_runs(name, tmp_path, capsys):
    """A fresh report of the kept runs writes the same page and numbers."""
    kept, copy = ladder.LADDERS / name, tmp_path / "ladder" / name
    shutil.copytree(kept, copy)
    shutil.copy(ladder.LADDERS / "carried.json", copy.parent)
    assert ladder.main([str(copy), "--report", "--runs", str(tmp_path / "runs")]) == 0
    for file in ("README.md", "results.json"):
        assert (copy / file).read_text() == (kept / file).read_text(), f"ladder.py {name} --report"


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(ladder.LADDERS.glob("*/contest.json"))])
def test_the_contest_is_planned_for_every_arm(name):
    arms = json.loads((ladder.LADDERS / name / "contest.json").read_text())["arms"]
    assert [*arms] == [*ladder.read_ladder(name).arms]
    assert all(row["ms"] > 0 and "MODEL_DIM" in row["settings"] for row in arms.values())


def test_the_page_of_ladders_names_them_all():
    page = (ladder.LADDERS / "README.md").read_text()
    assert [name for name in LADDERS if f"| [{name}]({name}/ladder.json) |" not in page] == []


# --- Lines and verdicts ---


def points(gain, noise=0.0, seeds=(3, 3, 2, 1), rng=None) -> list[tuple[float, float]]:
    """Pairs of differences `gain(x)` at the four rungs."""
    rng = rng or np.random.default_rng(0)
    return [(x, gain(x) + noise * rng.standard_normal()) for x, count in zip(X, seeds) for _ in range(count)]


def straight(low: float, high: float):
    """A line through `low` at the lowest rung and `high` at the highest."""
    return lambda x: low + (high - low) * (x - X[0]) / (X[-1] - X[0])


def judged(found: list[tuple[float, float]]) -> str:
    return trends.verdict(trends.Line.through(found), [x for x, _ in found], CONTEST)


@pytest.mark.parametrize("low, high, told", [
    (-0.01, -0.05, "grows"), (-0.05, -0.05, "stays"), (-0.08, -0.02, "fades"), (-0.05, 0.05, "reverses"),
    (0.01, 0.05, "grows"), (0.05, 0.05, "stays"), (0.08, 0.02, "fades"), (0.05, -0.05, "reverses"),
    (0.0, 0.0, "stays"), (0.0005, -0.0005, "stays"), (0.0, -0.05, "grows"),
])
@pytest.mark.parametrize("noise", [1e-5, 0.0008])
def test_five_kinds_of_arms_get_their_verdicts(low, high, told, noise):
    if noise > 1e-4 and abs(low) + abs(high) < 0.01:
        noise = 1e-4  # no effect is said only where the interval fits into +-0.003 as far as the contest
    assert judged(points(straight(low, high), noise)) == told


def test_noise_is_undecided():
    """Scatter without an effect gets a verdict in one case of twenty or so."""
    rng = np.random.default_rng(1)
    words = [judged(points(straight(0, 0), 0.02, rng=rng)) for _ in range(400)]
    assert words.count("undecided") > 0.92 * len(words)
    assert max(map(words.count, ("grows", "stays", "fades", "reverses"))) < 0.04 * len(words)


def test_a_line_that_would_cross_zero_beyond_the_highest_rung_fades():
    found = points(straight(-0.05, -0.02), 1e-4)
    assert trends.Line.through(found).at(CONTEST) > 0 and judged(found) == "fades"


def test_a_trend_too_small_to_matter_stays():
    """0.0001 BPB an e-fold is certain here, and 0.001 on the way to the contest."""
    found = points(straight(-0.04, -0.0407), 1e-6)
    assert trends.side(trends.Line.through(found).slope_interval) == -1 and judged(found) == "stays"


def test_two_rungs_are_no_verdict():
    assert judged([(X[0], -0.1), (X[0], -0.11), (X[1], -0.2), (X[1], -0.21)]) == "undecided"
    assert trends.verdict(None, [], CONTEST) == "undecided"


def test_a_bend_makes_intervals_wide():
    bend = points(lambda x: -0.02 + 0.004 * (x - X[0]) * (x - X[-1]), 1e-4, (3, 3, 3, 3))
    line = trends.Line.through(bend)
    assert line.bent and line.df == 2 and judged(bend) == "undecided"
    assert not trends.Line.through(points(straight(0, 1), 1e-4, (3, 3, 3, 3))).bent


values = st.floats(-0.2, 0.2).map(lambda x: round(x, 5))


@given(values, values, st.floats(1e-5, 0.02), st.integers(0, 1000))
@settings(deadline=None)
def test_a_mirrored_arm_has_the_same_verdict(low, high, noise, seed):
    found = points(straight(low, high), noise, rng=np.random.default_rng(seed))
    mirrored = [(x, -y) for x, y in found]
    a, b = trends.Line.through(found), trends.Line.through(mirrored)
    assert judged(found) == judged(mirrored) in trends.WORDS
    opposite = {"better": "worse", "worse": "better"}
    words = [stats.word(line.interval(X[-1])) for line in (a, b)]
    assert words[1] == opposite.get(words[0], words[0])
    # an interval of the line lies in that of a new pair
    for x in (X[0], CONTEST):
        (low, high), (least, most) = a.interval(x), a.prediction(x)
        assert least <= low <= a.at(x) <= high <= most


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, inside, slopes = np.random.default_rng(2), 0, 0
    truth, slope = straight(-0.02, -0.05), -0.03 / (X[-1] - X[0])
    for _ in range(600):
        line = trends.Line.through(points(truth, 0.004, rng=rng))
        low, high = line.prediction(CONTEST)
        inside += low <= truth(CONTEST) + 0.004 * rng.standard_normal() <= high
        low, high = line.slope_interval
        slopes += low <= slope <= high
    assert 0.92 < inside / 600 < 0.98 and 0.92 < slopes / 600 < 0.98


def test_fishers_tail_agrees_with_a_table():
    for f, df1, df2, p in ((4.26, 2, 9, 0.05), (5.14, 2, 6, 0.05), (10.92, 2, 6, 0.01), (7.71, 1, 4, 0.05)):
        assert trends.f_sf(f, df1, df2) == pytest.approx(p, rel=0.01)


@given(st.floats(0.0, 1.5), st.floats(0.1, 1.5), st.floats(0.03, 0.4))
@settings(deadline=None, max_examples=40)
def test_a_curve_without_noise_is_recovered(floor, size, exponent):
    truth = trends.Curve(floor, size, exponent, float(np.mean(X)))
    found, = trends.curve(X, [[truth.at(x) for x in X]], [3, 3, 2, 1])
    assert found.exponent == pytest.approx(exponent, rel=0.01)
    assert found.at(CONTEST) == pytest.approx(truth.at(CONTEST), abs=2e-3)
    assert (found.floor, found.size) == (pytest.approx(floor, abs=0.01), pytest.approx(size, rel=0.02))


def test_a_curve_with_noise_has_the_truth_in_its_interval():
    truth, rng, inside = trends.Curve(0.9, 0.8, 0.12, float(np.mean(X))), np.random.default_rng(3), 0
    for _ in range(60):
        scores = {x: [truth.at(x) + 0.002 * rng.standard_normal() for _ in range(count)]
                  for x, count in zip(X, (3, 3, 2, 2))}
        low, high = trends.fitted(scores).at(CONTEST)
        inside += low <= truth.at(CONTEST) <= high
    assert inside >= 51  # of 57 expected
    assert trends.fitted({X[0]: [1.0], X[1]: [0.9]}) is None
    # one seed each says nothing about noise
    assert trends.fitted({X[0]: [1.0], X[1]: [0.9], X[2]: [0.85]}).at(CONTEST) is None


# --- Reports of made-up runs ---


def made_up(place, arms: dict, seeds=(42, 314, 999), names=NAMES, **own) -> ladder.Ladder:
    """A ladder with runs of these arms, {arm: difference of x}, 0.001 of noise; `own` replaces metrics."""
    rng = np.random.default_rng(5)
    entries = {arm: {"why": "a reason", "set": {"LEAKY_SLOPE": 0.1 + i / 100}} for i, arm in enumerate(arms)}
    described = {"question": "Which?", "rungs": [float(name) for name in names],
                 "seeds": {name: [*seeds] for name in names}, "arms": entries}
    place.mkdir(parents=True, exist_ok=True)
    (place / "ladder.json").write_text(json.dumps(described))
    found, script = ladder.read_ladder(str(place)), run_seeds.sha256(TRUNK)
    program = ladder.program(TRUNK, place / "runs")
    for name in names:
        for seed in seeds:
            x, shared = ladder_report.compute(name), 0.002 * rng.standard_normal()
            for arm, gain in {"base": lambda x: 0.0, **arms}.items():
                asked = ladder.settings_at(found, found.arms[arm], name, {TRUNK: program})
                bpb = 1 + 0.8 * math.exp(-0.12 * (x - X[1])) + shared + gain(x) + 2e-4 * rng.standard_normal()
                metrics = {
                    "val_bpb": bpb, "headline": "final", "seed": seed, "script_sha256": script,
                    "bytes_model": 1000, "ms_per_step": 10.0, "steps": 5, "device": "cpu", "torch": "2",
                    "clocks": {"training": 5.0}, "dataset": {"name": "books", "sha256": "d"},
                    "evals": {"final": {"bytes": 2_000_000}},
                    "settings": program.module.Hyperparameters(asked).settings(), **own,
                }
                folder = place / name / arm / f"seed{seed}"
                folder.mkdir(parents=True)
                (folder / "metrics.json").write_text(json.dumps(metrics))
    return found


ARMS = {"up": straight(-0.01, -0.06), "flat": straight(-0.04, -0.04), "down": straight(-0.08, -0.02),
        "turned": straight(-0.05, 0.05), "nothing": straight(0, 0)}


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple:
    """(folder, results) of five arms of five kinds."""
    place = tmp_path_factory.mktemp("ladders") / "kinds"
    made_up(place, ARMS)
    assert ladder.main([str(place), "--report", "--runs", str(place / "runs")]) == 0
    return place, json.loads((place / "results.json").read_text())


def test_a_report_recovers_what_was_put_in(reported):
    place, found = reported
    told = {row["arm"]: row for row in found["trends"]}
    assert {arm: row["verdict"] for arm, row in told.items()} == {
        "up": "grows", "flat": "stays", "down": "fades", "turned": "reverses", "nothing": "stays"}
    assert [told[arm]["word"] for arm in ("up", "turned")] == ["better", "worse"]
    for arm, gain in ARMS.items():
        slope = (gain(X[-1]) - gain(X[0])) / (X[-1] - X[0]) * math.log(10)
        assert told[arm]["slope"] == pytest.approx(slope, abs=1e-3)
        assert told[arm]["at_contest"] == pytest.approx(gain(CONTEST), abs=3e-3)
    curve = {row["arm"]: row for row in found["curves"]}["base"]
    assert curve["exponent"] == pytest.approx(0.12, abs=0.02) and curve["floor"] == pytest.approx(1, abs=0.1)
    rows = [row for row in found["arms"] if row["arm"] == "up"]
    assert [row["rung"] for row in rows] == NAMES and {row["word"] for row in rows} == {"better"}
    assert {row["bytes"] for row in rows} == {1.0}


def test_a_report_is_text_and_plot_and_stays_as_it_is(reported, capsys):
    place, _ = reported
    readme, plot = place / "README.md", place / "ladder.png"
    text = readme.read_text()
    assert "**grows**" in text and "nothing on FineWeb" in text and run_seeds.sha256(TRUNK)[:8] in text
    readme.write_text(text.replace("# Ladder: kinds\n", "# Kinds\n\nWhat they taught us.\n"))
    before = plot.stat().st_mtime_ns
    assert ladder.main([str(place), "--report", "--runs", str(place / "runs")]) == 0
    again = readme.read_text()
    assert "What they taught us." in again and again.count("<!-- ladder -->") == 1
    assert plot.stat().st_mtime_ns == before  # equal numbers, equal plot


def test_the_contest_is_planned_once_and_its_time_is_charged(tmp_path, monkeypatch):
    place, planned = tmp_path / "paid", []
    made_up(place, {"fast": straight(0, 0), "slow": straight(-0.02, -0.02)})
    about = json.loads((place / "ladder.json").read_text())
    about["arms"]["slow"]["set"] = {"LEAKY_SLOPE": {**dict.fromkeys(NAMES, 0.11), "contest": 0.3}}
    (place / "ladder.json").write_text(json.dumps(about))

    def make_plan(script, settings, card, ranks):
        planned.append(settings)
        assert not {"DEVICE", "DTYPE", "COMPILE"} & {*settings} and settings["MODEL_DIM"] == "512"
        return {"ms_per_step": 50.0 + 10 * (settings.get("LEAKY_SLOPE") == "0.3"), "sizes": {"model": 7}}

    monkeypatch.setattr(ladder.plan, "make_plan", make_plan)
    options = [str(place), "--contest", "--runs", str(place / "runs")]
    assert ladder.main(options) == ladder.main(options) == 0
    assert len(planned) == 3  # each arm once
    kept = json.loads((place / "contest.json").read_text())["arms"]
    assert [row["ms"] for row in kept.values()] == [50, 50, 60]
    assert {row["script_sha256"] for row in kept.values()} == {run_seeds.sha256(TRUNK)}

    found = json.loads((place / "results.json").read_text())
    bpb = {row["rung"]: row["bpb"] for row in found["rungs"]}
    slope = np.gradient([bpb[name] for name in NAMES], X)
    assert {row["arm"] for row in found["arms"]} == {"fast", "slow"}
    for row in found["arms"]:
        ratio = 1.2 if row["arm"] == "slow" else 1.0
        assert row["planned_time"] == pytest.approx(ratio)
        price = -slope[NAMES.index(row["rung"])] * math.log(ratio)
        assert row["at_equal_planned_time"] == pytest.approx(row["difference"] + price)
    assert "| slow | a reason | 60.0 |" in (place / "README.md").read_text()

    del about["arms"]["slow"]["set"]["LEAKY_SLOPE"]["contest"]
    (place / "ladder.json").write_text(json.dumps(about))
    with pytest.raises(Misuse, match="slow: LEAKY_SLOPE has no value for `contest`"):
        ladder.main(options)


def test_a_ladder_without_runs_gets_no_page(tmp_path, capsys):
    place = tmp_path / "new"
    place.mkdir()
    (place / "ladder.json").write_text(json.dumps(TINY))
    assert ladder.main([str(place), "--report", "--runs", str(tmp_path / "runs")]) == 0
    assert "no run is kept yet" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["ladder.json"]


def test_many_arms_are_rows_of_one_panel_a_rung(tmp_path):
    place = tmp_path / "many"
    gains = np.linspace(-0.06, 0.06, ladder_report.PANELS + 1)
    made_up(place, {f"arm{i}": straight(gain, gain) for i, gain in enumerate(gains)})
    assert ladder.main([str(place), "--report", "--runs", str(place / "runs")]) == 0
    assert (place / "ladder.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((place / "results.json").read_text())
    panels = ladder_report.draw_rows(numbers).axes
    assert [axes.get_title() for axes in panels] == [f"rung {rung}" for rung in NAMES]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == [f"arm{i}" for i in range(len(gains))]
    for axes in panels:  # one mean a row, where it belongs
        means = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_ydata()[0] for line in means] == [*range(len(gains))]
        assert [line.get_xdata()[0] for line in means] == pytest.approx(gains, abs=2e-3)


@pytest.mark.parametrize("arm", [{"NUM_HEADS": 0}, {"NUM_HEADS": "*0.25"}, {"ITERATIONS": "x"}])
def test_a_setting_that_is_no_number_is_refused(tmp_path, arm):
    about = TINY | {"arms": {"odd": {"why": "no number", "set": arm}}}
    place = tmp_path / "tiny"
    place.mkdir()
    (place / "ladder.json").write_text(json.dumps(about))
    with pytest.raises(Misuse, match="odd at 0.001"):
        ladder.main([str(place), "--plan", "--runs", str(tmp_path / "runs")])


def test_arms_are_compared_with_one_another(trunk, tmp_path, capsys):
    place = tmp_path / "duel"
    arms = {"strong": straight(-0.08, -0.02), "weak": straight(-0.03, 0.03)}
    made_up(place, arms)
    about = json.loads((place / "ladder.json").read_text())
    about["arms"]["strong"]["against"] = ["weak"]
    (place / "ladder.json").write_text(json.dumps(about))
    shutil.rmtree(place / NAMES[-1] / "base")  # the highest rung was climbed without the base
    options = [str(place), "--runs", str(place / "runs")]
    assert ladder.main([*options, "--report"]) == 0

    found = json.loads((place / "results.json").read_text())
    rows = {row["arm"]: row for row in found["trends"]}
    assert [*rows] == ["strong", "strong - weak", "weak"]
    assert rows["strong - weak"]["verdict"] == "stays" and rows["strong - weak"]["rungs"] == len(NAMES)
    assert rows["strong"]["rungs"] == len(NAMES) - 1
    wide = trunk.Hyperparameters({}).settings()["MLP_MULT"]
    for row in found["rungs"]:  # with the base's MLPs, where it was run and where it was not
        layers, width = rungs.shape(float(row["rung"]))
        assert row["weights"] == round(layers * width**2 * (3 + 2 * wide))
    assert [row["seeds"] for row in found["rungs"]][-1] == 0
    duel = [row for row in found["arms"] if row["arm"] == "strong - weak"]
    assert {row["time"] for row in duel} == {1.0}
    assert [row["difference"] for row in duel] == pytest.approx([-0.05] * len(NAMES), abs=1e-3)

    capsys.readouterr()
    assert ladder.main([*options, "--plan", "--arms", "strong,weak", "--no-base", "--rungs", NAMES[-1]]) == 0
    told = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [(row[1], row[5]) for row in told] == [("strong", ""), ("weak", "")]  # no bytes of a base


def test_times_are_compared_where_they_mean_something():
    quick, slow_, other = ({"ms_per_step": ms, "steps": 5, "device": device}
                           for ms, device in ((10, "cpu"), (15, "cpu"), (10, "cuda")))
    assert ladder_report.time_ratio([(slow_, quick), (quick, quick)]) == pytest.approx(1.25)
    assert ladder_report.time_ratio([(slow_, quick), (other, quick)]) is None
    assert ladder_report.uneven([quick, slow_]) and not ladder_report.uneven([quick, quick])


def test_leaving_out_the_top_rung_says_so_when_it_surprises(tmp_path):
    def kink(x):
        return -0.05 + (0.08 if x == X[-1] else 0.0)
    place = tmp_path / "kink"
    made_up(place, {"kink": kink, "flat": straight(-0.05, -0.05)})
    assert ladder.main([str(place), "--report", "--runs", str(place / "runs")]) == 0
    rows = {row["arm"]: row for row in json.loads((place / "results.json").read_text())["trends"]}
    assert rows["kink"]["left_out"]["inside"] is False and rows["flat"]["left_out"]["inside"] is True
    text = (place / "README.md").read_text()
    assert re.search(r"\*\*not\*\* where the rungs below put it for kink", text)


def test_runs_of_other_scripts_and_settings_do_not_count(tmp_path):
    place = tmp_path / "ladders" / "mixed"
    made_up(place, {"flat": straight(-0.05, -0.05)}, names=NAMES[:3])

    def change(rung: str, seed: int, **own) -> None:
        path = place / rung / "flat" / f"seed{seed}" / "metrics.json"
        metrics = json.loads(path.read_text())
        for name, value in own.items():
            metrics[name] = metrics[name] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(metrics))

    def report() -> dict:
        assert ladder.main([str(place), "--report", "--runs", str(tmp_path / "runs")]) == 0
        return json.loads((place / "results.json").read_text())

    change("0.03", 42, settings={"LEAKY_SLOPE": 0.4})
    change("0.03", 314, script_sha256="5" * 64)
    change("0.03", 999, dataset={"sha256": "e"})
    change("0.1", 42, val_bpb=float("nan"))
    found = report()
    assert [(row["rung"], row["seeds"]) for row in found["arms"]] == [("0.1", [314, 999]),
                                                                      ("0.3", [42, 314, 999])]
    told = " ".join(found["left_out"])
    for reason in ("LEAKY_SLOPE", "script 55555555", "other data", "no finite score"):
        assert reason in told
    # what was shown to be equal counts
    proof = [{"from": "5" * 64, "to": run_seeds.sha256(TRUNK), "why": "a comment"}]
    (place.parent / "carried.json").write_text(json.dumps(proof))
    assert [row["seeds"] for row in report()["arms"]][0] == [314]


def test_proofs_of_a_base_hold_for_ladders_with_the_same_one():
    """`tables` and `laws` set tables for their base, `jepa` takes the default, `tokens` another script."""
    names = {name: ladder.in_proofs(ladder.read_ladder(name), "base") for name in LADDERS}
    assert names["tables"] == names["best"] == names["laws"] != names["jepa"] == names["xsa"]
    assert len({names[name] for name in ("tables", "jepa", "tokens")}) == 3


# --- A tiny real ladder ---


TINY = {
    "question": "Does it run?", "rungs": [0.001, 0.006], "seeds": {"0.001": [1], "0.006": [1]},
    "set": {"ITERATIONS": 30, "TRAIN_BATCH_TOKENS": 1024, "TRAIN_SEQ_LEN": 128, "VAL_BYTES": 3000,
            "NGRAM_ORDERS": "2,3,4,5,6", "NGRAM_BUCKETS": 300, "MLP_MULT": 2, "EVAL_STRIDE": 64,
            "DEVICE_BATCH_TOKENS": 1024},
    "arms": {"none": {"why": "no tables", "set": {"NGRAM_ORDERS": 0}, "match": ["MLP_MULT"]}},
}


@pytest.fixture
def tiny(tmp_path):
    """tiny(key=value, ...) -> a folder with a ladder.json, what is given in place of its entries."""

    def tiny(**changes):
        place = tmp_path / "ladders" / "tiny"
        place.mkdir(parents=True, exist_ok=True)
        (place / "ladder.json").write_text(json.dumps({**TINY, **changes}))
        return place

    return tiny


@slow
def test_a_tiny_ladder_is_stopped_and_goes_on(tiny, corpus, tmp_path):
    place = tiny()
    call = [*TOOL, str(place), "--data", str(corpus), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("done"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    assert "the same command goes on" in rest
    kept = sorted(place.glob("*/*/seed1/metrics.json"))
    assert 1 <= len(kept) < 4  # the others were not there yet
    before = [path.stat().st_mtime_ns for path in kept]

    done = subprocess.run(call, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before and "start  0.001 base" not in done.stderr
    assert len([*place.glob("*/*/seed1/metrics.json")]) == 4
    assert "| ends |" in done.stderr  # the live table
    found = json.loads((place / "results.json").read_text())
    row = {(row["arm"], row["rung"]): row for row in found["arms"]}["none", "0.006"]
    assert row["word"] == "undecided" and row["interval"] is None and 0.5 < row["bytes"] < 1.5
    assert [row["verdict"] for row in found["trends"]] == ["undecided"]

    text = (place / "0.001" / "none" / "seed1" / "metrics.json").read_text()
    metrics = json.loads(text)
    assert metrics["median_ms_per_step"] > 0 and metrics["script_sha256"] == run_seeds.sha256(TRUNK)
    assert metrics["settings"]["NGRAM_ORDERS"] == "0" and metrics["settings"]["MLP_MULT"] > 2
    assert str(tmp_path) not in text and "DATA_PATH" not in text
    # another ladder takes the base from here
    other = place.parent / "other"
    other.mkdir()
    (other / "ladder.json").write_text((place / "ladder.json").read_text())
    done = subprocess.run([*TOOL, str(other), "--data", str(corpus), "--runs", str(tmp_path / "other"),
                           "--rungs", "0.001", "--plan"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "| 0.001 | base | 1 | 1 |" in done.stdout, done.stdout + done.stderr
    assert [path.name for path in other.iterdir()] == ["ladder.json"]  # a plan only looks


# --- What the caller can mend ---


@pytest.mark.parametrize("changes, words", [
    ({"arms": {}}, "one arm or more"),
    ({"arms": {"base": {"why": "", "set": {"BITS": 1}}}}, "other than base"),
    ({"arms": {"a": {"set": {"BITS": 1}}}}, "`why` is needed"),
    ({"arms": {"a": {"why": "w"}}}, "it is the base"),
    ({"arms": {"a": {"why": "w", "set": {"SEED": 1}}}}, "SEED is set by this tool"),
    ({"arms": {"a": {"why": "w", "set": {"MATRIX_LR": {"0.001": 1}}}}}, "no value for rung 0.006"),
    ({"arms": {"a": {"why": "w", "set": {"MATRIX_LR": [1]}}}}, "a text, a number"),
    ({"arms": {"a": {"why": "w", "script": "Nobody"}}}, "Nobody: no script"),
    ({"arms": {"a": {"why": "w", "set": {"BITS": 5}, "against": ["base"]}}}, "`against` base: it is"),
    ({"arms": {"a": {"why": "w", "set": {"BITS": 5}, "against": ["a"]}}}, "`against` a: it is no other arm"),
    ({"arms": {"a": {"why": "w", "set": {"BITS": 5}, "against": "a"}}}, "`against` is a list"),
    ({"base": "Nobody"}, "Nobody: no script"),
    ({"base": ["BiJEPAX"]}, "`base` is a script's name"),
    ({"bytes_per_id": 0.5}, "`bytes_per_id` a number from 1 to 100"),
    ({"base": "BiJEPAX"}, "has no variable NGRAM_BUCKETS"),
    ({"arms": {"a": {"why": "w", "set": {"NOTHING": 1}}}}, "no variable NOTHING"),
    ({"arms": {"a": {"why": "w", "set": {"NUM_HEADS": 3}}}}, "must be a multiple"),
    ({"arms": {"a": {"why": "w", "set": {"ITERATIONS": 30}}}}, "base and a have the same settings"),
    ({"rungs": []}, "`rungs` is needed"),
    ({"rungs": [0.001, "much"]}, "rung much"),
    ({"rungs": [0.001, 0.0011], "seeds": {"0.001": [1], "0.0011": [1]}}, "two rungs of one size"),
    ({"seeds": {"0.001": [1]}}, "a list for each rung"),
    ({"seeds": {"0.001": [1], "0.006": [1, 1]}}, "different whole numbers"),
    ({"question": 3}, "`question` is needed"),
    ({"more": 3}, "an object with"),
    ({"set": {"ITERATIONS": 10_000}}, "and no text twice"),
    ({"bytes_per_id": 2}, "an id stands for 1.00 bytes, `bytes_per_id` is 2"),
    ({"set": {"LEAKY_SLOP": 1}}, "no variable LEAKY_SLOP"),
])
def test_a_bad_ladder_is_refused(tiny, corpus, tmp_path, changes, words):
    if "set" in changes:
        changes = {"set": {**TINY["set"], **changes["set"]}}
    with pytest.raises(Misuse, match=re.escape(words)):
        ladder.main([str(tiny(**changes)), "--data", str(corpus), "--runs", str(tmp_path / "runs"), "--plan"])


@pytest.mark.parametrize("arguments, words", [
    (["--arms", "nobody"], "--arms nobody: there are base, none"),
    (["--rungs", "7"], "--rungs 7: there are 0.001, 0.006"),
    (["--seeds", "8"], "--seeds 8: no rung has it"),
    (["--seeds", "x"], "different whole numbers"),
    (["--jobs", "0"], "--jobs 0"),
    (["--no-base"], "--no-base: --arms says which arms"),
    (["--report", "--arms", "none"], "--arms: --report, --carry and --contest are about the whole ladder"),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--trunk", "nowhere"], "--trunk nowhere"),
    ([], "--data FOLDER is needed"),
])
def test_a_bad_call_is_refused(tiny, tmp_path, arguments, words):
    with pytest.raises(Misuse, match=re.escape(words)):
        ladder.main([str(tiny()), "--runs", str(tmp_path / "runs"), *arguments])


def test_a_bad_call_is_one_line(tiny, tmp_path):
    words = "--data FOLDER is needed"
    done = subprocess.run([*TOOL, str(tiny()), "--runs", str(tmp_path / "runs")],
                          capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@slow
def test_runs_of_an_older_script_are_carried(tiny, corpus, tmp_path, monkeypatch, capsys):
    """Where every arm is equal; tests/test_carry.py is about the comparison itself."""
    asked = []

    def side_by_side(pairs, jobs):
        asked.extend(side.settings["NGRAM_ORDERS"] for pair in pairs for side in pair)
        apart = {"other": ["a weight"]} if b"# other\n" in pairs[0][1].source else {}
        return [ladder.carry.Comparison({"steps": 1}, apart, []) for _ in pairs]

    monkeypatch.setattr(ladder.carry, "side_by_side", side_by_side)
    text = TRUNK.read_text()
    for name in ("old", "now", "other"):
        (tmp_path / f"{name}.py").write_text(f"{text}# {name}\n")
    place = tiny(rungs=[0.001], seeds={"0.001": [1]}, set={**TINY["set"], "ITERATIONS": 4})

    def call(name: str, *arguments: str) -> int:
        return ladder.main([str(place), "--runs", str(tmp_path / "runs"), "--data", str(corpus),
                            "--trunk", str(tmp_path / f"{name}.py"), *arguments])

    assert call("old") == 0
    assert call("now", "--report") == 0
    assert "nothing has shown that it is equal" in (place / "README.md").read_text()
    assert call("other", "--carry") == 1
    assert call("now", "--carry") == 0 and asked[-4:] == ["2,3,4,5,6"] * 2 + ["0"] * 2
    entries = json.loads((place.parent / "carried.json").read_text())
    (base, arm), = (entry["for"] for entry in entries)  # a base by what makes it: ladders share some
    assert base.startswith("base: ") and "NGRAM_BUCKETS=300, NGRAM_ORDERS=2,3,4,5,6" in base
    assert arm == "tiny/none"

    capsys.readouterr()
    assert call("now", "--plan") == 0
    shown = capsys.readouterr().out
    assert shown.count("| 1 | 1 |") == 2 and "do not count" not in shown  # both are done
    assert call("now", "--report") == 0
    assert "shown to be equal to the present one" in (place / "README.md").read_text()
    assert call("other", "--plan") == 0
    shown = capsys.readouterr().out
    assert shown.count("| 0 | 1 |") == 2
    assert "2 kept runs do not count: script " in shown and "--carry shows whether" in shown


def test_no_ladder_and_no_json(tmp_path):
    with pytest.raises(Misuse, match="nobody: no ladder; there are"):
        ladder.read_ladder("nobody")
    (tmp_path / "ladder.json").write_text("{")
    with pytest.raises(Misuse, match="not JSON"):
        ladder.read_ladder(str(tmp_path))


def test_costs_follow_what_was_measured():
    asked = rungs.arm_settings(0.03, {}, {}, "base")
    jobs = [ladder.LadderJob("base", seed, asked, ROOT, rung="0.03") for seed in (1, 2, 3)]
    first = sum(ladder.prior_seconds(asked))
    assert ladder.ends(jobs, 2)[0]["0.03"] == pytest.approx(2 * first)
    jobs[0].state, jobs[0].metrics = "done", {"clocks": {"training": 3 * first}}
    assert ladder.ends(jobs, 1) == ({"0.03": pytest.approx(6 * first)}, pytest.approx(6 * first))
    assert ladder.prior_seconds(rungs.arm_settings(0.1, {}, {}, "base"))[0] > 3 * first
