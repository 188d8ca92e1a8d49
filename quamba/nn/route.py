"""Which way the data takes through a quantized mixer's ops, worked out once from the block's format."""

from dataclasses import dataclass

from quamba.nn.config import BlockConfig
from quamba.ops.blocks_step import chained
from quamba.ops.mixers_step import most_tokens
from quamba.recipe import BlockFormat


def as_a_whole(config: BlockConfig, batch: int) -> bool:
    """Whether a CUDA device is faster with so many sequences through whole such blocks than with the single ops."""
    sizes = {"d_inner": config.d_inner, "d_state": config.d_state, "dt_rank": config.dt_rank}
    return batch <= most_tokens(config.d_inner) or chained(batch, **sizes, norm_dbc=config.dbc_norm != "none")


@dataclass(frozen=True)
class Route:
    """What a quantized mixer asks of its format in every forward.

    Attributes:
        u: the granularity of u, or None.
        fused_xz: x0 and z leave in_proj as int8.
        conv: the convolution's weight is int8.
        fused_conv: in_proj and the convolution are int8 all through, which a step can take as one op.
        static_x: x leaves the convolution as int8.
        rotate_x: x is rotated for x_proj and back for the scan.
        channel_x: x's scales are in the columns of x_proj.
        token_x: x's scales are found at run time.
        static_dbc: d, B and C have static scales.
        fused_dbc: they leave x_proj as int8.
        smooth_g: g is divided by g_divisor.
        static_dt: dt leaves dt_proj as int8.
        fused_dt: dt_proj is an int8 product with one scale for d, which a step can take into the scan.
        rotate_g: g is rotated.
        static_g: g has a static scale.
        one_step: a token with a state takes one op: all weights, and all sites but perhaps dt, are static int8.
    """

    u: str | None
    fused_xz: bool
    conv: bool
    fused_conv: bool
    static_x: bool
    rotate_x: bool
    channel_x: bool
    token_x: bool
    static_dbc: bool
    fused_dbc: bool
    smooth_g: bool
    static_dt: bool
    fused_dt: bool
    rotate_g: bool
    static_g: bool
    one_step: bool

    @classmethod
    def of(cls, config: BlockConfig, format: BlockFormat) -> "Route":
        """The route of a block of that shape and format."""

        def static(*sites: str) -> bool:
            return all(format.granularity(site) in ("tensor", "channel") for site in sites)

        rotate_x = format.step("rotate_x") is not None
        dt = format.granularity("dt")
        one_step = static("u", "x0", "z", "x", "d", "B", "C", "g") and not rotate_x
        return cls(
            u=format.granularity("u"),
            fused_xz=static("x0", "z"),
            conv=format.weights["conv"] is not None,
            fused_conv=static("u", "x0", "z", "x")
            and not rotate_x
            and None not in (format.weights["in_proj"], format.weights["conv"]),
            # A rotated x is quantized after the rotation.
            static_x=static("x") and not rotate_x,
            rotate_x=rotate_x,
            channel_x=format.granularity("x") == "channel",
            token_x=format.granularity("x") == "token",
            static_dbc=static("d", "B", "C"),
            fused_dbc=static("d", "B", "C") and config.dbc_norm == "none",
            smooth_g=format.step("smooth_output") is not None,
            static_dt=static("dt"),
            fused_dt=format.granularity("d") == "tensor" and format.weights["dt_proj"] is not None,
            rotate_g=format.step("rotate_output") is not None,
            static_g=static("g"),
            one_step=one_step and dt in (None, "tensor", "channel") and None not in format.weights.values(),
        )
