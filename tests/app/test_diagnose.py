"""`minirlhf diagnose`: rules on series with a known answer, runs with a planted fault."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_run import as_flags, call, refusal, tiny_config

import minirlhf
from minirlhf.app.diagnose import check_names, diagnose, difference
from minirlhf.app.rules import RULES, Seen
from minirlhf.errors import InputError
from minirlhf.fields import with_fields
from minirlhf.nn.sampling import Sampling
from minirlhf.runs import pipeline
from minirlhf.runs.config import TrainConfig, flat, save_config
from minirlhf.runs.log import read_metrics
from minirlhf.runs.session import open_session
from minirlhf.train import ppo

N = 12
FLAT = {  # a run in which nothing happens
    "episode": [64.0 * (i + 1) for i in range(N)],
    "objective/kl": 1.0,
    "objective/kl_full_seq": 1.0,
    "objective/kl_sd": 2.0,
    "objective/kl_coef": 0.2,
    "objective/non_score_reward": -0.2,
    "objective/entropy": 5.0,
    "objective/surprise": [0.2, -0.2] * 6,
    "objective/surprise_se": 0.3,
    "objective/scores": [0.0, 0.5, *[0.8] * 10],
    "objective/scores_sd": 1.0,
    "objective/gold": [1.5, 1.6, 1.4, 1.7, 1.6, 1.8, 1.7, 1.8, 1.9, 1.8, 1.9, 1.8],
    "loss/policy_avg": 0.01,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "policy/updates": 8.0,
    "policy/approxkl_avg": 0.01,
    "policy/approxkl_first": 1e-13,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 0.4,
    "ppo/val/var": 0.01,
    "ppo/returns/var": 0.5,
    "ppo/returns/mean": 0.0,
    "ppo/returns/score_square": 0.5,
    "response_length/clip_ratio": 0.0,
    "response_length/mean": 10.0,
    "response/repeated_bigrams": 0.02,
    "response/corr_score_length": 0.3,
    "response/corr_score_repeats": 0.2,
    "loss/kl_avg": 0.1,
}


def rows(n=N, **changes):
    """Rows of a log: FLAT with other columns, a list or one number for all."""
    columns = {name: np.broadcast_to(x, N) for name, x in (FLAT | changes).items()}
    return [{"step": i, **{k: float(x[i]) for k, x in columns.items()}} for i in range(n)]


def config(**ppo):
    return with_fields(TrainConfig(), {"ppo": ppo}, "")


def found(*, ppo=None, n=N, **changes):
    """{rule: onset} of the rules that hold."""
    seen = Seen(rows(n, **changes), config(**(ppo or {})))
    signs = {name: rule.look(seen) for name, rule in RULES.items()}
    return {name: sign[0] for name, sign in signs.items() if sign}


def from_step(i, before, after):
    return [before] * i + [after] * (N - i)


K3 = {"kl_mode": "loss_k3_tok"}
PLANTED = {  # rule -> columns with an answer, its onset, columns that miss it by little, settings
    "non-finite": ({"loss/policy_avg": from_step(4, 0.1, math.nan)}, 4, {}, {}),
    "penalty-sign": (
        {"objective/non_score_reward": from_step(3, -0.2, 0.2)},
        3,
        {"objective/non_score_reward": [0.2, 0.2, *[-0.2] * 10]},
        {},
    ),
    "another-sampler": (
        {"objective/surprise": 1.3},
        1,  # 2.6 / (0.3 sqrt 2) is the first above 5
        {"objective/surprise": [1.3, *[0.0] * 11]},
        {},
    ),
    "late-samples": (
        {"objective/surprise": from_step(4, 0.0, 1.0)},
        8,  # 5 / (0.3 sqrt 9) > 5, 4 / (0.3 sqrt 8) is not
        {"objective/surprise": from_step(8, 0.0, 1.0)},
        {},
    ),
    "ratio-not-one": (
        {"policy/approxkl_first": from_step(2, 1e-13, 1e-4)},
        2,
        {"policy/approxkl_first": 1e-9},
        {},
    ),
    "ratio-always-one": (
        {"policy/approxkl_avg": 1e-13},
        0,
        {"policy/approxkl_avg": 1e-13, "policy/updates": 1.0},
        {},
    ),
    "score-position": ({"ppo/returns/var": 0.2}, 0, {"ppo/returns/var": 0.3}, {}),
    "reward-scale": (
        {"objective/scores_sd": 20.0, "ppo/returns/var": 300.0},
        0,
        {"objective/scores_sd": 1.4, "ppo/returns/var": 1.0},
        {},
    ),
    "reward-drift": (
        {"objective/scores": [0.4 * i for i in range(N)]},
        8,  # means of three up to step 8: 2.8 = 0.4 * 7 > 0.5 + 1.5 sqrt 2
        {"objective/scores": [0.2 * i for i in range(N)]},
        {},
    ),
    "penalty-gradient": ({}, 0, {"objective/kl_coef": 0.0}, {"kl_mode": "loss_k1"}),
    "inverted-k3": ({"loss/kl_avg": 0.2}, 0, {"loss/kl_avg": 0.14}, K3),
    "reference-is-policy": ({"objective/kl": 0.0}, 1, {"objective/kl": 1e-3}, {}),
    "reference-resets": ({}, 6, None, {"reset_reference_every": 3}),
    "value-not-learning": ({"ppo/val/var": 0.0}, 1, {"ppo/val/var": [0.0, *[1e-4] * 11]}, {}),
    "penalty-too-strong": ({"objective/kl_coef": 2.0}, 0, {"objective/kl_coef": 1.0}, {}),
    "step-too-large": (
        {"policy/clipfrac_avg": 0.5, "policy/approxkl_avg": 0.1},
        0,
        {"policy/clipfrac_avg": 0.7, "policy/approxkl_avg": 1e-3},  # a clip of 3e-4, as GSPO's
        {},
    ),
    "pays-length": (
        {"response/corr_score_length": 0.95, "response_length/mean": from_step(3, 10.0, 14.0)},
        4,  # (10 + 14 + 14) / 3 > 1.25 * 10
        {"response/corr_score_length": 0.95},
        {},
    ),
    "pays-repetition": (
        {"response/corr_score_repeats": 0.9, "response/repeated_bigrams": from_step(3, 0.02, 0.08)},
        4,
        {"response/repeated_bigrams": from_step(3, 0.02, 0.08)},
        {},
    ),
    "penalty-too-weak": (
        {"objective/kl": from_step(5, 1.0, 9.0), "objective/kl_coef": 0.001},
        6,
        {"objective/kl": from_step(5, 1.0, 9.0)},
        {},
    ),
    "missing-eos": (
        {"response_length/clip_ratio": 0.53},
        0,
        {"response_length/clip_ratio": 0.3},
        {},
    ),
    "over-optimisation": (
        {"objective/gold": [*FLAT["objective/gold"][:7], 1.5, 1.1, 0.8, 0.6, 0.4]},
        10,
        {},
        {},
    ),
    "kl-runaway": (
        {"objective/kl": from_step(5, 1.0, 30.0), "objective/kl_coef": 0.2},
        6,
        {"objective/kl": from_step(5, 1.0, 14.0)},
        {},
    ),
    "entropy-collapse": (
        {"policy/entropy_avg": from_step(6, 0.4, 0.05)},
        8,
        {"policy/entropy_avg": from_step(6, 0.4, 0.25)},
        {},
    ),
    "repetition": (
        {"response/repeated_bigrams": from_step(6, 0.02, 0.3)},
        7,  # (0.02 + 0.3 + 0.3) / 3 > 3 * 0.06
        {"response/repeated_bigrams": from_step(6, 0.02, 0.09)},
        {},
    ),
    "length-drift": (
        {"response_length/mean": from_step(6, 10.0, 20.0)},
        7,
        {"response_length/mean": from_step(6, 10.0, 13.0)},
        {},
    ),
    "negative-kl": (
        {"objective/kl": from_step(6, 1.0, -1.0)},
        6,
        {"objective/kl": from_step(6, 0.1, -0.3)},  # 2 / 8 is a standard error
        {},
    ),
}


def test_every_rule_of_a_log_has_its_series():
    assert {name for name, rule in RULES.items() if rule.holds} == PLANTED.keys()


def test_nothing_is_found_where_nothing_happens():
    assert found() == {}


@pytest.mark.parametrize("name", PLANTED)
def test_a_rule_on_a_series_with_a_known_answer_and_on_a_near_miss(name):
    columns, onset, near, ppo = PLANTED[name]
    assert found(ppo=ppo, **columns)[name] == onset
    if near is not None:
        assert name not in found(ppo=ppo, **near) or near == {} == columns
    if near == {}:
        assert name not in found()


@pytest.mark.parametrize("name", PLANTED)
def test_what_has_been_said_stays_said(name):
    """Of a longer log a rule says the same step: live and afterwards agree."""
    columns, onset, _, ppo = PLANTED[name]
    told = [found(ppo=ppo, n=n, **columns).get(name) for n in range(1, N + 1)]
    first = next(i for i, step in enumerate(told) if step is not None)
    assert set(told[first:]) == {onset} and first >= onset


@pytest.mark.parametrize("name", [name for name in PLANTED if RULES[name].needs])
def test_a_rule_without_its_metric_is_silent(name):
    columns, _, _, ppo = PLANTED[name]
    for lacks in RULES[name].needs:
        some = [{k: x for k, x in row.items() if k != lacks} for row in rows(**columns)]
        known = None if lacks == "config" else config(**ppo)
        assert RULES[name].look(Seen(some, known)) is None


def test_rules_say_what_they_should():
    flags = {"--" + name.replace("_", "-") for name, _ in flat(TrainConfig())}
    for rule in RULES.values():
        assert rule.severity in ("error", "warning")
        assert rule.cause and rule.knob and rule.source
        named = {w.rstrip(",:") for w in rule.knob.split() if w.startswith("--")}
        assert named <= flags, rule.name


def test_how_often_a_rule_is_right_is_what_the_published_table_says():
    readme = (Path(minirlhf.__file__).parent / "app/README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w-]+)` \| (.* \d+ of \d+ .*) \|$", readme, re.M))
    for rule in RULES.values():
        cells = table[rule.name].split(" | ")
        first = f"named first in {cells[1]} planted runs, " * (not cells[1].endswith(" 0"))
        assert rule.measured == f"{first}found in {cells[5]} healthy ones"


def test_a_row_that_is_made_again_takes_the_place_of_the_former():
    seen = Seen(rows(4))
    seen.add(2, rows(**{"objective/kl": 7.0})[2])
    assert seen.steps == [0, 1, 2] and seen["objective/kl"].tolist() == [1.0, 1.0, 7.0]
    assert len(seen["objective/scores"]) == 3


# --- runs


@pytest.fixture
def run_folder(tmp_path):
    """A folder with a log of given rows."""

    def write(rows, name="run", **ppo):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"stage": "ppo", **row}) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        save_config(folder / "config.toml", dataclasses.replace(config(**ppo), out=folder))
        (folder / "samples.jsonl").touch()
        return folder

    return write


def test_a_finding_has_four_lines_and_the_status_is_for_ci(run_folder, capsys):
    folder = run_folder(rows(**{"response_length/clip_ratio": 0.53}))
    status, out, _ = call(capsys, "diagnose", folder)
    lines = out.splitlines()
    assert status == 1 and lines[0].startswith("1. warning from step 0: missing-eos")
    assert "0.53" in lines[1] and lines[1].lstrip().startswith("seen:")
    assert RULES["missing-eos"].cause in lines[2] and RULES["missing-eos"].knob in lines[3]
    status, out, _ = call(capsys, "diagnose", folder, "--json")
    first = json.loads(out)["findings"][0]
    assert status == 1 and first["rule"] == "missing-eos" and first["onset"] == 0
    assert call(capsys, "diagnose", run_folder(rows(), "well"))[0] == 0
    assert "empty" in refusal(capsys, "diagnose", folder.parent / "empty")


def test_a_log_without_the_metrics_is_silent_and_says_so(run_folder):
    few = [{"step": i, "objective/kl": 1.0 * i, "objective/scores": 1.0} for i in range(N)]
    findings, unseen, iterations = found = diagnose(run_folder(few))
    assert not findings and iterations == N
    assert str(found).startswith(f"nothing found in {N} iterations of PPO\nnot seen: ")
    assert "over-optimisation: without objective/gold" in unseen
    assert any(line.startswith("penalty-too-weak: without objective/kl_coef") for line in unseen)
    none = diagnose(run_folder([], "none"))
    assert none.iterations == 0 and "there is no iteration of it" in none.unseen[0]


def test_what_never_was_a_number_is_non_finite(tmp_path):
    never = [{"step": i, "loss/policy_avg": None, "objective/kl": 1.0} for i in range(N)]
    assert RULES["non-finite"].look(Seen(never))[0] == 0
    once = [{"step": i, "loss/policy_avg": None if i == 4 else 1.0} for i in range(N)]
    assert RULES["non-finite"].look(Seen(once))[0] == 4
    gaps = [{"step": i} | ({"loss/policy_avg": 1.0} if i % 2 else {}) for i in range(N)]
    assert not RULES["non-finite"].look(Seen(gaps))  # what is not there is no wrong number


def test_rows_of_an_evaluation_between_those_of_training_are_none_of_them(tmp_path):
    """A healthy log of TRL: entropy and length as they were, whatever stands between."""
    same = {"entropy": 0.5, "completions/mean_length": 50.0, "kl": 0.01, "loss": 0.1}
    history = [{"step": i, **same} for i in range(1, 12)]
    between = [{"step": i, "eval_reward": 1.0} for i in range(0, 12, 3)]
    history = sorted([*history, *between], key=lambda row: row["step"])
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    found = diagnose(tmp_path / "trainer_state.json")
    assert not found.findings and found.iterations == 11


def test_a_reward_that_seldom_or_always_pays_is_not_its_scale_nor_the_penaltys():
    never = {"objective/scores_sd": 0.0, "objective/kl_sd": 1e-6}
    assert not found(**never).keys() & {"reward-scale", "penalty-too-strong"}
    always = {"objective/scores_sd": from_step(6, 1.0, 0.0)}
    assert "penalty-too-strong" not in found(**always)


def test_batches_of_a_few_replies_accuse_nobody():
    few = {"episode": [4.0 * (i + 1) for i in range(N)], "objective/surprise": 3.0}
    assert "another-sampler" not in found(**few) and "another-sampler" in found(
        **{"objective/surprise": 3.0}
    )


def test_a_negative_kl_is_seen_without_its_spread():
    """The log of another program: noise around 0 is none, a KL that falls and falls is one."""
    noise = np.random.default_rng(0).standard_normal(40)
    for kl, holds in ((noise, False), (-0.5 * np.arange(40) + 0.3 * noise, True)):
        seen = Seen([{"step": i, "objective/kl": x} for i, x in enumerate(kl)])
        assert bool(RULES["negative-kl"].look(seen)) == holds


def test_a_log_of_another_program_is_diagnosed_by_what_it_has(tmp_path):
    """GRPO's KL is a mean over tokens: 0.3 of it in 100 tokens are 30 nats a reply."""
    history = [{"step": i, "kl": 0.3, "completions/mean_length": 100.0} for i in range(N)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    findings, unseen, _ = diagnose(tmp_path / "trainer_state.json")
    assert [finding.rule for finding in findings] == ["kl-runaway"]
    assert "objective/kl 30" in findings[0].evidence and "--" not in findings[0].knob
    assert any(line.endswith("made again from a run folder alone") for line in unseen)


def test_the_first_finding_is_the_cause(run_folder):
    """k1 as loss lets the KL run away and gold fall; the placement stands above what it did."""
    columns = {"objective/kl": from_step(5, 1.0, 60.0), "policy/entropy_avg": 0.02}
    columns["policy/entropy_avg"] = from_step(6, 0.4, 0.02)
    folder = run_folder(rows(**columns, **{"objective/kl_coef": 0.001}), kl_mode="loss_k1")
    names = [finding.rule for finding in diagnose(folder).findings]
    assert names == ["penalty-gradient", "penalty-too-weak", "kl-runaway", "entropy-collapse"]


def test_where_one_run_left_another(run_folder, capsys):
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((2, N))
    ramp = np.maximum(np.arange(N) - 5, 0) * 1.0
    one = run_folder(rows(**{"objective/kl": 1 + noise[0]}), "a")
    two = run_folder(rows(**{"objective/kl": 1 + noise[1] + ramp}), "b", kl_coef=0.1)
    settings, first = difference(one, two)
    assert settings == "ppo.kl_coef: 0.2 and 0.1"
    assert re.match(r"from step [678] objective/kl 1\.\d+ and [23]\.\d+, \d+ standard", first)
    status, out, _ = call(capsys, "diagnose", "--diff", one, two)
    assert status == 0 and out.splitlines() == [settings, first]
    assert json.loads(call(capsys, "diagnose", "--json", "--diff", one, two)[1])["differences"]
    assert difference(one, one) == [f"no metric is 5 standard errors apart in {N} steps of PPO"]
    assert "--diff" in refusal(capsys, "diagnose")


# --- a fault in a run, and while it trains


LEARNED = {"ppo__iterations": 4, "max_response_tokens": 24, "sft__steps": 60, "model__d_model": 16}


def trained(out, *fault):
    """What is found in a run that was trained with something else in the place of a function."""
    config = tiny_config(out, **LEARNED)
    with mock.patch.object(*fault) if fault else contextlib.nullcontext():
        minirlhf.train(config, progress=False)
    return {finding.rule: finding for finding in diagnose(out).findings}


def test_a_penalty_from_another_temperature_is_made_again_and_named(tmp_path):
    real = ppo.score_rollout

    def other(policy, reference, samples, *, settings, **known):
        rollout = real(policy, reference, samples, settings=settings, **known)
        warm = dataclasses.replace(settings, temperature=1.5)
        of_ref = real(reference, reference, samples, settings=warm, **known)
        return rollout._replace(ref_logp=of_ref.ref_logp)

    assert "reference-logp" not in trained(tmp_path / "well")
    found = trained(tmp_path / "run", ppo, "score_rollout", other)["reference-logp"]
    assert found.onset == 0 and "temperature 1.5, not 1" in found.evidence


def test_padding_that_is_counted_is_seen_in_the_replies(tmp_path):
    real = pipeline.sample_as_set

    def padded(sample, policy, **known):
        samples = real(sample, policy, **known)
        mask = samples.batch.mask.copy()
        mask[:, samples.batch.prompt_len :] = 1
        return samples._replace(batch=samples.batch._replace(mask=mask), hidden=None)

    assert "padding-counted" not in trained(tmp_path / "well")
    found = trained(tmp_path / "run", pipeline, "sample_as_set", padded)["padding-counted"]
    assert "tokens of the reply" in found.evidence


def test_scores_of_another_reward_model_are_named(tmp_path):
    real = pipeline.Score.__call__
    fault = (pipeline.Score, "__call__", lambda self, of: 3.0 * real(self, of) + 0.4)
    found = trained(tmp_path / "run", *fault)["reward-drift"]
    assert "of the saved reward model" in found.evidence


def test_live_and_afterwards_the_same_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "Sampling", lambda t: Sampling(3.0 * t))
    said, config = [], tiny_config(tmp_path / "run", **LEARNED)
    session = open_session(config, say=said.append)
    minirlhf.app.api.run_session(session)
    live = [
        line.split(": ")[1] for line in said if line.split(" at step ")[0] in ("error", "warning")
    ]
    after = [f.rule for f in diagnose(tmp_path / "run").findings if RULES[f.rule].holds]
    assert "another-sampler" in live and sorted(live) == sorted(after)
    assert len(live) == len(set(live))


