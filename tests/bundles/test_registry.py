"""The registry: names, versions and aliases hold under removal, concurrency, kills and damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

import bioseq.bundles.stores as stores
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import write_bundle
from bioseq.bundles.index import Index
from bioseq.bundles.registry import Registry
from bioseq.bundles.stores import FolderStore, ObjectStore
from bioseq.errors import BundleError, NotFoundError, OutputError, RegistryError

HASH = "sha256:" + "0" * 64
NOTHING = Path("/nonexistent")  # no shipped bundles


def backbone(path: Path, seed: int = 0, name: str = "tiny"):
    model = PackedEncoder(CONFIGS["tiny"])
    model.init_weights(torch.Generator().manual_seed(seed))
    return save_backbone(path, model, name=name, card=f"# Card {seed}", evidence={})


def head(path: Path, *, base: str = HASH, name: str = "stability", value: float = 1.0, beats: bool = True):
    fields = {"kind": "head", "name": name, "alphabet": "protein", "base_hash": base, "task": "regression"}
    tensors = {"weight": torch.full((2,), value)}
    return write_bundle(
        path, manifest_fields=fields, tensors=tensors, card="# Head", evidence={"beats_baseline": beats}
    )


@pytest.fixture(params=["folder", "file-url", "subtree"])
def registry(request, tmp_path, monkeypatch) -> Registry:
    monkeypatch.setenv("BIOSEQ_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    if request.param == "folder":
        return Registry(home, shipped=NOTHING)
    if request.param == "file-url":
        return Registry(f"file://{home}", shipped=NOTHING)
    home.mkdir()
    return Registry(ObjectStore(SubTreeFileSystem(str(home), LocalFileSystem()), "reg"), shipped=NOTHING)


@pytest.fixture
def local(tmp_path) -> Registry:
    return Registry(tmp_path / "home", shipped=NOTHING)


# ------------------------------------------------------------------------------------------- every kind of store


def test_register_resolve_and_pin_a_version(registry, tmp_path):
    assert registry.entries() == []
    first = registry.register(backbone(tmp_path / "a", 1))
    second = registry.register(backbone(tmp_path / "b", 2))
    assert (first.ref, second.ref) == ("tiny@1", "tiny@2")
    assert registry.resolve("tiny").card() == "# Card 2\n"
    pinned = registry.resolve("tiny@1")
    assert pinned.card() == "# Card 1\n"
    assert (pinned.manifest.name, pinned.manifest.version) == ("tiny", 1)
    assert pinned.manifest.content_hash == first.content_hash
    assert [e.ref for e in registry.entries()] == ["tiny@1", "tiny@2"]


def test_the_same_content_is_stored_once(registry, tmp_path):
    made = backbone(tmp_path / "a")
    first = registry.register(made)
    assert registry.register(made).ref == first.ref  # not a second version
    other = registry.register(made, name="other")
    assert other.content_hash == first.content_hash and other.ref == "other@1"
    assert registry.resolve("other").manifest.name == "other"
    registry.remove("tiny@1")
    assert registry.resolve("other").card() == "# Card 0\n"  # still needed, so still there


def test_a_removed_number_is_never_given_again(registry, tmp_path):
    a, b = backbone(tmp_path / "a", 1), backbone(tmp_path / "b", 2)
    registry.register(a)
    registry.register(b)
    registry.remove("tiny@2")
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("tiny@2")
    assert caught.value.code == "version.not_found"
    assert registry.resolve("tiny").card() == "# Card 1\n"
    assert registry.register(b).ref == "tiny@3"
    registry.remove("tiny@1")
    registry.remove("tiny@3")
    assert registry.entries() == []
    assert registry.register(a).ref == "tiny@4"


def test_an_alias_moves(registry, tmp_path):
    registry.register(backbone(tmp_path / "a", 1))
    registry.register(backbone(tmp_path / "b", 2))
    assert registry.alias("default", "tiny@1").aliases == ("default",)
    assert registry.resolve("default").card() == "# Card 1\n"
    assert registry.alias("default", "tiny").ref == "tiny@2"
    assert registry.resolve("default").manifest.version == 2
    assert registry.aliases() == {"default": "tiny@2"}
    with pytest.raises(RegistryError, match="alias 'default' points at tiny@2"):
        registry.remove("tiny@2")
    with pytest.raises(RegistryError, match="'default' is an alias"):
        registry.register(backbone(tmp_path / "c", 3), name="default")
    with pytest.raises(RegistryError, match="'tiny' is a model's name"):
        registry.alias("tiny", "tiny@1")
    with pytest.raises(NotFoundError):
        registry.alias("other", "nothing@1")


def test_heads_of_a_backbone_and_generation(registry, tmp_path):
    seen = [registry.generation()]
    base = registry.register(backbone(tmp_path / "b"))
    seen.append(registry.generation())
    mine = registry.register(head(tmp_path / "h", base=base.content_hash))
    seen.append(registry.generation())
    assert mine.notes == ()
    newer = registry.register(head(tmp_path / "h2", base=base.content_hash, value=2.0))
    lost = registry.register(head(tmp_path / "o", name="orphan"))
    assert "not registered here" in lost.notes[0]
    seen.append(registry.generation())
    assert [e.ref for e in registry.heads_for(base)] == [newer.ref]
    registry.alias("a", "tiny@1")
    seen.append(registry.generation())
    registry.alias("a", "tiny@1")  # nothing changes, and nothing is told
    assert registry.generation() == seen[-1]
    registry.remove(newer.ref)
    seen.append(registry.generation())
    assert len(set(seen)) == len(seen)


def test_a_weak_head_is_refused_unless_accepted(registry, tmp_path):
    weak = head(tmp_path / "w", beats=False)
    with pytest.raises(RegistryError, match="does not beat") as caught:
        registry.register(weak)
    assert caught.value.code == "head.weak"
    assert registry.entries() == []
    assert registry.register(weak, accept_weak=True).ref == "stability@1"


def test_not_found_says_what_is_near(registry, tmp_path):
    base = registry.register(backbone(tmp_path / "b", name="esm2-8m"))
    registry.register(head(tmp_path / "h", base=base.content_hash))
    for ref, kind, code, said in [
        ("esm2-8n", None, "model.not_found", "Did you mean esm2-8m"),
        ("stabilty", "head", "head.not_found", "Did you mean stability"),
        ("esm2-8m", "head", "head.not_found", "esm2-8m is a backbone"),
        ("stability", "backbone", "model.not_found", "stability is a head"),
        ("esm2-8m@9", None, "version.not_found", "It has 1"),
        ("esm2-8m@x", None, "version.not_found", "whole numbers"),
        ("esm2-8m@0", None, "version.not_found", "whole numbers"),
        ("", None, "model.not_found", "no model ''"),
    ]:
        with pytest.raises(NotFoundError, match=said) as caught:
            registry.resolve(ref, kind=kind)
        assert caught.value.code == code
    for ref in ("nothing@1", "esm2-8m@2"):
        with pytest.raises(NotFoundError):
            registry.remove(ref)
    with pytest.raises(RegistryError, match="names no version"):
        registry.remove("esm2-8m")


def test_a_damaged_index_says_what_to_do(registry, tmp_path):
    registry.register(backbone(tmp_path / "b"))
    good = registry.store.read("index.json")
    entry = json.loads(good)
    entry["models"]["tiny"]["versions"]["1"]["content_hash"] = "../../etc"
    other = backbone(tmp_path / "c", 1)
    for bad in (b"", b"{", b"[]", b"\xff", b"{}", good[:-30], json.dumps(entry).encode()):
        registry.store.write("index.json", bad)
        with pytest.raises(RegistryError, match=r"index\.previous\.json"):
            registry.entries()
        with pytest.raises(RegistryError, match="damaged"):
            registry.register(other)
        assert registry.store.read("index.json") == bad  # never mended silently
    registry.store.write("index.json", good.replace(b'"format_version": 2', b'"format_version": 9'))
    with pytest.raises(RegistryError, match="format_version 9"):
        registry.entries()
    registry.store.write("index.json", good)
    assert registry.resolve("tiny").card() == "# Card 0\n"


def test_threads_register_at_once(registry, tmp_path):
    made = [backbone(tmp_path / str(i), i) for i in range(4)]
    failures: list[BaseException] = []

    def work(bundle):
        try:
            registry.register(bundle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(bundle,)) for bundle in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(e.version for e in registry.entries()) == [1, 2, 3, 4]
    assert {e.content_hash for e in registry.entries()} == {b.manifest.content_hash for b in made}


# ------------------------------------------------------------------------------------------------- a local folder


_WORKER = """
import sys
from pathlib import Path
from bioseq.bundles.index import Index
from bioseq.bundles.registry import Registry
registry = Registry(sys.argv[1], shipped=Path("/nonexistent"))
for path in sys.argv[2:]:
    print(registry.register(path).ref, flush=True)
