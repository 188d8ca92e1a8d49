"""For which devices the CUDA library is compiled: QUAMBA_CUDA_ARCHS as nvcc's flags. Imported by setup.py."""

DEFAULT = "8.0;9.0a"

# A multiprocessor's largest block of shared memory, in bytes, by compute capability: what a kernel may ask for.
SHARED_BYTES = {"8.0": 163 << 10, "8.6": 99 << 10, "8.7": 163 << 10, "8.9": 99 << 10, "9.0a": 227 << 10}
HOPPER = "9.0a"


def parse(text: str) -> list[str]:
    """The compute capabilities in a list separated by semicolons, ascending, each once.

    Raises:
        ValueError: for an empty list, and for what no kernel is written for.
    """
    found = [name.strip() for name in text.split(";") if name.strip()]
    unknown = [name for name in found if name not in SHARED_BYTES]
    if unknown or not found:
        hint = f"; {HOPPER} for Hopper, whose matrix instructions 9.0 lacks" if "9.0" in unknown else ""
        raise ValueError(
            f"QUAMBA_CUDA_ARCHS is {text!r}, with {', '.join(unknown) or 'nothing'} in it; "
            f"expected some of {', '.join(SHARED_BYTES)}, separated by semicolons{hint} "
            "(newer devices are served without being named)"
        )
    return sorted(set(found))


def gencode(archs: list[str], only: str) -> list[str]:
    """nvcc's flags for one translation unit; none where it is not needed.

    Args:
        archs: as `parse` returns them.
        only: "90a" for what Hopper alone runs, "80" for what Hopper does not need, "" for all the rest.
    """
    older = [arch for arch in archs if arch != HOPPER]
    native = {"": archs, "80": older, "90a": [arch for arch in archs if arch == HOPPER]}[only]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (arch.replace(".", "") for arch in native)]
    # PTX of the oldest architecture serves every newer one, and Hopper where the older matrix kernel is forced.
    if only != "90a":
        oldest = (older or ["8.0"])[0].replace(".", "")
        flags.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    return flags
