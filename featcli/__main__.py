"""`python -m featcli` is `featcli`."""

from featcli.cli import main

main()
