"""Identities (issue 20, A1): whatever changes a logit or a token changes them, names, paths and schedules do not; and
what is stored under them is compared with its content wherever finished work is used again."""

import json
import os
import time

import pytest
import torch
from torch import nn

from refreshkv import RefreshConfig, checksums, enable
from refreshkv.checksums import digest, file_checksum, remembered
from refreshkv.evaluation.perplexity.losses import SequenceRecord, SequenceRecords
from refreshkv.identity import adapters, fingerprint, first_difference, folder_identity, identity
from refreshkv.prefix.entry_file import read_entry
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.prefix_stores import remember


class Adapted(nn.Module):
    """A linear layer with adapters, with the names that the package peft gives them."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Linear, strength: float = 2.0):
        super().__init__()
        self.base_layer, self.disable_adapters, self.merged_adapters = base_layer, False, []
        self.active_adapters, self.scaling = ["one"], {"one": strength, "two": strength}
        ends = {"lora_A": (base_layer.in_features, 2), "lora_B": (2, base_layer.out_features)}
        for part, (inputs, outputs) in ends.items():
            layers = {name: nn.Linear(inputs, outputs, bias=False) for name in ("one", "two")}
            setattr(self, part, nn.ModuleDict(layers).to(base_layer.weight.dtype))

    def forward(self, x):
        out = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return out


def adapted(**settings):
    torch.manual_seed(1)
    model = tiny_model(**settings)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    return model, attention.q_proj


@torch.no_grad()
def logits(model):
    return model(random_ids(1, 40)).logits


CONFIGURATIONS = {
    "rms_norm_eps": 1e-2,
    "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "attention_bias": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "eos_token_id": 5,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_setting_of_the_model_counts(name):
    assert fingerprint(tiny_model(**{name: CONFIGURATIONS[name]})) != fingerprint(tiny_model())


def scaled_frequencies(model):
    model.model.rotary_emb.inv_freq *= 0.5


def one_embedding_row(model):
    model.model.embed_tokens.weight[17] += 1e-3


def one_value(model):
    model.lm_head.weight[31, 7] += 1e-6


def sign_of_zero(model):
    model.model.layers[1].mlp.up_proj.weight[3, 3] = -0.0


@pytest.mark.parametrize("change", [scaled_frequencies, one_embedding_row, one_value, sign_of_zero])
def test_every_byte_of_every_weight_counts(change):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 0.0
        before = fingerprint(model)
        change(model)
    assert fingerprint(model) != before


def test_names_paths_and_the_schedule_do_not_count(tmp_path):
    model = tiny_model(dtype=torch.float32)
    before = fingerprint(model)
    model.save_pretrained(tmp_path / "elsewhere")
    assert fingerprint(type(model).from_pretrained(tmp_path / "elsewhere")) == before
    assert fingerprint(enable(model, RefreshConfig(budget=9, stride=3))) == before
    assert first_difference(identity(model), json.loads(json.dumps(identity(model)))) is None


CHANGES = {
    "another": lambda layer: layer.active_adapters.__setitem__(0, "two"),
    "none": lambda layer: setattr(layer, "disable_adapters", True),
    "both": lambda layer: layer.active_adapters.append("two"),
    "weaker": lambda layer: layer.scaling.__setitem__("one", 1.0),
    "trained": lambda layer: layer.lora_A["one"].weight.data.add_(0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_active_adapters_and_their_strength_count(name, tmp_path):
    """Also for an open store: it serves no entry of another adapter."""
    model, layer = adapted(dtype=torch.float32)
    before, computed = fingerprint(model), logits(model)
    store = PrefixStore(tmp_path / "store", 10**8, model, setting="--prefix-store")
    ids = random_ids(1, 80)
    remember(model, store, ids)
    CHANGES[name](layer)
    assert fingerprint(model) != before and not torch.equal(logits(model), computed)
    with pytest.raises(SettingsError, match=r"made by another model \(not the same (adapters|weights)\)"):
        PrefixStore(tmp_path / "store", 10**8, model)
    if name != "trained":  # `.data` hides a change from torch itself
        with pytest.raises(SettingsError, match="--prefix-store: the model has changed since"):
            store.match(ids)


def test_adapters_that_are_off_do_not_count():
    model, layer = adapted()
    layer.disable_adapters = True
    assert adapters(model) == {} and fingerprint(model) == fingerprint(tiny_model())
    layer.disable_adapters = False
    before = fingerprint(model)
    with torch.no_grad():
        layer.lora_A["two"].weight += 1
    assert fingerprint(model) == before


def test_lora_of_peft_counts():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = fingerprint(model)
    assert before != fingerprint(tiny_model())
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(tiny_model())
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert fingerprint(model) == before
    model.set_adapter("two")
    assert fingerprint(model) != before


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(SettingsError, match=r"--model: the weight lm_head\.weight is not in memory"):
        fingerprint(model)


# ---- prompt stores, records


def test_a_store_refuses_entries_of_another_model(tmp_path):
    """A file that was copied from another model's folder has good checksums, and is not served."""
    one, other = tiny_enabled(dtype=torch.float32), tiny_enabled(dtype=torch.float32, seed=1)
    ids = random_ids(1, 90)
    stores = {name: PrefixStore(tmp_path / name, 10**8, model) for name, model in (("one", one), ("other", other))}
    entry = remember(other, stores["other"], ids)
    file = f"{entry.name}.safetensors"
    (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    assert read_entry(tmp_path / "one" / file).model == digest(identity(other))
    with pytest.warns(UserWarning, match="it is of another model"):
        assert stores["one"].match(ids) == (0, None)
    assert stores["other"].match(ids)[0] == 90


def test_a_store_of_an_earlier_version_is_refused(tmp_path):
    model = tiny_enabled(dtype=torch.float32)
    PrefixStore(tmp_path, 10**8, model)
    kept = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**kept, "layout": 1}))
    with pytest.raises(SettingsError, match="was made by an earlier version.*: remove it, or choose another"):
        PrefixStore(tmp_path, 10**8, model)


