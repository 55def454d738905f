"""From names to folders, and files that are not what they say."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from hooked_mamba.loading import CheckpointError, files, load_checkpoint
from hooked_mamba.loading.files import bundled_names, open_weights, resolve
from hooked_mamba.loading.tensor_files import open_bin, open_safetensors, read_json
from tests.hooked_mamba.loading.builders import assert_same, random_raw


def raw_folder(path, seed=0):
    config, state = random_raw("raw_mamba", seed, tie_embeddings=True)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def write_shards(path, state, suffix):
    """The two halves of a state dict and an index over them."""
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    names = sorted(state)
    halves = {
        f"{stem}-00001-of-00002.{suffix}": names[: len(names) // 2],
        f"{stem}-00002-of-00002.{suffix}": names[len(names) // 2 :],
    }
    for file, part in halves.items():
        save({name: state[name] for name in part}, path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


class TestResolve:
    def test_a_bundled_name_comes_before_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "PRETRAINED", tmp_path / "pretrained")
        (tmp_path / "pretrained" / "tiny").mkdir(parents=True)
        (tmp_path / "pretrained" / "tiny" / "config.json").write_text("{}")
        (tmp_path / "pretrained" / "no-config").mkdir()
        assert bundled_names() == ["tiny"]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny").mkdir()
        assert resolve("tiny") == tmp_path / "pretrained" / "tiny"
        with pytest.raises(CheckpointError, match=r"nor a hub id.*come with the package: tiny"):
            resolve("nowhere/at all")

    @pytest.mark.parametrize("name", bundled_names())
    def test_bundled_tokenizers_are_of_a_class_that_all_versions_know(self, name):
        """transformers 5 writes a class of its own, which 4 does not have."""
        about = json.loads((files.PRETRAINED / name / "tokenizer_config.json").read_text())
        assert about["tokenizer_class"] == "PreTrainedTokenizerFast"

    def test_a_local_folder(self, tmp_path):
        assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
        with pytest.raises(CheckpointError, match="has no revisions"):
            resolve(tmp_path, revision="main")

    @pytest.mark.parametrize("name", ["../a/b", "/no/such/folder", "a/b/c", "", "a b", "https://x/y", "-x/y"])
    def test_neither_a_folder_nor_a_hub_id(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        if not name:  # the empty path is the present folder
            with pytest.raises(CheckpointError, match="no config"):
                load_checkpoint(name)
        else:
            with pytest.raises(CheckpointError, match="nor a hub id" if name[0] not in "./" else "does not exist"):
                resolve(name)

    def test_a_file_is_not_a_folder(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="is a file; expected its folder"):
            resolve(tmp_path / "model.safetensors")

    def test_a_hub_id_is_fetched_without_weights_twice(self, tmp_path, monkeypatch):
        import huggingface_hub

        asked = []

        def snapshot(repo_id, revision, allow_patterns):
            asked.append((repo_id, revision, allow_patterns))
            if "consolidated*.safetensors" in allow_patterns:
                (tmp_path / "consolidated.safetensors").touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        assert resolve("owner/name", revision="v1") == tmp_path
        assert {(repo, revision) for repo, revision, _ in asked} == {("owner/name", "v1")}
        assert [patterns for _, _, patterns in asked][1:] == [["model*.safetensors"], ["consolidated*.safetensors"]]

    def test_of_several_gguf_files_one_is_to_be_named(self, tmp_path, monkeypatch):
        import huggingface_hub

        asked = []

        def snapshot(repo_id, revision, allow_patterns):
            asked.append(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["b.gguf", "README.md", "a.gguf"])
        with pytest.raises(CheckpointError, match=r"several GGUF files: a\.gguf, b\.gguf; .* 'owner/name/a\.gguf'"):
            resolve("owner/name")
        assert resolve("owner/name/b.gguf") == tmp_path / "b.gguf"
        assert asked[-1] == ["b.gguf"]
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["b.gguf"])
        assert resolve("owner/name") == tmp_path
        assert asked[-1] == ["b.gguf"]
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["Q4_K_M/b.gguf"])
        assert resolve("owner/name") == tmp_path / "Q4_K_M"
        assert resolve("owner/name/Q4_K_M/b.gguf") == tmp_path / "Q4_K_M" / "b.gguf"
        assert asked[-1] == ["Q4_K_M/b.gguf"]
        with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
            resolve("owner/name/../b.gguf")

    def test_no_network_names_what_needs_none(self, tmp_path, monkeypatch):
        import huggingface_hub

        def snapshot(*_, **__):
            raise ConnectionError("name resolution failed\nmore")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(files, "PRETRAINED", tmp_path)
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").touch()
        with pytest.raises(OSError, match=r"at revision 'v2'.*name resolution failed.*need no network: tiny"):
            resolve("owner/name", revision="v2")

    def test_offline_is_honoured(self, tmp_path, monkeypatch):
        """The real client, told to stay off the network, with an empty cache."""
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(OSError, match="fetching it from the hub failed"):
            resolve("owner/not-in-the-cache")


class TestShards:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_shards_read_as_one(self, tmp_path, suffix):
        state = raw_folder(tmp_path)
        write_shards(tmp_path, state, suffix)
        assert_same(open_weights(tmp_path), state)
        assert load_checkpoint(tmp_path).format == "raw_mamba"

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_a_missing_shard_is_named(self, tmp_path, suffix):
        _, weight_map = write_shards(tmp_path, raw_folder(tmp_path), suffix)
        lost = sorted(set(weight_map.values()))[1]
        (tmp_path / lost).unlink()
        with pytest.raises(CheckpointError, match=f"2 shards, of which these are not there: {lost}"):
            open_weights(tmp_path)

    def test_shards_that_hold_other_tensors(self, tmp_path):
        index, weight_map = write_shards(tmp_path, raw_folder(tmp_path), "safetensors")
        first = sorted(weight_map)[0]
        moved = weight_map | {first: sorted(set(weight_map.values()))[1], "ghost": weight_map[first]}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(CheckpointError, match=rf"missing ghost; unexpected {first}"):
            open_weights(tmp_path)

    @pytest.mark.parametrize(
        "name",
        ["../other/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "C:\\x.safetensors", "x.bin", ""],
    )
    def test_an_index_may_not_leave_its_folder(self, tmp_path, name):
        raw_folder(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match=r"expected a \.safetensors file in the same folder"):
            open_weights(tmp_path)

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}', "[]", "not json"])
    def test_an_index_without_a_map(self, tmp_path, text):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_weights(tmp_path)


class TestSafetensors:
    def test_preferred_over_an_archive(self, tmp_path):
        state = raw_folder(tmp_path)
        save_file(state, tmp_path / "model.safetensors")
        torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
        assert_same(open_weights(tmp_path), state)

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, tmp_path, kept):
        save_file({"a": torch.randn(64, 64), "b": torch.randn(8)}, tmp_path / "model.safetensors")
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|empty)"):
            open_weights(tmp_path)

    def test_longer_than_it_says(self, tmp_path):
        save_file({"a": torch.randn(8)}, tmp_path / "model.safetensors")
        with (tmp_path / "model.safetensors").open("ab") as file:
            file.write(b"tail")
        with pytest.raises(CheckpointError, match="longer than its header says"):
            open_weights(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"PK\x03\x04 an archive under another name",
            b"<!doctype html><html>not found</html>",
            struct.pack("<Q", 2**60) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 8) + b'{"a": 1}',
            struct.pack("<Q", 8) + b"{broken}",
            b"short",
        ],
    )
    def test_another_kind_of_file(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            open_safetensors(tmp_path / "model.safetensors")

    def test_a_pointer_of_git_lfs(self, tmp_path):
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(CheckpointError, match="git lfs pull"):
            open_weights(tmp_path)

    def test_offsets_that_overlap(self, tmp_path):
        header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(CheckpointError, match="does not read as safetensors"):
            open_safetensors(tmp_path / "x.safetensors")

    def test_tensors_are_views_of_the_file(self, tmp_path):
        state = {f"w{i}": torch.randn(3, 5) for i in range(4)}
        save_file(state, tmp_path / "x.safetensors")
        opened = open_safetensors(tmp_path / "x.safetensors")
        kept = [opened[name] for name in opened]
        assert_same(dict(zip(opened, kept, strict=True)), state)
        assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) <= len(kept)

    def test_mapping_anew_changes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hooked_mamba.loading.tensor_files.REMAP_BYTES", 16)
        state = {f"w{i}": torch.randn(3, 5) for i in range(9)}
        save_file(state, tmp_path / "x.safetensors")
        torch.save(state, tmp_path / "x.bin")
        for opened in (open_safetensors(tmp_path / "x.safetensors"), open_bin(tmp_path / "x.bin")):
            first = opened["w0"]
            assert_same({name: opened[name] for name in reversed(list(opened))}, state)
            assert torch.equal(first, state["w0"])  # still there after its mapping was let go


class Marker:
    """Unpickling this would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class TestArchive:
    @pytest.mark.parametrize("new", [True, False])
    def test_both_layouts_of_torch_save(self, tmp_path, new):
        state = raw_folder(tmp_path)
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        assert_same(open_weights(tmp_path), state)

    @pytest.mark.parametrize("how", ["archive", "stream", "bare"])
    def test_code_is_never_run(self, tmp_path, how):
        trace, path = tmp_path / "trace", tmp_path / "pytorch_model.bin"
        if how == "bare":
            path.write_bytes(pickle.dumps({"w": Marker(trace)}))
        else:
            torch.save({"w": Marker(trace)}, path, _use_new_zipfile_serialization=how == "archive")
        with pytest.raises(CheckpointError, match="holds code, which is never run"):
            open_weights(tmp_path)
        assert not trace.exists()

    @pytest.mark.parametrize("kept", [0.1, 0.6, 0.99])
    def test_truncated(self, tmp_path, kept):
        torch.save({"w": torch.randn(100, 100)}, tmp_path / "pytorch_model.bin")
        whole = (tmp_path / "pytorch_model.bin").read_bytes()
        (tmp_path / "pytorch_model.bin").write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(CheckpointError, match="is damaged"):
            open_weights(tmp_path)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(2), "holds a Tensor; expected tensors by name"),
            ([torch.zeros(2)], "holds a list"),
            ({"w": torch.zeros(2), "step": 3, "opt": {}}, "no tensors: opt, step"),
            ({0: torch.zeros(2)}, "no tensors: 0"),
        ],
    )
    def test_other_things_than_tensors_by_name(self, tmp_path, value, message):
        torch.save(value, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            open_weights(tmp_path)


class TestFolder:
    def test_no_weights(self, tmp_path):
        raw_folder(tmp_path)
        with pytest.raises(CheckpointError, match=r"has no weights: expected model\.safetensors.*found config\.json"):
            load_checkpoint(tmp_path)

    def test_no_config(self, tmp_path):
        (tmp_path / "weights.pt").touch()
        with pytest.raises(CheckpointError, match=r"no config\.json and no params\.json; found weights\.pt"):
            load_checkpoint(tmp_path)

    def test_json_of_either_release(self, tmp_path):
        (tmp_path / "a.json").write_text('{"x": [0.0, Infinity]}')
        (tmp_path / "b.json").write_text('{"x": [0.0, {"__float__": "Infinity"}]}')
        assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json") == {"x": [0.0, float("inf")]}

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": {"__float__": "many"}}', "[" * 100_000])
    def test_broken_json(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|holds a list)"):
            load_checkpoint(tmp_path)

    def test_absurdly_large_json(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hooked_mamba.loading.tensor_files.JSON_BYTES_MAX", 4)
        (tmp_path / "config.json").write_text('{"a": 1}')
        with pytest.raises(CheckpointError, match="more than a config can have"):
            load_checkpoint(tmp_path)
