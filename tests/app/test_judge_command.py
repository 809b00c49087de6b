"""`minirlhf judge`: planted terms in three frameworks, losses, advantages, refusals, the table."""

import functools
import importlib.util
import json
import subprocess
import sys
import time

import numpy as np
import planted_terms
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_terms import EXPECTED, RIGHT, SMALL, judged, to_go, total
from tiny_run import call, refusal

import minirlhf
from minirlhf import assert_descends, judge
from minirlhf.app.cli import main
from minirlhf.app.judge import sentences
from minirlhf.errors import InputError
from minirlhf.exact.libraries import LIBRARIES
from minirlhf.rlhf.advantages import advantages_without_critic, gae


def check_planted(name, found):
    claim, right, reads_padding, off = found
    assert claim == EXPECTED[name]
    assert right == (name in RIGHT) and reads_padding == (name == "the mask forgotten")
    if "of the response times" in name or "fixed" in name:
        assert off == "kl"  # the ratio of the whole response
    if name == "k2 of the response":
        assert off == "kl on samples of old"


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("name", EXPECTED)
def test_twenty_planted_terms(name, framework):
    pytest.importorskip(framework)
    check_planted(name, judged(name, framework))


def test_twenty_planted_terms_in_jax():
    if not importlib.util.find_spec("jax"):
        pytest.skip("jax is not installed")
    program = [sys.executable, planted_terms.__file__, "jax"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        check_planted(name, found)


# --- never a false match

smooth = st.floats(0.2, 2.0)


@given(st.tuples(*[smooth] * 6), st.booleans())
@settings(max_examples=15)
def test_a_random_smooth_function_is_none_of_these(c, with_old):
    def f(logp, old_logp, ref_logp, mask):
        x, y = logp - 0.9 * ref_logp, (old_logp if with_old else ref_logp) + 0.3
        return mask * (c[0] * np.sin(c[1] * x + c[2] * y) + c[3] * np.tanh(c[4] * logp * y + c[5]))

    report = judge(f, size=SMALL)
    assert report.descends == "none of these" and not report.right
    assert [v.claim for v in report.verdicts] == ["none of these"] * 2
    assert report.verdicts[0].value_is == "none of these"


def k2(logp, ref_logp, mask):
    return 0.5 * total(logp - ref_logp, mask) ** 2


def test_wrong_by_2_per_cent_is_not_right():
    def k3(logp, ref_logp, mask):
        return total(np.exp(ref_logp - logp) - 1 + logp - ref_logp, mask)

    large = judge(lambda logp, ref_logp, mask: 1.02 * k2(logp, ref_logp, mask), size=SMALL)
    assert large.verdicts[0].claim == "1.02 x kl" and not large.right
    mixed = judge(
        lambda logp, ref_logp, mask: k2(logp, ref_logp, mask) + 0.02 * k3(logp, ref_logp, mask),
        size=SMALL,
    )
    assert mixed.descends == "none of these" and mixed.verdicts[0].nearest == "kl"
    assert_descends(
        lambda logp, ref_logp, mask: 0.04 * k2(logp, ref_logp, mask), "0.04 x kl", size=SMALL
    )
    for f in (lambda logp, ref_logp, mask: 1.02 * k2(logp, ref_logp, mask), k3):
        with pytest.raises(AssertionError, match="expected kl; the penalty, samples of the pol"):
            assert_descends(f, "kl", size=SMALL)


def test_a_slope_at_padding_is_wrong_even_where_all_else_is_right():
    report = judge(
        lambda logp, ref_logp, mask: k2(logp, ref_logp, mask) + total(logp, 1 - mask), size=SMALL
    )
    assert report.descends == "kl" and report.reads_padding
    assert not report.right and not report.holds("kl")
    assert sentences(report)[-1] == "it reads what stands at padding"


def test_the_shapes_that_a_loss_may_have():
    def term(logp, ref_logp):
        return 0.5 * (logp - ref_logp) ** 2

    def number(logp, ref_logp, mask):
        return total(term(logp, ref_logp), mask)

    for shape in ((), (1,), (1, 1)):
        report = judge(
            lambda logp, ref_logp, mask, s=shape: np.reshape(number(logp, ref_logp, mask), s),
            size=SMALL,
        )
        assert report.verdicts[0].claim == "token_kl"
    for of_tokens in (term, lambda logp, ref_logp: term(logp, ref_logp)[0]):
        assert judge(of_tokens, size=SMALL).verdicts[0].claim == "token_kl"


# --- what the value is

VALUES = {
    "KL(pi || ref)": lambda logp, ref_logp: logp - ref_logp,
    "-1 x KL(pi || ref)": lambda logp, ref_logp: ref_logp - logp,
    "0.1 x KL(pi || ref), divided by the length": lambda logp, ref_logp, mask: (
        0.1 * total(logp - ref_logp, mask) / mask.sum()
    ),
    "chi^2 - KL token by token": lambda logp, ref_logp: (
        np.exp(logp - ref_logp) - 1 - (logp - ref_logp)
    ),
    "half the mean square of the log-ratio": k2,
    "none of these": lambda logp, ref_logp: (logp - ref_logp) ** 4,
}


@pytest.mark.parametrize("value", VALUES)
def test_of_what_the_value_is_an_estimate(value):
    assert judge(VALUES[value], size=SMALL).verdicts[0].value_is == value


# --- whole losses


def ppo(logp, old_logp, ref_logp, advantages, mask, beta=0.04):
    ratio = np.exp(logp - old_logp)
    clipped = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    kl = np.exp(ref_logp - logp) - 1 + logp - ref_logp
    return mask * (beta * kl - clipped)


def parts(f, **about):
    return {(v.part, v.given): v for v in judge(f, **about).verdicts}


def test_a_loss_is_judged_part_by_part():
    started = time.perf_counter()
    found = parts(ppo)
    assert time.perf_counter() - started < 5  # at the default size
    assert [verdict.claim for verdict in found.values()] == [
        *("0.04 x token_forward_kl", "reward"),
        *("0.04 x token_forward_kl on samples of old", "none of these"),
    ]
    without = parts(functools.partial(ppo, beta=0.0), size=SMALL)
    assert {part for part, _ in without} == {"reward"}


def old(f, **about):
    """What its advantages do on samples of the policy, and on those of an old one."""
    found = [v for v in judge(f, size=SMALL, **about).verdicts if v.part == "reward"]
    return [verdict.claim for verdict in found]


def test_the_advantages_of_a_loss():
    def pg(logp, old_logp, advantages, mask):
        return -total(np.exp(logp - old_logp) * advantages, mask)

    def whole(logp, old_logp, advantages, mask):
        return -np.exp(total(logp - old_logp, mask)) * advantages[0, 0]

    def gspo(logp, old_logp, advantages, mask):
        return -np.exp(total(logp - old_logp, mask) / mask.sum()) * advantages[0, 0]

    def reinforce(logp, advantages):
        return -logp * advantages

    assert old(functools.partial(ppo, beta=0.0)) == ["reward", "none of these"]  # its clip
    assert old(pg) == ["reward", "reward by token ratios"]
    assert old(whole) == ["reward", "reward"]
    assert old(gspo)[0] == "mean_reward"
    assert old(reinforce) == ["reward", "reward on samples of old"]
    assert old(lambda logp, advantages: 2 * logp * advantages)[0] == "-2 x reward"
    assert_descends(ppo, "reward", size=SMALL)
    assert_descends(ppo, "0.04 x token_forward_kl", size=SMALL)


# --- advantages


def of_values(f, **about):
    return [verdict.claim for verdict in judge(f, **about).verdicts]


def test_estimators_of_advantages():
    def ours(rewards, values, mask, lam):
        return gae(rewards, values, mask=mask, lam=lam)

    def monte_carlo(rewards, mask):
        return to_go(rewards * mask)

    def late(rewards, values, mask):  # each token is paid for those after it alone
        return to_go(rewards * mask) - rewards

    biased = ["reward", "none of these", "none of these"]
    assert of_values(ours) == biased
    assert of_values(functools.partial(ours, lam=1.0)) == ["reward"] * 3
    assert of_values(monte_carlo) == ["reward"] * 3
    assert of_values(late) == ["none of these"] * 3
    assert of_values(lambda rewards, mask: -to_go(rewards * mask)) == ["-1 x reward"] * 3
    mean = of_values(lambda rewards, mask: rewards.sum() / mask.sum() + 0 * mask)
    assert mean[0] == "none of these"  # what was earned before is divided by the length as well

    def reads_padding(rewards, values, mask):
        advantages, last = np.zeros_like(rewards), 0.0
        for t in reversed(range(rewards.shape[1])):
            after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            advantages[:, t] = last = rewards[:, t] + after - values[:, t] + 0.95 * last
        return advantages

    report = judge(reads_padding)
    assert report.descends == "none of these"


GROUPS = {
    "leave one out": (
        lambda rewards, uid, mask: advantages_without_critic(
            rewards, mask=mask, form="leave-one-out", samples_per_prompt=len(uid)
        ),
        "reward",
    ),
    "less the mean": (lambda rewards: rewards - rewards.mean(), "0.66667 x reward"),
    "over the deviation": (
        lambda rewards: (rewards - rewards.mean()) / (rewards.std() + 1e-4),
        "none of these",
    ),
    "as it is": (lambda rewards, group_size: rewards * group_size / 3, "reward"),
    "of tokens": (
        lambda rewards, index, mask: mask * (rewards.sum(1, keepdims=True) - rewards.sum() / 3),
        "0.66667 x reward",
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_estimators_of_a_group(name):
    f, expected = GROUPS[name]
    assert of_values(f) == [expected]


def test_advantages_in_torch():
    torch = pytest.importorskip("torch")

    def grpo(rewards: torch.Tensor, num_generations: int):
        assert len(rewards) == num_generations and isinstance(rewards, torch.Tensor)
        return rewards - rewards.mean()

    assert of_values(grpo, framework="torch") == ["0.66667 x reward"]


# --- what cannot be judged


def by_position(logp, /, ref_logp):
    return logp - ref_logp


REFUSED = {
    "unknown name": (
        lambda policy, ref_logp: policy - ref_logp,
        r"got \(policy, ref_logp\).*wrap it in such a function",
    ),
    "any number": (lambda *args: args[0], r"expected parameters like.*got \(\*args\)"),
    "any names": (lambda **arrays: arrays["logp"].sum(), r"got \(\*\*arrays\)"),
    "by position": (by_position, "expected parameters like"),
    "no log-probs": (lambda mask: mask, r"got \(mask\)"),
    "of both kinds": (lambda logp, values: logp - values, r"got \(logp, values\)"),
    "no function": (3, "expected a function; got 3"),
    "a wrong shape": (lambda logp: np.zeros((2, 3)) + logp.sum(), r"of shape \(2, 3\)"),
    "a list": (lambda logp: list(logp[0]), "got list"),
    "a bool": (lambda logp: logp > 0, "got bool"),
    "nothing": (lambda logp: None, "got NoneType"),
    "nan": (lambda logp, mask: np.log(-abs(total(logp, mask)) - 1), "expected finite numbers"),
    "raises": (lambda logp: logp.nonsense(), "raised AttributeError.*--framework"),
    "beyond squares": (lambda logp, mask: 1e200 * total(logp, mask) ** 2, "expected finite"),
    "float32": (lambda logp: logp.astype(np.float32) ** 2, "expected a smooth function in float64"),
    "a step": (lambda logp: np.round(logp), "gradient is 0"),
    "a constant": (lambda logp, ref_logp: 0 * logp + ref_logp, "gradient is 0.*--placement reward"),
}


def test_who_writes_into_what_it_gets_is_judged_by_its_term_or_refused():
    def in_place(logp, ref_logp, mask):
        logp -= ref_logp
        logp *= mask
        ref_logp[:] = mask[:] = 0
        return 0.5 * np.sum(logp) ** 2

    def with_its_own(logp, ref_logp, mask):
        kl = total(logp - ref_logp, mask)
        found = 0.5 * kl * kl, kl * mask
        ref_logp[:] = 0
        return found

    assert judge(in_place, framework="numpy", size=SMALL).right
    assert judge(with_its_own, framework="own", size=SMALL).right
    pytest.importorskip("torch")

    def before_backward(logp, ref_logp, mask):
        loss = k2(logp, ref_logp, mask)
        mask[:] = 0
        return loss

    with pytest.raises(InputError, match="it raised RuntimeError: .*in.?place operation"):
        judge(before_backward, framework="torch", size=SMALL)


def test_a_factor_of_a_claim_may_be_written_as_any_number():
    third = judge(lambda logp, ref_logp, mask: k2(logp, ref_logp, mask) / 3, size=SMALL)
    for factor in (1 / 3, "0.333333", "3.3333e-1", ".33333"):
        assert third.holds(f"{factor} x kl")
    assert (
        not third.holds("0.3333 x kl")
        and not third.holds("kl")
        and not third.holds("-0.33333 x kl")
    )
    for claim in ("0 x kl", "a third x kl", "1.2.3 x kl", "0.33333x kl"):
        with pytest.raises(InputError, match="expected a claim like kl"):
            third.holds(claim)


def test_a_loss_is_right_where_both_of_its_parts_are():
    """A penalty that is there only without advantages is seen in what they add."""

    def loss(logp, old_logp, ref_logp, advantages, mask):
        kl = 0.0 if advantages.any() else k2(logp, ref_logp, mask)
        return kl - total(np.exp(logp - old_logp) * advantages, mask)

    report = judge(loss, size=SMALL)
    assert report.claims == {"kl": "kl", "reward": "none of these"} and not report.right


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_judged_is_a_sentence(name):
    f, said = REFUSED[name]
    with pytest.raises(InputError, match=said) as raised:
        judge(f)
    assert str(raised.value).startswith("judge: expected") and str(raised.value).count("; ") >= 1


def test_other_refusals():
    k1 = VALUES["KL(pi || ref)"]
    with pytest.raises(InputError, match="a number for each|of shape"):
        judge(lambda logp, ref_logp: (logp - ref_logp).sum(), placement="reward")
    with pytest.raises(InputError, match=r"\(number, |real numbers of shape"):
        judge(k2, framework="own")
    with pytest.raises(InputError, match="expected a claim like kl"):
        assert_descends(k1, "KL")
    for size in ((1, 4), (4, 1), (40, 4)):
        with pytest.raises(InputError, match="--size"):
            judge(k1, size=size)


def test_torch_that_is_detached():
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="gradient is 0 at every response: is it detached"):
        judge(lambda logp, ref_logp: torch.square(logp - ref_logp).detach())
    with pytest.raises(InputError, match="gradient is 0"):
        judge(lambda logp, ref_logp: torch.square(logp - ref_logp).sum().item())
    single = judge(lambda logp, ref_logp: 0.5 * torch.square((logp - ref_logp).float()))
    assert single.verdicts[0].claim == "token_kl"  # a float32 inside is near enough


def test_whose_arrays_a_function_takes():
    torch = pytest.importorskip("torch")

    class Loss:
        def __call__(self, log_probs, log_probs_base, action_mask):
            return torch.exp(log_probs_base - log_probs) + log_probs - log_probs_base - 1

    def half(new_logps, ref_logps, kind):
        return {"k2": 0.5}[kind] * torch.square(new_logps - ref_logps)

    assert judge(Loss()).descends == "token_forward_kl"
    assert judge(functools.partial(half, kind="k2")).descends == "token_kl"
    assert judge(lambda logp, ref_logp: (logp - ref_logp, {"metric": 1.0})).descends == "nothing"


# --- the command

TERM = """\
import numpy as np

def k3(logp, ref_logp, mask):
    d = ref_logp - logp
    return (mask * (np.exp(d) - d - 1)).sum()

def k1(log_probs, log_probs_base):
    return log_probs - log_probs_base

def unnamed(x, y):
    return x - y
"""


@pytest.fixture
def term(tmp_path):
    path = tmp_path / "term.py"
    path.write_text(TERM)
    return path


def test_the_command(term, capsys):
    status, printed, _ = call(capsys, "judge", f"{term}:k3")
    assert status == 0 and "token_forward_kl" in printed and "0.29" in printed
    assert "its value is on average KL(pi || ref)" in " ".join(printed.split())
    assert call(capsys, "judge", f"{term}:k3", "--expect", "token_forward_kl")[0] == 0
    status, printed, _ = call(capsys, "judge", f"{term}:k3", "--expect", "kl")
    assert status == 1 and "NOT as expected: kl" in printed


def test_the_command_prints_json(term, capsys):
    flags = ("--placement", "reward", "--expect", "kl", "--json")
    status, printed, _ = call(capsys, "judge", f"{term}:k1", *flags)
    found = json.loads(printed, parse_constant=lambda word: pytest.fail(word))
    assert status == 0 and found["holds"] and not found["reads_padding"]
    on, off = found["verdicts"]
    assert on["descends"] == "kl" and [row["error"] < 1e-12 for row in on["rows"]] == [True] * 3
    assert off["given"] == "samples of an old policy"


def test_what_the_command_refuses(term, tmp_path, capsys):
    assert "found none: check the path" in refusal(capsys, "judge", f"{tmp_path}/no.py:f")
    assert "expected a function f in" in refusal(capsys, "judge", f"{term}:f")
    assert "trl-grpo" in refusal(capsys, "judge", "trl-grop")
    assert "expected also" in refusal(capsys, "judge")
    assert "got (x, y): wrap it" in refusal(capsys, "judge", f"{term}:unnamed")
    assert "expected a claim" in refusal(capsys, "judge", f"{term}:k3", "--expect", "k1")


LIBRARY_ROWS = {
    "trl-grpo": "token_kl",
    "trl-grpo-uncorrected": "token_forward_kl",
    "trl-rloo": "kl",
    "verl-reward-k1": "kl",
    "verl-k1": "nothing",
    "verl-abs": "token_l1",
    "verl-k3+": "token_kl",
    "openrlhf-reward-k3": "kl_minus_token_forward_kl",
    "nemo-rl-before-k1": "nothing",
    "nemo-rl-after": "none of these, near token_kl",
    "rlhf-book-kl1": "-1 x length",
    "rlhf-book-kl3": "mean_token_half_chi2",
    "reasoning-from-scratch": "nothing",
    "reasoning-from-scratch-v32": "kl",
    "deepseek-v3.2": "token_kl",
}


def test_what_the_libraries_do(capsys):
    size = ("--size", "3", "3")
    status, printed, _ = call(capsys, "judge", "libraries", *size, "--json")
    rows = {row["name"]: row for row in json.loads(printed)}
    assert status == 0 and set(rows) == set(LIBRARIES)
    for name, expected in LIBRARY_ROWS.items():
        assert rows[name]["descends"] == expected, name
    assert rows["reasoning-from-scratch-v32"]["off"] == "kl"
    assert not any(judge(name, size=SMALL).reads_padding for name in ("verl-k3", "verl-k3+"))


def test_the_table_of_the_libraries(capsys, monkeypatch):
    few = {name: LIBRARIES[name] for name in ("trl-rloo", "verl-k3", "nemo-rl-after")}
    monkeypatch.setattr("minirlhf.app.judge.LIBRARIES", few)
    status, printed, _ = call(capsys, "judge", "libraries")
    words = " ".join(printed.split())
    assert status == 0 and "trl-rloo kl" in words and "KL(pi || ref) = 3.03" in words
    assert words.count("none of these") == 2  # cut at 10, far from the reference


def test_public_names():
    assert {"judge", "assert_descends"} <= set(dir(minirlhf))
    assert "descends kl (KL(pi || ref): the penalty)" in sentences(judge("trl-rloo"))[0]


# --- found by somebody who tried it


def gae_without_a_mask(rewards, values, gamma=1.0, lam=0.95):
    out, following, value = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * value - values[:, t] + gamma * lam * following
        value, out[:, t] = values[:, t], following
    return out


def test_an_estimator_that_reads_padding_is_told():
    assert judge(gae_without_a_mask, size=SMALL).reads_padding
    right = judge(lambda rewards, values, mask: gae(rewards, values, mask=mask)[0], size=SMALL)
    assert not right.reads_padding


def test_a_function_that_ends_the_program_is_a_sentence():
    def leave(logp, mask):
        raise SystemExit(3)

    with pytest.raises(InputError, match="it raised SystemExit: 3"):
        judge(leave, size=SMALL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trl-grpo --seed -1", "expected --seed from 0 on"),
        ("trl-grpo --placement reward", "beside a function of your own alone"),
        ("libraries --expect kl", "--expect not beside libraries"),
    ],
)
def test_options_that_would_change_nothing_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["judge", *arguments.split()])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_what_holds_is_said_too(capsys):
    with pytest.raises(SystemExit) as end:
        main(["judge", "verl-k1", "--expect", "nothing", "--size", "3", "3"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "its expected gradient is 0: noise alone" in said
    assert said.endswith("as expected: nothing")
