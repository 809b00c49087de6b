"""Data of one's own: every format trains, limits follow from the data, cuts are clean.

What the readers make of a file is tested in tests/worlds/test_readers.py.
"""

import csv
import gzip
import json
from collections import Counter

import numpy as np
import pytest
from tiny_run import VOWELS, changed, metrics, refusal, tiny_config, updates

from minirlhf.errors import InputError
from minirlhf.runs import limits, pipeline
from minirlhf.runs import session as session_module
from minirlhf.runs.config import ModelConfig
from minirlhf.runs.limits import most_tokens
from minirlhf.runs.pipeline import preference_pairs
from minirlhf.runs.session import open_session, reopen_session
from minirlhf.worlds.tokens import Tokenizer


def preferences(n):
    """(prompt, better, worse): who says yes is preferred."""
    things = ("tea", "rain", "work", "music")
    return [(f"about {things[i % 4]} {i}", f"yes, {i} yes", f"no, {i} no") for i in range(n)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write_hh(path, rows):
    lines = [
        {
            "chosen": f"\n\nHuman: {p}\n\nAssistant: {a}",
            "rejected": f"\n\nHuman: {p}\n\nAssistant: {b}",
        }
        for p, a, b in rows
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def write_trl(path, rows):
    lines = [
        {"prompt": [user(p)], "chosen": [assistant(a)], "rejected": [assistant(b)]}
        for p, a, b in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_ultrafeedback(path, rows):
    lines = [
        {"prompt": p, "chosen": [user(p), assistant(a)], "rejected": [user(p), assistant(b)]}
        for p, a, b in rows
    ]
    path.write_text(json.dumps(lines))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("instruction", "chosen_response", "rejected_response"), *rows])


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(table), path)