"""


def start(home, *bundles, code=_WORKER):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(home), *map(str, bundles)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_processes_register_at_once(local, tmp_path):
    made = [head(tmp_path / f"h{i}", value=float(i)).path for i in range(9)]
    shared = head(tmp_path / "shared", name="shared").path
    workers = [start(tmp_path / "home", *made[i::3], shared) for i in range(3)]
    said = [worker.communicate()[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    refs = [ref for lines in said for ref in lines]
    assert sorted(r for r in refs if r != "shared@1") == sorted(f"stability@{v}" for v in range(1, 10))
    assert refs.count("shared@1") == 3
    assert len(local.entries()) == 10
    assert all(local.resolve(e.ref).manifest.content_hash == e.content_hash for e in local.entries())


_FOREVER = """
import itertools, sys
from pathlib import Path
from bioseq.bundles.index import Index
from bioseq.bundles.registry import Registry
registry = Registry(sys.argv[1], shipped=Path("/nonexistent"))
for i in itertools.count():
    print(registry.register(sys.argv[2 + i % 2], name=f"n{i}").ref, flush=True)
    if i % 3 == 2:
        registry.remove(f"n{i}@1")
"""


@pytest.mark.parametrize("delay", [0.0, 0.013])
def test_a_kill_during_register_leaves_a_readable_registry(local, tmp_path, delay):
    """SIGKILL at whatever moment: the registry reads, what is listed opens, and the next writer gets the lock."""
    made = [head(tmp_path / f"h{i}", value=float(i)).path for i in range(3)]
    worker = start(tmp_path / "home", *made[:2], code=_FOREVER)
    for _ in range(4):
        worker.stdout.readline()  # it is writing now
    time.sleep(delay)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    entries = local.entries()
    assert len(entries) >= 3
    for entry in entries:
        local.resolve(entry.ref)
    assert local.register(made[2]).ref == "stability@1"


def test_a_kill_between_copy_and_index_wastes_nothing(local, tmp_path, monkeypatch):
    made = backbone(tmp_path / "a")
    monkeypatch.setattr(FolderStore, "write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        local.register(made)
    assert local.entries() == []
    monkeypatch.undo()
    assert local.register(made).ref == "tiny@1"


def test_content_removed_while_it_is_registered_is_copied_again(local, tmp_path, monkeypatch):
    made = backbone(tmp_path / "a")
    put, calls = FolderStore.put_blob, []

    def put_then_lose(self, digest, folder):
        put(self, digest, folder)
        calls.append(digest)
        if len(calls) == 1:
            self.drop_blob(digest)  # what a concurrent remove of the last version does

    monkeypatch.setattr(FolderStore, "put_blob", put_then_lose)
    assert local.register(made).ref == "tiny@1" and len(calls) == 2
    local.resolve("tiny@1")


def test_removal_deletes_the_content(local, tmp_path):
    entry = local.register(backbone(tmp_path / "a"))
    assert Path(entry.path).is_dir()
    local.remove("tiny@1")
    assert not Path(entry.path).exists()


def test_a_damaged_blob_is_refused(local, tmp_path):
    entry = local.register(backbone(tmp_path / "a"))
    local.resolve("tiny")
    (Path(entry.path) / "card.md").write_text("# Forged")
    with pytest.raises(BundleError, match=r"card\.md has hash"):
        local.resolve("tiny")
    shutil.rmtree(entry.path)
    with pytest.raises(RegistryError, match="its files are gone"):
        local.resolve("tiny")


def test_resolve_takes_a_folder_unless_told_not_to(local, tmp_path, monkeypatch):
    backbone(tmp_path / "here", 5)
    assert local.resolve(tmp_path / "here").card() == "# Card 5\n"
    assert local.resolve(str(tmp_path / "here")).card() == "# Card 5\n"
    monkeypatch.chdir(tmp_path)
    assert local.resolve("here").card() == "# Card 5\n"
    local.register(backbone(tmp_path / "other", 6), name="here")
    assert local.resolve("here").card() == "# Card 6\n"  # a registered name wins
    assert local.resolve("./here").card() == "# Card 5\n"
    for ref in (str(tmp_path / "here"), "./here", "../home/blobs/x"):
        with pytest.raises(NotFoundError):
            local.resolve(ref, paths=False)


@pytest.mark.parametrize("name", ["A", "a/b", "../x", "a@1", " "])
def test_names_that_could_be_paths_are_refused(local, tmp_path, name):
    with pytest.raises(RegistryError, match="cannot name a model"):
        local.register(backbone(tmp_path / "a"), name=name)
    assert not (tmp_path / "home").exists()


def test_one_name_is_one_kind(local, tmp_path):
    local.register(backbone(tmp_path / "a"))
    with pytest.raises(RegistryError, match="'tiny' is a backbone, this bundle a head"):
        local.register(head(tmp_path / "h"), name="tiny")


def test_home_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "elsewhere"))
    Registry(shipped=NOTHING).register(backbone(tmp_path / "a"))
    assert (tmp_path / "elsewhere" / "index.json").exists()


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    made = backbone(tmp_path / "a")
    with pytest.raises((OutputError, RegistryError), match="cannot"):
        Registry(tmp_path / "file" / "home", shipped=NOTHING).register(made)


def test_a_held_lock_is_reported(local, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.1)
    made = backbone(tmp_path / "a")
    with local.store.lock():
        with pytest.raises(RegistryError, match="locked by another writer") as caught:
            local.register(made)
    assert caught.value.code == "registry.busy"
    assert local.register(made).ref == "tiny@1"


# ------------------------------------------------------------------------------------------------ shipped bundles


def test_shipped_bundles_are_there_and_read_only(tmp_path):
    shipped = tmp_path / "models"
    base = backbone(shipped / "default", 9, name="bioseq-8m")
    head(shipped / "loc", base=base.manifest.content_hash, name="localization")
    registry = Registry(tmp_path / "home", shipped=shipped)
    assert registry.resolve("default").card() == "# Card 9\n"
    assert registry.resolve("default").manifest.name == "bioseq-8m"
    assert [(e.ref, e.shipped) for e in registry.entries()] == [
        ("bioseq-8m@1", True),
        ("localization@1", True),
    ]
    assert [e.name for e in registry.heads_for(base.manifest)] == ["localization"]
    assert not (tmp_path / "home").exists()  # reading writes nothing
    with pytest.raises(RegistryError, match="shipped with bioseq"):
        registry.remove("bioseq-8m@1")
    with pytest.raises(RegistryError, match="a model that bioseq ships"):
        registry.register(backbone(tmp_path / "a", 1), name="bioseq-8m")
    registry.register(backbone(tmp_path / "b", 2), name="mine")
    registry.alias("default", "mine@1")
    assert registry.resolve("default").card() == "# Card 2\n"
    registry.alias("default", "bioseq-8m@1")
    assert registry.resolve("default").card() == "# Card 9\n"


# ------------------------------------------------------------------------------------------------ object storage


def remote(tmp_path, cache: str = "cache") -> Registry:
    (tmp_path / "bucket").mkdir(exist_ok=True)
    filesystem = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    return Registry(ObjectStore(filesystem, "reg", cache=tmp_path / cache), shipped=NOTHING)


def test_a_remote_bundle_is_fetched_once_and_verified(tmp_path):
    entry = remote(tmp_path).register(backbone(tmp_path / "a"))
    there = remote(tmp_path, "cache-of-another-machine")
    first = there.resolve("tiny")
    assert first.path.is_relative_to(tmp_path / "cache-of-another-machine")
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert (there.resolve("tiny").path / "manifest.json").stat().st_mtime_ns == stamp
    blob = tmp_path / "bucket" / "reg" / "blobs" / entry.content_hash[7:] / "card.md"
    blob.write_text("# Forged\n")
    with pytest.raises(BundleError, match=r"card\.md has hash"):
        remote(tmp_path, "third").resolve("tiny")


def test_a_bundle_that_another_process_fetched_first_is_left_alone(tmp_path, monkeypatch):
    """Replicas start together and fetch the same bundle: nobody's files may vanish under a reader."""
    remote(tmp_path).register(backbone(tmp_path / "a"))
    first = remote(tmp_path).resolve("tiny").path
    inode = first.stat().st_ino
    # the second process looked before the first had finished
    is_file = Path.is_file
    answers = iter([False])
    monkeypatch.setattr(
        Path, "is_file", lambda p: next(answers, True) if p == first / "manifest.json" else is_file(p)
    )
    assert remote(tmp_path).store.fetch("sha256:" + first.name) == first
    monkeypatch.undo()
    assert first.stat().st_ino == inode
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # and nothing is left behind


