"""A reward of one's own at its edges, and those that are ready-made."""

import inspect
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from minirlhf.errors import InputError
from minirlhf.worlds import rewards
from minirlhf.worlds.rewards import (
    READY_MADE,
    UserReward,
    load_reward,
    module_file,
    name_of,
    ready_made,
)


def of_reply(reward, response, prompt=""):
    (value,) = reward([prompt], [response], [f"{prompt} {response}"])
    return value


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- ready-made


@pytest.mark.parametrize(
    ("reward", "response", "value"),
    [
        ("length", "four", 4),
        ("length:6", "four", -2),
        ("length:3", "four", -1),
        (r"regex:\bthank\w*", "Thank you, thanks, thank you", 2),
        (r"regex:(?i)(thank)( you)", "Thank you, thanks, thank you", 2),
        ("regex:a:b", "a:b ab a:b", 2),
        ("words:list.txt", "Good tea and GOOD rain", 3 / 5),
        ("words:list.txt", "...", 0),
        ("vowel_share", "Emma", 0.5),
        ("minirlhf.worlds.rewards:short_words", "tea or coffee", 2 / 3),
        ("distinct_words", "tea tea", 0.5),
    ],
)
def test_ready_made_rewards_by_hand(here, reward, response, value):
    (here / "list.txt").write_text("good\nTea\n")
    assert of_reply(load_reward(reward), response) == value
    assert of_reply(load_reward(name_of(reward)), response) == value


def test_the_prompt_is_no_part_of_a_reply_that_is_counted():
    for reward in ("length", "regex:a"):
        assert of_reply(load_reward(reward), "aa", prompt="aaaa") == 2


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("length:", "length:N; got N = ''"),
        ("length:many", "length:N; got N = 'many'"),
        ("length:-1", "length:N; got N = '-1'"),
        ("regex:(", "expected a regular expression; got '\\(' \\(missing \\)"),
        ("words:nowhere.txt", "nowhere.txt: expected a file; found none"),
        ("vowel_share:3", "No module named 'vowel_share'"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused(here, reward, says):
    with pytest.raises(InputError, match=says):
        load_reward(reward)


def test_every_ready_made_reward_is_named_where_none_is_known():
    with pytest.raises(InputError) as refused:
        load_reward("lenght")
    assert all(name in str(refused.value) for name in READY_MADE)
    assert ready_made("lenght") is ready_made("mine.py:length") is None


def test_a_list_of_words_is_found_from_any_directory(here):
    assert name_of("words:a/b.txt") == f"words:{here}/a/b.txt"
    assert name_of("regex:a.py:b") == "regex:a.py:b"


# --- what it raises


def test_an_error_shows_the_line_of_the_users_file(here):
    code = "import json\n\n\ndef f(text):\n    return help(text)\n\n\ndef help(text):\n"
    (here / "my_two.py").write_text(f"{code}    return json.loads(text)\n")
    for reward in ("my_two.py:f", "my_two:f"):
        with pytest.raises(
            InputError, match=r"it raised JSONDecodeError in line 9 of \S+/my_two.py"
        ):
            of_reply(load_reward(reward), "no JSON")


def test_an_error_in_a_function_of_python_shows_its_line():
    def broken(text):
        return text.missing

    line = inspect.getsourcelines(broken)[1] + 1
    with pytest.raises(InputError) as refused:
        of_reply(load_reward(broken), "a")
    assert f"python:{broken.__qualname__}: expected a number" in str(refused.value)
    assert f"AttributeError in line {line} of {__file__}" in str(refused.value)


class Stop(BaseException):
    """As libraries raise to pass all `except Exception`."""


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, Stop, RecursionError])
def test_whatever_it_raises_is_one_sentence(error):
    def raises(text):
        raise error

    with pytest.raises(InputError, match=f"it raised {error.__name__} in line"):
        of_reply(UserReward(raises), "a")


