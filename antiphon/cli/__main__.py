"""`python -m antiphon.cli` is `antiphon`."""

from antiphon.cli.app import main

main()
