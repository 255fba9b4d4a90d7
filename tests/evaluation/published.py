"""Rows of the five data sets in every layout they are published in.

`data/` holds the original files; the hub's Parquet files are written here, with the hub's schemas.
"""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DATA = Path(__file__).parent / "data"

SST2 = [
    {"idx": 0, "sentence": 'a warm , funny film that earns its "happy ending ', "label": 1},
    {"idx": 1, "sentence": "flat , and far too long . ", "label": 0},
    {"idx": 2, "sentence": "you will not be bored ", "label": 1},
    {"idx": 3, "sentence": "the jokes do not land ", "label": 0},
]
_LIGHTHOUSE = "Arnholm's lighthouse was finished in 1871. Its lamp burnt oil."
SQUAD = [
    {
        "id": "q1",
        "title": "Lighthouses",
        "context": _LIGHTHOUSE,
        "question": "When was the lighthouse of Arnholm built?",
        "answers": {"text": ["1871", "in 1871"], "answer_start": [37, 34]},
    },
    {
        "id": "q2",
        "title": "Lighthouses",
        "context": _LIGHTHOUSE,
        "question": "When was the lighthouse of Arnholm pulled down?",
        "answers": {"text": [], "answer_start": []},
    },
    {
        "id": "q3",
        "title": "Lighthouses",
        "context": "The keeper counted the ships every night.",
        "question": "What did the keeper count?",
        "answers": {"text": ["the ships"], "answer_start": [19]},
    },
]
IWSLT = [
    {"translation": {"en": "Good morning.", "fr": "Bonjour."}},
    {
        "translation": {
            "en": "My brother & I built a boat.",
            "fr": "Mon frère & moi avons construit un bateau.",
        }
    },
    {"translation": {"en": "It floats.", "fr": "Il flotte."}},
]
_ANN = "Ann built a boat in a month.\nThen she left by water."
RACE = [
    {
        "example_id": "high7.txt",
        "article": _ANN,
        "answer": "B",
        "question": "What did Ann build?",
        "options": ["a tent", "a boat", "a house", "a chair"],
    },
    {
        "example_id": "high7.txt",
        "article": _ANN,
        "answer": "D",
        "question": "How did she leave?",
        "options": ["By train.", "On foot.", "By car.", "By water."],
    },
    {
        "example_id": "middle12.txt",
        "article": "Tom has a red kite.",
        "answer": "A",
        "question": "Tom's kite is   _  .",
        "options": ["red", "blue", "green", "white"],
    },
]
MEDMCQA = [
    {
        "id": "00000000-0000-0000-0000-000000000001",
        "question": "Which vitamin is lacking in scurvy?",
        "opa": "Vitamin A",
        "opb": "Vitamin B1",
        "opc": "Vitamin C",
        "opd": "Vitamin D",
        "cop": 2,
        "choice_type": "single",
        "exp": "Vitamin C is needed for collagen.",
        "subject_name": "Biochemistry",
        "topic_name": None,
    },
    {
        "id": "00000000-0000-0000-0000-000000000002",
        "question": "The largest bone of the body is the",
        "opa": "Femur",
        "opb": "Tibia",
        "opc": "Humerus",
        "opd": "Radius",
        "cop": 0,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": "Skeleton",
    },
]
ROWS = {
    "sst2": SST2,
    "squad_v2": SQUAD,
    "iwslt2017_en_fr": IWSLT,
    "race": RACE,
    "medmcqa": MEDMCQA,
}

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_ANSWERS = pa.struct({"text": _TEXTS, "answer_start": pa.list_(pa.int32())})
SCHEMAS = {
    "sst2": pa.schema({"idx": pa.int32(), "sentence": _TEXT, "label": pa.int64()}),
    "squad_v2": pa.schema(
        dict.fromkeys(("id", "title", "context", "question"), _TEXT) | {"answers": _ANSWERS}
    ),
    "iwslt2017_en_fr": pa.schema({"translation": pa.struct({"en": _TEXT, "fr": _TEXT})}),
    "race": pa.schema(
        dict.fromkeys(("example_id", "article", "answer", "question"), _TEXT) | {"options": _TEXTS}
    ),
    "medmcqa": pa.schema(
        dict.fromkeys(("id", "question", "opa", "opb", "opc", "opd"), _TEXT)
        | {"cop": pa.int64()}
        | dict.fromkeys(("choice_type", "exp", "subject_name", "topic_name"), _TEXT)
    ),
}
# As a clone of the hub's repository has them, or a folder with nothing but the split's files.
PARQUET = {
    "sst2": ["validation-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
    "squad_v2": ["validation-00000-of-00001.parquet", "squad_v2/validation-00000-of-00001.parquet"],
    "iwslt2017_en_fr": ["iwslt2017-en-fr/test/0000.parquet", "test.parquet", "test/0000.parquet"],
    "race": ["test-00000-of-00001.parquet", "all/test-00000-of-00001.parquet"],
    "medmcqa": ["validation-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
}


def write_parquet(path: Path, task: str, rows=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows or ROWS[task], SCHEMAS[task]), path)


@pytest.fixture
def data_root(tmp_path) -> Path:
    """A copy of the original files, to be read or damaged."""
    return Path(shutil.copytree(DATA, tmp_path / "data"))