def test_ctrl_c_is_nobodys_error(here):
    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_reply(UserReward(interrupted), "a")
    (here / "slow_import.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_reward("slow_import.py:f")


def test_what_to_do_about_an_error_can_be_said():
    for wrong in (lambda text: None, lambda text: 1 / 0, lambda texts: 3):
        with pytest.raises(InputError, match=": ask Ann$"):
            of_reply(UserReward(wrong, then="ask Ann"), "a")


@pytest.mark.parametrize(("value", "fits"), [(1e300, True), (-1e300, True), (1.1e300, False)])
def test_sums_of_rewards_do_not_overflow(value, fits):
    reward = UserReward(lambda text: value)
    if fits:
        assert math.isfinite(sum(of_reply(reward, "a") for _ in range(1000)))
    else:
        with pytest.raises(InputError, match=r"at most 1e\+300 .*; got 1.1e\+300"):
            of_reply(reward, "a")


# --- a time limit


def sleeps(text):
    time.sleep(30)


def catches_all(text):
    while True:
        try:
            time.sleep(30)
        except Exception:
            pass


def spins(text):
    while True:
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="an alarm of Unix")
@pytest.mark.parametrize("function", [sleeps, catches_all, spins, "regex:(a+)+$"])
def test_a_call_that_takes_too_long_is_stopped(function):
    before, started = signal.getsignal(signal.SIGALRM), time.perf_counter()
    with pytest.raises(InputError, match="Timeout.*longer than --reward-timeout 0.05") as refused:
        of_reply(load_reward(function, timeout=0.05), "a" * 60 + "b")
    assert time.perf_counter() - started < 5
    if callable(function):
        assert f" of {__file__}" in str(refused.value)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_call_in_time_is_as_without_a_limit():
    assert of_reply(load_reward("length", timeout=1e300), "abc") == 3
    time.sleep(0.01)
    assert of_reply(load_reward(len, timeout=0.005), "abc") == 4  # each call has its time
    time.sleep(0.01)


# --- where a module lies


def test_a_module_is_found_without_running_it(here):
    (here / "boom_package").mkdir()
    (here / "boom_package/__init__.py").write_text("raise RuntimeError\n")
    (here / "boom_package/inner.py").write_text("raise RuntimeError\n")
    (here / "boom_module.py").write_text("raise RuntimeError\n")
    assert module_file("boom_module") == f"{here}/boom_module.py"
    assert module_file("boom_package.inner") == f"{here}/boom_package/inner.py"
    assert module_file("boom_package") == f"{here}/boom_package/__init__.py"
    assert not {"boom_module", "boom_package"} & sys.modules.keys()
    assert Path(module_file("json.decoder")) == Path(json.decoder.__file__)
    assert module_file("minirlhf.worlds.rewards") == rewards.__file__
    for name in ("nowhere_at_all", "boom_package.nowhere", "sys", "", ".", "a..b"):
        assert module_file(name) in ("", os.path.join(here, "__init__.py")), name


def test_the_names_of_the_parameters_say_what_comes_in_which_place():
    replies = ["p", "pp"], ["reply", "replies"], ["p reply", "pp replies"]

    def swapped(response, prompt):
        return 10 * len(prompt) + len(response)

    def lists(responses, prompts):
        return [10 * len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]

    assert UserReward(swapped)(*replies) == UserReward(lists)(*replies) == [15.0, 27.0]
    assert UserReward(lambda response: len(response))(*replies) == [5.0, 7.0]
    assert UserReward(lambda text: len(text))(*replies) == [7.0, 10.0]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda reply_text: 0, "the text, prompt and reply together, as reply_text; a parameter"),
        (lambda a, b: 0, "gets prompt and reply as a and b; a parameter named response gets the"),
        (lambda text: 0, None),
        (lambda answer, question: 0, None),
        (lambda prompts, completions: 0, None),
        (lambda: 0, None),
    ],
)
def test_what_names_do_not_say_is_said(function, says):
    said = UserReward(function, "mine").guessed
    assert says in said if says else said == ""
