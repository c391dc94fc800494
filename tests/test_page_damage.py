"""One damaged page of the database costs what lay on it and nothing else: `make pages` in short."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import page_damage
import pytest
from page_map import FREE, addresses_on, read_map

SCRIPT = Path(page_damage.__file__)
KINDS = 30
"""At least as many as there are kinds of pages: each comes up once among as many odd seeds."""


def test_a_damaged_page_costs_what_lay_on_it():
    """Whatever kind of page it is: the other entries, the sums and the files beside it stay."""
    path = os.pathsep.join(map(str, (SCRIPT.parents[2], SCRIPT.parents[1], SCRIPT.parent)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(KINDS), "1", "2"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KINDS} pages damaged, 0 rounds failed, 0 wrong vectors" in done.stdout


@pytest.fixture
async def goods(tmp_path):
    """Give a store in both of its states."""
    return await page_damage.prepare(tmp_path, page_damage.SIZES[0], page_damage.CLIENTS[0])


async def test_the_map_of_the_pages_is_complete(goods):
    """Every page has a kind, and every record lies on a page of rows and on one of the index."""
    _, merged = goods
    path = merged.directory / "v1" / "cache.db"
    data, size = path.read_bytes(), merged.pages.page_bytes
    with closing(sqlite3.connect(path)) as connection:
        stored = {key for (key,) in connection.execute("SELECT key FROM Cache")}
        ((free,),) = connection.execute("PRAGMA freelist_count")
        ((pages,),) = connection.execute("PRAGMA page_count")
    seen = {"Cache ": set(), "Cache_key_raw ": set()}
    for number, kind in read_map(path).kinds.items():
        page = data[(number - 1) * size : number * size]
        for name in seen:
            if kind.startswith(name):
                seen[name] |= addresses_on(page, number)
    assert seen == {"Cache ": stored, "Cache_key_raw ": stored}
    assert len(merged.pages.kinds) == pages
    assert len(merged.pages.numbers(FREE)) == free > 10
    assert len(set(merged.pages.kinds.values())) <= KINDS
