"""Our Llama against LlamaForCausalLM of transformers: logits, gradients, greedy text, folders."""

import json
import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minirlhf.errors import InputError
from minirlhf.nn.heads import logits_forward, output_matrix
from minirlhf.nn.sampling import Sampling, generate
from minirlhf.nn.transformer import transformer_forward
from minirlhf.runs.checkpoint import load_model, save_model
from minirlhf.train.batches import Batch
from minirlhf.train.policy import policy_forward
from minirlhf.train.ppo import Experience, ppo_loss_backward, ppo_loss_forward
from minirlhf.train.settings import PPOConfig
from minirlhf.tree import tree_items

pytestmark = pytest.mark.peers
torch.set_num_threads(1)

N_CTX, V = 24, 53
SHAPES = {  # heads, heads of keys, width, inside the MLP, tied, theta
    "as many keys": (4, 4, 32, 40, True, 1e4),
    "groups of two": (4, 2, 24, 29, False, 5e5),
    "one key": (6, 1, 36, 17, True, 1e4),
    "one head, odd sizes": (1, 1, 10, 7, False, 50.0),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # of the largest logit, which is from 2 to 30
GRADIENT = 1e-10  # of each tensor's norm, in float64


class Rotary(torch.nn.Module):
    """Angles in float64. Theirs are in float32 in any model; so is their RMSNorm, replaced too."""

    def __init__(self, theta, n):
        super().__init__()
        self.theta, self.n = theta, n

    def forward(self, x, position_ids):
        frequencies = self.theta ** (-torch.arange(self.n, dtype=torch.float64) / self.n)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def peer_model(shape, dtype, **settings):
    """Three blocks at the scale of trained weights; no gain is 1."""
    H, K, C, F, tied, theta = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=F,
        num_hidden_layers=3,
        num_attention_heads=H,
        num_key_value_heads=K,
        max_position_embeddings=N_CTX,
        rms_norm_eps=1e-4,
        rope_theta=theta,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
        **settings,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = Rotary(theta, C // H // 2)
    for owner in [model.model, *model.model.layers]:
        for name, _ in list(owner.named_children()):
            if "norm" in name:
                setattr(owner, name, torch.nn.RMSNorm(C, eps=1e-4))
    model = model.to(getattr(torch, dtype)).eval()
    rng = np.random.default_rng(1)
    for name, tensor in sorted(dict(model.named_parameters()).items()):
        values = rng.standard_normal(tuple(tensor.shape))
        if tensor.ndim == 2:
            values *= (1.5 if "embed" in name or "lm_head" in name else 1.0) / min(
                tensor.shape
            ) ** 0.5
        else:
            values = 1.0 + 0.3 * values
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values))
    return model


def ragged(dtype, T=12, lengths=(12, 1, 7, 5)):
    """Prompts padded on the left."""
    tokens = np.random.default_rng(2).integers(2, V, (len(lengths), T))
    mask = (np.arange(T) >= T - np.array(lengths)[:, None]).astype(dtype)
    return tokens, mask


def peer_logits(model, tokens, mask):
    attention_mask = torch.from_numpy(mask).long()
    return model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
    ).logits


