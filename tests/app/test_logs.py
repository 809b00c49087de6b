"""Logs of others by our names: each program's format as a small file, and what is no log."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from tiny_run import metrics, tiny_config, train, write_pairs

from minirlhf.app.logs import TABLES, read_log
from minirlhf.errors import InputError
from minirlhf.runs.log import RunLog

PPO_STATE = Path(__file__).with_name("trl-1.12.0-ppo") / "trainer_state.json"


def written(path, content):
    """A file with this text, with an object as JSON, or with a list of objects one a line."""
    if not isinstance(content, str):
        lines = content if isinstance(content, list) else [content]
        content = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(content)
    return path


def series(path, stage="ppo"):
    return read_log(path).stages[stage]


# --- formats

GRPO = {
    "global_step": 3,
    "log_history": [
        {"epoch": 0.1, "kl": 0.01, "loss": 0.2, "reward": 1.0, "reward_std": 0.5, "step": 1},
        {"epoch": 0.2, "kl": 0.02, "loss": math.nan, "reward": 2.0, "reward_std": 0, "step": 2},
        {"epoch": 0.2, "eval_reward": 1.5, "eval_runtime": 3.0, "step": 2},
        {"epoch": 0.3, "kl": 0.03, "loss": "0.1", "reward": None, "reward_std": 0.5, "step": 3},
        {"step": 3, "total_flos": 0.0, "train_loss": 0.1, "train_runtime": 9.0},
    ],
}


def test_a_trainer_state_of_grpo(tmp_path):
    log = read_log(written(tmp_path / "trainer_state.json", GRPO))
    assert (log.source, log.folder) == ("trl-grpo", None)
    assert log.unknown == "epoch eval_runtime total_flos train_loss train_runtime".split()
    rows = log.stages["ppo"]
    names = {"step", "objective/kl_token", "loss/total", "objective/scores", "objective/scores_sd"}
    assert [row.keys() - names for row in rows] == [set(), {"eval/proxy"}, set()]
    assert [type(rows[1][name]) for name in ("step", "objective/scores_sd")] == [int, float]
    assert [row["loss/total"] for row in rows[::2]] == [0.2, 0.1] and rows[0]["step"] == 1
    assert rows[1]["eval/proxy"] == 1.5
    assert math.isnan(rows[1]["loss/total"]) and math.isnan(rows[2]["objective/scores"])


def test_the_state_of_a_folder_is_that_of_its_last_checkpoint_or_its_own(tmp_path):
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"reward": float(step), "step": step}]}
        written(tmp_path / f"checkpoint-{step}" / "trainer_state.json", state)
    log = read_log(tmp_path)
    assert log.stages["ppo"][0]["objective/scores"] == 10
    assert series(tmp_path / "checkpoint-9")[0]["objective/scores"] == 9
    written(tmp_path / "trainer_state.json", GRPO)
    assert len(series(tmp_path)) == 3


def test_the_ppo_trainer_of_trl(tmp_path):
    log = read_log(PPO_STATE.parent)
    assert log.source == "trl-ppo" and log.unknown == ["epoch", "eps", "val/ratio_var"]
    theirs = json.loads(PPO_STATE.read_text())["log_history"]
    for here, there in zip(log.stages["ppo"], theirs, strict=True):
        assert here == {k: float(x) for k, x in there.items() if k not in log.unknown}
        penalty = -0.05 * here["objective/kl"]  # the sum over a response, and no token mean
        assert here["objective/non_score_reward"] == pytest.approx(penalty, abs=1e-6)


VERL = {
    "actor/reward_kl_penalty": 0.002,
    "actor/reward_kl_penalty_coeff": 0.001,
    "actor/ppo_kl": -0.0003,
    "actor/pg_loss": 0.01,
    "actor/pg_clipfrac": 0.02,
    "actor/entropy": 0.4,
    "critic/score/mean": 0.5,
    "critic/rewards/mean": 0.4,
    "critic/vf_explained_var": 0.3,
    "response_length/mean": 200.0,
    "response_length/clip_ratio": 0.25,
    "perf/throughput": 1e3,
}


def verl_rows(n=3):
    return [{"step": step, "data": VERL | {"training/global_step": step}} for step in range(n)]


def test_the_file_logger_of_verl(tmp_path):
    log = read_log(written(tmp_path / "run.jsonl", verl_rows()))
    assert (log.source, log.unknown) == ("verl", ["perf/throughput"])
    assert log.stages["ppo"][2] == {
        "step": 2,
        "objective/kl_token": 0.002,
        "objective/kl_coef": 0.001,
        "policy/kl_old_token": -0.0003,
        "loss/policy_avg": 0.01,
        "policy/clipfrac_avg": 0.02,
        "policy/entropy_avg": 0.4,
        "objective/scores": 0.5,
        "objective/rlhf_reward": 0.4,
        "ppo/val/var_explained": 0.3,
        "response_length/mean": 200.0,
        "response_length/clip_ratio": 0.25,
    }


OPENRLHF = "kl,policy_loss,critic_loss,reward,return,response_length,truncated,ppo_clip_ratio"
OPENRLHF_NUMBERS = "0.01,0.2,0.3,1.5,1.2,100,0.1,0.02"


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_an_export_of_openrlhf_from_wandb(tmp_path, mark):
    """Its logger writes train/..; W&B adds its own columns, and leaves cells empty."""
    names = ["train/" + name for name in OPENRLHF.split(",")]
    rows = [
        ["_step", "_runtime", "eval/accuracy", "train/global_step", *names],
        ["0", "1.5", "", "1", *OPENRLHF_NUMBERS.split(",")],
        ["7", "1.6", "0.5", "", *[""] * 8],
        ["8", "1.7", "", "2", *OPENRLHF_NUMBERS.replace("0.01,", "NaN,").split(",")],
    ]
    text = "\n".join(mark.join(row) for row in rows)
    log = read_log(written(tmp_path / "export.csv", text))
    assert log.source == "openrlhf" and log.unknown == ["_runtime", "eval_accuracy"]
    first, last = log.stages["ppo"]
    assert (first["step"], last["step"]) == (1, 2) and math.isnan(last["objective/kl_token"])
    assert first["objective/scores"] == 1.5 and first["objective/rlhf_reward"] == 1.2
    assert first["objective/kl_token"] == 0.01 and first["response_length/clip_ratio"] == 0.1


def test_the_chart_of_one_run(tmp_path):
    name = "my - run - critic/rewards/mean"
    text = f'"Step","{name}","{name}__MIN","{name}__MAX"\n"5","0.5","0.5","0.5"\n'
    rows = series(written(tmp_path / "wandb_export.csv", text))
    assert rows == [{"step": 5, "objective/rlhf_reward": 0.5}]
    text = "Step,a - critic/rewards/mean,b - critic/rewards/mean\n1,0.5,0.6\n"
    with pytest.raises(InputError, match="columns of 2 runs: keep those of one"):
        read_log(written(tmp_path / "two.csv", text))


@pytest.mark.parametrize("rows", [[{"kl": 0.1, "reward": 1, "policy_loss": 0, "return": 2}] * 3])
def test_a_list_of_rows_without_steps_is_counted(tmp_path, rows):
    path = tmp_path / "history.json"
    path.write_text(json.dumps(rows, indent=1))
    assert read_log(path).source == "openrlhf"
    assert [row["step"] for row in series(path)] == [0, 1, 2]


def test_after_a_resume_the_last_numbers_count(tmp_path):
    rows = [{"step": s, "reward": r} for s, r in ((2, 0.2), (3, 0.3), (1, 0.1), (2, 0.9), (3, 0.8))]
    rows += [{"step": 3, "kl": 0.5, "stage": 2}, {"step": None, "reward": 7}, {"reward": 7}]
    rows += [{"step": 10**400, "reward": 7, "kl": [1]}]
    got = series(written(tmp_path / "log.jsonl", rows))
    assert [(row["step"], row["objective/scores"]) for row in got] == [(1, 0.1), (2, 0.9), (3, 0.8)]
    assert got[2]["objective/kl_token"] == 0.5 and "objective/kl_token" not in got[0]


@pytest.mark.parametrize("table", TABLES)
def test_a_log_is_known_by_its_names(tmp_path, table):
    """All names of a program, and the half that is logged without critic, penalty or entropy."""
    names = list(TABLES[table]["names"])
    for some in (names, names[::2] + names[:1]):
        log = read_log(written(tmp_path / "log.jsonl", [{"step": 1, **dict.fromkeys(some, 0.5)}]))
        assert log.source == table and log.unknown == []


def test_what_is_logged_by_every_trainer_is_fine_tuning(tmp_path):
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "entropy": 0.5}
    log = read_log(written(tmp_path / "log.jsonl", [row]))
    assert log.source == "trl-sft" and log.stages["sft"][0]["loss/sft"] == 2.0


# --- names

NEW = """objective/kl_token policy/kl_old_token policy/kl_sampler_token policy/kl_sampler_k3_token
    response_length/max response_length/clip_ratio loss/total loss/kl_avg frac_reward_zero_std
    loss/dpo rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen
    logps/rejected heldout/loss_dpo heldout/loss_sft"""


def test_every_name_is_one_of_ours_or_a_known_addition(desk):
    """The metrics of a run, those of DPO and of options that are off, and what we do not log."""
    ours = {name for row in metrics(desk) for name in row} | set(NEW.split())
    for table, content in TABLES.items():
        assert content["names"] and set(content["names"].values()) <= ours, table


def test_a_mean_over_tokens_is_never_the_sum():
    """Only TRL's PPO and its relatives log the KL summed over a response."""
    sums = {t for t, c in TABLES.items() if "objective/kl" in c["names"].values()}
    assert sums == {"trl-ppo", "trl-online-dpo"}
    means = {t for t, c in TABLES.items() if "objective/kl_token" in c["names"].values()}
    assert means == {"trl-grpo", "verl", "openrlhf"}


