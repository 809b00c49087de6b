"""transformers and TRL use what a run leaves, and a run starts from what transformers leaves."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import CHATS, VOWELS, tiny_config, train, write_names, write_pairs

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tokenizers

from minirlhf.nn.sampling import Sampling
from minirlhf.runs import pipeline
from minirlhf.runs.hugging_face import GPT2_PATTERN, companions, read_model, read_tokenizer
from minirlhf.runs.session import open_session, reopen_session
from minirlhf.train.reward_model import score_responses
from minirlhf.worlds.examples import as_example
from minirlhf.worlds.tokens import BOS, EOS, SEP, SPECIALS, make_tokenizer, train_tokenizer

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # the peers' own
]

CORPUS = ["kalo mitru brisen", "Où est ma bouilloire ? 日本語", "it's 1234 o'clock\n\n  'S"] * 3
OURS = train_tokenizer(CORPUS, vocab_size=340)
RANKS = OURS.encoding._mergeable_ranks
OF_GPT2 = make_tokenizer("gpt2", GPT2_PATTERN, RANKS, OURS.encoding._special_tokens)
# what tokenizers differ about: apostrophes, runs of white space, digits of all kinds, controls
hard = st.lists(
    st.sampled_from(
        [*"'sSdt \n\t\r\x00\x0b\x0c\x1f\x85\xa0", "  ", "\u2003", "\u2028", "\u3000", "\ufeff"]
        + [
            "é",
            "e\u0301",
            "日本",
            "한국",
            "ไทย",
            "ab",
            "kalo",
            "12",
            "٣",
            "½",
            "²",
            "😀",
            "👩‍👩‍👧",
            "🇨🇭",
        ]
        + ["<|", "|>", "<", "\U0010ffff", "ſ", "\u200d", "\xad"]
    ),
    max_size=30,
).map("".join)
with_names = st.lists(st.sampled_from([*SPECIALS, " ", "a", "<|"])).map("".join)
texts = st.text(max_size=40) | hard | with_names


def auto(folder, **changes):
    return transformers.AutoTokenizer.from_pretrained(folder, **changes)


@pytest.fixture(scope="module", params=[OURS, OF_GPT2], ids=["our pattern", "GPT-2's"])
def pair(request, tmp_path_factory):
    """(our tokenizer, AutoTokenizer of its files)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in companions(request.param, {"padding_side": "left"}, {}).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return request.param, auto(folder)


@settings(max_examples=1000)
@given(texts)
def test_the_same_ids_on_a_thousand_strings(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, split_special_tokens=True) == ids
    assert theirs.decode(ids) == ours.decode(ids)
    if not any(name in text for name in SPECIALS):  # which transformers reads as these tokens
        assert theirs.encode(text) == ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_and_the_chat_template_make_our_sequences(pair):
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert (theirs.sep_token_id, theirs.pad_token_id) == (ours.sep, ours.pad)
    assert theirs.encode(f"{BOS}kalo{SEP}") == ours.prompt_ids("kalo")
    for chat in CHATS:
        prompt, reply = as_example({"messages": chat})
        asked, whole = (
            theirs.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
            for messages, asks in ((chat[:-1], True), (chat, False))
        )
        assert asked == ours.prompt_ids(prompt)
        assert whole == [*asked, *ours.response_ids(reply)]


