import re

import pytest

from tests.csrc.load import module

resources = module("resources")
Kernel, Family = resources.Kernel, resources.Family

USAGE = """
Fatbin ptx code:
================
arch = sm_80
compressed

Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0 CONSTANT[3]:12
 Function _Z4scanILi4EEvv:
  REG:168 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:696 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4scanILi8EEvv:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:696 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6matrixv:
  REG:90 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:696
"""
FOUND = resources.kernels(USAGE)


def test_the_kernels_of_each_architecture_are_read() -> None:
    assert [
        Kernel("sm_80", "_Z4scanILi4EEvv", 168, 48),
        Kernel("sm_90a", "_Z4scanILi8EEvv", 32, 0),
        Kernel("sm_90a", "_Z6matrixv", 90, 16),
    ] == FOUND


MATRIX = Family("matrix", local=16, only="sm_90a")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([Family("scan", local=48), MATRIX], []),
        # The first that matches counts, here and only for the architecture it is for.
        ([Family("scanILi4", local=48, only="sm_8."), Family("scanILi8", only="sm_90a"), MATRIX], []),
        ([Family("scan", local=47), MATRIX], [r"sm_80 _Z4scanILi4EEvv: 48 bytes.*168 registers.*'scan' allows 47"]),
        ([Family("scan", local=48), Family("matrix")], [r"matrixv: 16 bytes", r"sm_80: no kernel.*'matrix'"]),
        ([Family("scan", local=48)], [r"sm_90a _Z6matrixv: not in resources.json"]),
        ([Family("scan", local=48), MATRIX, Family("conv", only="sm_8.")], [r"sm_80: no kernel.*'conv'"]),
        ([Family("scan", local=48, only="sm_8."), MATRIX], [r"sm_90a _Z4scanILi8EEvv: not in"]),
    ],
)
def test_what_is_over_its_bound_or_missing_is_listed(table, expected) -> None:
    lines = resources.problems(FOUND, table)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line)


def test_an_empty_library_is_a_problem() -> None:
    assert resources.problems([], []) == ["the library has no kernels"]


def test_the_table_is_read_and_says_why_where_it_allows_anything() -> None:
    table = resources.families(resources.TABLE.read_text())
    assert len({(family.name, family.only) for family in table}) == len(table)
    assert all((family.local > 0) == bool(family.why) for family in table)
    assert all(family.only == "" or family.belongs("sm_90a") or family.belongs("sm_89") for family in table)
    with pytest.raises(TypeError):
        resources.families('[{"name": "scan", "bytes": 8}]')


def test_symbols_of_torch_beyond_its_c_interface_are_found() -> None:
    symbols = """
                 w __gmon_start__
                 U malloc@GLIBC_2.2.5
                 U _ZNSo5flushEv@GLIBCXX_3.4
                 U _ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev
                 U aoti_torch_get_numel
                 U torch_call_dispatcher
                 U _ZN3c106detail14torchCheckFailEPKcS2_jS2_
                 U _ZNK2at10TensorBase5printEv
                 U cudaMalloc
    """
    assert resources.foreign(symbols) == [
        "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
        "_ZNK2at10TensorBase5printEv",
        "cudaMalloc",
    ]
