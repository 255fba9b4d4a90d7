import pytest

from recall_jax.errors import InputError
from recall_jax.similarity.choice import MeasureChoice, parse_measures
from recall_jax.similarity.measures import ALIASES, MEASURES

READ = {
    "cka": [("linear_cka", {})],
    " rbf ( sigma = 2 ) ,cosine": [("paired_rbf", {"sigma": 2.0}), ("row_cosine", {})],
    "cka()": [("linear_cka", {})],
    "mutual_knn(normalize=false,k=5)": [("mutual_knn", {"k": 5, "normalize": False})],
    "rsa(rdm=euclidean,compare=pearson),rsa": [
        ("rsa", {"rdm": "euclidean", "compare": "pearson"}),
        ("rsa", {}),
    ],
    "rbf_cka(threshold=1),rbf_cka(threshold=0.5)": [
        ("rbf_cka", {"threshold": 1.0}),
        ("rbf_cka", {"threshold": 0.5}),
    ],
}


@pytest.mark.parametrize("text", READ)
def test_names_and_options_are_read(text):
    asked = parse_measures(text)
    assert asked == tuple(MeasureChoice(name, options) for name, options in READ[text])
    # what is written of them reads as the same again
    assert parse_measures(",".join(one.label for one in asked)) == asked
    assert len({one.slug for one in asked}) == len(asked)
    assert not {"(", ")", ",", "=", "/"} & set("".join(one.slug for one in asked))


def test_options_stand_in_the_order_of_the_signature():
    assert parse_measures("mutual_knn(normalize=false,k=5)")[0].label == (
        "mutual_knn(k=5,normalize=false)"
    )


def test_all_is_every_measure():
    assert [one.label for one in parse_measures(" all ")] == list(MEASURES)


def test_every_alias_is_read():
    for alias, name in ALIASES.items():
        assert parse_measures(alias) == (MeasureChoice(name, {}),)


REFUSED = {
    "": "cannot read.*commas",
    "cka,": "cannot read",
    "cka,,rbf": "cannot read",
    "cka(": "cannot read",
    "mutual_knn(k=5": "cannot read",
    "mutual_knn(k=(5))": "cannot read",
    "cka rbf": "cannot read",
    "k=5": "cannot read",
    "nope": "nope.*rbf.*linear_cka.*procrustes",
    "cka,all": "unknown measure 'all'",
    "cka,linear_cka": "linear_cka.*twice",
    "mutual_knn(k=5),mutual_knn(k=5)": r"mutual_knn\(k=5\).*twice",
    "cka(k=5)": "linear_cka has no option 'k': it takes none",
    "mutual_knn(j=5)": "has no option 'j': it takes k, normalize",
    "mutual_knn(k)": "no value",
    "mutual_knn(k=)": "no value",
    "mutual_knn(=5)": "has no option ''",
    "mutual_knn(k=5,k=6)": "k of mutual_knn is given twice",
    "mutual_knn(k=2.5)": "k of mutual_knn.*whole number",
    "mutual_knn(k=-1)": "mutual_knn: k.*above 0",
    "mutual_knn(normalize=1)": "true or false",
    "rbf(sigma=wide)": "sigma of paired_rbf.*write a number",
    "rbf(sigma=nan)": "paired_rbf: sigma is nan",
    "rbf(sigma=inf)": "paired_rbf: sigma is inf",
    "rsa(rdm=cosine)": "rdm of rsa.*choose from correlation, euclidean",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused(text):
    with pytest.raises(InputError, match=REFUSED[text]) as error:
        parse_measures(text)
    assert "\n" not in str(error.value)
