"""`python -m featcli` is `featcli`."""

from featcli.cli.boundary import main

main()
