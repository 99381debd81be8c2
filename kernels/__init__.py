"""Triton kernels; imported as `pico_fast.kernels`."""

if __name__ != "pico_fast.kernels":
    raise ImportError(
        f"the Triton kernels are the package pico_fast.kernels, not {__name__}: install pico_fast"
        " (pip install -e .) and import that, or every kernel would be loaded twice"
    )