def test_what_transformers_saves_again_is_read(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    got, _ = read_tokenizer(tmp_path, n_rows=ours.vocab_size)
    assert got.encoding._mergeable_ranks == RANKS
    assert got.encoding._special_tokens == ours.encoding._special_tokens
    assert got.encoding._pat_str == ours.encoding._pat_str


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pairs = write_pairs(folder / "pairs.jsonl")
    train(tiny_config(folder / "run", pairs=pairs, sft__steps=150))
    return folder / "run"


def test_transformers_continues_a_prompt_as_we_do(run):
    """Greedily, with the settings that lie beside the policy for all the rest."""
    session = reopen_session(run, look=True)
    policy = transformers.AutoModelForCausalLM.from_pretrained(run / "policy")
    theirs = auto(run / "policy")
    settings = policy.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert settings.do_sample and settings.top_k == 0 and settings.max_new_tokens == 10
    prompts = ["tea 3", "music 12"]
    batch = theirs([f"{BOS}{p}{SEP}" for p in prompts], padding=True, return_tensors="pt")
    out = policy.generate(**batch, do_sample=False)[:, batch["input_ids"].shape[1] :]
    ours, _ = pipeline.load_models(session)
    greedy = Sampling(temperature=0.0)
    samples = session.sample(ours, prompts, np.random.default_rng(0), greedy)
    assert all(samples.responses)
    assert theirs.batch_decode(out, skip_special_tokens=True) == samples.responses


def test_transformers_gives_our_scores(run):
    session = reopen_session(run, look=True)
    reference = pipeline.reference_stage(session)
    model = pipeline.reward_stage(session, reference)
    assert model.mean != 0 and model.sd != 1
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(run / "reward_model")
    assert type(peer).__name__ == "GPT2ForSequenceClassification" and peer.num_labels == 1
    theirs, ours = auto(run / "reward_model"), session.tokenizer
    texts = [("tea 3", "good good"), ("rain 11 and more", "no"), ("work", "")]
    ids = [[ours.prompt_ids(p) for p, _ in texts], [ours.response_ids(r) for _, r in texts]]
    expected = score_responses(model, *ids, pad_id=ours.pad)
    written = [f"{BOS}{p}{SEP}{r}{EOS}" for p, r in texts]
    with torch.no_grad():
        got = peer(**theirs(written, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-5)


# --- a GPT-2 of others


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder as people publish it: made by transformers, in several parts."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=330, special_tokens=[EOS], show_progress=False)
    trained.save_model(str(folder))  # vocab.json, merges.txt
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    transformers.GPT2Tokenizer(**files).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=336,
        n_positions=48,
        n_embd=8,
        n_layer=2,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder, max_shard_size="6KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@given(texts)
def test_its_tokenizer_gives_the_same_ids_here(gpt2, text):
    ours, source = read_tokenizer(gpt2, n_rows=336)
    assert source == "tokenizer.json" and ours.eos == 0
    assert ours.encode(text) == auto(gpt2).encode(text, split_special_tokens=True)


def test_from_a_gpt2_to_a_policy_and_back(gpt2, tmp_path):
    """The way of the README: transformers, train --init, transformers; and the ids stay."""
    names = write_names(tmp_path / "names.txt")
    config = tiny_config(tmp_path / "run", corpus=names, init=str(gpt2), reward=VOWELS)
    session = open_session(config)
    start = read_model(gpt2)
    peer = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    wte = peer.transformer.wte.weight.detach().numpy()
    assert np.array_equal(start.transformer["wte"][:336], wte)
    pipeline.run_stages(session)
    policy = transformers.AutoModelForCausalLM.from_pretrained(config.out / "policy")
    assert policy.config.n_positions == 48 and policy.config.vocab_size == 339
    before, after = auto(gpt2), auto(config.out / "policy")
    for text in ("kalo mitru", "Où est ma bouilloire ? 日本語", "it's 1234\n\n  'S 😀\x00"):
        assert before.encode(text) == after.encode(text)


def test_trl_takes_a_grpo_step_from_our_policy(run, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy = transformers.AutoModelForCausalLM.from_pretrained(run / "policy")
    before = policy.transformer.wte.weight.detach().clone()
    prompts = [f"{BOS}{thing} {i}{SEP}" for i, thing in enumerate(["tea", "rain", "work", "tea"])]
    trainer = trl.GRPOTrainer(
        model=policy,
        processing_class=auto(run / "policy"),
        reward_funcs=[
            str(run / "reward_model"),
            lambda completions, **_: list(map(len, completions)),
        ],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=8,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    after = trainer.model.transformer.wte.weight.detach()
    assert torch.isfinite(after).all() and not torch.equal(after, before)
