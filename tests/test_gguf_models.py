# SPDX-License-Identifier: BSD-3-Clause
"""Models out of GGUF files, and back: values, bytes, and files that do not hold a whole model."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from errors import raises
from switchgear import offload
from switchgear.cli import main
from switchgear.integrations.gguf import ARCHITECTURES
from switchgear.integrations.gguf_file import Array, GgufFile, GgufTensor, Value, read_gguf, write_gguf
from switchgear.layers import StoredEmbedding, StoredLinear
from switchgear.reference import gguf
from switchgear.weights import stored_of
from switchgear.weights.gguf import encode_rows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gguf_models import IDS, distance, logits_of, make_model  # noqa: E402

# Of logits, in the 2-norm: activations are rounded to 8 bits, by 0.005 in each of ten products one after the other.
ROUNDED = 0.05
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@architectures
def test_a_plain_file_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    switchgear.save_gguf(model, tmp_path / "a.gguf", "f32")
    loaded = switchgear.load_gguf(tmp_path / "a.gguf")
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits_of(loaded), logits_of(model))


@architectures
@pytest.mark.parametrize("type", ["q8_0", "q4_k_m"])
def test_stored_weights_are_those_of_the_file(name: str, type: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    switchgear.save_gguf(make_model(name), path, type)
    model = switchgear.load_gguf(path)
    for path_of_part, part in model.named_modules():
        is_split = path_of_part.endswith("kv_b_proj")  # of which files have a transposed half
        is_plain = is_split or getattr(part, "out_features", 1) == 1
        assert part.__class__ not in (torch.nn.Linear, StoredLinear) or isinstance(part, StoredLinear) != is_plain
        assert not path_of_part.endswith(".experts") or stored_of(part) is not None
        assert not isinstance(part, torch.nn.Embedding) or isinstance(part, StoredEmbedding)
    with switchgear.use_backend("reference"):
        wanted = logits_of(model)
    assert distance(logits_of(model), wanted) < ROUNDED
    switchgear.save_gguf(model, tmp_path / "b.gguf", like=path)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_experts_are_views_of_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    switchgear.save_gguf(make_model("olmoe"), path, "q4_k")
    model = switchgear.load_gguf(path)
    wanted = logits_of(model)
    experts = model.model.layers[0].mlp.experts
    stored = stored_of(experts)
    assert stored is not None
    first, second = stored.weights(experts)
    memory = first.data.untyped_storage().data_ptr()
    assert memory == second.data.untyped_storage().data_ptr() == model.lm_head.weight_data.untyped_storage().data_ptr()
    file = read_gguf(path)
    for index, part in enumerate(("gate", "up")):
        assert torch.equal(first.data[:, index], file.tensors[f"blk.0.ffn_{part}_exps.weight"].data)
    # in another order, and split, the same rows are copied
    tensors = dict(sorted(file.tensors.items(), reverse=True))
    write_gguf(other, file.metadata, tensors)
    assert torch.equal(logits_of(switchgear.load_gguf(other)), wanted)
    shards = [tmp_path / f"c-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, shard in enumerate(shards):
        metadata = dict(file.metadata) if number == 0 else {}
        metadata |= {"split.no": Value("uint16", number), "split.count": Value("uint16", 2)}
        write_gguf(shard, metadata, {name: t for name, t in tensors.items() if ("_up_" in name) == bool(number)})
    assert torch.equal(logits_of(switchgear.load_gguf(shards[1])), wanted)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_pages_of_copied_tensors_are_freed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    switchgear.save_gguf(make_model("olmoe"), path, "f32")
    file = read_gguf(path)
    head = file.tensors["output.weight"]
    stored = GgufTensor("q8_0", head.shape, gguf.encode("q8_0", head.data))
    write_gguf(other, file.metadata, {**file.tensors, "output.weight": stored})
    model = switchgear.load_gguf(other)
    _, _, mapped = Path("/proc/self/smaps").read_text().partition(f"{other}\n")
    resident = re.search(r"^Rss: +(\d+) kB", mapped, re.M)
    assert resident is not None
    assert int(resident[1]) << 10 < other.stat().st_size / 10
    assert torch.equal(model.model.embed_tokens.weight, file.tensors["token_embd.weight"].data)


def test_older_files_have_latent_keys_and_values_in_one_matrix(tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    model = make_model("deepseek2:softmax", q_lora_rank=None)
    switchgear.save_gguf(model, path, "f32")
    file, whole = read_gguf(path), {}
    for name, tensor in file.tensors.items():
        if "attn_k_b" in name:
            data = model.model.layers[int(name.split(".")[1])].self_attn.kv_b_proj.weight.detach()
            whole[name.replace("k_b", "kv_b")] = GgufTensor("f32", tuple(data.shape), data)
        elif "attn_v_b" not in name:
            whole[name] = tensor
    sizes = {"key_length": 64, "value_length": 64, "head_count_kv": 4}
    metadata = file.metadata | {f"deepseek2.attention.{key}": Value("uint32", size) for key, size in sizes.items()}
    metadata = {key: value for key, value in metadata.items() if "_mla" not in key and "gating" not in key}
    write_gguf(other, metadata, whole)
    loaded = switchgear.load_gguf(other)
    assert torch.equal(logits_of(loaded), logits_of(model))
    switchgear.save_gguf(loaded, path, like=other)
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("high", [1.0, 4.0])
def test_factors_of_positions_are_those_of_transformers(high: float, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": high, "original_max_position_embeddings": 8192}
    model = make_model("llama4", rope_parameters=scaling)
    switchgear.save_gguf(model, tmp_path / "a.gguf", "f32")
    factors = read_gguf(tmp_path / "a.gguf").tensors["rope_freqs.weight"].data
    plain = 5e5 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq * factors, plain, rtol=1e-5, atol=0)
    assert switchgear.load_gguf(tmp_path / "a.gguf").config.rope_parameters == model.config.rope_parameters


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    model = make_model("glm4moe")
    switchgear.save_gguf(model, path, "f32")
    file = read_gguf(path)
    extra = {"blk.2.nextn.enorm.weight": GgufTensor("f32", (256,), torch.ones(256))}
    metadata = file.metadata | {
        "glm4moe.block_count": Value("uint32", 3), "glm4moe.nextn_predict_layers": Value("uint32", 1)
    }  # fmt: skip
    write_gguf(other, metadata, file.tensors | extra)
    loaded = switchgear.load_gguf(other)
    assert torch.equal(logits_of(loaded), logits_of(model))
    switchgear.save_gguf(loaded, path, like=other)
    assert read_gguf(path).get("glm4moe.nextn_predict_layers") == 0
    assert torch.equal(logits_of(switchgear.load_gguf(path)), logits_of(model))


@pytest.mark.parametrize("change", ["dtype", "mixed", "packed", "plain embedding", "restored"])
def test_models_that_are_changed_are_written_as_they_are(change: str, tmp_path: Path) -> None:
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    switchgear.save_gguf(make_model("granitemoe"), path, "q4_k_m")
    file = read_gguf(path)
    if change == "mixed":
        name = "blk.1.ffn_up_exps.weight"
        shape = file.tensors[name].shape
        write_gguf(path, file.metadata, {**file.tensors, name: GgufTensor("f16", shape, torch.randn(shape).half())})
    if change == "plain embedding":
        name = "token_embd.weight"
        shape = file.tensors[name].shape
        write_gguf(
            path, file.metadata, {**file.tensors, name: GgufTensor("bf16", shape, torch.randn(shape).bfloat16())}
        )
    model = switchgear.load_gguf(path, dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (change == "plain embedding")
    wanted = logits_of(model)
    if change == "packed":
        model.save_pretrained(tmp_path / "packed")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert torch.equal(logits_of(model), wanted)
    if change == "restored":
        with pytest.warns(RuntimeWarning, match="rounded"):
            switchgear.restore(model)
    switchgear.save_gguf(model, other, like=path)
    assert (other.read_bytes() == path.read_bytes()) == (change not in ("mixed", "dtype", "restored"))
    assert distance(logits_of(switchgear.load_gguf(other)), wanted.float()) < 0.05


def test_tensors_are_encoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, encoded, path = encode_rows, [], tmp_path / "a.gguf"

    def encode_alone(*args: Any) -> torch.Tensor:
        assert all(reference() is None for reference in encoded)
        encoded.append(weakref.ref(data := encode(*args)))
        return data

    monkeypatch.setattr("switchgear.integrations.gguf.encode_rows", encode_alone)
    model = make_model("llama")
    switchgear.save_gguf(model, path, "q8_0")
    assert len(encoded) == 2 * (4 + 3) + 2
    before = path.read_bytes()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = float("nan")
    with raises(ValueError, "output.weight"):  # the last tensor, when others are in the unfinished file
        switchgear.save_gguf(model, path, "q8_0")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


MISSING: dict[str, Any] = {
    "general.architecture": None,
    "olmoe.expert_count": None,
    "olmoe.embedding_length": Value("float32", 256.0),
    "olmoe.attention.head_count": Value("uint32", 0),
    "olmoe.attention.head_count_kv": Value("array", Array("uint32", torch.tensor([2, 2]).to(torch.uint32))),
    "olmoe.feed_forward_length": Value("uint64", 2**63),
    "olmoe.block_count": Value("uint32", 2**32 - 1),
    "olmoe.rope.scaling.type": Value("string", "longrope"),
    "olmoe.rope.freq_base": Value("string", "x"),
}
BAD_TENSORS: dict[str, Any] = {
    "token_embd.weight": None,
    "blk.0.ffn_up_exps.weight": None,
    "blk.1.attn_q.weight": None,
    "output_norm.weight": GgufTensor("f32", (255,), torch.zeros(255)),
    "blk.0.ffn_down_exps.weight": GgufTensor("f32", (4, 256, 128), torch.zeros(4, 256, 128)),
    "blk.0.ffn_gate_inp.weight": GgufTensor("i32", (4, 256), torch.zeros(4, 256, dtype=torch.int32)),
    "output.weight": GgufTensor("iq2_s", (96, 256), torch.zeros(96, 82, dtype=torch.uint8)),
    "blk.0.attn_q.bias": GgufTensor("f32", (256,), torch.zeros(256)),
    "rope_freqs.weight": GgufTensor("f32", (32,), torch.ones(32)),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    switchgear.save_gguf(make_model("olmoe"), path, "q4_0")
    return read_gguf(path)


@pytest.mark.parametrize("name", [*MISSING, *BAD_TENSORS])
def test_what_is_missing_or_wrong_is_named(name: str, file: GgufFile, tmp_path: Path) -> None:
    changes = {key: value for key, value in MISSING.items() if key == name}
    metadata = {key: value for key, value in (file.metadata | changes).items() if value is not None}
    changes = {key: value for key, value in BAD_TENSORS.items() if key == name}
    tensors = {key: value for key, value in (file.tensors | changes).items() if value is not None}
    write_gguf(tmp_path / "a.gguf", metadata, tensors)
    with raises(ValueError, "olmoe" if "feed_forward" in name else name):
        switchgear.load_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("glm4moe", "nextn_predict_layers", Value("uint32", 2)),
        ("glm4moe", "rope.dimension_count", Value("uint32", 65)),
        ("glm4moe", "expert_weights_norm", Value("uint32", 1)),
        ("deepseek2", "attention.key_length_mla", Value("uint32", 32)),
        ("deepseek2", "expert_gating_func", Value("uint32", 3)),
    ],
)
def test_keys_of_some_architectures_are_named(name: str, key: str, value: Value, tmp_path: Path) -> None:
    switchgear.save_gguf(make_model(name), tmp_path / "a.gguf", "f32")
    file = read_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", file.metadata | {f"{name}.{key}": value}, file.tensors)
    with raises(ValueError, key):
        switchgear.load_gguf(tmp_path / "b.gguf")


def test_what_cannot_be_loaded_or_written(file: GgufFile, tmp_path: Path) -> None:
    metadata = {**file.metadata, "general.architecture": Value("string", "gpt2")}
    write_gguf(tmp_path / "a.gguf", metadata, file.tensors)
    with pytest.raises(ValueError, match="gpt2"):
        switchgear.load_gguf(tmp_path / "a.gguf")
    model = make_model("olmoe")
    with raises(ValueError, "type"):
        switchgear.save_gguf(model, tmp_path / "b.gguf", "q9")
    with raises(ValueError, "like"):
        switchgear.save_gguf(model, tmp_path / "b.gguf", like=tmp_path / "a.gguf")
    model.config.norm_topk_prob = True
    with raises(ValueError, "model.config.norm_topk_prob"):
        switchgear.save_gguf(model, tmp_path / "b.gguf")
    with raises(ValueError, "model"):
        switchgear.save_gguf(torch.nn.Linear(2, 2), tmp_path / "b.gguf")
    with raises(ValueError, "dtype"):
        switchgear.load_gguf(file.path, dtype=torch.int8)


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "granitemoe"])
def test_experts_in_a_store_have_the_bytes_of_the_file(name: str, tmp_path: Path) -> None:
    path, out = tmp_path / "a.gguf", tmp_path / "store"
    switchgear.save_gguf(make_model(name), path, "q4_k_m")
    if name == "granitemoe":  # gates and ups of different types are decoded
        file, other = read_gguf(path), "blk.1.ffn_up_exps.weight"
        shape = file.tensors[other].shape
        write_gguf(path, file.metadata, {**file.tensors, other: GgufTensor("f16", shape, torch.randn(shape).half())})
    resident = switchgear.load_gguf(path)
    wanted = logits_of(resident)
    assert main(["offload-store", str(path), "--out", str(out), "--verify"]) == 0
    store, of_model = offload.Store.open(out), offload.write_store(resident, tmp_path / "model", "as published")
    assert [r.checksums for r in store.layers.values()] == [r.checksums for r in of_model.layers.values()]
    model = offload.load_model(path, store)
    with offload.offload(model, store, slots=2):
        assert torch.equal(logits_of(model), wanted)


def test_stores_of_a_file_in_other_forms(file: GgufFile, tmp_path: Path) -> None:
    store = offload.write_store(file.path, tmp_path / "a", "int8", dtype=torch.bfloat16)
    model = switchgear.load_gguf(file.path, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="rounded"):
        switchgear.restore(model)
    wanted = offload.write_store(model, tmp_path / "b", "int8")
    assert [r.checksums for r in store.layers.values()] == [r.checksums for r in wanted.layers.values()]
    with raises(ValueError, "device"):
        offload.load_model(file.path, store, device="cuda")
    with raises(offload.StoreError, "path"):
        offload.Store.open(file.path)
    switchgear.save_gguf(make_model("llama4"), tmp_path / "c.gguf", "q8_0")
    with raises(ValueError, "source"):  # experts that do not run on the fused kernel
        offload.write_store(tmp_path / "c.gguf", tmp_path / "c", "as published")


@architectures
def test_llama_cpp_chooses_the_same_tokens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("switchgear_bench", reason="switchgear_bench is not installed")
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from switchgear_bench.llama import Llama

    for type, bound in (("f32", 2e-3), ("q8_0", ROUNDED)):  # keys and values are float16 in llama.cpp
        path = tmp_path / f"{type}.gguf"
        switchgear.save_gguf(make_model(name), path, type)
        model, other, ids = switchgear.load_gguf(path), Llama(path, 128, 2), IDS[0].tolist()
        logits = other.step(ids)
        assert distance(logits_of(model)[0, -1], logits) < bound
        if type == "q8_0":
            continue  # with that error, two tokens may change places
        wanted = []
        for _ in range(12):
            wanted.append(int(logits.argmax()))
            logits = other.step(wanted[-1:])
        got = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(ids) :]
        assert got.tolist() == wanted
