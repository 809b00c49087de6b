"""Our forward and greedy sampler against GPT2LMHeadModel of transformers, through checkpoints."""

import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minirlhf.nn.heads import logits_forward
from minirlhf.nn.sampling import Sampling, generate, sampling_logprobs
from minirlhf.nn.transformer import GPTConfig, init_transformer, transformer_forward
from minirlhf.runs.checkpoint import load_model, save_model
from minirlhf.train.batches import pad_batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.reward_model import reward_forward
from minirlhf.tree import tree_items, tree_map

pytestmark = pytest.mark.peers
torch.set_num_threads(1)

N_CTX = 24
SHAPES = {  # layers, heads, width, vocabulary
    "one_head": (1, 1, 8, 97),
    "two_layers": (2, 4, 32, 131),
    "wide": (3, 3, 48, 1009),
    "narrow_heads": (2, 8, 16, 53),
}
# A difference is measured against the largest logit, which is between 3 and 10 in these models.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
LENGTHS = (12, 1, 7, 5)  # of the rows of a batch


def peer_model(shape, dtype, activation="gelu_new", ln_eps=1e-5):
    """A GPT-2 of transformers at the scale of trained weights; no bias is 0 and no gain is 1."""
    n_layer, n_head, n_embd, vocab_size = SHAPES[shape]
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=N_CTX,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        activation_function=activation,
        layer_norm_epsilon=ln_eps,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype)).eval()
    randomize(dict(model.named_parameters()))
    return model


def randomize(named):
    """Rows of unit length at every linear layer, so that activations and logits are of order 1."""
    rng = np.random.default_rng(1)
    for name, tensor in sorted(named.items()):
        values = rng.standard_normal(tuple(tensor.shape))
        if name.endswith("wpe.weight"):
            values *= 0.3
        elif tensor.ndim == 2:
            values *= (1.5 if "wte" in name else 1.0) / np.sqrt(min(tensor.shape))
        else:
            values = 0.3 * values + (1.0 if "ln_" in name and "weight" in name else 0.0)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values))


def padded_batch(vocab_size, side, dtype, pad_id=0):
    """Rows of LENGTHS tokens; padding of the given side holds `pad_id`."""
    rng = np.random.default_rng(2)
    T = max(LENGTHS)
    tokens = np.full((len(LENGTHS), T), pad_id)
    mask = np.zeros((len(LENGTHS), T), dtype)
    for row, n in enumerate(LENGTHS):
        columns = slice(T - n, T) if side == "left" else slice(0, n)
        tokens[row, columns] = rng.integers(0, vocab_size, n)
        mask[row, columns] = 1
    return tokens, mask


def our_logits(params, config, tokens, mask):
    h, _ = transformer_forward(params, tokens=tokens, mask=mask, config=config)
    return logits_forward(h, params["wte"])[0]


@torch.no_grad()
def peer_logits(model, tokens, mask):
    """Position ids from the attention mask, as transformers' own generate() makes them."""
    attention_mask = torch.from_numpy(mask).long()
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return model(
        input_ids=torch.from_numpy(tokens), attention_mask=attention_mask, position_ids=position_ids
    ).logits.numpy()


