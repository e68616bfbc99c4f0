"""`python -m olmoscope`: the same as `olmoscope`, for an interpreter whose scripts are not on the path."""

from olmoscope.cli.app import main

if __name__ == "__main__":
    main()