def test_halt_on_stops_and_resume_goes_on(tmp_path, capsys):
    config = tiny_config(
        tmp_path / "run", ppo__iterations=6, checkpoint_every=5, halt_on=("penalty-gradient",)
    )
    config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, kl_mode="loss_k1"))
    status, _, err = call(capsys, "train", *as_flags(config))
    said = err.splitlines()[-1]
    assert status == 1 and "stopped at step 0 by --halt-on penalty-gradient" in said
    assert f"minirlhf resume {tmp_path / 'run'}" in said
    assert [row["step"] for row in read_metrics(config.out) if row["stage"] == "ppo"] == [0]
    status, _, err = call(capsys, "resume", config.out)
    assert status == 0 and "penalty-gradient" not in err
    plain = dataclasses.replace(config, out=tmp_path / "plain", halt_on=())
    minirlhf.train(plain, progress=False)
    kept, whole = (
        [{k: x for k, x in row.items() if not k.startswith("time/")} for row in read_metrics(out)]
        for out in (config.out, plain.out)
    )
    assert kept == whole


def test_a_name_that_is_no_rule_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="expected any, or some of .*got 'gold'"):
        check_names(("gold",))
    flags = as_flags(tiny_config(tmp_path / "run"))
    assert "halt-on" in refusal(capsys, "train", *flags, "--halt-on", "gold")
    assert not (tmp_path / "run").exists()


def test_looking_costs_next_to_nothing():
    """A whole look at 200 rows takes less than a hundredth of a short iteration of 0.5 s."""
    import time

    seen = Seen([{**row, "step": i} for i, row in enumerate(rows() * 17)], config())
    started = time.process_time()
    for rule in RULES.values():
        rule.look(seen)
    assert time.process_time() - started < 0.02
