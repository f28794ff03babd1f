"""vLLM's CPU platform with a name for what its Ray workers reserve.

vLLM starts Ray workers only where the platform names a resource, and its CPU platform
names none. Put this folder's parent on the path of a process (see tests/engine), and
tell Ray that the machine has GPUs: they are a count, nobody looks for them. It is a
platform plugin because Ray's actors ask before general plugins are loaded.
"""


def platform() -> str:
    return "ray_cpu_platform.platform.RayCpuPlatform"
