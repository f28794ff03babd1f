from triton.backends.compiler import BaseBackend


class StubBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "stub"

    def parse_options(self, options):
        raise NotImplementedError("this backend only serves Triton's interpreter")

    def add_stages(self, stages, options):
        raise NotImplementedError("this backend only serves Triton's interpreter")

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