# --- runs of ours


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A finished run of the support world, with its mirror for spreadsheets."""
    config = tiny_config(tmp_path_factory.mktemp("desk") / "desk", log="csv")
    train(config)
    return config.out


def test_a_run_of_ours(desk):
    log = read_log(desk)
    assert (log.source, log.unknown, log.folder) == ("minirlhf", [], desk)
    assert list(log.stages) == ["sft", "reward_model", "ppo"]
    for stage, rows in log.stages.items():
        for here, there in zip(rows, metrics(desk, stage), strict=True):
            for name in there.keys() - {"stage"}:
                same = math.isnan(here[name]) if there[name] is None else here[name] == there[name]
                assert same and isinstance(here[name], int if name == "step" else float)


def test_its_files_elsewhere_are_the_same_log(desk, tmp_path):
    whole = read_log(desk)
    for name in ("metrics.jsonl", "metrics.csv"):
        path = tmp_path / name
        path.write_bytes((desk / name).read_bytes())
        log = read_log(path)
        assert (log.source, log.unknown, log.folder) == ("minirlhf", [], None)
        assert list(log.stages) == list(whole.stages)
        for stage, rows in log.stages.items():
            for here, there in zip(rows, whole.stages[stage], strict=True):
                assert {k: x for k, x in there.items() if x == x} == {
                    k: x for k, x in here.items() if x == x
                }


def test_dpo_is_a_stage(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    train(tiny_config(tmp_path / "run", pairs=pairs, stages="sft,dpo"))
    assert list(read_log(tmp_path / "run").stages) == ["sft", "dpo"]
    assert "rewards/margins" in series(tmp_path / "run", "dpo")[0]


def test_a_run_without_a_line_has_no_stages(tmp_path):
    RunLog(tmp_path)
    assert read_log(tmp_path).stages == {}


# --- what is no log


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", '{"log_history": [', r"expected JSON, a JSON object a line, or CSV; got "),
        ("a.json", "[1, 2]", "no rows of names and numbers"),
        ("a.json", "[" * 100_000, "expected JSON"),
        ("a.json", '{"log_history": []}', r"\(like loss, .*objective/kl.*\); got none: log under"),
        ("a.json", '{"weights": 1}\n{"biases": 2}', "got weights, biases: log under such names"),
        ("a.csv", "Dear diary, today\nI have not logged.\n", "got Dear diary: log under"),
        ("a.csv", "step,reward\n1,\0\n" + "x" * 200_000, "expected JSON"),
        ("a.csv", " \n", "the file is empty"),
        ("events.out.tfevents.1", "not events", "got none: log under such names"),
    ],
)
def test_a_file_that_is_no_log_is_one_sentence(tmp_path, name, content, says):
    path = written(tmp_path / name, content)
    csv.field_size_limit(131_072)  # Python's own: reading a corpus raises it for the process
    with pytest.raises(InputError, match=says) as refused:
        read_log(path)
    assert str(path) in str(refused.value) and "expected" in str(refused.value)


def test_a_folder_without_a_log_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="got a folder without: name a log in JSON or CSV"):
        read_log(tmp_path)
    with pytest.raises(InputError, match="expected a file; found none"):
        read_log(tmp_path / "nothing")
    written(tmp_path / "metrics.jsonl", '{"step": 1}\n')
    with pytest.raises(
        InputError, match=re.escape("metrics.jsonl:1: expected a line with its stage")
    ):
        read_log(tmp_path)