def assert_same_logits(ours, theirs, mask, dtype):
    real = mask > 0
    assert ours.dtype == theirs.dtype == np.dtype(dtype)
    scale = np.abs(theirs[real]).max()
    assert 2 < scale < 30  # neither flat nor saturated
    assert np.abs(ours - theirs)[real].max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_a_checkpoint_of_transformers(tmp_path, shape, side, dtype):
    model = peer_model(shape, dtype)
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    tokens, mask = padded_batch(config.vocab_size, side, dtype)
    ours = our_logits(params, config, tokens, mask)
    assert_same_logits(ours, peer_logits(model, tokens, mask), mask, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("ln_eps", [1e-3, 1e-6])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_under_every_supported_setting(tmp_path, activation, ln_eps, attention, dtype):
    model = peer_model("two_layers", dtype, activation, ln_eps)
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    assert config.ln_eps == ln_eps
    tokens, mask = padded_batch(config.vocab_size, "left", dtype)
    ours = our_logits(params, config, tokens, mask)
    assert_same_logits(ours, peer_logits(model, tokens, mask), mask, dtype)


def test_a_full_window_without_padding(tmp_path):
    """All N_CTX positions used, and the dtype asked for at loading instead of the stored one."""
    model = peer_model("wide", "float32")
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path, dtype=np.float64)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, N_CTX))
    mask = np.ones(tokens.shape)
    ours = our_logits(params, config, tokens, mask)
    assert_same_logits(ours, peer_logits(model.double(), tokens, mask), mask, "float64")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_greedy_continuation(tmp_path, shape, dtype):
    """Left-padded prompts, a KV cache on both sides, rows that stop early and rows that do not."""
    model = peer_model(shape, dtype)
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    tokens, mask = padded_batch(config.vocab_size, "left", dtype)
    max_new = N_CTX - max(LENGTHS)
    pad_id = config.vocab_size - 1

    def continuations(stop_id):
        ours = generate(
            params,
            tokens=tokens,
            mask=mask,
            config=config,
            max_new=max_new,
            stop_id=stop_id,
            pad_id=pad_id,
            rng=np.random.default_rng(0),
            sampling=Sampling(temperature=0.0),
        )
        theirs = model.generate(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask).long(),
            do_sample=False,
            max_new_tokens=max_new,
            eos_token_id=stop_id,
            pad_token_id=pad_id,
        ).numpy()
        padded = np.full(ours.tokens.shape, pad_id)  # theirs ends when all rows have stopped
        padded[:, : theirs.shape[1]] = theirs
        return ours, padded

    ours, theirs = continuations(stop_id=config.vocab_size - 1)
    assert np.array_equal(ours.tokens, theirs)
    P = tokens.shape[1]
    assert len(np.unique(theirs[:, P:])) > 3  # no constant babble, which would prove little

    stop_id = int(theirs[0, P + max_new // 2])  # the first row now stops at the latest there
    ours, theirs = continuations(stop_id)
    assert np.array_equal(ours.tokens, theirs)
    for row in range(len(LENGTHS)):  # our mask: everything up to and including the stop token
        stops = np.flatnonzero(theirs[row, P:] == stop_id)
        length = stops[0] + 1 if len(stops) else max_new
        assert ours.mask[row, P:].sum() == length
        assert (ours.mask[row, P : P + length] == 1).all()
    assert ours.mask[0, P:].sum() < max_new


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transformers_gives_the_logits_of_a_checkpoint_of_ours(tmp_path, dtype):
    config = GPTConfig(vocab_size=131, n_ctx=N_CTX, n_layer=2, n_head=4, d_model=32, ln_eps=1e-4)
    rng = np.random.default_rng(5)

    def at_scale(x):  # as `randomize`
        noise = rng.standard_normal(x.shape)
        return (noise / np.sqrt(min(x.shape)) if x.ndim == 2 else x + 0.3 * noise).astype(dtype)

    params = tree_map(at_scale, init_transformer(config, rng=rng, dtype=dtype))
    heads = {
        name: {"w": rng.standard_normal((32, 1)).astype(dtype), "b": np.ones(1, dtype)}
        for name in ("value_head", "reward_head")
    }
    save_model(tmp_path / "ours", params, config, heads=heads)
    peer, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    tokens, mask = padded_batch(config.vocab_size, "left", dtype)
    ours = our_logits(params, config, tokens, mask)
    assert_same_logits(ours, peer_logits(peer.eval(), tokens, mask), mask, dtype)

    again, config_again, heads_again = load_model(tmp_path / "ours")
    assert config_again == config
    for one, other in ((again, params), (heads_again, heads)):
        one, other = dict(tree_items(one)), dict(tree_items(other))
        assert one.keys() == other.keys()
        for path, x in one.items():
            assert x.dtype == other[path].dtype and np.array_equal(x, other[path]), path


def test_the_loss_of_a_labelled_batch(tmp_path):
    """GPT2LMHeadModel(labels=...) is our cross-entropy: logits at t are scored against token t+1.

    Theirs takes the loss in float32 whatever the model is in (`logits.float()`).
    """
    model = peer_model("two_layers", "float64")
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 131, n).tolist() for n in (4, 1, 6)]
    responses = [rng.integers(0, 131, n).tolist() for n in (5, 7, 2)]
    batch = pad_batch(prompts, responses, pad_id=0, config=config, dtype=np.float64)
    out, _ = policy_forward({"transformer": params}, batch=batch, config=config)
    ours = -(out.logp * batch.response_mask).sum() / batch.response_mask.sum()

    labels = torch.from_numpy(batch.tokens).clone()
    labels[torch.from_numpy(batch.mask) == 0] = -100
    labels[:, : batch.prompt_len] = -100
    mask = torch.from_numpy(batch.mask).long()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(batch.tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            labels=labels,
        ).loss.item()
    assert theirs > 1
    assert abs(ours - theirs) <= 1e-6 * theirs


def test_a_reward_model_is_gpt2_for_sequence_classification(tmp_path):
    """One label, read at the last token that is no padding. Theirs has no bias: ours is 0 here."""
    model = peer_model("two_layers", "float64")
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    peer_config = transformers.GPT2Config.from_pretrained(tmp_path, num_labels=1, pad_token_id=0)
    peer = transformers.GPT2ForSequenceClassification(peer_config).double().eval()
    peer.transformer.load_state_dict(model.transformer.state_dict())
    peer.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    head = {"w": peer.score.weight.detach().numpy().T.copy(), "b": np.zeros(1)}

    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 131, n).tolist() for n in (4, 1, 6)]
    responses = [rng.integers(1, 131, n).tolist() for n in (5, 7, 2)]
    batch = pad_batch(prompts, responses, pad_id=0, config=config, dtype=np.float64)
    ours, _ = reward_forward(
        {"transformer": params, "reward_head": head}, batch=batch, config=config
    )
    mask = torch.from_numpy(batch.mask).long()
    with torch.no_grad():
        theirs = peer(
            input_ids=torch.from_numpy(batch.tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits[:, 0]
    theirs = theirs.numpy()
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("setting", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}])
def test_the_sampler_cuts_what_transformers_cuts(setting):
    """TopKLogitsWarper, then TopPLogitsWarper, on logits / temperature."""
    logits = 2.0 * np.random.default_rng(3).standard_normal((200, 53))
    ours = sampling_logprobs(logits, temperature=0.7, **setting)
    scores = transformers.TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits))
    if "top_k" in setting:
        scores = transformers.TopKLogitsWarper(setting["top_k"])(None, scores)
    if "top_p" in setting:
        scores = transformers.TopPLogitsWarper(setting["top_p"])(None, scores)
    theirs = torch.log_softmax(scores, dim=-1).numpy()
    assert np.array_equal(np.isinf(ours), np.isinf(theirs))
    kept = np.isfinite(theirs)
    assert 0.02 < kept.mean() < 0.6
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=0, atol=1e-13)
