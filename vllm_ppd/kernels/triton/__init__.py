"""Tree attention, and what `vllm_ppd.trees` does, as Triton kernels on the device.

They import ``triton`` itself: ``vllm.triton_utils`` hands out placeholders where no
GPU driver is active, and then the kernels could not run in Triton's interpreter.
"""

import triton  # noqa: F401  (without Triton this folder cannot be imported)
