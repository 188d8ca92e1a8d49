import pytest

from tests.csrc.load import module

architectures = module("architectures")


def natives(flags: list[str]) -> list[str]:
    return [flag.partition(",code=")[2] for flag in flags if ",code=sm_" in flag]


def ptx(flags: list[str]) -> list[str]:
    return [flag.partition(",code=")[2] for flag in flags if ",code=compute_" in flag]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a", ["8.0", "9.0a"]),
        (" 9.0a ;8.9;8.6;;8.9; 8.7", ["8.6", "8.7", "8.9", "9.0a"]),
        ("8.7", ["8.7"]),
        (architectures.DEFAULT, ["8.0", "9.0a"]),
    ],
)
def test_the_list_is_sorted_and_without_repetitions(text: str, expected: list[str]) -> None:
    assert architectures.parse(text) == expected


@pytest.mark.parametrize("text", ["", " ; ", "9.0", "8.0;7.5", "8.0,8.6", "sm_80", "all", "8.0;10.0"])
def test_anything_else_is_refused_with_the_names_that_are_known(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected some of 8\.0, 8\.6, 8\.7, 8\.9, 9\.0a"):
        architectures.parse(text)


def test_nine_without_its_suffix_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"9\.0a for Hopper"):
        architectures.parse("9.0")
    with pytest.raises(ValueError, match=r"7\.5 in it; [^H]*$"):
        architectures.parse("7.5")


@pytest.mark.parametrize(
    ("archs", "only", "code", "forward"),
    [
        (["8.0", "9.0a"], "", ["sm_80", "sm_90a"], ["compute_80"]),
        (["8.0", "9.0a"], "80", ["sm_80"], ["compute_80"]),
        (["8.0", "9.0a"], "90a", ["sm_90a"], []),
        (["8.6", "8.7", "8.9"], "", ["sm_86", "sm_87", "sm_89"], ["compute_86"]),
        (["8.6", "8.7", "8.9"], "80", ["sm_86", "sm_87", "sm_89"], ["compute_86"]),
        (["8.6", "8.7", "8.9"], "90a", [], []),
        # What Hopper forces and what comes after it still has to find something to run.
        (["9.0a"], "", ["sm_90a"], ["compute_80"]),
        (["9.0a"], "80", [], ["compute_80"]),
        (["9.0a"], "90a", ["sm_90a"], []),
    ],
)
def test_every_unit_gets_its_architectures(archs: list[str], only: str, code: list[str], forward: list[str]) -> None:
    flags = architectures.gencode(archs, only)
    assert natives(flags) == code
    assert ptx(flags) == forward
    assert len(flags) == len(code) + len(forward)
    for flag in flags:
        virtual, _, real = flag.removeprefix("-gencode=arch=").partition(",code=")
        assert real in (virtual, virtual.replace("compute_", "sm_"))


def test_the_matrix_kernels_of_hopper_are_not_made_for_others() -> None:
    for name in architectures.SHARED_BYTES:
        assert bool(architectures.gencode([name], "90a")) == (name == architectures.HOPPER)
        assert architectures.gencode([name], "80")  # linked from every library
