"""`python -m optimstate`: the command line of this interpreter's environment."""

from optimstate.cli.__main__ import main

if __name__ == "__main__":
    main()
