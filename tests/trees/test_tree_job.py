"""Merges of JAX trees from recipe to folder: against the streamed engine, and against misuse."""

import json
import sys

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from orbax.checkpoint import v1 as ocp
from tree_layouts import TREE, UNITS, L, apply_float32, linen, maxtext, weights

from recall_jax.checkpoint.npz import NpzTree, write_npz
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.jobs.trees.on_disk import merge_trees_on_disk
from recall_jax.jobs.verify import verify
from recall_jax.recipes.recipe import make_recipe, read_recipe

BFLOAT16 = ml_dtypes.bfloat16
FLOAT32 = "tree_layouts:apply_float32"


def flat(tree, above="") -> dict[str, np.ndarray]:
    found = {}
    for key, below in tree.items():
        found |= flat(below, f"{above}{key}/") if isinstance(below, dict) else {above + key: below}
    return found


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Three models in one file each, with big_vision's names, bfloat16."""
    folder, names = tmp_path_factory.mktemp("npz"), []
    for seed in range(3):
        path = folder / f"{seed}.npz"
        write_npz(path, flat(linen(weights(seed, BFLOAT16))).items())
        names.append(str(path))
    return names


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The same three models under Hugging Face names, which the streamed engine merges."""
    folder, names = tmp_path_factory.mktemp("named"), []
    for seed in range(3):
        (path := folder / str(seed)).mkdir()
        w = weights(seed, BFLOAT16)
        tensors = {
            "model.embed_tokens.weight": w["embed"],
            "model.norm.weight": w["norm"],
            "lm_head.weight": w["head"],
        }
        for i in range(L):
            tensors |= {
                f"model.layers.{i}.mlp.wi.weight": w[f"{i}.wi"],
                f"model.layers.{i}.mlp.wo.weight": w[f"{i}.wo"],
                f"model.layers.{i}.norm.weight": w[f"{i}.norm"],
            }
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "our_own"}')
        names.append(str(path))
    return names


def renamed(leaves) -> dict[str, np.ndarray]:
    """Leaves by the names of `named`."""
    outer = {"embedder": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    found = {}
    for name, leaf in leaves.items():
        _, top, *rest = name.split("/")
        if top in outer:
            found[f"{outer[top]}.weight"] = leaf
        else:
            found[".".join(["model.layers", top.removeprefix("layers_"), *rest[:-1], "weight"])] = (
                leaf
            )
    return found


def recipe_of(names, **keys):
    values = {"tree": TREE["linen"], **keys}
    if "models" not in values:
        values["models"] = [{"model": name} for name in names]
    return make_recipe({key: value for key, value in values.items() if value is not None})


PER_MODEL = [0.7, [0.1, 0.9, 0.2], [{"filter": "mlp", "value": 0.3}, {"filter": "*", "value": 0.6}]]
TASK = {"lambda": [0.4, 1.2]}
METHODS = {
    "linear": {"parameters": {"normalize": False}},
    "task_arithmetic": {"parameters": TASK},
    "ties": {"parameters": {"density": 0.3, **TASK}},
    "dare_ties": {"parameters": {"density": 1.0, **TASK}, "out_dtype": "float32"},
    "magmax": {"parameters": TASK},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_merges_as_the_streamed_engine_merges_its_weights(method, npz, named, tmp_path):
    outs = {}
    for kind, names in {"tree": npz, "stream": named}.items():
        entries = [{"model": name} for name in names]
        if method != "magmax":
            for entry, weight in zip(entries, PER_MODEL, strict=True):
                entry["parameters"] = {"weight": weight}
        keys = {"merge_method": method, "models": entries, **METHODS[method]}
        if method != "linear":
            keys["base_model"] = names[0]
        if kind == "tree":
            merge_trees_on_disk(recipe_of(names, **keys), tmp_path / kind)
            tree = NpzTree("merged", tmp_path / kind / "tree.npz")
            outs[kind] = renamed({name: tree.read(name) for name in tree.specs})
        else:
            job.merge(make_recipe(keys), tmp_path / kind)
            outs[kind] = safetensors.numpy.load_file(tmp_path / kind / "model.safetensors")
    assert outs["tree"].keys() == outs["stream"].keys()
    for name, array in outs["stream"].items():
        assert outs["tree"][name].dtype == array.dtype
        np.testing.assert_array_equal(outs["tree"][name], array, err_msg=name)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = np.random.default_rng(5)
    lines = [json.dumps({"input_ids": rng.integers(0, 23, size=7).tolist()}) for _ in range(9)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_recall_leaves_all_that_repeats_it(npz, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = {"data": rows, "count": 4, "batch_size": 3}
    keys = {"merge_method": "recall", "forward": FLOAT32, "samples": samples}
    heard = []
    report = merge_trees_on_disk(recipe_of(npz, **keys), tmp_path / "out", announce=heard.append)
    assert len(heard) == 1 and "3 trees of 12 leaves in 5 units" in heard[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tree.npz",
        "README.md",
        "checksums.json",
        "recall_recipe.yml",
        "recall_report.html",
        "recall_report.json",
        "typical.jsonl",
    }
    assert json.loads((tmp_path / "out" / "recall_report.json").read_text()) == report
    assert (report["method"], report["units"], report["reference"]) == ("recall", UNITS, 2)
    assert len(report["typical_samples"]) == 4
    assert report["bytes"]["written"] == sum(a.nbytes for a in weights(0, BFLOAT16).values())
    assert report["bytes"]["read"] == 6 * report["bytes"]["written"]
    found = verify(tmp_path / "out")
    assert (found.kind, found.faults) == ("npz", ())
    assert "numpy" in (tmp_path / "out" / "README.md").read_text()

    monkeypatch.chdir("/")
    again = read_recipe(tmp_path / "out" / "recall_recipe.yml")
    merge_trees_on_disk(again, tmp_path / "again")
    by_weights = again.changed(weights=str(tmp_path / "out" / "recall_report.json"))
    merge_trees_on_disk(by_weights, tmp_path / "weighed")
    for other in ("again", "weighed"):
        content = (tmp_path / other / "tree.npz").read_bytes()
        assert content == (tmp_path / "out" / "tree.npz").read_bytes()


def test_each_format_comes_out_as_it_went_in(npz, tmp_path):
    """Models may be of several formats; the newest's is the output's."""
    tree = linen(weights(2, BFLOAT16)) | {"step": 5}
    msgpack = tmp_path / "newest.msgpack"
    msgpack.write_bytes(flax.serialization.msgpack_serialize(tree))
    ocp.save(tmp_path / "orbax", tree)
    expected = {}
    for kind, newest in {"npz": npz[2], "msgpack": msgpack, "orbax": tmp_path / "orbax"}.items():
        names = [npz[0], str(tmp_path / "orbax"), str(newest)]
        out = tmp_path / "out" / kind
        report = merge_trees_on_disk(recipe_of(names, merge_method="average"), out)
        assert report["tree"]["format"] == kind
        assert verify(out).kind == kind
        if kind == "npz":
            file = NpzTree("", out / "tree.npz")
            expected = {name: file.read(name) for name in file.specs}
            continue
        if kind == "msgpack":
            content = (out / "tree.msgpack").read_bytes()
            merged = flax.serialization.msgpack_restore(content)
        else:
            merged = ocp.load(out / "tree")
        assert merged.pop("step") == 5
        for name, leaf in flat(merged).items():
            assert np.asarray(leaf).tobytes() == expected[name].tobytes()


def apply_images(params, batch):
    """Units that are pooled already, from arrays that are no tokens."""
    embed = params["embed"]["kernel"]
    x = batch["image"].reshape(len(batch["image"]), -1) @ embed
    units = [x]
    for i in range(2):
        x = jax.nn.relu(x @ params[f"encoderblock_{i}"]["kernel"])
        units.append(x)
    return [*units, x @ params["head"]["kernel"]]


def test_arrays_are_samples_too(tmp_path):
    """As of a vision model in big_vision's format."""
    sys.modules.setdefault("test_tree_job", sys.modules[__name__])
    rng = np.random.default_rng(0)
    names = []
    for seed in range(2):
        leaves = {
            "embed/kernel": rng.normal(size=(12, 6)),
            "encoderblock_0/kernel": rng.normal(size=(6, 6)),
            "encoderblock_1/kernel": rng.normal(size=(6, 6)),
            "head/kernel": rng.normal(size=(6, 4)),
        }
        path = tmp_path / f"{seed}.npz"
        write_npz(path, ((name, leaf.astype(np.float32)) for name, leaf in leaves.items()))
        names.append(str(path))
    np.savez(tmp_path / "images.npz", image=rng.normal(size=(13, 2, 6)).astype(np.float32))
    report = merge_trees_on_disk(
        recipe_of(
            names,
            merge_method="recall",
            tree={"embed": "embed/**", "layers": "encoderblock_{i}/**"},
            forward="test_tree_job:apply_images",
            samples={"data": str(tmp_path / "images.npz"), "count": 5, "batch_size": 4, "pool": 11},
        ),
        tmp_path / "out",
    )
    assert len(report["typical_samples"]) == 5 and max(report["typical_samples"]) < 13
    assert not (tmp_path / "out" / "typical.jsonl").exists()
    assert np.shape(report["weights"]) == (2, 4)


