"""One file a subcommand, each with `main(argv) -> exit code`."""
