"""The command line for scripts that know a Python, not where its programs are: `python -m launch train ...`."""

from launch.cli import main

if __name__ == "__main__":
    main()
