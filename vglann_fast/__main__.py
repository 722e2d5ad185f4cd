"""`python -m vglann_fast` is `vglann`."""

import sys


def program() -> int:
    """Run `vglann` as a program of its own; returns the exit status, also after Ctrl-C while it still loads."""
    try:
        from vglann_fast.cli.main import main
        from vglann_fast.runtime.processors import be_a_good_guest

        be_a_good_guest()
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(program())
