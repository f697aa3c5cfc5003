"""Run the command line, so that `python -m featcli` does the same as `featcli`."""

from featcli.cli.boundary import main

main()
