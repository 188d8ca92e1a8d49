"""The errors that quamba raises on purpose. All derive from QuambaError."""


class QuambaError(Exception):
    """Base of every error that quamba raises on purpose."""


class UnsupportedModelError(QuambaError):
    """The model, or a module inside it, is not one that quamba knows how to quantize."""


class RecipeError(QuambaError, ValueError):
    """A recipe, a spec or an override is malformed, or an override matches nothing."""


class CalibrationError(QuambaError):
    """The calibration data is malformed, holds no tokens, or produced NaN or infinite values."""


class CheckpointError(QuambaError):
    """A checkpoint is truncated, corrupt, mislabelled or of an unknown format version."""


class SizeError(QuambaError, ValueError):
    """A tensor's shape, or a size given by a number, does not fit the operation."""


class DtypeError(QuambaError, TypeError):
    """A tensor's dtype does not fit the operation."""


class KernelError(QuambaError, RuntimeError):
    """The kernels for a device are not installed, or cannot run there."""


class TaskError(QuambaError, ValueError):
    """An evaluation task, its template or its data is malformed, or cannot be had here."""


class RuntimeConfigError(QuambaError, ValueError):
    """A setting of quamba.runtime or quamba.bench is unknown or out of range."""