def test_a_remote_lock_left_by_a_dead_writer_expires(tmp_path, monkeypatch):
    registry = remote(tmp_path)
    locks = tmp_path / "bucket" / "reg" / "locks"
    locks.mkdir(parents=True)
    (locks / "deadbeef").write_text("held")
    made = backbone(tmp_path / "a")
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.5)
    with pytest.raises(RegistryError, match="locked by another writer"):
        registry.register(made)
    os.utime(locks / "deadbeef", (time.time() - 1000,) * 2)
    assert registry.register(made).ref == "tiny@1"
    assert list(locks.iterdir()) == []


def test_pyarrow_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOSEQ_CACHE", str(tmp_path / "cache"))
    filesystem, root = FileSystem.from_uri("mock:///registry")
    store = ObjectStore(filesystem, root, "mock:///registry")
    registry = Registry(store, shipped=NOTHING)
    entry = registry.register(backbone(tmp_path / "a"))
    assert entry.path.startswith("mock:///registry/blobs/")
    assert registry.resolve("tiny@1").card() == "# Card 0\n"
    assert isinstance(Registry("mock:///other", shipped=NOTHING).store, ObjectStore)
    with pytest.raises(RegistryError, match="cannot open the registry at gopher"):
        Registry("gopher://x/y")


def test_a_name_is_found_without_a_look_at_the_others(local, tmp_path, monkeypatch):
    """With 10,000 heads a request must not pay for all of them: the file is parsed once a change, and entries of other
    names are not made."""
    local.register(backbone(tmp_path / "one"), "one")
    local.register(backbone(tmp_path / "two", seed=2), "two")
    reads = []
    plain = local.store.read
    monkeypatch.setattr(local.store, "read", lambda name: reads.append(name) or plain(name))
    monkeypatch.setattr(Index, "entries", lambda self: pytest.fail("all entries were made"))
    local._seen = None
    assert [local.find(n).ref for n in ("one", "two@1", "one@1")] == ["one@1", "two@1", "one@1"]
    assert reads == ["index.json"]
    Registry(tmp_path / "home", shipped=NOTHING).alias("three", "two@1")
    assert local.find("three").ref == "two@1" and reads == ["index.json"] * 2


