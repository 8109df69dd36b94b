"""Native kernels: is the extension there, and how many threads and which instructions it uses."""

try:
    from quire.kernels.native import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _reason = f"the native extension cannot be loaded ({error}); reinstall with a C++17 compiler"
else:
    _reason = ""


def available() -> bool:
    """True if the extension was built and loads."""
    return _native is not None


def why_not() -> str:
    """Why the extension is not available; empty if it is."""
    return _reason
