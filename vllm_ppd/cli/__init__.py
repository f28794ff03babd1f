"""The command `vllm-ppd`; one file per subcommand."""
