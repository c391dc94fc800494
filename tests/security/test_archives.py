"""`cache import` refuses an archive that no export can have made, with one line."""

import io
import math
import struct
import sys
from types import SimpleNamespace

import orjson
import pytest
from embedding_proxy.cache.key import Partition, Row, checksum
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.record import Entry, encode

HERE = Partition("", "openai/text-embedding-3-small", 2)
GOOD = (0.6, 0.8)
NOW = 1.7e9


def _row(number, vector=GOOD, stored=NOW, partition=HERE):
    entry = Entry(struct.pack(f"<{len(vector)}f", *vector), 1, True, number.to_bytes(16, "big"))  # noqa: FBT003
    return Row(number.to_bytes(16, "little"), encode(entry), stored, partition)


def _archive(*rows):
    file = io.BytesIO()
    archive.write(file, iter([_row(1), *rows, _row(9)]))
    return file.getvalue()


def _with_partition(dimensions):
    """Return an archive whose partition names a width that `Partition` never has."""
    text = orjson.dumps({"namespace": "", "space": "s", "dimensions": dimensions})
    body = b"EMBA\x02" + struct.pack("<I", len(text)) + text
    return _archive() + body + checksum(body)


BAD = {
    "NaN": (_archive(_row(2, (math.nan, 1.0))), "Entry 2 of the archive", "not finite"),
    "infinity": (_archive(_row(2, (1.0, math.inf))), "Entry 2 of the archive", "not finite"),
    "no numbers": (_archive(_row(2, ())), "Entry 2 of the archive", "holds no number"),
    "stored NaN": (_archive(_row(2, stored=math.nan)), "Entry 2 of the archive", "is not finite"),
    "stored never": (_archive(_row(2, stored=math.inf)), "Entry 2 of the archive", "is not finite"),
    "stored before all": (
        _archive(_row(2, stored=-math.inf)),
        "Entry 2 of the archive",
        "is not finite",
    ),
    "width 0": (_with_partition(0), "vectors of 0 dimensions", ""),
    "width -5": (_with_partition(-5), "vectors of -5 dimensions", ""),
}


@pytest.fixture
def config(tmp_path):
    """Give a configuration with a cache directory of its own."""
    file = tmp_path / "config.yaml"
    file.write_text(f"cache: {{directory: {tmp_path / 'cache'}}}\n")
    return file


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--json",)])
def test_an_archive_that_was_made_to_do_harm_is_refused(options, what, command, config, tmp_path):
    """It is one line that names the file and the entry, and nothing is taken in."""
    content, where, why = BAD[what]
    file = tmp_path / "bad.emba"
    file.write_bytes(content)
    done = command("cache", "import", file, "--config", config, *options)
    assert done.code == 1
    assert done.err.startswith(f"embedding-proxy: {file}: ")
    assert done.err.count("\n") == 1
    assert where in done.err
    assert why in done.err
    assert not done.out
    assert not (tmp_path / "cache").exists()


def test_such_an_archive_is_refused_from_a_pipe_too(command, config, monkeypatch):
    """What cannot be read twice is refused where it goes wrong."""

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(BAD["NaN"][0])))
    done = command("cache", "import", "-", "--config", config)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "Entry 2 of the archive cannot be used" in done.err


def test_a_good_archive_is_taken_in(command, config, tmp_path):
    """The check lets what was exported through."""
    file = tmp_path / "good.emba"
    file.write_bytes(_archive(_row(2), _row(3, (1.0,), partition=None)))
    done = command("cache", "import", file, "--config", config)
    assert (done.code, done.out.split()[0]) == (0, "4")
