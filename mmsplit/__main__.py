"""`python -m mmsplit`."""

from mmsplit.cli import main

if __name__ == "__main__":
    main()