def write_ranked(path, rows):
    lines = [
        {"prompt": p, "responses": [b, a, "perhaps"], "ranking": [3, 1, 2]} for p, a, b in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


FORMATS = {
    "hh.jsonl.gz": write_hh,
    "trl.jsonl": write_trl,
    "ultrafeedback.json": write_ultrafeedback,
    "pairs.csv": write_csv,
    "pairs.parquet": write_parquet,
    "ranked.jsonl": write_ranked,
}


@pytest.mark.parametrize("name", FORMATS)
def test_preferences_of_every_format_train_a_reward_model(tmp_path, name):
    path, said = tmp_path / name, []
    FORMATS[name](path, preferences(60))
    config = tiny_config(tmp_path / "run", pairs=str(path), max_response_tokens=0)
    session = open_session(config, say=lambda line: said.append(line.removeprefix("note: ")))
    assert said[0] == f"{path}: read 60 preferences"
    pipeline.reward_stage(session, pipeline.reference_stage(session))
    steps, heldout = updates(tmp_path / "run", "reward_model"), metrics(tmp_path / "run")[-1]
    assert steps[-1]["loss/reward_model"] < steps[0]["loss/reward_model"]
    assert 0 <= heldout["heldout/accuracy"] <= 1
    again = reopen_session(tmp_path / "run").world
    assert again.pairs == session.world.pairs
    (prompt, best, *worse), (_, a, b) = again.pairs[0], preferences(1)[0]
    assert prompt.endswith(("tea 0", "tea 0\n\nAssistant:")) and best == a and worse[-1] == b
    assert len(worse) == (2 if name == "ranked.jsonl" else 1)


# --- limits


def write_corpus(path, rows):
    path.write_text(
        "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows), encoding="utf-8"
    )
    return str(path)


def opened(tmp_path, rows, **changes):
    """(session, what it said) of a new run on a corpus; limits follow from the data."""
    said = []
    tmp_path.mkdir(exist_ok=True)
    path = write_corpus(tmp_path / "c.jsonl", rows)
    config = tiny_config(tmp_path / "run", corpus=path, reward=VOWELS, max_response_tokens=0)
    return open_session(
        changed(config, changes), say=lambda line: said.append(line.removeprefix("note: "))
    ), said


def test_the_default_limits_leave_95_percent_whole(tmp_path):
    rows = [(f"question {i}", "good " * (40 + i)) for i in range(95)]
    rows += [(f"another question {i}", "long " * 300) for i in range(5)]
    session, said = opened(tmp_path, rows)
    world = session.world
    texts = [r for _, r in world.demonstrations + world.heldout_demonstrations]
    lengths = [len(session.tokenizer.response_ids(text)) for text in texts]
    limit = session.world.max_response_tokens
    assert limit == sorted(lengths)[94] < max(lengths)
    prompts = world.train_prompts + world.heldout_prompts
    longest = max(len(session.tokenizer.prompt_ids(prompt)) for prompt in prompts)
    assert session.world.max_prompt_tokens == longest <= limits.SHORT  # short texts are not cut
    (line,) = [line for line in said if line.startswith("chosen")]
    assert line == (
        "chosen so that 95 % of the texts are whole: "
        f"--max-prompt-tokens {longest}, --max-response-tokens {limit}"
    )
    assert session.gpt.n_ctx == longest + limit
    again = reopen_session(session.folder)
    assert (again.world.max_prompt_tokens, again.world.max_response_tokens) == (longest, limit)


def test_limits_that_are_set_are_obeyed_and_not_chosen(tmp_path):
    rows = [(f"question {i}", "good " * 40) for i in range(20)]
    session, said = opened(tmp_path, rows, max_prompt_tokens=7, max_response_tokens=2000)
    assert (session.world.max_prompt_tokens, session.world.max_response_tokens) == (7, 2000)
    assert session.gpt.n_ctx == 2007 and not [line for line in said if line.startswith("chosen")]


def test_the_default_limits_keep_within_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FLOATS", 1 << 18)
    rows = [("question " * 100, "good " * 900), ("another", "word")] * 20
    session, said = opened(tmp_path, [(f"{i} {p}", r) for i, (p, r) in enumerate(rows)])
    room = most_tokens(session.config.model, session.tokenizer.vocab_size)
    assert session.gpt.n_ctx <= room + 1
    (line,) = [line for line in said if line.startswith("chosen")]
    assert line.startswith("chosen so that 1 MB hold a sequence (95 % of the texts are whole with ")


@pytest.mark.parametrize("vocab_size", [300, 50_257])
def test_the_longest_sequence_fills_the_memory(vocab_size):
    def floats(n):
        return 2 * n * n * (3 + 2) + n * (17 * 3 * 32 + 4 * vocab_size)

    n = most_tokens(ModelConfig(n_layer=3, n_head=2, d_model=32), vocab_size)
    assert floats(n) <= limits.FLOATS < floats(n + 1)


def test_long_responses_train_to_their_end(tmp_path):
    rows = [(f"scene {i}:", f"once {i} upon a time " * 40) for i in range(12)]
    session, _ = opened(
        tmp_path,
        rows,
        max_response_tokens=512,
        vocab_size=262,  # bytes: no text is short
        **{"sft.steps": 2, "sft.batch_size": 2, "ppo.iterations": 1, "ppo.batch_size": 4},
        **{"eval_prompts": 4, "eval_every": 0, "reward_model.n_normalize": 4},
    )
    pipeline.run_stages(session)
    (row,) = metrics(session.folder, "ppo")
    assert session.gpt.n_ctx > 512 and row["response_length/mean"] > 100


# --- cuts


def test_a_cut_demonstration_has_no_stop_token(tmp_path, monkeypatch):
    long = " ".join(f"word{i}" for i in range(60))
    rows = [(f"question {i}", f"{i} {long}") for i in range(20)]
    rows += [(f"other {i}", "short") for i in range(20)]
    session, said = opened(tmp_path, rows, max_response_tokens=40)
    seen = []

    def catch(optimizer, examples, **rest):
        seen.extend(examples)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_sft", catch)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_stages(session)
    eos, decode = session.tokenizer.eos, session.tokenizer.decode
    whole = [decode(ids) in ("short", *(r for _, r in rows)) for _, ids in seen]
    assert [ids[-1] == eos for _, ids in seen] == whole and {*whole} == {True, False}
    assert all(len(ids) == 40 for (_, ids), w in zip(seen, whole, strict=True) if not w)
    assert "cut 20 of 40 demonstrations to 40 tokens" in "".join(said)


def test_a_sample_that_is_cut_shows_no_half_character(tmp_path, monkeypatch):
    session, _ = opened(tmp_path, [(f"q{i}", f"a{i}") for i in range(9)])
    euro, eos = list("€".encode()), session.tokenizer.eos

    def sample_responses(params, prompts, **rest):
        ids = [euro, [65, *euro[:2]], [65, *euro[:2], eos], [*euro[1:], 65], [eos]]
        return session_module.Samples(prompts, ids, None)

    monkeypatch.setattr(session_module, "sample_responses", sample_responses)
    shown = session.sample({}, ["q1"] * 5, np.random.default_rng(0)).responses
    assert shown == ["€", "A", "A\ufffd", "\ufffd\ufffdA", ""]


def test_held_out_prompts_differ_after_the_cut(tmp_path):
    end = "please tell me about the weather in the big city of london today"
    rows = [(f"{i} {end} {'abcdefgh'[i % 8] * 3}", f"it is {i} degrees") for i in range(64)]
    session, said = opened(tmp_path, rows, max_prompt_tokens=9)
    train, heldout = (
        {tuple(session.prompt_ids(prompt)) for prompt in prompts}
        for prompts in (session.world.train_prompts, session.world.heldout_prompts)
    )
    assert len(train | heldout) == 8 and not train & heldout and heldout
    assert len(session.world.train_prompts) + len(session.world.heldout_prompts) == 64
    (tmp_path / "same").mkdir()
    rows = [(f"{i} {end}", f"it is {i} degrees") for i in range(60)]
    session, said = opened(tmp_path / "same", rows, max_prompt_tokens=8)
    assert any("trained on and evaluated on" in line for line in said)


def test_prompts_of_the_support_world_that_are_equal_as_cut_are_said(tmp_path):
    session = open_session(tiny_config(tmp_path / "run", max_prompt_tokens=4))
    (note,) = [note for note in session.world.notes if "held-out prompts are" in note]
    train = {tuple(session.prompt_ids(prompt)) for prompt in session.world.train_prompts}
    again = sum(tuple(session.prompt_ids(p)) in train for p in session.world.heldout_prompts)
    assert again > 0 and note.startswith(f"{again} held-out prompts are")


def test_pairs_that_differ_late_train_and_advice_names_an_option(tmp_path, capsys):
    same = "the same beginning of both replies, again and again, " * 4
    rows = [
        {"prompt": f"p{i}", "chosen": same + "good", "rejected": same + "bad"} for i in range(20)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tmp_path / "run", pairs=str(path), max_response_tokens=0)
    session = open_session(config)
    train, heldout, _ = preference_pairs(session, {})
    assert len(train) + len(heldout) == 20
    config = tiny_config(tmp_path / "short", pairs=str(path), max_response_tokens=5)
    with pytest.raises(
        InputError, match="differ in their first 5 tokens; .* raise --max-response-"
    ):
        preference_pairs(open_session(config), {})


def test_a_folder_of_another_name_for_packed_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hh(tmp_path / "hh.jsonl.gz", preferences(20))
    session = open_session(changed(tiny_config("x"), {"out": None, "pairs": "hh.jsonl.gz"}))
    assert str(session.folder) == "runs/hh-0" and session.world.name == "hh"


def test_the_command_line_refuses_a_file_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a \\ud800", "chosen": "b", "rejected": "c"}\n')
    message = refusal(capsys, "train", "--out", tmp_path / "run", "--pairs", path)
    assert "1 with half a surrogate pair (line 1)" in message
    assert not (tmp_path / "run").exists()


def test_what_a_file_makes_useless_is_said_once_it_is_known_what_it_is(tmp_path):
    """The name says nothing: a table and JSON are known by their beginning."""
    table = tmp_path / "table.txt"
    table.write_text("title,body\n" + "".join(f"p{i},r{i} r\n" for i in range(20)))
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(f"p{i} text of line {i}\n" for i in range(20)))
    columns, said = ("prompt=title", "response=body"), {}
    for path in (table, plain):
        for unit in ("auto", "line"):
            lines = said[path, unit] = []
            config = tiny_config(tmp_path / f"{path.stem}-{unit}", corpus=str(path), reward=VOWELS)
            chosen = {"columns": columns * (path == table), "corpus_unit": unit}
            open_session(changed(config, chosen), say=lines.append)
    useless = {key: [x for x in lines if "changes nothing" in x] for key, lines in said.items()}
    assert useless[table, "auto"] == []
    assert useless[table, "line"] == [
        f"note: --corpus-unit changes nothing for {table}, which has rows"
    ]
    assert useless[plain, "auto"] == useless[plain, "line"] == []
    config = tiny_config(tmp_path / "other", corpus=str(plain), reward=VOWELS)
    with pytest.raises(InputError, match="--columns: expected names of columns; got 'body'"):
        open_session(changed(config, {"columns": columns}))
    assert not (tmp_path / "other").exists()


