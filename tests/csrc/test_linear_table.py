import json

import pytest

from tests.csrc.load import module

linear_table = module("linear_table")
TABLE = json.loads(linear_table.TABLE.read_text())


def entries(header: str) -> list[tuple[int, int, int, str]]:
    rows = [line.strip(" {},").split(", ") for line in header.splitlines() if "LinearKernel::" in line]
    return [(int(n), int(k), int(m), kernel.removeprefix("LinearKernel::")) for n, k, m, kernel in rows]


def test_the_header_is_sorted_and_complete() -> None:
    header = linear_table.header(
        {
            "shapes": [
                {"columns": 768, "inner": 1536, "choices": [[8, "rows8"], [4096, "64x64"]]},
                {"columns": 768, "inner": 48, "choices": [[1, "dot"]]},
            ]
        }
    )
    assert entries(header) == [(768, 48, 1, "kDot"), (768, 1536, 8, "kRows8"), (768, 1536, 4096, "k64x64")]


def test_what_is_unknown_or_twice_is_refused() -> None:
    shape = {"columns": 768, "inner": 48, "choices": [[1, "fast"]]}
    with pytest.raises(ValueError, match=r"'fast'; expected one of dot, rows4"):
        linear_table.header({"shapes": [shape]})
    shape["choices"] = [[1, "dot"]]
    with pytest.raises(ValueError, match="twice"):
        linear_table.header({"shapes": [shape, shape]})


@pytest.mark.parametrize("shape", TABLE["shapes"], ids=lambda shape: f"{shape['columns']}x{shape['inner']}")
def test_the_committed_choices_can_run(shape: dict) -> None:
    rows = [most for most, _ in shape["choices"]]
    assert rows == sorted(rows)
    assert rows[-1] >= 512
    for most, kernel in shape["choices"]:
        if kernel == "dot":
            assert most == 1
        elif kernel.startswith("rows"):
            assert most <= 32
        elif kernel == "short":
            assert shape["inner"] <= 256
    # Matrix kernels fill a tile of 64 rows badly below 16.
    assert not any(kernel[0].isdigit() for most, kernel in shape["choices"] if most < 16)


def test_the_weights_of_known_models_are_in_the_table() -> None:
    shapes = {(shape["columns"], shape["inner"]) for shape in TABLE["shapes"]}
    assert {(10240, 2560), (192, 5120), (5120, 160), (2560, 5120), (50280, 2560)} <= shapes  # mamba-2.8b
    assert {(16384, 4096), (288, 8192), (8192, 256), (4096, 8192), (65024, 4096), (65536, 4096)} <= shapes
