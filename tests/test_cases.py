"""What the other tests rely on: tables of pairs, and memory that shows who reads it before it is written."""

from itertools import combinations, product

import pytest
import torch
from cases import each_pair, pairwise
from processes import ranks

TABLES = {"one column": ["abc"], "two columns": ["abc", "xy"], "many": ["abcde", "uvwxyz", "01", "+-", "?"]}


@pytest.mark.parametrize("columns", TABLES.values(), ids=TABLES.keys())
def test_every_pair_is_in_a_table_of_pairs(columns):
    possible = list(product(*columns))
    rows = pairwise(possible)
    assert set(rows) <= set(possible)
    sizes = sorted(map(len, columns))
    # No table of pairs is shorter than its two longest columns multiplied; a greedy one is not much longer.
    assert len(rows) <= 1.5 * sizes[-1] * (sizes[-2] if len(sizes) > 1 else 1)
    for i, j in combinations(range(len(columns)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(columns[i], columns[j]))
    assert {row[0] for row in rows} == set(columns[0])


def test_what_does_not_exist_is_not_in_a_table_and_what_is_asked_for_is():
    a, b, c = ({value: value for value in values} for values in ("123", "123", "123"))
    rows = each_pair(also=[("3", "3", "3")], unless=lambda a, b, c: a == "1" and b != "1", a=a, b=b, c=c).args[1]
    found = [row.values for row in rows]
    assert ("3", "3", "3") in found
    assert {row[1] for row in found if row[0] == "1"} == {"1"}
    assert {(row[0], row[1]) for row in found} == {("1", "1"), *product("23", "123")}
    assert [row.id for row in rows] == ["-".join(row) for row in found]


def unwritten(rank: int = 0) -> list[torch.Tensor]:
    x = torch.zeros(3)
    return [
        torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (2,)), torch.empty(3).half(),
        torch.empty(3, dtype=torch.int64),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="see conftest.py")
@pytest.mark.parametrize("where", ["here", "in ranks"])
def test_unwritten_memory_is_poisoned(where):
    for tensors in [unwritten()] if where == "here" else ranks(2)(unwritten):
        *floats, integers = tensors
        assert all(t.isnan().all() for t in floats)
        assert integers.eq(torch.iinfo(torch.int64).max).all()
