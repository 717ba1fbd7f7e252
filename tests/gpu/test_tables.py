"""Attention on a GPU over tables of shapes, with `--whole-tables` over the whole ones."""

import pytest

from tests.gpu import tables

TABLES = {
    "decode": (tables.some_decode, tables.whole_decode),
    "prefill": (tables.some_prefill, tables.whole_prefill),
}


def pytest_generate_tests(metafunc):
    for name in TABLES.keys() & set(metafunc.fixturenames):
        cases = list(TABLES[name][metafunc.config.getoption("whole_tables")]())
        metafunc.parametrize(name, cases, ids=[case.name for case in cases])


def judge(case, record_property):
    error = tables.error(case)
    for name in ("op", "tokens", "group"):
        record_property(name, getattr(case, name))
    record_property("error", error)
    assert error < tables.MAX_ERROR


@pytest.mark.gpu("decode_attention")
def test_decode(decode, record_property):
    judge(decode, record_property)


@pytest.mark.gpu("prefill_attention")
def test_prefill(prefill, record_property):
    judge(prefill, record_property)