def test_a_record_that_was_changed_is_not_believed(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    SequenceRecords(file).add([SequenceRecord(key, "full", [1.5, 2.0], None) for key in ("a", "b")])
    assert SequenceRecords(file)["a"].losses == [1.5, 2.0]
    file.write_text(file.read_text().replace("1.5", "0.5", 1))
    changed = SequenceRecords(file)
    assert changed.get("a") is None and changed["b"].losses == [1.5, 2.0]
    assert "1 lines were changed since they were written; they are measured again" in capsys.readouterr().err


# ---- files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRESHKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "JUST_NOW", 0.0)
    return tmp_path / "cache"


def test_checksums_are_kept_while_a_file_stays_the_same(cache, tmp_path):
    file, read = tmp_path / "weights.bin", []

    def compute():
        read.append(1)
        return file.read_bytes().hex()

    file.write_bytes(b"one")
    time.sleep(0.02)
    assert [remembered("hex", [file], compute) for _ in range(3)] == [b"one".hex()] * 3 and len(read) == 1
    times = file.stat()
    file.write_bytes(b"two")  # as long, and then as old
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered("hex", [file], compute) == b"two".hex() and len(read) == 2
    for kept in cache.iterdir():
        kept.write_text("{")
    assert remembered("hex", [file], compute) == b"two".hex()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "weights.bin"]


def test_facts_about_files_that_just_changed_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRESHKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("one")
    file_checksum(tmp_path / "file")
    assert not (tmp_path / "cache").exists()


def test_without_a_cache_folder_checksums_are_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("one")
    monkeypatch.setattr(checksums, "JUST_NOW", 0.0)
    monkeypatch.setenv("REFRESHKV_CACHE", str(tmp_path / "file"))
    assert file_checksum(tmp_path / "file") == file_checksum(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("config.json", {"rms_norm_eps": 1e-2}, "rest"),
        ("config.json", {"_name_or_path": "/home/else", "transformers_version": "9"}, None),
        ("model.safetensors", b"\0", "weights"),
        ("tokenizer.json", b"{}", "rest"),
        ("README.md", b"mine", None),
    ],
)
def test_a_folder_is_known_by_its_files(cache, tmp_path, name, change, part):
    folder = tmp_path / "model"
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    before = folder_identity(folder)
    if isinstance(change, dict):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    else:
        with (folder / name).open("ab") as file:
            file.write(change)
    after = folder_identity(folder)
    assert {key for key in before if before[key] != after[key]} == ({part} if part else set())
    assert folder_identity(tmp_path) is None
