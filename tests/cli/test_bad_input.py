"""Bad input: exit status 2, one line that says what and where, and nothing written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import copy_model, make_tokenizer, tree, write_rows

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter

INDEX = "model.safetensors.index.json"


@pytest.fixture
def refused(recall, tmp_path, monkeypatch):
    """Run a command that must be refused; give back the line that says why."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, match: str) -> str:
        before = tree(tmp_path)
        done = recall(*arguments)
        assert done.status == 2, done
        assert done.out == ""
        assert re.fullmatch(r"recall: [^\n]+\n", done.err), done.err
        assert re.search(match, done.err), done.err
        assert tree(tmp_path) == before
        return done.err

    return run


def quick(*models, data, out="out", **options):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ["quick", *models, "--data", data, "--out", out, *flags]


# --------------------------------------------------------------------------------- weight files


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)


def change_entry(folder: Path, **values) -> None:
    header, data = parts(folder / "model.safetensors")
    header["model.norm.weight"] |= values
    put(folder / "model.safetensors", header, data)


def cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def move_back(folder: Path) -> None:
    """Let the last tensor overlap the one before it."""
    header, data = parts(folder / "model.safetensors")
    offsets = max((e["data_offsets"] for n, e in header.items() if n != "__metadata__"))
    for entry in header.values():
        if entry.get("data_offsets") == offsets:
            entry["data_offsets"] = [offset - 2 for offset in offsets]
    put(folder / "model.safetensors", header, data)


def put_header(folder: Path, header: bytes, length: int | None = None) -> None:
    put(folder / "model.safetensors", header, parts(folder / "model.safetensors")[1], length)


