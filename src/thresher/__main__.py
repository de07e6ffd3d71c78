"""`python -m thresher`, for launchers that start a module."""

from thresher.cli import main

if __name__ == "__main__":
    main()
