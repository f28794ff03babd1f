"""`python -m vllm_ppd` is the command `vllm-ppd`."""

from vllm_ppd.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