def put_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json.*J"),
    "an empty config": (lambda f: (f / "config.json").write_text(""), "config.json.*JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "an empty file": (lambda f: cut(f, 0), "truncated"),
    "a file of seven bytes": (lambda f: cut(f, 7), "truncated"),
    "half a header": (lambda f: cut(f, 200), "truncated"),
    "a header alone": (lambda f: put_header(f, b"{}"), "followed by bytes of no tensor"),
    "the last byte missing": (lambda f: cut(f, -1), "truncated"),
    "an oversized header": (lambda f: put_header(f, b"{}", 2**63), str(2**63)),
    "a header that is no JSON": (lambda f: put_header(f, b'{"a": '), "header.*JSON"),
    "a header that is no text": (lambda f: put_header(f, b"\xff" * 20), "header.*JSON"),
    "a header that is a list": (lambda f: put_header(f, b"[]"), "header"),
    "a tensor given twice": (lambda f: put_header(f, b'{"a": {}, "a": {}}'), "twice"),
    "overlapping offsets": (move_back, "overlap"),
    "offsets that leave the file": (
        lambda f: change_entry(f, data_offsets=[10**9, 10**9 + 64]),
        "model.norm.weight|truncated",
    ),
    "offsets that are negative": (
        lambda f: change_entry(f, data_offsets=[-64, 0]),
        "model.norm.weight.*data_offsets",
    ),
    "offsets that do not fit the shape": (
        lambda f: change_entry(f, shape=[33]),
        r"model.norm.weight.*\[33\]",
    ),
    "a shape in words": (lambda f: change_entry(f, shape="32"), "model.norm.weight.*shape"),
    "a dtype that is not known": (lambda f: change_entry(f, dtype="I3"), "model.norm.weight.*I3"),
    "eight-bit floats": (lambda f: change_entry(f, dtype="F8_E4M3"), "F8_E4M3.*dequantise"),
    "an index that is no JSON": (lambda f: put_index(f, "{"), INDEX),
    "an index without a map": (lambda f: put_index(f, {}), "weight_map"),
    "an index with a missing shard": (
        lambda f: put_index(f, {"weight_map": {"a": "model-1.safetensors"}}),
        "model-1.safetensors.*missing",
    ),
    "an index that leaves the folder": (
        lambda f: put_index(f, {"weight_map": {"a": "../base/model.safetensors"}}),
        r"\.\./base",
    ),
    "an index with an absolute path": (
        lambda f: put_index(f, {"weight_map": {"a": "/etc/passwd"}}),
        "/etc/passwd",
    ),
    "a .bin that is no checkpoint": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder(case, refused, toys, tmp_path):
    damage, match = DAMAGES[case]
    folder = copy_model(toys.qwen2[1], tmp_path / "damaged")
    damage(folder)
    line = refused(*quick(toys.qwen2[0], folder, data=toys.data), match=match)
    assert "damaged" in line


def test_no_model_has_a_tokenizer(refused, toys, tmp_path):
    """Where an older one has, that is taken."""
    folder = copy_model(toys.qwen2[1], tmp_path / "damaged")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(*quick(folder, folder, data=toys.data), match="damaged has no tokenizer: put ")


@pytest.mark.parametrize("case", ["no weights", "overlapping offsets", "no config"])
def test_the_older_model_is_checked_as_well(case, refused, toys, tmp_path):
    damage, match = DAMAGES[case]
    folder = copy_model(toys.qwen2[1], tmp_path / "damaged")
    damage(folder)
    refused(*quick(folder, toys.qwen2[0], data=toys.data), match=match)


@pytest.mark.parametrize(
    "model", ["nowhere", "no/where", "./no/where/at/all", "", "{}+", "+{}", "{}+nowhere"]
)
def test_a_model_that_is_not_there(model, refused, toys):
    model = model.format(toys.qwen2[0])
    refused(*quick(toys.qwen2[0], model, data=toys.data), match=r"where|name|models\.1\.model")


def test_a_file_is_no_model(refused, toys):
    refused(*quick(toys.qwen2[0], toys.data, data=toys.data), match="data.jsonl is a file")


# --------------------------------------------------------------------------------- models apart


def write_tensors(template, folder: Path, change, **config) -> Path:
    """A copy of a model with `change` made to its tensors."""
    source = open_checkpoint(template)
    arrays = {name: source.read(name) for name in source.specs}
    copy_model(template, folder, **config)
    for path in folder.glob("model*"):
        path.unlink()
    change(arrays)
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return folder


def write_recipe(path: Path, models, method="recall", **values) -> Path:
    entries = [{"model": str(model)} for model in models]
    path.write_text(json.dumps({"merge_method": method, "models": entries, **values}))
    return path


@pytest.fixture
def both_methods(toys, tmp_path):
    """Command lines that merge two models: with and without running them."""

    def lines(*models):
        recipe = write_recipe(tmp_path / "recipe.yml", models, "average")
        return [quick(*models, data=toys.data), ["merge", recipe, "out"]]

    return lines


def test_models_of_different_families(refused, both_methods, toys):
    for line in both_methods(toys.llama[0], toys.qwen2[0]):
        refused(*line, match="llama.*qwen2")


def test_models_of_different_shapes(refused, both_methods, toys, tmp_path):
    def narrow(arrays):
        for name in arrays:
            if "mlp.down" in name:
                arrays[name] = np.ascontiguousarray(arrays[name][:, :40])
            elif "mlp" in name:
                arrays[name] = arrays[name][:40]

    narrow_model = write_tensors(toys.qwen2[0], tmp_path / "narrow", narrow, intermediate_size=40)
    for line in both_methods(narrow_model, toys.qwen2[0]):
        said = refused(*line, match="narrow")
        assert "40" in said and "48" in said and toys.qwen2[0] in said


def test_models_of_different_vocabularies(refused, both_methods, toys, tmp_path):
    def add_rows(arrays):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            arrays[name] = np.concatenate([arrays[name], arrays[name][:2]])

    larger = write_tensors(toys.qwen2[0], tmp_path / "larger", add_rows, vocab_size=99)
    for line in both_methods(toys.qwen2[0], larger):
        assert "larger" in refused(*line, match="97.*99|99.*97")


def test_models_of_different_depths(refused, both_methods, toys, tmp_path):
    def drop(arrays):
        for name in [name for name in arrays if "layers.2." in name]:
            del arrays[name]

    shallow = write_tensors(toys.llama[0], tmp_path / "shallow", drop, num_hidden_layers=2)
    for line in both_methods(shallow, toys.llama[1]):
        assert "shallow" in refused(*line, match=r"layers\.2|num_hidden_layers")


@pytest.mark.parametrize("older", [True, False])
def test_models_with_other_tensor_names(older, refused, both_methods, toys, tmp_path):
    def rename(arrays):
        arrays["model.extra.weight"] = arrays.pop("model.norm.weight")

    odd = write_tensors(toys.qwen2[0], tmp_path / "odd", rename)
    models = (odd, toys.qwen2[1]) if older else (toys.qwen2[1], odd)
    for line in both_methods(*models):
        said = refused(*line, match="model.extra.weight")
        assert "model.norm.weight" in said


@pytest.mark.parametrize("newest_is_tied", [True, False])
def test_an_output_projection_does_not_vanish(
    newest_is_tied, refused, both_methods, toys, tmp_path
):
    def untie(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * 2

    untied = write_tensors(toys.llama[0], tmp_path / "untied", untie, tie_word_embeddings=False)
    models = (untied, toys.llama[1]) if newest_is_tied else (toys.llama[1], untied)
    for line in both_methods(*models):
        refused(*line, match="lm_head|tie_word_embeddings")


def test_models_that_compute_otherwise(refused, toys, tmp_path):
    odd = copy_model(toys.qwen2[0], tmp_path / "odd", rms_norm_eps=1e-5)
    line = refused(*quick(odd, toys.qwen2[1], data=toys.data), match="rms_norm_eps")
    assert "1e-05" in line and "1e-06" in line and "odd" in line


def test_weights_that_do_not_fit_their_config(refused, toys, tmp_path):
    odd = copy_model(toys.qwen2[0], tmp_path / "odd", num_hidden_layers=4, layer_types=None)
    refused(*quick(odd, odd, data=toys.data), match="odd: .* config says: 3 layers instead of 4")


def test_a_config_attribute_that_is_not_known(refused, recall, toys, tmp_path):
    odd = copy_model(toys.qwen2[0], tmp_path / "odd", new_trick=3)
    line = quick(odd, toys.qwen2[1], data=toys.data)
    refused(*line, match="odd.*new_trick.*--ignore-config new_trick")
    assert recall(*line, "--ignore-config", "new_trick").status == 0
    assert "new_trick" not in json.loads(Path("out", "config.json").read_text())


# --------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
])  # fmt: skip
def test_values_that_are_not_finite(name, newest, value, refused, both_methods, toys, tmp_path):
    def spoil(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[-1] = value

    spoilt = write_tensors(toys.qwen2[1], tmp_path / "spoilt", spoil)
    models = (toys.qwen2[0], spoilt) if newest else (spoilt, toys.qwen2[0])
    for line in both_methods(*models):
        said = refused(*line, match="NaN or infinite")
        assert name in said and "spoilt" in said


def test_a_result_too_large_for_its_dtype(refused, toys, tmp_path):
    def enlarge(arrays):
        arrays["lm_head.weight"] = (arrays["lm_head.weight"] * 1e6).astype("bfloat16")

    large = write_tensors(toys.qwen2[0], tmp_path / "large", enlarge)
    recipe = write_recipe(tmp_path / "r.yml", [large, large], "average", out_dtype="float16")
    refused("merge", recipe, "out", match="lm_head.weight.*float16")
    refused("convert", large, "out", "--dtype", "float16", match="lm_head.weight.*float16")


# --------------------------------------------------------------------------------- adapters


def spoil_adapter(toys, folder: Path, change) -> str:
    shutil.copytree(toys.adapter, folder)
    change(folder)
    return f"{toys.llama[0]}+{folder}"


def change_adapter_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_modules(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    header, data = parts(path)
    renamed = {name.replace("layers", "blocks"): entry for name, entry in header.items()}
    put(path, renamed, data)


ADAPTERS = {
    "that matches nothing": (rename_modules, "blocks"),
    "of another kind": (lambda f: change_adapter_config(f, peft_type="IA3"), "IA3"),
    "with an unknown option": (lambda f: change_adapter_config(f, new_trick=1), "new_trick"),
    "that changed the base": (
        lambda f: change_adapter_config(f, init_lora_weights="pissa"),
        "pissa",
    ),
    "without weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model"),
    "without a config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config"),
    "of another rank": (lambda f: change_adapter_config(f, r=3), "lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter(case, refused, toys, tmp_path):
    change, match = ADAPTERS[case]
    model = spoil_adapter(toys, tmp_path / "damaged", change)
    line = refused(*quick(toys.llama[1], model, data=toys.data), match=match)
    assert "damaged" in line


@pytest.mark.parametrize("base", [None, "/of/another/machine", "nobody/has-it"])
def test_an_adapter_whose_base_is_not_found(base, refused, toys, tmp_path):
    adapter = shutil.copytree(toys.adapter, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config))
    refused(*quick(toys.llama[1], adapter, data=toys.data), match=rf"{adapter} is an.*BASE\+")


# --------------------------------------------------------------------------------- data

DATA = {
    "empty": ("rows.jsonl", b"", "no rows"),
    "blank lines": ("rows.jsonl", b"\n\n  \n", "no rows"),
    "no JSON": ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    "no object": ("rows.jsonl", b'"abc"\n', "line 1"),
    "no field": ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 1.*body"),
    "a number for text": ("rows.jsonl", b'{"text": 3}\n', "row 0.*int"),
    "no token": ("rows.jsonl", b'{"text": "abc"}\n{"text": ""}\n', "row 1.*tokenises to nothing"),
    "an unknown kind": ("rows.xlsx", b"abc", r"rows\.xlsx.*\.jsonl"),
    "without a kind": ("rows", b"abc", r"rows.*\.jsonl"),
    "an object of rows": ("rows.json", b'{"data": [{"text": "a"}]}', "row 0.*it has data"),
    "a csv without the field": ("rows.csv", b"a,b\n1,2\n", "row 0"),
    "a parquet that is none": ("rows.parquet", b"abc", "Parquet"),
    "not UTF-8": ("rows.txt", b"\xff\xfe", "UTF-8"),
    "chats without a template": (
        "rows.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data(case, refused, toys, tmp_path):
    name, content, match = DATA[case]
    (tmp_path / name).write_bytes(content)
    refused(*quick(*toys.llama, data=name), match=match)


def test_numbers_of_rows_beyond_all_files(recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "abc", "row": 2**64}, {"text": "de f", "row": 3}, {"text": "g", "row": 5}]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = recall("quick", *toys.llama, "--typical", "t.jsonl", "--out", "out")
    assert done.status in (0, 2), done.err


def test_a_batch_is_no_larger_than_the_rows(recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), ["abc", "de f", "gh"])
    line = quick(*toys.llama, data="rows.jsonl")
    # which no machine has the memory for
    assert recall(*line, "--batch-size", 10**13).status == 0


def test_half_a_character_is_no_fault_of_ours(recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "ab\ud83d"}, {"text": "cde"}, {"text": "f gh"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recall(*quick(*toys.llama, data="rows.jsonl")).status in (0, 2)


def test_data_that_is_not_there(refused, toys, tmp_path):
    refused(*quick(*toys.qwen2, data="no.jsonl"), match=r"no\.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    refused(*quick(*toys.qwen2, data="folder.jsonl"), match=r"folder\.jsonl")


def test_a_field_that_is_not_there(refused, toys):
    refused(*quick(*toys.qwen2, data=toys.data, field="answer"), match="row 0.*'answer'.*text")


def test_a_tokenizer_of_another_model(refused, toys, tmp_path):
    def shrink(arrays):
        arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"][:60]

    small = write_tensors(toys.llama[0], tmp_path / "small", shrink, vocab_size=60)
    refused(*quick(small, small, data=toys.data), match="token id.*60 embeddings")


def test_one_model(refused, toys):
    refused(*quick(toys.qwen2[0], data=toys.data), match="at least 2 models")


def test_one_sample_has_no_median(refused, recall, toys, tmp_path):
    write_rows(tmp_path / "one.jsonl", ["abc"])
    line = quick(*toys.llama, data="one.jsonl")
    refused(*line, match="one sample.*sigma")
    refused(*quick(*toys.llama, data=toys.data, count=1), match="one sample.*sigma")
    assert recall(*line, "--sigma", "0.5").status == 0


def test_a_median_of_zero_in_the_last_unit_leaves_nothing_either(refused, toys, tmp_path):
    def silence(arrays):
        arrays["model.norm.weight"] = np.zeros_like(arrays["model.norm.weight"])

    silent = write_tensors(toys.llama[1], tmp_path / "silent", silence)
    refused(*quick(toys.llama[0], silent, data=toys.data), match="zero in unit head:")


def test_a_median_of_zero_names_its_unit(refused, toys, tmp_path):
    write_rows(tmp_path / "same.jsonl", ["abc", "abc", "abc"])
    refused(*quick(*toys.llama, data="same.jsonl"), match="zero in unit embed")
    # the same letters in another order differ only after the embedding
    write_rows(tmp_path / "moved.jsonl", ["ab", "ba"])
    refused(*quick(*toys.llama, data="moved.jsonl"), match="zero in unit embed")
    # one letter again and again, of several lengths: the mean over the tokens is the letter's
    write_rows(tmp_path / "letter.jsonl", ["aa", "aaaa"])
    refused(*quick(*toys.llama, data="letter.jsonl"), match="zero in unit embed")


# --------------------------------------------------------------------------------- OUT


def test_out_that_exists(refused, recall, toys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    line = quick(*toys.llama, data=toys.data)
    refused(*line, match="out exists.*--force")
    assert recall(*line, "--force").status == 0
    assert not (tmp_path / "out" / "precious").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_that_is_a_file(refused, toys, tmp_path):
    (tmp_path / "out").write_text("1")
    refused(*quick(*toys.llama, data=toys.data), match="out is not a folder")
    refused(*quick(*toys.llama, data=toys.data), "--force", match="out is not a folder")


def test_out_that_stands_although_the_merge_is_refused(refused, toys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    write_rows(tmp_path / "same.jsonl", ["abc", "abc"])
    refused(*quick(*toys.llama, data="same.jsonl"), "--force", match="zero in unit")


def test_out_that_holds_an_input(refused, toys, tmp_path):
    for index in range(2):
        copy_model(toys.llama[index], tmp_path / "all" / str(index))
    shutil.copytree(toys.adapter, tmp_path / "lora")
    models = ["all/0", "all/1+lora"]
    for out in ("all", "all/0", "all/1", "lora", "all/../all", str(tmp_path)):
        refused(*quick(*models, data=toys.data, out=out), "--force", match="holds")
    shutil.copy(toys.data, tmp_path / "all" / "2.jsonl")
    (tmp_path / "data").mkdir()
    shutil.copy(toys.data, tmp_path / "data" / "rows.jsonl")
    refused(*quick(*models, data="data/rows.jsonl", out="data"), "--force", match="holds")
    (tmp_path / "recipes").mkdir()
    write_recipe(tmp_path / "recipes" / "r.yml", toys.llama, "average")
    refused("merge", "recipes/r.yml", "recipes", "--force", match="holds")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    refused(*quick(*models, data=toys.data, out="link"), "--force", match="holds")


def test_out_that_cannot_be_written(refused, toys, tmp_path):
    (tmp_path / "file").write_text("1")
    for out in ("file/out", "file/deep/er/out", "/proc/out", "/proc/deep/er/out", "/"):
        refused(*quick(*toys.llama, data=toys.data, out=out), match=re.escape(out))
    name = "x" * 300
    refused(*quick(*toys.llama, data=toys.data, out=name), match=name)


@pytest.mark.parametrize("out", ["typical.jsonl", "/proc/typical.jsonl", "file/typical.jsonl"])
def test_a_file_that_cannot_be_written(out, refused, toys, tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "typical.jsonl").write_text("precious")
    refused("select", toys.llama[0], "--data", toys.data, "--out", out, match=re.escape(out))


def test_an_input_is_not_replaced_by_its_output(refused, toys, tmp_path):
    shutil.copy(toys.data, tmp_path / "rows.jsonl")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    for out in ("rows.jsonl", "link.jsonl"):
        refused(
            "select", toys.llama[0], "--data", "rows.jsonl", "--out", out, "--force", match="input"
        )
        refused(
            "extract", *toys.llama, "--data", "rows.jsonl", "--out", out, "--force", match="input"
        )


# --------------------------------------------------------------------------------- stages


def save_npz(path: Path, **arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


REPS = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
ARTIFACTS = {
    "not there": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("reps"),
    "an array": lambda path: np.save(path.open("wb"), REPS),
    "a damaged archive": lambda path: (
        save_npz(path, reps=REPS),
        path.write_bytes(path.read_bytes()[:-60]),
    ),
    "damaged data": lambda path: (
        save_npz(path, reps=REPS),
        path.write_bytes(path.read_bytes().replace(REPS.tobytes()[:40], b"\x01" * 40)),
    ),
    "without reps": lambda path: save_npz(path, other=REPS),
    "of three dimensions": lambda path: save_npz(path, reps=REPS[0]),
    "of two units": lambda path: save_npz(path, reps=REPS[:, :2]),
    "of one model": lambda path: save_npz(path, reps=REPS[:1]),
    "of words": lambda path: save_npz(path, reps=np.full((2, 3, 4, 5), "a")),
    "of objects": lambda path: save_npz(path, reps=np.full((2, 3, 4, 5), None)),
    "of complex numbers": lambda path: save_npz(path, reps=REPS.astype(complex)),
    "with NaN": lambda path: save_npz(path, reps=np.where(REPS > 2, np.nan, REPS) * np.nan),
    "beyond float32": lambda path: save_npz(path, reps=REPS.astype(np.float64) * 1e300),
    "without rows": lambda path: save_npz(path, reps=REPS[:, :, :0]),
    "without width": lambda path: save_npz(path, reps=REPS[..., :0]),
    "rows that are words": lambda path: save_npz(path, reps=REPS, rows=np.array(list("abcd"))),
    "rows of another number": lambda path: save_npz(path, reps=REPS, rows=np.arange(3)),
    "rows below zero": lambda path: save_npz(path, reps=REPS, rows=np.arange(-4, 0)),
    "rows given twice": lambda path: save_npz(path, reps=REPS, rows=np.array([0, 1, 1, 2])),
    "rows out of order": lambda path: save_npz(path, reps=REPS, rows=np.array([0, 2, 1, 3])),
    "units of another number": lambda path: save_npz(path, reps=REPS, units=np.array(["a"])),
    "units given twice": lambda path: save_npz(path, reps=REPS, units=np.array(["a", "a", "b"])),
    "samples that are all alike": lambda path: save_npz(path, reps=np.ones_like(REPS)),
}  # fmt: skip


@pytest.mark.parametrize("case", ARTIFACTS)
def test_representations(case, refused, tmp_path):
    ARTIFACTS[case](tmp_path / "reps.npz")
    match = "zero in unit embed" if "alike" in case else "reps|model|sample"
    refused("weights", "--reps", "reps.npz", "--out", "w.json", match=match)


UNITS = ["embed", "layers.0", "layers.1", "layers.2", "head"]
HALVES = {"format": 1, "models": ["a", "b"], "units": UNITS, "weights": [[0.5] * 5] * 2}
WEIGHTS = {
    "not there": (None, "w.json"),
    "no JSON": ("{", "w.json"),
    "a list": ([], "w.json"),
    "without weights": ({**HALVES, "weights": None}, "w.json"),
    "of three models": (
        {**HALVES, "models": list("abc"), "weights": [[1 / 3] * 5] * 3},
        "3 models.*merges 2",
    ),
    "of other units": (
        {**HALVES, "units": ["embed", "layers.0", "head"], "weights": [[0.5] * 3] * 2},
        r"layers\.2|units",
    ),
    "of another shape": ({**HALVES, "weights": [[0.5] * 4] * 2}, "weights"),
    "that do not sum to one": ({**HALVES, "weights": [[0.4] * 5] * 2}, "sum to 1"),
    "in words": ({**HALVES, "weights": [["a"] * 5] * 2}, "w.json.*number"),
    "of another format": ({**HALVES, "format": 2}, "w.json.*format"),
    "NaN": (json.dumps({**HALVES, "weights": [[np.nan] * 5] * 2}), "NaN"),
    "beyond float32": ({**HALVES, "weights": [[1e300] * 5, [-1e300] * 5]}, "weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, refused, toys, tmp_path):
    content, match = WEIGHTS[case]
    write_recipe(tmp_path / "r.yml", toys.llama, samples={"data": toys.data})
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "w.json").write_text(text)
    refused("merge", "r.yml", "out", "--weights", "w.json", match=match)


def test_weights_and_samples_are_for_methods_that_have_some(refused, toys, tmp_path):
    models = [{"model": m} for m in toys.llama]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "average", "models": models}))
    (tmp_path / "w.json").write_text(json.dumps(HALVES))
    refused("merge", "r.yml", "out", "--weights", "w.json", match="weights")
    refused("merge", "r.yml", "out", "--typical", toys.data, match="samples|typical")


def test_similarity_takes_models_or_representations(refused, toys, tmp_path):
    save_npz(tmp_path / "reps.npz", reps=REPS)
    refused("similarity", match="models.*--reps")
    refused("similarity", *toys.llama, "--reps", "reps.npz", match="models.*--reps")
    refused("similarity", "--reps", "reps.npz", "--data", toys.data, match="--data")
    refused("similarity", "--reps", "reps.npz", "--measure", "rbf,nope", match="nope")
    refused("similarity", "--reps", "reps.npz", "--measure", "", match="similarity|measure")
    refused("similarity", *toys.llama, match="data.*typical")


# --------------------------------------------------------------------------------- recipes, options


RECIPES = {
    "an unknown method": ({"method": "recal"}, "recal"),
    "an unknown key": ({"method": "average", "dtpe": "float16"}, "dtpe.*dtype"),
    "no weights": ({"method": "linear"}, "weight"),
    "weights that sum to zero": (
        {
            "method": "linear",
            "parameters": {"weight": [{"filter": "norm", "value": 0}, {"value": 1}]},
        },
        "norm.*sum to (0|zero)",
    ),
    "weights that no number can hold the sum of": (
        {"method": "linear", "parameters": {"weight": 1e308}},
        "weight",
    ),
    "a unit that is not there": ({"samples": {"unit": 9}}, "samples.unit"),
    "a reference that is not there": ({"parameters": {"reference": "nobody"}}, "nobody"),
    "a reference beyond the models": ({"parameters": {"reference": 2}}, "reference"),
    "an unknown measure": ({"parameters": {"similarity": "rbff"}}, "rbff.*rbf"),
    "a mix that no number can hold the sum of": (
        {"parameters": {"similarity": {"rbf": 1e308, "cosine": 1e308}}},
        "similarit",
    ),
    "a rotation onto nobody": (
        {"parameters": {"reference": "pairwise", "alignment": "procrustes"}},
        "procrustes",
    ),
    "a temperature that float32 lacks": ({"parameters": {"temperature": 1e-300}}, "temperature"),
    "a seed that is too large": ({"samples": {"seed": 99999999999999999999}}, "seed"),
    "one sample, by linear CKA": (
        {"parameters": {"similarity": "linear_cka"}, "samples": {"count": 1}},
        "similarity linear_cka: 1 samples: this measure takes at least 2",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_refused_through_the_command_line(case, refused, toys, tmp_path):
    values, match = RECIPES[case]
    method = values.get("method", "recall")
    rest = {key: value for key, value in values.items() if key != "method"}
    if method == "recall":
        rest["samples"] = {"data": toys.data, **rest.get("samples", {})}
    write_recipe(tmp_path / "r.yml", toys.llama, method, **rest)
    refused("merge", "r.yml", "out", match=match)


def test_a_recipe_that_is_not_there(refused):
    refused("merge", "no.yml", "out", match=r"no\.yml")
    refused("merge", ".", "out", match="directory")


USAGE = {
    "an unknown command": (["mreg"], "mreg"),
    "an unknown option": (["quick", "a", "b", "--out", "c", "--nope"], "--nope"),
    "an option of another command": (["inspect", "a", "--force"], "--force"),
    "a missing argument": (["merge", "r.yml"], "(?i)out"),
    "a missing option": (["quick", "a", "b"], "--out"),
    "an option without a value": (["quick", "a", "b", "--out"], "--out"),
    "a number in words": (["quick", "a", "b", "--out", "c", "--count", "many"], "--count"),
    "half a number": (["quick", "a", "b", "--out", "c", "--count", "1.5"], "--count"),
    "a count of zero": (["quick", "a", "b", "--out", "c", "--count", "0"], "--count"),
    "a seed below zero": (["quick", "a", "b", "--out", "c", "--seed", "-1"], "--seed"),
    "too many arguments": (["inspect", "a", "b"], "b"),
    "an unknown option before the command": (["--nope", "merge"], "--nope"),
}
OPTIONS = {
    "a size in words": (["--shard-size", "large"], "large"),
    "a size of zero": (["--shard-size", "0GB"], "0GB"),
    "a size in an unknown unit": (["--shard-size", "5XB"], "5XB"),
    "a size that is NaN": (["--shard-size", "nan"], "nan"),
    "a size without end": (["--shard-size", "inf"], "inf"),
    "a compute dtype": (["--compute-dtype", "int8"], "int8"),
    "an output dtype": (["--out-dtype", "int8"], "int8"),
    "sigma in words": (["--sigma", "mean"], "mean"),
    "sigma NaN": (["--sigma", "nan"], "nan"),
    "sigma of zero": (["--sigma", "0"], "sigma"),
    "a temperature of zero": (["--temperature", "0"], "temperature"),
    "a temperature that is NaN": (["--temperature", "nan"], "temperature"),
    "a unit": (["--unit", "layers.3"], "layers.3"),
    "a unit by number": (["--unit", "5"], "5"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, refused):
    line, match = USAGE[case]
    refused(*line, match=match)


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, refused, toys):
    options, match = OPTIONS[case]
    refused(*quick(*toys.llama, data=toys.data), *options, match=match)


@pytest.mark.parametrize("line", [
    ["convert", "{}", "out", "--to", "onnx"],
    ["convert", "{}", "out", "--dtype", "int8"],
    ["convert", "{}", "{}"],
    ["convert", "{}", "{}", "--force"],
    ["convert", "nowhere", "out"],
    ["inspect", "nowhere"],
])  # fmt: skip
def test_convert_and_inspect(line, refused, toys):
    words = [word.format(toys.llama[0]) for word in line]
    refused(*words, match="onnx|int8|exists|holds|nowhere")


def test_pickled_code_is_not_run(refused, toys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    folder = copy_model(toys.llama[0], tmp_path / "bomb")
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    refused(*quick(toys.llama[1], folder, data=toys.data), match="pytorch_model.bin")
    refused("inspect", folder, match="pytorch_model.bin")
    refused("convert", folder, "out", match="pytorch_model.bin")


def test_a_tokenizer_that_brings_code_is_not_run(refused, toys, tmp_path):
    folder = copy_model(toys.llama[1], tmp_path / "bomb")
    (folder / "tokenizer.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    changed = {"tokenizer_class": "Bomb", "auto_map": {"AutoTokenizer": [None, "tokenizer.Bomb"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    before = set(tree(tmp_path))
    refused(*quick(toys.llama[0], folder, data=toys.data), match="tokenizer|bomb")
    assert set(tree(tmp_path)) == before


@pytest.mark.parametrize("step", ["load", "read"])
def test_a_tokenizer_that_makes_its_library_panic(step, refused, toys, tmp_path):
    folder = copy_model(toys.llama[1], tmp_path / "model")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    if step == "load":
        values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAA("}
    else:
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        }
    path.write_text(json.dumps(values))
    refused(*quick(toys.llama[0], folder, data=toys.data), match="tokenizer of .*model is damaged")
