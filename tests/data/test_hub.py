"""Data sets of the hub, through the real package: local ones stand for those of the network."""

import json

import pytest

from halfbyte.data.hub import open_hub
from halfbyte.data.sources import open_sources
from halfbyte.data.specs import Spec
from halfbyte.errors import DataError

datasets = pytest.importorskip("datasets", reason="the package datasets reads the hub")

# httpx, and what `datasets` leaves open when a stream is not read to its end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory for each data set `owner/name`, which the package reads as it reads the hub's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "hub"
    rows = [{"messages": [{"role": "user", "content": f"{at}"}], "day": None} for at in range(20)]
    for name, lines in (("train", rows), ("test", rows[:3])):
        (place / "name").mkdir(parents=True, exist_ok=True)
        (place / "name" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    real = datasets.load_dataset

    def load(path, *more, **options):
        if path == "owner/gated":
            raise datasets.exceptions.DatasetNotFoundError(
                "Dataset 'owner/gated' is a gated dataset on the Hub. You must be authenticated."
            )
        if path == "owner/far":
            raise ConnectionError("Couldn't reach 'owner/far' on the Hub (OfflineModeIsEnabled)")
        return real(str(place / path.split("/")[1]), *more, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return place


def values(data, **options):
    return [
        (row.line, row.value["messages"][0]["content"])
        for row in open_sources(data, **options).rows()
    ]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("owner/name", range(20)),
        ("owner/name:train", range(20)),
        ("owner/name:test", range(3)),
        ("owner/name[:5]", range(5)),
        ("owner/name:train[10%:20%]", range(2, 4)),
        ("owner/name[-3:]", range(17, 20)),
        ("owner/name#4", range(4)),
    ],
)
def test_rows_have_their_numbers_in_the_whole_split(hub, text, rows):
    assert values(text) == [(str(at + 1), str(at)) for at in rows]


def test_a_data_set_is_converted_once(hub, tmp_path):
    (first,) = open_sources("owner/name").files
    (second,) = open_sources("owner/name").files
    assert first == second
    assert tmp_path / "cache" in first.path.parents


def test_no_more_rows_are_converted_than_are_used(hub):
    (file,) = open_sources("owner/name[5:9]", max_samples=2).files
    assert [row.line for row in file.rows()] == ["6", "7"]
    assert len(file.path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("text", ["owner/name", "owner/name[4:7]"])
def test_a_stream_gives_the_same_rows(hub, text):
    streamed = list(open_sources(text, streaming=True).stream())
    assert streamed == list(open_sources(text).rows())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("owner/name:dev", "Unknown split.*Write owner/name:split, or owner/name:config:split"),
        ("owner/name:other:train", "could not be read from the hub: .*owner/name:config:split"),
        ("owner/gated", "is a gated dataset.*accept its conditions and log in: hf auth login"),
        ("owner/far", "Couldn't reach .* Without a network, only what has been downloaded before"),
        ("owner/none", "The data set owner/none could not be read from the hub: "),
        ("owner/name[30:]", r"has no rows in \[30:\]"),
    ],
)
def test_what_goes_wrong_is_one_message(hub, text, message):
    with pytest.raises(DataError, match=message) as caught:
        list(open_sources(text).rows())
    assert "\n" not in str(caught.value)


def test_rows_counted_from_the_end_need_an_end(hub):
    with pytest.raises(DataError, match="which a stream does not have"):
        open_sources("owner/name[-5:]", streaming=True)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_hub(Spec.parse("someone/orders"))
