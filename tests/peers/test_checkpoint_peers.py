"""The files on disk are those of Hugging Face transformers, in both directions."""

import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minirlhf.errors import InputError
from minirlhf.nn.transformer import GPTConfig, init_transformer
from minirlhf.runs.checkpoint import load_model, save_model

pytestmark = pytest.mark.peers

CONFIG = GPTConfig(vocab_size=11, n_ctx=6, n_layer=2, n_head=2, d_model=4, ln_eps=1e-6)
# our path in one block -> theirs, written here once more and not taken from the code under test
BLOCK = {
    ("ln1", "gain"): "ln_1.weight",
    ("ln1", "bias"): "ln_1.bias",
    ("attn", "qkv", "w"): "attn.c_attn.weight",
    ("attn", "qkv", "b"): "attn.c_attn.bias",
    ("attn", "out", "w"): "attn.c_proj.weight",
    ("attn", "out", "b"): "attn.c_proj.bias",
    ("ln2", "gain"): "ln_2.weight",
    ("ln2", "bias"): "ln_2.bias",
    ("mlp", "up", "w"): "mlp.c_fc.weight",
    ("mlp", "up", "b"): "mlp.c_fc.bias",
    ("mlp", "down", "w"): "mlp.c_proj.weight",
    ("mlp", "down", "b"): "mlp.c_proj.bias",
}


def assert_equal_tensors(params, peer):
    state = {name: tensor.detach().numpy() for name, tensor in peer.transformer.named_parameters()}
    ours = {
        "wte.weight": params["wte"],
        "wpe.weight": params["wpe"],
        "ln_f.weight": params["ln_f"]["gain"],
        "ln_f.bias": params["ln_f"]["bias"],
    }
    for i, block in enumerate(params["blocks"]):
        for path, name in BLOCK.items():
            node = block
            for key in path:
                node = node[key]
            ours[f"h.{i}.{name}"] = node
    assert ours.keys() == state.keys()
    for name, array in ours.items():
        assert array.dtype == state[name].dtype and np.array_equal(array, state[name]), name


def peer_model(**changes):
    torch.manual_seed(0)
    settings = {"bos_token_id": 0, "eos_token_id": 0} | changes
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=4, n_layer=2, n_head=2, **settings
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # biases and gains away from 0 and 1, so that none can be confused
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transformers_loads_what_we_write(tmp_path, dtype):
    rng = np.random.default_rng(0)
    params = init_transformer(CONFIG, rng=rng, dtype=dtype)
    heads = {"value_head": {"w": np.ones((4, 1), dtype), "b": np.zeros(1, dtype)}}
    meta = {"bos_token_id": 9, "eos_token_id": 8}
    save_model(tmp_path, params, CONFIG, heads=heads, meta=meta)
    peer, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True, torch_dtype="auto"
    )
    assert not any(info.values()), info
    assert_equal_tensors(params, peer)
    assert peer.lm_head.weight.data_ptr() == peer.transformer.wte.weight.data_ptr()
    assert peer.config.layer_norm_epsilon == 1e-6
    assert (peer.config.bos_token_id, peer.config.eos_token_id) == (9, 8)


def test_we_load_what_transformers_writes(tmp_path):
    peer = peer_model(layer_norm_epsilon=1e-6)
    peer.save_pretrained(tmp_path)
    params, config, heads = load_model(tmp_path)
    assert config == CONFIG and heads == {}
    assert_equal_tensors(params, peer)


def test_we_load_the_bare_transformer_too(tmp_path):
    peer = peer_model()
    peer.transformer.save_pretrained(tmp_path)  # names without the prefix "transformer."
    assert_equal_tensors(load_model(tmp_path)[0], peer)


def test_bfloat16_as_transformers_writes_it(tmp_path):
    peer = peer_model().to(torch.bfloat16)
    peer.save_pretrained(tmp_path)
    assert_equal_tensors(load_model(tmp_path)[0], peer.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 8}, "n_inner"),
    ],
)
def test_another_gpt2_is_refused(tmp_path, changes, message):
    peer_model(**changes).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type to be 'gpt2' or 'llama'; got 'gpt_neox'"):
        load_model(tmp_path)