def our_logits(params, config, tokens, mask):
    h, _ = transformer_forward(params, tokens=tokens, mask=mask, config=config)
    return logits_forward(h, output_matrix(params))[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_a_folder_of_transformers(tmp_path, shape, dtype):
    model = peer_model(shape, dtype)
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    tokens, mask = ragged(dtype)
    ours = our_logits(params, config, tokens, mask)
    theirs = peer_logits(model, tokens, mask).detach().numpy()
    real = mask > 0
    assert ours.dtype == theirs.dtype == np.dtype(dtype)
    scale = np.abs(theirs[real]).max()
    assert 2 < scale < 30  # neither flat nor saturated
    assert np.abs(ours - theirs)[real].max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_goes_there_and_back_bit_for_bit(tmp_path, shape):
    model = peer_model(shape, "float32")
    model.save_pretrained(tmp_path / "theirs")
    params, config, _ = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", params, config)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, peer.state_dict()[name]), name
    again, config_again, _ = load_model(tmp_path / "ours")
    assert config_again == config
    for (path, one), (_, other) in zip(tree_items(again), tree_items(params), strict=True):
        assert np.array_equal(one, other), path


def test_a_folder_in_parts(tmp_path):
    model = peer_model("groups of two", "float32")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = (load_model(tmp_path / name)[0] for name in ("whole", "parts"))
    for (path, one), (_, other) in zip(tree_items(whole), tree_items(parts), strict=True):
        assert np.array_equal(one, other), path


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_greedy_continuation(tmp_path, shape):
    model = peer_model(shape, "float64")
    model.save_pretrained(tmp_path)
    params, config, _ = load_model(tmp_path)
    tokens, mask = ragged("float64")
    ends = {"max_new": N_CTX - tokens.shape[1], "stop_id": 1, "pad_id": 0}
    same = {"config": config, "rng": np.random.default_rng(0), "sampling": Sampling(0.0)}
    ours = generate(params, tokens=tokens, mask=mask, **ends, **same)
    theirs = model.generate(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask).long(),
        do_sample=False,
        max_new_tokens=ends["max_new"],
        eos_token_id=1,
        pad_token_id=0,
    ).numpy()
    padded = np.zeros(ours.tokens.shape, dtype=int)  # theirs ends when all rows have stopped
    padded[:, : theirs.shape[1]] = theirs
    assert np.array_equal(ours.tokens, padded)
    assert len(np.unique(theirs[:, tokens.shape[1] :])) > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_ppo_loss(tmp_path, shape):
    """Clipped surrogate and entropy bonus, written here once more; every tensor of the model."""
    model = peer_model(shape, "float64")
    model.save_pretrained(tmp_path / "theirs")
    params, config, _ = load_model(tmp_path / "theirs")
    rng, (tokens, mask), P = np.random.default_rng(3), ragged("float64"), 5
    mask[:, P - 1 :] = 1.0
    mask[2, 9:] = 0.0  # a response that ends early
    batch = Batch(tokens, mask, P)
    out, _ = policy_forward({"transformer": params}, batch=batch, config=config)
    real, shape_BT = batch.response_mask, out.logp.shape
    old_logp = out.logp - 0.4 * rng.standard_normal(shape_BT)
    advantages, zeros = rng.standard_normal(shape_BT), np.zeros(shape_BT)
    experience = Experience(
        batch, old_logp, zeros, None, zeros, advantages, zeros, real / real.sum(), 0.0
    )
    settings = PPOConfig(advantages="batch", ent_coef=0.1)
    loss, cache = ppo_loss_forward(
        {"transformer": params}, experience=experience, config=config, settings=settings
    )
    gradients = ppo_loss_backward(1.0, cache)["transformer"]

    logits = peer_logits(model, tokens, mask)[:, P - 1 : -1]
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(-1, torch.from_numpy(tokens[:, P:, None]))[..., 0]
    ratio, A = (logp - torch.from_numpy(old_logp)).exp(), torch.from_numpy(advantages)
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    theirs = -((surrogate + 0.1 * entropy) * torch.from_numpy(real)).sum() / real.sum()
    theirs.backward()
    assert abs(theirs.item() - float(loss)) <= 1e-12

    with torch.no_grad():  # their gradients in the places of the parameters: read as a folder
        for tensor in model.parameters():
            tensor.copy_(tensor.grad)
    model.save_pretrained(tmp_path / "gradients")
    expected, _, _ = load_model(tmp_path / "gradients")
    ours = dict(tree_items(gradients))
    for path, leaf in tree_items(expected):
        assert np.linalg.norm(leaf) > 1e-6, path
        error = np.linalg.norm(ours[path] - leaf) / np.linalg.norm(leaf)
        assert error <= GRADIENT, f"{path}: {error:.1e}"
    assert ours.keys() == dict(tree_items(expected)).keys()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "rope_scaling",
            {"rope_type": "linear", "factor": 2.0},
            "expected rope_scaling to be null",
        ),
        ("attention_bias", True, "expected attention_bias to be false"),
        ("head_dim", 6, "expected head_dim to be null or 8"),
        ("hidden_act", "gelu", "expected hidden_act to be 'silu'"),
    ],
)
def test_variants_are_refused_by_name(tmp_path, entry, value, message):
    peer_model("as many keys", "float32").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content.pop("rope_parameters", None)
    path.write_text(json.dumps({**content, entry: value}))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)
