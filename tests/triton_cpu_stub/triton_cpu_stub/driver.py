import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class StubDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("this backend only serves Triton's interpreter")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed in the interpreter")

    def get_current_device(self):
        return 0
