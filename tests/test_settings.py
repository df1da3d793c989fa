"""The environment is the interface: every variable, every refusal."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

# The submitted command line of #832, without its bigrams: the trunk has them by NGRAM_ORDERS.
PUBLISHED_832 = {
    "RUN_ID": "x", "SEED": "42", "DATA_PATH": "d", "VOCAB_SIZE": "260", "NUM_LAYERS": "13",
    "MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4", "MLP_MULT": "2.0", "TIE_EMBEDDINGS": "1",
    "ROPE_BASE": "10000", "LOGIT_SOFTCAP": "30", "EMBED_LR": "0.6", "HEAD_LR": "0.008",
    "TIED_EMBED_LR": "0.035", "TIED_EMBED_INIT_STD": "0.005", "MATRIX_LR": "0.025", "SCALAR_LR": "0.025",
    "MUON_BETA2": "0.95", "MUON_MOMENTUM": "0.99", "MUON_MOMENTUM_WARMUP_START": "0.92",
    "MUON_MOMENTUM_WARMUP_STEPS": "1500", "MUON_BACKEND_STEPS": "5", "BETA1": "0.9", "BETA2": "0.95",
    "ADAM_EPS": "1e-8", "GRAD_CLIP_NORM": "0.3", "MUON_WD": "0.04", "ADAM_WD": "0.04", "EMA_ENABLED": "1",
    "EMA_DECAY": "0.997", "SWA_ENABLED": "0", "SWA_EVERY": "200", "QAT_ENABLED": "0", "LATE_QAT": "0",
    "QAT_THRESHOLD": "0.1", "XSA_LAST_N": "4", "ROPE_DIMS": "16", "LN_SCALE": "1",
    "BIGRAM_VOCAB_SIZE": "0", "BIGRAM_DIM": "32", "MTP_NUM_HEADS": "0", "MTP_LOSS_WEIGHT": "0.2",
    "EVAL_STRIDE": "512", "JEPA_CHUNK_SIZE": "8", "JEPA_LATENT_DIM": "256", "JEPA_PROJ_HIDDEN": "256",
    "JEPA_SIGREG_PROJS": "256", "JEPA_SIGREG_KNOTS": "17", "JEPA_LAMBDA_MAX": "0.001",
    "JEPA_SIGREG_WEIGHT": "0.02", "JEPA_PHASE1_FRAC": "0.3", "JEPA_PHASE2_FRAC": "0.5", "JEPA_LR": "0.001",
    "VAL_BATCH_SIZE": "524288", "VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "200", "ITERATIONS": "9000",
    "WARMDOWN_ITERS": "3000", "WARMUP_STEPS": "20", "TRAIN_BATCH_TOKENS": "393216", "TRAIN_SEQ_LEN": "4096",
    "EVAL_SEQ_LEN": "4096", "MAX_WALLCLOCK_SECONDS": "600", "QK_GAIN_INIT": "1.5",
}


def test_published_command_line_is_understood(trunk):
    """Every name is honoured, refused unless it means off, or told to be ignored: none is passed over."""
    args = trunk.Hyperparameters(PUBLISHED_832)
    told = {warning.split()[0] for warning in args.warnings}
    known = {*args.RETIRED, *(name.upper() for name in args.vars())}
    assert set(PUBLISHED_832) - known == told
    assert {"SWA_EVERY", "QAT_THRESHOLD", "MTP_LOSS_WEIGHT"} <= told
    assert (args.num_layers, args.muon_momentum) == (13, 0.99)


def test_variables_of_the_field_that_a_script_lacks_are_told(trunk):
    """What torchrun and a machine set is no business of ours."""
    field = {"LQER_ENABLED": "1", "SPARSE_ATTN_GATE": "1", "TTT_MASK": "no_qv", "MUON_ROW_NORM": "1"}
    other = {"LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin", "HOME": "/", "NCCL_DEBUG": "INFO", "PYTHONPATH": ""}
    warnings = trunk.Hyperparameters(field | other).warnings
    assert warnings == [f"{name} is no variable of this script: ignored" for name in field]


@pytest.mark.parametrize("name, value", [
    ("SWA_ENABLED", "1"), ("MTP_NUM_HEADS", "2"), ("LATE_QAT", "1"), ("BIGRAM_VOCAB_SIZE", "4096"),
    ("QUANT_CLIP", "mse"), ("QAT_START", "0.5"), ("TIE_EMBEDDINGS", "0"),
])
def test_retired_variable_is_refused_with_its_reason(trunk, name, value):
    with pytest.raises(trunk.UserError, match=f"{name}='{value}' is retired: "):
        trunk.Hyperparameters({name: value})


def test_retired_variables_are_taken_at_their_off_value(trunk):
    """The settings that a run before their retirement recorded still start one."""
    retired = trunk.Hyperparameters.RETIRED.items()
    off = {name: (value.split() or [""])[-1] for name, (value, _) in retired}
    args = trunk.Hyperparameters(off)
    assert args.settings() == trunk.Hyperparameters().settings() and not args.warnings


BAD_VALUES = [
    ("NUM_LAYERS", "0"), ("NUM_LAYERS", "three"), ("MODEL_DIM", "7.5"), ("UNET_SKIPS", "yes"),
    ("MATRIX_LR", "-1"), ("MATRIX_LR", "nan"), ("DTYPE", "int8"), ("JEPA_PHASE1_FRAC", "1.5"),
    ("NGRAM_ORDERS", "2,2"), ("NGRAM_ORDERS", "1"), ("NGRAM_ORDERS", "a"), ("BITS", "mlp:9"),
    ("ATTN_WINDOW", "0"), ("ATTN_WINDOW_LAYERS", "13"), ("ATTN_WINDOW_LAYERS", "0,0"), ("BITS", "nose:6"),
    ("QUANT_K", "mlp"), ("COMPRESSOR", "rar"),
]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_bad_value_names_variable_value_and_what_is_accepted(trunk, name, value):
    with pytest.raises(trunk.UserError) as caught:
        trunk.Hyperparameters({name: value})
    assert name in str(caught.value) and value.split(":")[0] in str(caught.value)
    assert "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_keeps_its_spaces_and_a_choice_loses_them(trunk):
    args = trunk.Hyperparameters(
        {"RUN_ID": " def ", "DTYPE": " fp32 ", "NUM_LAYERS": " 3 ", "UNET_SKIPS": " 1 "}
    )
    assert (args.run_id, args.dtype, args.num_layers, args.unet_skips) == (" def ", "fp32", 3, True)


BAD_PAIRS = [
    {"NUM_HEADS": "7"}, {"NUM_KV_HEADS": "3"}, {"ROPE_DIMS": "5"}, {"ROPE_DIMS": "256"},
    {"TRAIN_BATCH_TOKENS": "393217"}, {"EVAL_STRIDE": "8192"}, {"EVAL_STRIDE": "12"},
    {"JEPA_SIGREG_GROUP": "5"}, {"JEPA_PHASE1_FRAC": "0.9"}, {"RANK": "1"}, {"TRAIN_SEQ_LEN": "100"},
    {"RESUME": "auto"},
]


@pytest.mark.parametrize("overrides", BAD_PAIRS, ids=str)
def test_impossible_combination_names_both_variables(trunk, overrides):
    with pytest.raises(trunk.UserError) as caught:
        trunk.Hyperparameters(overrides)
    assert str(caught.value).count("=") >= 2 and next(iter(overrides)) in str(caught.value)


def test_misspelt_variable(trunk):
    with pytest.raises(trunk.UserError, match="NUM_LAYER is not a variable.*did you mean NUM_LAYERS"):
        trunk.Hyperparameters({"NUM_LAYER": "3"})
    for off in ("0", "false"):
        args = trunk.Hyperparameters({"NUM_LAYER": "3", "STRICT_ENV": off})
        assert args.num_layers == 13 and "NUM_LAYERS" in args.warnings[0]


def test_usual_environments_raise_no_false_alarm(trunk):
    ordinary = [
        "PATH", "HOME", "USER", "SHELL", "LANG", "TERM", "PWD", "HOSTNAME", "DISPLAY", "EDITOR", "LOGNAME",
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE",
        "GROUP_RANK", "ROLE_NAME", "TORCHELASTIC_RUN_ID", "NCCL_DEBUG", "PYTHONPATH", "VIRTUAL_ENV", "CXX",
        "MALLOC_TOP_PAD_", "TMPDIR", "SSH_TTY", "MAIL", "SLURM_JOB_ID", "HF_HOME", "DATA_DIR",
    ]
    args = trunk.Hyperparameters({name: "1" for name in ordinary if name != "MASTER_ADDR"})
    assert not args.warnings


def call(**environ):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **environ},
    )


def test_help_lists_every_variable(trunk):
    text = trunk.Hyperparameters.help()
    assert all(f"  {var.name} " in text for var in trunk.Hyperparameters.vars().values())


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    for environ in (
        {"NUM_HEADS": "7"}, {"MATRIX_LRR": "1"}, {"DATA_PATH": str(tmp_path / "none")},
        {"DATA_PATH": str(tmp_path)}, {"EVAL_ONLY": "1", "ARTIFACT": str(tmp_path / "none.bin")},
        {"WORLD_SIZE": "2"},
    ):
        done = call(**environ)
        assert done.returncode == 2, done.stderr
        who = "rank 0: " if "WORLD_SIZE" in environ else ""  # of several ranks each says who it is
        assert done.stderr.startswith(f"{who}error: "), done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout


def test_every_environment_read_is_in_the_settings():
    """The file mentions the environment in one place only: where `main` hands it to Hyperparameters."""
    text = (ROOT / "train_gpt.py").read_text()
    assert text.count("os.environ") == 2 and "getenv" not in text  # before and after an artifact is known
    assert all(key == key.upper() for key in TINY)


def test_frame_and_budgets():
    text = (ROOT / "train_gpt.py").read_text()
    lines = text.splitlines()
    rulers = [
        lines[i + 1]
        for i in range(len(lines) - 2)
        if lines[i].startswith("# ---") and lines[i + 2].startswith("# ---")
    ]
    assert rulers == [
        "# HYPERPARAMETERS",
        "# RUNTIME",
        "# ATTENTION",
        "# DATA",
        "# QUANTISER",
        "# AUXILIARY OBJECTIVES",
        "# MODEL",
        "# OPTIMIZERS",
        "# ARTIFACT",
        "# EVALUATION",
        "# GENERATION",
        "# TRAINING",
    ]
    assert len(lines) <= 3000 and len(text.encode()) <= 150_000 and max(map(len, lines)) <= 110
    start = lines.index("def main() -> int:")
    assert lines.index('if __name__ == "__main__":') - start <= 60