def test_a_manifest_is_read_alone_and_checked(tmp_path):
    entry = remote(tmp_path).register(backbone(tmp_path / "a"))
    there = remote(tmp_path, "cache-of-another-machine")
    manifest = there.manifest(there.find("tiny"))
    assert manifest == there.resolve("tiny").manifest
    again = remote(tmp_path, "third")
    assert again.manifest(entry) == manifest and again.file(entry, "card.md") == b"# Card 0\n"
    assert not (tmp_path / "third").exists(), "the bundle was fetched"
    blob = tmp_path / "bucket" / "reg" / "blobs" / entry.content_hash[7:]
    (blob / "card.md").write_text("# Forged\n")
    with pytest.raises(RegistryError, match=r"card\.md of tiny@1 has not the hash"):
        again.file(entry, "card.md")
    (blob / "manifest.json").write_text((blob / "manifest.json").read_text().replace("unknown", "MIT"))
    with pytest.raises(RegistryError, match="is not that of"):
        again.manifest(entry)


def test_a_remote_registry_tells_a_change_without_its_index(tmp_path, monkeypatch):
    there = remote(tmp_path)
    entry = there.register(backbone(tmp_path / "a"))
    reads = []
    plain = ObjectStore.read
    monkeypatch.setattr(ObjectStore, "read", lambda self, name: reads.append(name) or plain(self, name))
    seen = there.generation()
    assert there.generation() == seen and "index.json" not in reads
    there.alias("x", entry.ref)
    assert there.generation() != seen