def apply_texts(params, batch):
    return apply_float32(params, batch | {"input_ids": batch["input_ids"] % 23})


def test_texts_are_read_by_a_tokenizer(npz, toys, tmp_path):
    sys.modules.setdefault("test_tree_job", sys.modules[__name__])
    texts = ["reverse abc", "sort bca", "shift x", "a longer row of text", "swap ab"]
    (tmp_path / "rows.txt").write_text("\n".join(texts) + "\n")
    samples = {"data": str(tmp_path / "rows.txt"), "tokenizer": toys.llama[0], "count": 2}
    recipe = recipe_of(
        npz, merge_method="recall", forward="test_tree_job:apply_texts", samples=samples
    )
    report = merge_trees_on_disk(recipe, tmp_path / "out")
    lines = (tmp_path / "out" / "typical.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["row"] for row in rows] == report["typical_samples"]
    assert [row["text"] for row in rows] == [texts[row["row"]] for row in rows]
    given = samples | {"typical": str(tmp_path / "out" / "typical.jsonl"), "data": None}
    given = {key: value for key, value in given.items() if value is not None}
    again = merge_trees_on_disk(recipe.changed(samples=given), tmp_path / "again")
    assert (again["typical_samples"], again["typical"]) == (report["typical_samples"], None)
    np.testing.assert_allclose(again["weights"], report["weights"], rtol=1e-6)


def test_types_beside_float32(tmp_path):
    """Whole numbers are the newest's; float64 keeps its precision; equal models stay equal."""
    step = 2.0**-40
    for seed in range(2):
        write_npz(
            tmp_path / f"{seed}.npz",
            {
                "embed/x": np.asarray([-0.0, 1.0, 3.0], np.float16),
                "layers/0/x": np.asarray([1.0, 1.0 + 2 * step * seed, 5.0], np.float64),
                "layers/0/count": np.asarray([seed, 1], np.int64),
                "norm": np.asarray([np.finfo(np.float32).tiny / 4], np.float32),
            }.items(),
        )
    names = [str(tmp_path / f"{seed}.npz") for seed in range(2)]
    merge_trees_on_disk(recipe_of(names, merge_method="average", tree=None), tmp_path / "out")
    merged = NpzTree("", tmp_path / "out" / "tree.npz")
    newest = NpzTree("", tmp_path / "1.npz")
    assert merged.specs == newest.specs
    for name in ("embed/x", "layers/0/count", "norm"):
        assert merged.read(name).tobytes() == newest.read(name).tobytes()
    assert merged.read("layers/0/x").dtype == np.float64
    assert merged.read("layers/0/x")[2] == 5.0


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((np.float32, np.int8), "layers/0/x is float32 in .*0.npz and int8 in .*1.npz: integers"),
        ((np.int64, np.float32), "layers/0/x is int64 in .*0.npz and float32 in .*1.npz: integers"),
        ((np.int8, np.int8), "layers/0/x, int8, is not the same in .*0.npz and .*1.npz: quantised"),
    ],
)
def test_quantised_leaves_are_refused(kinds, said, tmp_path):
    names = []
    for seed, kind in enumerate(kinds):
        leaves = dict.fromkeys(("embed/x", "layers/0/scale", "norm"), np.ones(2, np.float32))
        leaves["layers/0/x"] = np.full(3, seed, kind)
        names.append(str(tmp_path / f"{seed}.npz"))
        write_npz(tmp_path / f"{seed}.npz", leaves.items())
    with pytest.raises(InputError, match=said):
        merge_trees_on_disk(recipe_of(names, merge_method="average", tree=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- faults


def nan_at(folder, name):
    leaves = flat(linen(weights(1, BFLOAT16)))
    leaves[name] = np.full_like(leaves[name], np.nan)
    write_npz(folder / "nan.npz", leaves.items())
    return str(folder / "nan.npz")


def fails(params, batch):
    raise KeyError("kernle")


def too_few(params, batch):
    return [params["params"]["embedder"]["embedding"][batch["input_ids"]]]


FAULTS = {
    "no such tree": (
        lambda c: {"models": [{"model": "nowhere"}, {"model": c.npz[0]}]},
        ["nowhere does not exist", "Orbax"],
    ),
    "no leaf": (
        lambda c: {"tree": {"embed": "embedding/**", "layers": "params/layers_{i}/**"}},
        ["'embedding/**' matches no leaf", "params/embedder/embedding"],
    ),
    "wrong axis": (
        lambda c: {"tree": {"layers": "params/layers_*/**", "axis": 1}},
        ["has no axis 1", "layers_0/norm/scale"],
    ),
    "uneven axis": (
        lambda c: {"tree": {"layers": "params/**", "axis": 0}},
        ["different lengths", "23 in params/embedder/embedding and 8 in"],
    ),
    "no root": (
        lambda c: {"tree": {"root": "state", "layers": "layers_{i}/**"}},
        ["tree.root 'state' holds no floating point leaves"],
    ),
    "optimizer": (
        lambda c: {
            "models": [{"model": m} for m in c.full],
            "tree": {**TREE["maxtext"], "root": None},
        },
        ["opt_state besides params", "tree: {root: params}"],
    ),
    "no patterns": (
        lambda c: {"models": [{"model": m} for m in c.scanned], "tree": None},
        ["numbered layers", "tree: {embed"],
    ),
    "other leaves": (
        lambda c: {"models": [{"model": c.npz[0]}, {"model": c.odd}]},
        ["different leaves", "params/more"],
    ),
    "not finite": (
        lambda c: {
            "models": [{"model": c.npz[0]}, {"model": nan_at(c.folder, "params/lm_head/kernel")}]
        },
        ["nan.npz", "params/lm_head/kernel", "NaN"],
    ),
    "overflow": (
        lambda c: {
            "merge_method": "linear",
            "parameters": {"weight": 1e6, "normalize": False},
            "out_dtype": "float16",
        },
        ["overflows float16", "out_dtype"],
    ),
    "weights of others": (
        lambda c: {"merge_method": "recall", "weights": c.told},
        ["weights for the units embed … head (2)", "head (5)"],
    ),
    "no module": (
        lambda c: c.recall(forward="no_such_module:apply"),
        ["no_such_module:apply cannot be imported", "ModuleNotFoundError"],
    ),
    "no function": (
        lambda c: c.recall(forward="tree_layouts:nothing"),
        ["tree_layouts has no function nothing"],
    ),
    "forward fails": (
        lambda c: c.recall(forward="test_tree_job:fails"),
        ["test_tree_job:fails fails on", "KeyError", "kernle"],
    ),
    "too few units": (
        lambda c: c.recall(forward="test_tree_job:too_few"),
        ["returns 1 arrays", "5 units", "embed … head"],
    ),
    "no tokens": (
        lambda c: c.recall(samples={"data": c.texts}),
        ["row 0", "input_ids", "samples.tokenizer"],
    ),
    "no such unit": (
        lambda c: c.recall(samples={"data": c.rows, "count": 3, "unit": "layers.9"}),
        ["'layers.9' is not a unit"],
    ),
    "arrays of other rows": (
        lambda c: c.recall(samples={"data": c.npz[0]}),
        ["do not all start with the same rows"],
    ),
}


class Case:
    def __init__(self, npz, rows, folder):
        self.npz, self.rows, self.folder = npz, rows, folder
        self.texts = str(folder / "texts.jsonl")
        (folder / "texts.jsonl").write_text('{"text": "hello"}\n')
        leaves = flat(linen(weights(1, BFLOAT16)))
        write_npz(
            folder / "odd.npz",
            (leaves | {"params/more": leaves["params/final_norm/scale"]}).items(),
        )
        self.odd = str(folder / "odd.npz")
        record = {"format": 1, "models": ["a"], "units": ["embed", "head"], "weights": [[1, 1]]}
        (folder / "told.json").write_text(json.dumps(record))
        self.told = str(folder / "told.json")
        full = maxtext(weights(0))
        for name, tree in {"full": full, "scanned": {"params": full["params"]}}.items():
            write_npz(folder / f"{name}.npz", flat(tree).items())
            setattr(self, name, [str(folder / f"{name}.npz")] * 2)

    def recall(self, **keys):
        return {
            "merge_method": "recall",
            "forward": FLOAT32,
            "samples": {"data": self.rows, "count": 3},
            **keys,
        }


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(name, npz, rows, tmp_path):
    sys.modules.setdefault("test_tree_job", sys.modules[__name__])
    keys, words = FAULTS[name]
    (work := tmp_path / "work").mkdir()
    case = Case(npz, rows, tmp_path)
    with pytest.raises(InputError) as caught:
        merge_trees_on_disk(
            recipe_of(npz, **{"merge_method": "average", **keys(case)}), work / "out"
        )
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    for word in words:
        assert word in line
    assert list(work.iterdir()) == []


def test_an_output_is_replaced_only_if_asked(npz, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / "kept").write_text("")
    recipe = recipe_of(npz, merge_method="average")
    with pytest.raises(InputError, match="--force"):
        merge_trees_on_disk(recipe, out)
    assert (out / "kept").exists()
    merge_trees_on_disk(recipe, out, force=True)
    assert not (out / "kept").exists() and (out / "tree.npz").exists()
    inside = recipe_of([npz[0], str(out)], merge_method="average")
    with pytest.raises(InputError, match="holds the input"):
        merge_trees_on_disk(inside, out, force=True)


@pytest.mark.eight_devices
def test_the_command_merges_trees(recall, npz, tmp_path):
    """With patterns or without, over devices or on one."""
    entries = "".join(f"  - model: {name}\n" for name in npz)
    plain = f"merge_method: average\nmodels:\n{entries}"
    tree = "tree: {embed: params/embedder/**, layers: 'params/layers_{i}/**'}\n"
    outs = {}
    for name, text, options in (
        ("given", plain + tree, []),
        ("guessed", plain, []),
        ("spread", plain + tree, ["--mesh", "data=2,fsdp=4"]),
    ):
        (tmp_path / f"{name}.yml").write_text(text)
        done = recall("merge", tmp_path / f"{name}.yml", tmp_path / name, *options)
        assert (done.status, done.err) == (0, "")
        assert "merged 3 models" in done.out and "12 leaves in 5 units" in done.out
        outs[name] = (tmp_path / name / "tree.npz").read_bytes()
    assert outs["given"] == outs["guessed"] == outs["spread"]
    done = recall("merge", tmp_path / "given.yml", tmp_path / "given")
    assert done.status == 2 and "--force" in done.err


def test_the_leaves_of_a_tree_are_shown(recall, npz, tmp_path):
    done = recall("inspect", npz[0])
    assert (done.status, done.err) == (0, "")
    assert "npz" in done.out and "params/layers_1/mlp/wi/kernel" in done.out
    found = json.loads(recall("inspect", npz[0], "--json").out)
    leaves = flat(linen(weights(0, BFLOAT16)))
    assert list(found["leaves"]) == list(leaves)
    for name, leaf in leaves.items():
        expected = {"shape": list(leaf.shape), "dtype": "bfloat16", "bytes": leaf.nbytes}
        assert found["leaves"][name] == expected
    assert found["parameters"] == sum(leaf.size for leaf in leaves.values())


def test_a_converted_model_merges_as_a_tree_and_converts_back(recall, toys, tmp_path):
    """Without patterns: our own layout is known."""
    for index, to in enumerate(("orbax", "npz")):
        done = recall("convert", toys.llama[index], tmp_path / to, "--to", to)
        assert (done.status, done.err) == (0, "")
    keys = {"merge_method": "linear", "parameters": {"weight": [0.2, 0.8]}, "out_dtype": "bfloat16"}
    trees = [{"model": str(tmp_path / to)} for to in ("orbax", "npz")]
    job.merge(make_recipe(keys | {"models": trees}), tmp_path / "merged")
    done = recall("convert", tmp_path / "merged", tmp_path / "back")
    assert (done.status, done.err) == (0, "")
    named = [{"model": toys.llama[index]} for index in range(2)]
    job.merge(make_recipe(keys | {"models": named}), tmp_path / "named")
    for name in ("config.json", "tokenizer.json"):
        content = (tmp_path / "back" / name).read_bytes()
        assert content == (tmp_path / "named" / name).read_bytes()
    back, direct = (
        safetensors.numpy.load_file(tmp_path / out / "model.safetensors")
        for out in ("back", "named")
    )
    assert back.keys() == direct.keys()
    for name, array in direct.items():
        assert back[name].dtype == array.dtype == BFLOAT16
        assert back[name].tobytes() == array.tobytes(), name