def test_the_default_limits_fit_beside_one_that_is_given_and_the_positions(tmp_path):
    rows = [(f"question {i} " * 20, "good " * 90) for i in range(30)]
    session, said = opened(tmp_path, rows, **{"max_response_tokens": 90, "model.n_ctx": 100})
    assert session.longest == (10, 90)
    assert any("the model's positions hold a sequence" in line for line in said)
    with pytest.raises(InputError, match="expected at least 5 positions, 3 for a prompt and 2"):
        opened(tmp_path / "b", rows, **{"model.n_ctx": 4})


def test_each_text_is_encoded_once_to_choose_the_limits_and_count_the_cuts(tmp_path, monkeypatch):
    counted = Counter()

    def response_ids(tokenizer, text, max_tokens=None):
        counted[text] += 1
        return real(tokenizer, text, max_tokens)

    real = Tokenizer.response_ids
    monkeypatch.setattr(Tokenizer, "response_ids", response_ids)
    rows = [(f"question {i}", "good " * (40 + i)) for i in range(60)]
    session, said = opened(tmp_path, rows)
    assert counted == Counter(response.strip() for _, response in rows)
    cut = f"cut 3 of 60 demonstrations to {session.world.max_response_tokens} tokens"
    assert [line for line in said if line.startswith(cut)]
