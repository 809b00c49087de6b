"""minirlhf from Python: train, open, sample, score; the same refusals as the command line."""

import inspect
import pydoc
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_run import interrupted_after, outcome, tiny_config, train, write_names

import minirlhf
from minirlhf.app import api
from minirlhf.errors import InputError
from minirlhf.runs import pipeline
from minirlhf.runs.config import TrainConfig
from minirlhf.train.settings import PPOConfig

PROMPT, REPLY = "Where is my kettle?", "Your kettle is on."


def polite(prompt, response):
    return response.count("a") - 0.1 * len(response)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the support world with its reward model."""
    config = tiny_config(tmp_path_factory.mktemp("api") / "run", max_response_tokens=12)
    return minirlhf.train(config, progress=False)


# --- training


def test_it_is_what_the_pipeline_does(run, tmp_path):
    train(tiny_config(tmp_path / "same", max_response_tokens=12))
    assert outcome(run.folder) == outcome(tmp_path / "same")


def test_settings_by_keyword_as_dataclass_or_dict(tmp_path):
    config = tiny_config(tmp_path / "unused", corpus=write_names(tmp_path / "names.txt"))
    one = minirlhf.train(
        config, out=str(tmp_path / "1"), ppo={"iterations": 1}, reward=len, progress=False
    )
    assert one.config.out == tmp_path / "1"
    assert one.config.ppo == replace(config.ppo, iterations=1)  # over that of the configuration
    assert len([row for row in one.metrics if row["stage"] == "ppo"]) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sfft": {}}, "train: expected one of .*; got 'sfft': correct the name"),
        ({"sft": {"stepz": 3}}, "sft: expected one of steps, .*; got 'stepz'"),
        ({"seed": "1"}, "seed: expected int; got '1'"),
        ({"ppo": 3}, "ppo: expected a table, PPOConfig or a dict; got 3"),
        ({"ppo": {"optimizer": {"eps": "small"}}}, "optimizer.eps: expected float"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda"),
        ({"ppo": {"kl_coef": -1}}, "kl_coef: expected at least 0"),
        ({"reward": "nowhere"}, "expected file.py:function, module:function"),
        ({"reward": 3}, "reward: expected str; got 3"),
    ],
)
def test_what_the_command_line_refuses_is_refused_here(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        minirlhf.train(progress=False, **changes)
    assert not list(tmp_path.iterdir())


def test_the_configuration_takes_strings_and_dicts_and_nothing_else():
    config = TrainConfig(out="r1", sft={"steps": 3})
    assert str(config.out) == "r1" and config.sft.steps == 3 and config.sft.batch_size == 32
    assert TrainConfig(sft={"optimizer": {"warmup": 1}}).sft.optimizer.learning_rate == 3e-3
    for bad in ({"out": 3}, {"sft": []}, {"seed": True}, {"seed": 1.5}, {"corpus": None}):
        with pytest.raises(InputError, match="expected"):
            TrainConfig(**bad)


def test_a_configuration_that_is_none_is_refused():
    with pytest.raises(InputError, match="expected a TrainConfig; got 'c.toml': read it with"):
        minirlhf.train("c.toml", recipe="grpo")


def test_a_part_without_progress_is_quiet(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", stages="sft", corpus=write_names(tmp_path / "names.txt"))
    minirlhf.train(config, progress=False)
    assert capsys.readouterr().err == ""


def test_progress_is_shown_unless_it_is_not_wanted(tmp_path, capsys):
    config = tiny_config(tmp_path / "loud", corpus=write_names(tmp_path / "names.txt"))
    minirlhf.train(config, reward=polite)
    assert "PPO: 3/3" in capsys.readouterr().err
    minirlhf.train(config, out=tmp_path / "quiet", reward=polite, progress=False)
    assert capsys.readouterr().err == ""


# --- a reward of one's own


def test_a_function_without_a_name_is_asked_for_again(tmp_path):
    def nameless(prompts, responses):
        return [float(len(reply)) for reply in responses]

    config = tiny_config(tmp_path / "run", corpus=write_names(tmp_path / "names.txt"))
    run = minirlhf.train(config, reward=nameless, progress=False)
    prompt, reply = "K", "alo"
    raw = run.session.world.reward
    assert raw([prompt], [reply], ["Kalo"]) == [3.0]
    assert np.isfinite(run.score(prompt, reply).score)
    assert run.score(prompt, reply).reward == pytest.approx(3.0, abs=1e-12)  # in its own units
    blind = minirlhf.open_run(run.folder)
    assert blind.sample(prompt, seed=1) == run.sample(prompt, seed=1)
    scores = blind.score(prompt, reply)
    assert np.isnan(scores.score) and np.isnan(scores.objective) and np.isnan(scores.reward)
    assert "pass reward= to minirlhf.open_run" in scores.no_score
    assert scores.kl_seq == run.score(prompt, reply).kl_seq
    again = minirlhf.open_run(run.folder, reward=nameless)
    assert again.score(prompt, reply).score == run.score(prompt, reply).score


def test_an_interrupted_run_goes_on(tmp_path):
    names = write_names(tmp_path / "names.txt")
    config = tiny_config(tmp_path / "whole", corpus=names)
    whole = minirlhf.train(config, reward=polite, progress=False)
    config = tiny_config(tmp_path / "part", corpus=names, reward=whole.config.reward)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_stages(
            api.open_session(config, reward=polite, track=interrupted_after("PPO", 1))
        )
    half = minirlhf.open_run(config.out, reward=polite)
    assert half.is_trained and half.sample("k") != half.sample("k", reference=True)
    assert np.isfinite(half.score("k", "alo").score)
    part = minirlhf.resume(config.out, reward=polite, progress=False)
    assert outcome(part.folder) == outcome(whole.folder)


# --- looking at a run


def test_samples_of_policy_and_reference(run):
    replies = run.sample([PROMPT] * 3, seed=5)
    assert len(replies) == 3 and replies == run.sample([PROMPT] * 3, seed=5)
    assert run.sample(PROMPT, seed=5) == replies[:1]  # one prompt needs no list
    assert run.sample([PROMPT] * 3, seed=6) != replies
    assert run.sample([PROMPT] * 3, seed=5, reference=True) != replies
    greedy = run.sample([PROMPT] * 2, temperature=0.0)
    assert greedy[0] == greedy[1]
    assert run.sample([]) == []


def test_a_notebook_shows_runs_replies_and_scores(run):
    shown = run._repr_html_()
    for of in (run.result["reference"], run.result["policy"]):
        assert f"<td>{of['kl_seq']:.2f}</td>" in shown
    replies = run.sample([PROMPT, "Who are you?"], seed=1)
    assert isinstance(replies, list) and len(replies) == 2
    shown = replies._repr_html_()
    assert f"<td>{PROMPT}</td>" in shown and "gold" in shown and "<th>reply</th>" in shown
    evil = api.Replies(["<b>&"], ["<script>"], run.session.world)._repr_html_()
    assert "&lt;b&gt;&amp;" in evil and "<script>" not in evil
    paid = run.score(PROMPT, REPLY)
    assert f'data-kl-seq="{paid.kl_seq}"' in paid._repr_html_()


def test_the_score_of_a_reply(run):
    paid = run.score(PROMPT, REPLY)
    assert len(paid.pieces) == len(paid.logp) == len(paid.ref_logp) == len(paid.kl_token)
    assert paid.kl_seq == pytest.approx(paid.kl_token.sum())
    assert paid.objective == pytest.approx(paid.score - run.config.ppo.kl_coef * paid.kl_seq)
    assert paid.gold is not None and run.score("Who are you?", REPLY).gold is None
    assert "".join(paid.pieces).startswith("Your kettle")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run: run.score(["a"], ["b"]), "score: expected two texts"),
        (lambda run: run.score("x " * 200, REPLY), "prompt: expected at most .* got"),
        (lambda run: run.score(PROMPT, "x " * 200), "response: expected at most"),
        (lambda run: run.sample([""]), "got an empty prompt"),
        (lambda run: run.score(PROMPT, ""), "got an empty response"),
        (lambda run: run.sample([PROMPT], temperature=-1.0), "sample: expected"),
        (lambda run: run.sample([PROMPT], top_p=0.0), "sample: expected"),
        (lambda run: run.sample([PROMPT], seed=-1), "sample: expected"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(run, call, says):
    with pytest.raises(InputError, match=says):
        call(run)


def test_metrics_result_and_curves(run):
    assert {row["stage"] for row in run.metrics} == {"sft", "reward_model", "ppo"}
    assert set(run.result) == {"reference", "policy", "seconds"}
    figure = run.curves()
    titles = {axis.get_title().split(":")[0] for axis in figure.axes if axis.lines}
    assert {"fine-tuning", "reward model", "score", "gold", "length of a reply"} <= titles
    assert repr(run) == f"Run({str(run.folder)!r})"
    assert minirlhf.open_run(run.folder).sample(PROMPT) == run.sample(PROMPT)


@pytest.mark.parametrize("content", ["{}", '{"policy": 3}', '{"policy": {"gold": "a"}}'])
def test_curves_of_a_damaged_result_are_refused(run, monkeypatch, tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    monkeypatch.setattr(run, "folder", tmp_path)
    with pytest.raises(InputError, match="result.json: expected numbers"):
        run.curves()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a run folder"):
        minirlhf.open_run(tmp_path)


# --- the package


def test_the_public_names_are_shown_and_found():
    assert set(minirlhf.__all__) <= set(dir(minirlhf))
    for name in minirlhf.__all__:
        assert getattr(minirlhf, name) is not None
    assert {"train", "open_run", "resume", "Run", "TrainConfig"} <= set(minirlhf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = minirlhf.trian
    for name in ("open_run", "resume", "Run", "summed_penalty", "check_pair"):
        assert inspect.getdoc(getattr(minirlhf, name))


def test_train_is_a_room_and_a_function():
    import minirlhf.train.ppo as ppo

    assert minirlhf.train.ppo is ppo and callable(minirlhf.train)
    assert inspect.getdoc(api.train) in inspect.getdoc(minirlhf.train)
    shown = pydoc.render_doc(minirlhf.train)
    assert "progress: bool = True" in shown and "Args:" in shown


def test_help_says_what_every_field_means():
    for kind, names in ((TrainConfig, ("seed", "corpus", "ppo")), (PPOConfig, ("kl_coef", "lam"))):
        for name in names:
            assert f"    {name}: " in inspect.getdoc(kind) or name == "ppo"
    assert "weight of the penalty" in inspect.getdoc(PPOConfig)


def test_importing_it_is_cheap():
    code = "import sys, minirlhf; print(len({'numpy', 'matplotlib', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
